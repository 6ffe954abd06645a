"""Widths that have to stay, each with its reason; and what belongs to one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxlr.layers.operators import GATES
from onnxlr.model.load import load
from onnxlr.prepare.prepared import prepare
from onnxlr.widths.find import Widths
from onnxlr.widths.narrowing import widths_of
from tests.support.builders import make_model, node, relative, run
from tests.support.narrowing import narrowing_case
from tests.support.planted import CARRIERS, CHANNELS, Plant, planted


def found(model: onnx.ModelProto) -> Widths:
    shape = tuple(d.dim_value or 2 for d in model.graph.input[0].type.tensor_type.shape.dim)
    return widths_of(prepare(load(model), feed={"x": np.zeros(shape, np.float32)}))


def between(middle: Callable[[Plant, str], str]) -> onnx.ModelProto:
    """Something between two convolutions."""
    plant = Plant(0)
    return plant.model(plant.reader(middle(plant, plant.writer("x", 4))))


def normalised(plant: Plant, x: str) -> str:
    last = plant.op("Transpose", x, perm=[0, 2, 3, 1])
    scale = plant.constant(CHANNELS)
    normal = plant.op("LayerNormalization", last, scale, axis=-1)
    return plant.op("Transpose", normal, perm=[0, 3, 1, 2])


def fed_beside(plant: Plant, x: str) -> str:
    """A sum with what a pooling of the input gives: no weight writes it."""
    joined = plant.op("Concat", "x", "x", "x", axis=1)
    return plant.op("Add", x, joined)


def one_by_one(plant: Plant, x: str) -> str:
    """A function that nobody here knows to leave channels apart."""
    return plant.op("CumSum", x, plant.store(np.array(1)))


REFUSED = {
    "normalised across": normalised,
    "which may mix it": one_by_one,
    "mixed across": lambda p, x: p.op("Softmax", x, axis=1),
    "summed up": lambda p, x: p.op("Mul", x, p.op("ReduceMean", x, axes=[1])),
    "what no weight writes": fed_beside,
    "may pad it": lambda p, x: p.op(
        "Slice",
        p.op("Pad", x, p.store(np.array([0, 1, 0, 0, 0, 0, 0, 0]))),
        *(p.store(np.array([v])) for v in (1, 1 + CHANNELS, 1)),
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_to_stay_says_why(reason: str) -> None:
    row = found(between(REFUSED[reason])).rows[0]
    assert row.refusal is not None
    assert reason in row.refusal


def test_an_output_keeps_its_channels() -> None:
    plant = Plant(0)
    written = plant.writer("x", 4)
    model = plant.model(plant.reader(plant.op("Relu", written)), written)
    assert found(model).rows[0].refusal == "an output of the model"


@pytest.mark.parametrize("cell", sorted(GATES))
def test_recurrent_layers_keep_their_states(cell: str) -> None:
    """What they read may go; a state that channels are written into stays."""
    gates = GATES[cell]
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((6, 8)).astype(np.float32),
        "v": rng.standard_normal((6, 5)).astype(np.float32),
        "i": rng.standard_normal((1, gates * 5, 8)).astype(np.float32),
        "r": rng.standard_normal((1, gates * 5, 5)).astype(np.float32),
    }
    nodes = [
        node("MatMul", ["x", "w"], "h", "fc"),
        node("ReduceMean", ["x"], "s", axes=[0]),
        node("MatMul", ["s", "v"], "h0", "start"),
        node(cell, ["h", "i", "r", "", "", "h0"], "y", hidden_size=5),
    ]
    model = make_model(nodes, {"x": (3, 2, 6)}, ["y"], weights)
    assert {w.name: w.refusal for w in found(model).rows} == {
        "fc": None,
        "start": f"read by {cell} 'y' beside its input",
    }


@pytest.mark.parametrize("carrier", CARRIERS)
def test_every_carrier_is_followed(carrier: str) -> None:
    rows = found(planted(0, [carrier])).rows
    assert any(row.refusal is None and row.size == CHANNELS for row in rows)


def test_a_sum_is_one_width_of_all_that_write_into_it() -> None:
    row = found(planted(0, ["residual", "residual"])).rows[0]
    assert len(row.writers) == 3
    assert row.size == CHANNELS


def test_equal_constants_of_others_stay_as_they_are(tmp_path: Path) -> None:
    """An exporter stores equal biases once: who cuts one must leave the other alone."""
    plant = Plant(0)
    first = plant.op("Relu", plant.writer("x", 4))
    bias = plant.nodes[0].input[2]
    second = plant.op("Conv", first, plant.constant(CHANNELS, CHANNELS, 1, 1), bias)
    model = plant.model(plant.reader(plant.op("Sigmoid", second)))
    case = narrowing_case(model, tmp_path)
    name = case.widths.rows[0].name
    size = CHANNELS - 3  # the copies; here nothing is dead in the first
    small = case.narrow({name: size})
    before, after = (run(m, {"x": case.x})[0] for m in (model, small))
    assert relative(before, after) < 1e-5


@pytest.mark.parametrize("op", ["Add", "BatchNormalization", "Conv"])
def test_constants_behind_an_identity_are_cut(op: str, tmp_path: Path) -> None:
    """An exporter writes an Identity for each further parameter of equal values."""
    plant = Plant(0)
    x = plant.writer("x", 4)
    shape = (CHANNELS, 1, 1) if op == "Add" else (CHANNELS,)
    behind = [
        plant.op("Identity", plant.store(plant.rng.uniform(0.5, 1.5, shape)))
        for _ in range(4 if op == "BatchNormalization" else 1)
    ]
    if op == "Conv":
        x = plant.op("Conv", x, plant.constant(CHANNELS, CHANNELS, 1, 1), behind[0])
    else:
        x = plant.op(op, plant.op("Relu", x), *behind)
    model = plant.model(plant.reader(plant.op("Sigmoid", x)))
    case = narrowing_case(model, tmp_path)
    assert [row.refusal for row in case.widths.usable] == [None] * (2 if op == "Conv" else 1)
    assert not any("Identity" in node.op_type for node in case.prepared.model.graph)
    count = CHANNELS - 1
    small = case.narrow({case.widths.usable[-1].name: count})
    assert run(small, {"x": case.x})[0].shape == run(model, {"x": case.x})[0].shape


def test_whole_groups_go(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((12, 4, 1, 1))).astype(np.float32)
    grouped = rng.standard_normal((8, 3, 1, 1)).astype(np.float32)
    reader = rng.standard_normal((5, 8, 1, 1)).astype(np.float32)
    reader[:, 2:4] = 0  # what the second group of four writes
    nodes = [
        node("Conv", ["x", "a"], "h", "first"),
        node("Conv", ["h", "b"], "g", "second", group=4),
        node("Conv", ["g", "c"], "y", "third"),
    ]
    model = make_model(nodes, {"x": (2, 4, 5, 5)}, ["y"], {"a": weight, "b": grouped, "c": reader})
    case = narrowing_case(model, tmp_path)
    assert [(w.name, w.size) for w in case.widths.usable] == [("first", 4)]
    small, counts = case.without_redundant()
    assert counts == {"first": 3}
    before, after = (run(m, {"x": case.x})[0] for m in (model, small))
    assert relative(before, after) < 1e-5
    shapes = {t.name: list(t.dims) for t in small.graph.initializer}
    assert shapes["a"] == [9, 4, 1, 1]
    assert shapes["b"] == [6, 3, 1, 1]
