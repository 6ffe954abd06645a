"""Sizes that a model computes although no input changes them: they are stored, and no others."""

import pickle
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnxlr.prepare.prepared as preparing
from onnxlr.model.load import load
from onnxlr.model.protobuf import to_proto
from onnxlr.prepare.fold_sizes import find_sizes, store_sizes
from onnxlr.prepare.prepared import prepare
from onnxlr.widths.narrowing import widths_of
from tests.support.builders import Array, low_rank, make_model, node, relative, run

RNG = np.random.default_rng(0)
OPEN = ("n", 6, "t")  # the input of these models: two axes of open size about one of six


def ints(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


WEIGHTS: dict[str, Array] = {
    **{f"i{k}": np.array(k, np.int64) for k in (-2, 0, 1, 2, 3, 5)},
    **{f"l{k}": ints(k) for k in (-1, 0, 1, 2, 3, 5)},
    "middle": ints(1, -2),
    "half": np.array(0.5, np.float32),
    "pair": ints(2, 3),
}
# A chain of nodes from x to bounds of a slice or the like, and then to y.
CHUNK = [
    node("Shape", ["x"], "s"),
    node("Gather", ["s", "i1"], "channels", axis=0),
    node("Add", ["channels", "i1"], "more"),
    node("Div", ["more", "i2"], "each"),
    node("Mul", ["each", "i2"], "whole"),
    node("Unsqueeze", ["each", "l0"], "from"),
    node("Unsqueeze", ["whole", "l0"], "to"),
    node("Slice", ["x", "from", "to", "l1"], "y"),
]
THROUGH_FLOATS = [
    node("Shape", ["x"], "s"),
    node("Gather", ["s", "i-2"], "channels", axis=0),
    node("Cast", ["channels"], "real", to=onnx.TensorProto.FLOAT),
    node("Mul", ["real", "half"], "product"),
    node("Floor", ["product"], "floor"),
    node("Cast", ["floor"], "each", to=onnx.TensorProto.INT64),
    node("Unsqueeze", ["each", "l0"], "to"),
    node("Slice", ["x", "l0", "to", "l1"], "y"),
]
SLICED = [
    node("Shape", ["x"], "s"),
    node("Slice", ["s", "l1", "l2", "l0", "l1"], "to"),
    node("Sub", ["to", "l1"], "less"),
    node("Slice", ["x", "l0", "less", "l1"], "y"),
]
WITH_ENDS = [
    node("Shape", ["x"], "to", start=1, end=2),
    node("Slice", ["x", "l1", "to", "l1"], "y"),
]
TWICE = [
    node("Shape", ["x"], "s"),
    node("Gather", ["s", "middle"], "both", axis=0),
    node("ReduceSum", ["both"], "sum", keepdims=1),
    node("Sub", ["sum", "l5"], "from"),
    node("Slice", ["x", "from", "l5", "l1"], "y"),
]
PADDED = [  # as torch traces F.pad(x, (2, 3))
    node("ConstantOfShape", ["l2"], "zeros", value=onnx.numpy_helper.from_array(ints(0))),
    node("Concat", ["pair", "zeros", "zeros"], "list", axis=0),
    node("Reshape", ["list", "reversed"], "pairs"),
    node("Slice", ["pairs", "l-1", "least", "l0", "l-1"], "turned"),
    node("Transpose", ["turned"], "columns", perm=[1, 0]),
    node("Reshape", ["columns", "l-1"], "flat"),
    node("Cast", ["flat"], "pads", to=onnx.TensorProto.INT64),
    node("Pad", ["x", "pads"], "y"),
]
EXPANDED = [
    node("ConstantOfShape", ["l3"], "ones", value=onnx.numpy_helper.from_array(ints(1))),
    node("Mul", ["ones", "l-1"], "minus"),
    node("Equal", ["wanted", "minus"], "same"),
    node("Where", ["same", "ones", "wanted"], "target"),
    node("Expand", ["x", "target"], "y"),
]
MORE = {
    "reversed": ints(-1, 2),
    "least": ints(np.iinfo(np.int64).min),
    "wanted": ints(1, -1, 1),
}


def model_of(nodes: list[Any], shape: Any = OPEN, **settings: Any) -> onnx.ModelProto:
    read = {name for n in nodes for name in n.input}
    weights = {name: w for name, w in (WEIGHTS | MORE).items() if name in read}
    return make_model(nodes, {"x": shape}, ["y"], weights, **settings)


def stored(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model with its sizes stored, which gives the same for inputs of every size."""
    graph = load(model).model
    before = to_proto(graph).SerializeToString(deterministic=True)
    sizes = find_sizes(graph)
    assert to_proto(graph).SerializeToString(deterministic=True) == before
    store_sizes(graph, sizes)
    result = to_proto(graph)
    onnx.checker.check_model(result)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    for size in (1, 3, 4):
        x = RNG.standard_normal([d or size for d in shape]).astype(np.float32)
        for a, b in zip(run(model, {"x": x}), run(result, {"x": x}), strict=True):
            np.testing.assert_array_equal(a, b)
    return result


def operators(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


@pytest.mark.parametrize(
    "nodes", [CHUNK, THROUGH_FLOATS, SLICED, WITH_ENDS, TWICE, PADDED, EXPANDED]
)
def test_what_no_input_changes_is_stored(nodes: list[Any]) -> None:
    assert operators(stored(model_of(nodes))) == [nodes[-1].op_type]


def test_what_an_input_decides_is_still_computed() -> None:
    nodes = [
        node("Shape", ["x"], "s"),
        node("Gather", ["s", "i2"], "length", axis=0),
        node("Div", ["length", "i2"], "each"),
        node("Unsqueeze", ["each", "l0"], "to"),
        node("Slice", ["x", "l0", "to", "l2"], "y"),
    ]
    assert operators(stored(model_of(nodes))) == [n.op_type for n in nodes]


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Mul", ["l1", "l3"], "to"), node("Slice", ["x", "l0", "to", "l1"], "y")],
        [
            node("Shape", ["x"], "s"),
            node("Gather", ["s", "l3"], "to", axis=0),
            node("Slice", ["x", "l0", "to", "l1"], "y"),
        ],
    ],
)
def test_what_callers_may_feed_is_still_computed_with(nodes: list[Any]) -> None:
    model = model_of(nodes, ("n", 6, 2, 5))
    fed = onnx.helper.make_tensor_value_info("l3", onnx.TensorProto.INT64, [1])
    model.graph.input.append(fed)
    assert operators(stored(model)) == [n.op_type for n in nodes]


def test_an_output_of_the_model_stays_while_others_read_what_is_stored() -> None:
    nodes = [*SLICED[:2], node("Mul", ["to", "l2"], "y"), node("Sub", ["y", "l1"], "less")]
    model = model_of([*nodes, node("Slice", ["x", "l0", "less", "l1"], "z")])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT64, [1])
    model.graph.output[0].CopyFrom(output)
    real = onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["n", "c", "t"])
    model.graph.output.append(real)
    result = stored(model)
    assert operators(result) == ["Mul", "Slice"]
    assert [o.name for o in result.graph.output] == ["y", "z"]


@pytest.mark.parametrize("place", ["value_info", "output"])
def test_shapes_that_a_file_only_tells_are_not_believed(place: str) -> None:
    """An axis of open size, of which the file says that it has three elements."""
    nodes = [node("Relu", ["x"], "r"), *WITH_ENDS]
    nodes[1] = node("Shape", ["r"], "to", start=1, end=2)
    model = model_of(nodes, ("n", "c", "t"))
    told = onnx.helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, ["n", 3, "t"])
    getattr(model.graph, place).append(told)
    assert operators(stored(model)) == ["Relu", "Shape", "Slice"]


@given(data=st.data())
def test_sizes_are_those_of_a_run(data: st.DataObject) -> None:
    """Beside NumPy: what is taken of a shape is stored if all of it is of fixed axes."""
    shape = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5), label="0 is open")
    rank = len(shape)
    kind = data.draw(st.sampled_from(["one", "some", "slice", "ends"]))
    weights: dict[str, Array]
    if kind in ("one", "some"):
        picked = data.draw(st.lists(st.integers(-rank, rank - 1), min_size=1, max_size=3))
        picks = np.array(picked if kind == "some" else picked[0], np.int64)
        weights = {"index": picks}
        taken = [node("Shape", ["x"], "s"), node("Gather", ["s", "index"], "y", axis=0)]
        wanted = np.asarray(np.array(shape)[picks])
    else:
        start, end = (data.draw(st.integers(-rank - 1, rank + 1)) for _ in range(2))
        weights = {"start": ints(start), "end": ints(end)} if kind == "slice" else {}
        wanted = np.array(shape)[start:end]
        taken = [node("Shape", ["x"], "y", start=start, end=end)]
        if kind == "slice":
            taken = [node("Shape", ["x"], "s"), node("Slice", ["s", "start", "end"], "y")]
    model = make_model(
        [*taken, node("Identity", ["y"], "z")],
        {"x": [d or f"open{i}" for i, d in enumerate(shape)]},
        ["z"],
        weights,
    )
    output = onnx.helper.make_tensor_value_info("z", onnx.TensorProto.INT64, None)
    model.graph.output[0].CopyFrom(output)
    found = find_sizes(load(model).model)
    if np.all(wanted != 0):
        np.testing.assert_array_equal(found["y"], wanted)
        x = np.zeros([d or 7 for d in shape], np.float32)
        np.testing.assert_array_equal(found["y"], run(model, {"x": x})[0])
        assert found["y"].shape == wanted.shape
    else:
        assert "y" not in found


def packed(rank: int) -> onnx.ModelProto:
    """Two parts of one weight, bounded by thirds of the size of an axis, as torch traces them."""
    nodes = [
        node("Shape", ["w"], "s"),
        node("Gather", ["s", "i1"], "columns", axis=0),
        node("Div", ["columns", "i3"], "third"),
        node("Unsqueeze", ["third", "l0"], "bound"),
        node("Slice", ["w", "l0", "bound", "l1"], "first"),
        node("Slice", ["w", "bound", "most", "l1"], "second"),
        node("MatMul", ["x", "first"], "a", "query"),
        node("MatMul", ["x", "second"], "b", "rest"),
        node("Concat", ["a", "b"], "y", axis=-1),
    ]
    weights = {k: WEIGHTS[k] for k in ("i1", "i3", "l0", "l1")}
    weights |= {"w": low_rank(RNG, 24, 36, rank), "most": ints(np.iinfo(np.int64).max)}
    return make_model(nodes, {"x": ["n", 24]}, ["y"], weights)


def test_parts_of_a_weight_within_computed_bounds_are_layers() -> None:
    prepared = prepare(load(packed(3)), feed={"x": np.ones((2, 24), np.float32)})
    assert {layer.name: layer.shape for layer in prepared.layers} == {
        "query": (24, 12),
        "rest": (24, 24),
    }


def test_channels_in_halves_of_a_computed_size_are_a_width() -> None:
    """A gated unit: halves of what a layer writes, one of which lets the other through."""
    halves = [
        node("Shape", ["h"], "s"),
        node("Gather", ["s", "i1"], "channels", axis=0),
        node("Div", ["channels", "i2"], "each"),
        node("Unsqueeze", ["each", "l0"], "bound"),
        node("Unsqueeze", ["channels", "l0"], "end"),
        node("Slice", ["h", "l0", "bound", "l1"], "left"),
        node("Slice", ["h", "bound", "end", "l1"], "right"),
    ]
    nodes = [
        node("Conv", ["x", "v"], "h", "write"),
        *halves,
        node("Sigmoid", ["right"], "gate"),
        node("Mul", ["left", "gate"], "gated"),
        node("Conv", ["gated", "w"], "y", "read"),
    ]
    weights = {k: WEIGHTS[k] for k in ("i1", "i2", "l0", "l1")}
    weights["v"] = RNG.standard_normal((16, 4, 1)).astype(np.float32)
    weights["w"] = RNG.standard_normal((5, 8, 1)).astype(np.float32)
    model = make_model(nodes, {"x": ["n", 4, "t"]}, ["y"], weights)
    widths = widths_of(prepare(load(model), feed={"x": np.ones((1, 4, 9), np.float32)}))
    assert [(width.writers, width.readers) for width in widths.usable] == [(("write",), ("read",))]


def test_another_process_stores_the_same_without_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(load(packed(3)), feed={"x": np.ones((2, 24), np.float32)})
    sent = pickle.dumps(prepared)
    monkeypatch.setattr(preparing, "find_sizes", None)
    arrived = pickle.loads(sent)
    a, b = (to_proto(p.model).SerializeToString(deterministic=True) for p in (prepared, arrived))
    assert a == b


def test_the_model_that_is_written_gives_what_it_gave(tmp_path: Any) -> None:
    import onnxlr

    model, out = packed(3), tmp_path / "out.onnx"
    result = onnxlr.optimize(model, out, rank="exact", method="svd", measure=False)
    assert {d.name: d.rank for d in result.plan.replaced} == {"query": (3,), "rest": (3,)}
    x = RNG.standard_normal((5, 24)).astype(np.float32)
    (a,), (b,) = run(model, {"x": x}), run(onnx.load(out), {"x": x})
    assert relative(a, b) < 1e-5
