"""Sizes that hang together: expressions of symbols, caches of decoders, inputs without a rank."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxlr
from onnxlr.errors import ModelError, UsageError
from onnxlr.model.load import load
from onnxlr.prepare.dimensions import Sizes
from onnxlr.prepare.feeding import open_with_feeding
from onnxlr.prepare.inputs import InputSpec, input_specs, parse_shapes
from onnxlr.prepare.synthetic import candidate_shapes
from onnxlr.system.session import ONE_CPU_THREAD, Session
from tests.support.builders import low_rank, make_model, node, run

FLOAT = np.dtype(np.float32)
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("past + seq", 12),
        ("seq+past", 12),
        ("past_len.1 + seq", None),
        ("2*seq", 10),
        ("(seq - 1)//2 + 1", 3),
        ("floor(seq/2) + 1", 3),
        ("Max(1, seq - 4)", 1),
        ("Min(past, seq)", 5),
        ("-seq + past + 2", 4),
        ("seq % 3", 2),
        ("past - 8 + 0*seq", None),
        ("seq // (past - 7)", None),
        ("seq.upper()", None),
        ("past if seq else 2", None),
        ("seq ** 9", None),
        ("__import__('os')", None),
        ("past +", None),
    ],
)
def test_expressions(text: str, size: int | None) -> None:
    sizes = Sizes(["past", "seq", text])
    sizes.set("past", 7)
    sizes.set("seq", 5)
    assert sizes.get(text) == size


def test_a_text_with_an_operator_is_a_symbol_where_nothing_in_it_is_one() -> None:
    sizes = Sizes(["batch-size", "past", "past + more"])
    assert not sizes.symbols.count("batch")
    assert sizes.symbols == ["past", "more"]
    sizes.set("batch-size", 3)
    assert sizes.get("batch-size") == 3


def first_shapes(*specs: tuple[str, tuple[Any, ...]], fixed: str = "") -> list[tuple[int, ...]]:
    inputs = [InputSpec(name, FLOAT, dims) for name, dims in specs]
    shapes = parse_shapes([fixed] if fixed else [], inputs)
    return list(next(iter(candidate_shapes(inputs, shapes, 1))).values())


CACHE = ("past", ("batch", 4, "past_length", 16))


@pytest.mark.parametrize(
    ("ids", "mask", "cache", "expected"),
    [
        ("length", "past_length + length", CACHE, [(1, 128), (1, 256), (1, 4, 128, 16)]),
        (1, "past_length + 1", CACHE, [(1, 1), (1, 129), (1, 4, 128, 16)]),
        ("length", "total_length", CACHE, [(1, 128), (1, 256), (1, 4, 128, 16)]),
        (1, "total_length", CACHE, [(1, 1), (1, 129), (1, 4, 128, 16)]),
        (
            "length",
            "past_length + length",
            ("past", (1, 4, 0, 16)),
            [(1, 128), (1, 128), (1, 4, 0, 16)],
        ),
    ],
)
def test_decoders(ids: Any, mask: str, cache: Any, expected: list[tuple[int, ...]]) -> None:
    specs = ("ids", ("batch", ids)), ("mask", ("batch", mask)), cache
    assert first_shapes(*specs) == expected


def test_at_last_nothing_is_cached_or_one_token_comes_in() -> None:
    specs = [InputSpec("ids", FLOAT, (1, "length")), InputSpec("past", FLOAT, (1, "past_length"))]
    *_, empty, one = candidate_shapes(specs, {}, 1)
    assert [*empty.values(), *one.values()] == [(1, 128), (1, 0), (1, 1), (1, 128)]


def test_sizes_of_the_users_decide_the_others() -> None:
    specs = ("ids", ("batch", "length")), ("mask", ("batch", "past_length + length")), CACHE
    assert first_shapes(*specs, fixed="ids:2,3") == [(2, 3), (2, 131), (2, 4, 128, 16)]
    assert first_shapes(*specs, fixed="past:2,4,0,16") == [(2, 128), (2, 128), (2, 4, 0, 16)]
    with pytest.raises(UsageError, match="write NAME:1,3,224,224"):
        first_shapes(*specs, fixed="ids:0,3")


def decoder(*, ids: Any, mask: Any, cached: Any = "past_length") -> onnx.ModelProto:
    """One step of attention over what is cached and what comes in."""
    nodes = [
        node("MatMul", ["x", "wk"], "k", "key"),
        node("Concat", ["past", "k"], "present", axis=1),
        node("Transpose", ["present"], "t", perm=[0, 2, 1]),
        node("MatMul", ["x", "t"], "scores"),
        node("Unsqueeze", ["mask", "one"], "m"),
        node("Add", ["scores", "m"], "masked"),
        node("Softmax", ["masked"], "p"),
        node("MatMul", ["p", "present"], "o"),
        node("MatMul", ["o", "wo"], "y", "out"),
    ]
    inputs = {"x": ("batch", ids, 32), "mask": ("batch", mask), "past": ("batch", cached, 32)}
    weights = {"wk": low_rank(RNG, 32, 32, 2), "wo": low_rank(RNG, 32, 32, 2)}
    return make_model(nodes, inputs, ["y", "present"], {**weights, "one": np.array([1])})


@pytest.mark.parametrize(
    "sizes",
    [
        {"ids": "length", "mask": "past_length + length"},
        {"ids": 1, "mask": "total_length"},
        {"ids": "length", "mask": "length", "cached": "past_length"},  # runs with nothing cached
        {"ids": "length", "mask": "length", "cached": 0},
    ],
)
def test_decoders_run_from_their_declared_inputs_alone(sizes: dict[str, Any]) -> None:
    result = onnxlr.optimize(decoder(**sizes), rank="exact", max_drop=1.0, measure=False)
    assert [d.decision for d in result.plan.decisions] == ["svd", "svd"]


def test_of_many_inputs_few_are_listed() -> None:
    names = [f"x{i}" for i in range(12)]
    inputs: dict[str, Any] = {n: ("n", f"size{i}", 5) for i, n in enumerate(names)}
    model = make_model([node("Concat", names, "c", axis=2), node("Reshape", ["c", "s"], "y")],
                       inputs, ["y"], {"s": np.array([3, 1, 7])})  # fmt: skip
    with pytest.raises(ModelError, match="--shape") as error:
        open_with_feeding(load(model), ONE_CPU_THREAD)
    assert "and 8 more" in str(error.value)
    assert "x4" not in str(error.value).split("--shape")[1]


def rankless() -> onnx.ModelProto:
    model = make_model(
        [
            node("MatMul", ["x", "w"], "h", "a"),
            node("Relu", ["h"], "r"),
            node("MatMul", ["r", "v"], "y", "b"),
        ],
        {"x": (4, 32)},
        ["y"],
        {"w": low_rank(RNG, 32, 32, 2), "v": low_rank(RNG, 32, 32, 2)},
    )
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.ClearField("shape")
    return model


def test_inputs_without_a_rank_take_that_of_the_samples_or_of_the_shape(tmp_path: Path) -> None:
    model = rankless()
    assert len(onnxlr.inspect(model)) == 2
    for shape in ((8, 32), (8, 3, 32)):
        x = RNG.standard_normal(shape).astype(np.float32)
        np.save(tmp_path / "x.npy", x)
        result = onnxlr.optimize(
            model,
            data=tmp_path / "x.npy",
            validation=tmp_path / "x.npy" if len(shape) == 3 else None,
            rank="exact",
            max_drop=1.0,
            measure=False,
        )
        assert [d.decision for d in result.plan.decisions] == ["svd", "svd"]
        np.testing.assert_allclose(
            run(result.model, {"x": x})[0], run(model, {"x": x})[0], rtol=1e-4, atol=1e-5
        )
    result = onnxlr.optimize(model, shape=["x:4,2,32"], rank="exact", max_drop=1.0, measure=False)
    assert result.report.input.macs == 4 * 2 * 2 * 32 * 32
    result = onnxlr.optimize(model, rank="exact", verify="none")
    assert [d.decision for d in result.plan.decisions] == ["svd", "svd"]
    with pytest.raises(
        ModelError, match="'x' declares no rank: give samples with --data, or sizes"
    ):
        onnxlr.optimize(model)
    assert str(input_specs(load(model).model)[0]) == "x float32 of unknown rank"


@pytest.mark.parametrize("declared", [["n"], ["n", 1, "m"], [3, 9], []])
def test_outputs_of_another_shape_than_declared_are_timed(declared: list[Any]) -> None:
    nodes = [node("Cast", ["sizes"], "s", to=7), node("Reshape", ["x", "s"], "y")]  # any rank
    model = make_model(nodes, {"x": (3, 8), "sizes": (2,)}, ["y"], {})
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", 1, declared))
    session = Session(model.SerializeToString(), ONE_CPU_THREAD)
    timed = session.bind({"x": np.ones((3, 8), np.float32), "sizes": np.array([4, 6], np.float32)})
    for _ in range(3):
        timed()
