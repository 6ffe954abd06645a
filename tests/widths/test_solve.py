"""What readers become: constants go into their biases, and in sequence they meet the original."""

import itertools
from pathlib import Path

import numpy as np
import onnx

from onnxlr.courses.channels import kept_of
from onnxlr.model.protobuf import to_proto
from onnxlr.prepare.samples import load_samples
from onnxlr.progress import Silent
from tests.support.builders import Array, make_model, node, relative, run
from tests.support.narrowing import narrowing_case
from tests.support.planted import CHANNELS, GOES, Plant


def outputs(model: onnx.ModelProto, x: Array) -> Array:
    """Outputs on all rows, which the model takes in one feed."""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    del model.graph.value_info[:]
    return run(model, {"x": x})[0]


def test_combinations_and_constants_go_exactly(tmp_path: Path) -> None:
    """Nothing lies in between that a combination wouldn't survive; a bias takes the constant."""
    plant = Plant(2, linear=True)
    value = plant.writer("x", 4)
    value = plant.op("Mul", value, plant.store(np.array(1.5)))
    model = plant.model(plant.reader(value))
    case = narrowing_case(model, tmp_path)
    small, counts = case.without_redundant()
    assert list(counts.values()) == [CHANNELS - GOES - 2]
    before, after = (run(m, {"x": case.x})[0] for m in (model, small))
    assert relative(before, after) < 1e-5


def test_by_the_inputs_of_a_layer_a_bias_takes_the_mean(tmp_path: Path) -> None:
    """The same by the moments that factors are fitted to, which single precision sums."""
    plant = Plant(2, linear=True)
    model = plant.model(plant.reader(plant.writer("x", 4)))
    case = narrowing_case(model, tmp_path, exact=False, samples=512)
    small = case.narrow({case.offers[0].width.name: CHANNELS - GOES - 2})
    before, after = (run(m, {"x": case.x})[0] for m in (model, small))
    assert relative(before, after) < 0.01


def test_in_sequence_outputs_are_those_of_least_squares(tmp_path: Path) -> None:
    """Of the regression of the original's outputs on the narrowed model's the slope is one."""
    rng = np.random.default_rng(0)
    sizes = (6, 32, 32, 5)
    nodes, weights, value = [], {}, "x"
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        weights[f"w{i}"] = (rng.standard_normal((a, b)) / np.sqrt(a)).astype(np.float32)
        weights[f"b{i}"] = rng.standard_normal(b).astype(np.float32)
        nodes.append(node("Gemm", [value, f"w{i}", f"b{i}"], f"h{i}" if i < 2 else "y", f"fc{i}"))
        nodes += [node("Relu", [f"h{i}"], f"a{i}")] if i < 2 else []
        value = f"a{i}"
    model = make_model(nodes, {"x": (2, 6)}, ["y"], weights)
    case = narrowing_case(model, tmp_path, samples=2000, exact=False)
    kept = kept_of(case.offers, {"fc0": 8, "fc1": 8})
    samples = load_samples(tmp_path / "x.npy", case.prepared.specs, None)
    corrected = case.narrower.corrected(kept, samples, 0, Silent())
    plain = case.narrower.narrow(kept)
    x = np.load(tmp_path / "x.npy")
    small = (to_proto(narrowing.prepared.model) for narrowing in (plain, corrected))
    wanted, first, second = (outputs(m, x) for m in (model, *small))
    assert relative(wanted, second) < relative(wanted, first)
    for y, reached in zip(wanted.T, second.T, strict=True):
        slope, offset = np.polyfit(reached, y, 1)
        assert abs(slope - 1) < 0.02
        assert abs(offset) < 0.03 * y.std()
