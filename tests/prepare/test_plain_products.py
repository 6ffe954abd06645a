"""Einsum and fused operators as plain products: the same outputs, and layers like others."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import onnxlr
from onnxlr.layers.macs import count_macs
from onnxlr.model.load import load
from onnxlr.model.protobuf import to_proto
from onnxlr.prepare.plain_products import write_plain_products
from onnxlr.prepare.prepared import simplified_model
from tests.support.builders import Array, layers_of, low_rank, make_model, node, relative, run

RNG = np.random.default_rng(0)
MICROSOFT = "com.microsoft"


def rand(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def plain(model: onnx.ModelProto, feed: dict[str, Array]) -> tuple[list[str], int]:
    """The operators after it, with the same outputs, and how many products were written."""
    graph = load(model).model
    count = write_plain_products(graph)
    result = to_proto(simplified_model(load(to_proto(graph)))[0])
    for before, after in zip(run(model, feed), run(result, feed), strict=True):
        assert relative(before, after) < 1e-6
    assert all(v.uses() or v.is_graph_output() for n in graph.graph for v in n.outputs)
    return [n.op_type for n in result.graph.node], count


def einsum(
    equation: str, x: tuple[int, ...], w: tuple[int, ...], *, first: bool = False
) -> onnx.ModelProto:
    order = ["w", "x"] if first else ["x", "w"]
    nodes = [node("Einsum", order, "y", "sum", equation=equation)]
    model = make_model(nodes, {"x": x}, ["y"], {"w": rand(*w)})
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


@pytest.mark.parametrize(
    ("equation", "x", "w", "operators"),
    [
        ("bsd,df->bsf", (2, 3, 8), (8, 5), ["MatMul"]),
        ("ab , bc -> ac", (3, 8), (8, 5), ["MatMul"]),
        ("bsd,fd->bsf", (2, 3, 8), (5, 8), ["Transpose", "MatMul"]),
        ("...d,df->...f", (2, 3, 8), (8, 5), ["MatMul"]),
        ("abc,cde->abde", (2, 3, 8), (8, 4, 2), ["MatMul", "Reshape"]),
        ("abc,edc->abde", (2, 3, 8), (2, 4, 8), ["MatMul", "Reshape"]),
        ("abcd,cde->abe", (2, 3, 4, 2), (4, 2, 8), ["Reshape", "MatMul"]),
        ("abcd,dec->abe", (2, 3, 4, 2), (2, 8, 4), ["Reshape", "MatMul"]),
        ("abcd,cdef->abef", (2, 3, 4, 2), (4, 2, 3, 5), ["Reshape", "MatMul", "Reshape"]),
        ("bsd,df->bfs", (2, 3, 8), (8, 5), ["MatMul", "Transpose"]),
        ("dbs,fd->fbs", (8, 2, 3), (5, 8), ["Transpose", "Transpose", "MatMul", "Transpose"]),
        ("hbd,hde->hbe", (4, 2, 8), (4, 8, 5), ["MatMul"]),
        ("bhd,hde->bhe", (2, 4, 8), (4, 8, 5), ["Transpose", "MatMul", "Transpose"]),
        (
            "bhcd,cehdf->fbhe",
            (2, 4, 2, 3),
            (2, 5, 4, 3, 6),
            ["Transpose", "Reshape", "MatMul", "Reshape", "Transpose"],
        ),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_einsums_that_are_products(
    equation: str, x: tuple[int, ...], w: tuple[int, ...], operators: list[str], first: bool
) -> None:
    if first:
        left, right = equation.split("->")
        equation = "->".join([",".join(reversed(left.split(","))), right])
    model = einsum(equation, x, w, first=first)
    assert plain(model, {"x": rand(*x)}) == (operators, 1)
    (row,) = onnxlr.inspect(model)
    assert (row.layer.name, row.layer.op) == ("sum", "MatMul")
    assert [fit.method for fit in row.fits] == ["svd"]


@pytest.mark.parametrize(
    ("equation", "x", "w"),
    [
        ("bshd,hde->bshe", (2, 3, 4, 8), (4, 8, 5)),
        ("gbhd,ghde->gbhe", (2, 3, 4, 8), (2, 4, 8, 5)),
        ("d,df->f", (8,), (8, 5)),
        ("bsd,df->sf", (2, 3, 8), (8, 5)),
        ("bs,df->bsdf", (2, 3), (8, 5)),
        ("...d,def->...ef", (2, 3, 8), (8, 5, 2)),
        ("bd,dd->bd", (2, 8), (8, 8)),
    ],
)
def test_other_einsums_stay(equation: str, x: tuple[int, ...], w: tuple[int, ...]) -> None:
    assert plain(einsum(equation, x, w), {"x": rand(*x)}) == (["Einsum"], 0)


@pytest.mark.parametrize(
    ("equation", "x", "z", "macs"),
    [
        ("ab,bc->ac", (3, 4), (4, 5), 60),
        ("bd,bkdh->bkh", (3, 4), (3, 2, 4, 5), 120),  # each sample by experts of its own
        ("...ab,...bc->...ac", (2, 3, 4), (2, 4, 5), 120),
        ("ab,bc", (3, 4), (4, 5), 60),
    ],
)
def test_work_of_einsums_of_data_counts(
    equation: str, x: tuple[int, ...], z: tuple[int, ...], macs: int
) -> None:
    model = make_model(
        [node("Einsum", ["x", "z"], "y", equation=equation)], {"x": x, "z": z}, ["y"], {}
    )
    source, shapes, _ = layers_of(model)
    assert count_macs(source, shapes) == macs


def test_einsums_of_data_alone_stay() -> None:
    model = make_model(
        [node("Einsum", ["x", "z"], "y", equation="ab,bc->ac")],
        {"x": (3, 4), "z": (4, 5)},
        ["y"],
        {},
    )
    assert write_plain_products(load(model).model) == 0


def fused(
    op: str, x: tuple[int, ...], weights: dict[str, Array], inputs: list[str], **attributes: Any
) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node(op, inputs, ["y"], name="fused", domain=MICROSOFT, **attributes)],
        "g",
        [helper.make_tensor_value_info("x", 1, x)],
        [helper.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(w, n) for n, w in weights.items()],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


KERNEL = {"w": rand(6, 4, 3, 3), "b": rand(6)}
GEMM = {"w": rand(8, 6), "b": rand(6)}
FUSED: dict[str, tuple[onnx.ModelProto, tuple[int, ...], list[str]]] = {}


def case(
    name: str,
    operators: str,
    op: str,
    x: tuple[int, ...],
    weights: dict[str, Array],
    inputs: str = "x w",
    **attributes: Any,
) -> None:
    model = fused(op, x, weights, inputs.split(), **attributes)
    FUSED[name] = (model, x, operators.split())


case("matmul", "MatMul", "FusedMatMul", (2, 3, 8), {"w": rand(8, 6)})
case("scaled", "MatMul Mul", "FusedMatMul", (2, 3, 8), {"w": rand(8, 6)}, alpha=0.5)
case("transA", "Transpose MatMul", "FusedMatMul", (2, 8, 3), {"w": rand(8, 6)}, transA=1)
case("transB", "Transpose MatMul", "FusedMatMul", (2, 3, 8), {"w": rand(6, 8)}, transB=1)
case("left", "Transpose MatMul", "FusedMatMul", (8, 3), {"w": rand(8, 6)}, "w x", transA=1)
extra: Any
for name, extra in (
    ("Relu", {}),
    ("Tanh", {}),
    ("LeakyRelu", {"activation_alpha": 0.2}),
    ("HardSigmoid", {"activation_alpha": 0.3, "activation_beta": 0.4}),
):
    case(
        *(f"gemm {name}", f"Gemm {name}", "FusedGemm", (4, 8), GEMM, "x w b"),
        activation=name,
        alpha=0.7,
        beta=1.5,
        **extra,
    )
for name, params in (
    ("Relu", []),
    ("Sigmoid", []),
    ("LeakyRelu", [0.2]),
    ("HardSigmoid", [0.3, 0.4]),
    ("Clip", [-0.2, 0.3]),
):
    extra = {"activation_params": params} if params else {}
    case(
        *(f"conv {name}", f"Conv {name}", "FusedConv", (1, 4, 7, 7), KERNEL, "x w b"),
        activation=name,
        pads=[1] * 4,
        **extra,
    )
case(
    *("conv and sum", "Conv Add Relu", "FusedConv", (1, 4, 7, 7)),
    {**KERNEL, "z": rand(1, 6, 5, 5)},
    "x w b z",
    activation="Relu",
)


@pytest.mark.parametrize("name", FUSED)
def test_fused_operators(name: str) -> None:
    model, x, operators = FUSED[name]
    assert plain(model, {"x": rand(*x)}) == (operators, 1)
    (row, *_) = onnxlr.inspect(model)
    assert row.layer.name == "fused"
    assert row.fits


def test_what_is_fused_with_something_unknown_stays() -> None:
    model = fused("FusedGemm", (4, 8), GEMM, ["x", "w", "b"], activation="Softplus")
    graph = load(model).model
    assert write_plain_products(graph) == 0
    assert len(graph.graph.initializers["w"].uses()) == 1
    turned = fused("FusedMatMul", (2, 3, 8), {"w": rand(2, 8, 6)}, ["x", "w"], transBatchA=1)
    assert write_plain_products(load(turned).model) == 0


def test_they_are_replaced_and_what_shares_a_weight_does_not_store_it_twice() -> None:
    weight = low_rank(RNG, 64, 64, 3).reshape(64, 4, 16)
    nodes = [
        node("Einsum", ["x", "w"], "q", "query", equation="abc,cde->abde"),
        node("Einsum", ["x", "w"], "k", "key", equation="abc,cde->abde"),
        node("Add", ["q", "k"], "y"),
    ]
    model = make_model(nodes, {"x": (2, 3, 64)}, ["y"], {"w": weight})
    result = onnxlr.optimize(model, rank="exact", max_drop=1.0, measure=False)
    assert {d.decision for d in result.plan.decisions} == {"svd"}
    assert result.model.ByteSize() < model.ByteSize() / 2
    feed = {"x": rand(2, 3, 64)}
    assert relative(run(model, feed)[0], run(result.model, feed)[0]) < 1e-5


def picked(table: tuple[int, ...], axes: list[int], *, opset: int, batch: int = 0) -> Any:
    """What torch's exporter writes for ``table[indices]``, and more like it."""
    attribute: dict[str, Any] = {"axes": axes} if opset < 13 else {}
    nodes = [
        node("Cast", ["x"], "i", to=onnx.TensorProto.INT64),
        node("Unsqueeze", ["i"] if attribute else ["i", "axes"], "j", **attribute),
        node("GatherND", ["w", "j"], "y", "picked", batch_dims=batch),
    ]
    weights = {"w": rand(*table), "axes": np.array(axes)}
    return make_model(nodes, {"x": (2, 2)}, ["y"], weights, opset=opset)


@pytest.mark.parametrize("opset", [12, 18])
@pytest.mark.parametrize("table", [(40, 24), (6, 16, 24)])
def test_look_ups_of_whole_entries(table: tuple[int, ...], opset: int) -> None:
    model = picked(table, [-1], opset=opset)
    feed = {"x": RNG.integers(-table[0], table[0], (2, 2)).astype(np.float32)}
    assert plain(model, feed) == (["Cast", "Gather"], 1)
    (row,) = onnxlr.inspect(model)
    assert (row.layer.name, row.layer.op, row.layer.refusal) == ("picked", "Gather", None)


@pytest.mark.parametrize(("axes", "batch"), [([0], 0), ([-1], 1)])
def test_look_ups_of_other_places_stay(axes: list[int], batch: int) -> None:
    model = picked((2, 40, 24), axes, opset=18, batch=batch)
    assert plain(model, {"x": np.array([[1, 0], [0, 1]], np.float32)})[1] == 0
