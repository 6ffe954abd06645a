"""Folding BatchNormalization: every refusal has its reason, and leaves the model as it is."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxlr.model.protobuf import to_proto
from onnxlr.prepare.batch_norm import Refusal, fold_batch_norms
from tests.support.builders import Array, make_model, node


def conv_and_norm(opset: int = 17) -> onnx.ModelProto:
    """A Conv of 4 channels, a BatchNormalization behind it, and a Relu."""
    rng = np.random.default_rng(0)
    weights = {
        "k": rng.standard_normal((4, 4, 3, 3)),
        "b": rng.standard_normal(4),
        "scale": rng.uniform(0.2, 3, 4),
        "shift": rng.standard_normal(4),
        "mean": rng.standard_normal(4),
        "var": rng.uniform(0.01, 4, 4),
    }
    return make_model(
        [
            node("Conv", ["x", "k", "b"], "c", "conv"),
            node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], "n", "norm"),
            node("Relu", ["n"], "y"),
        ],
        {"x": (2, 4, 7, 8)},
        ["y"],
        {name: array.astype(np.float32) for name, array in weights.items()},
        opset=opset,
    )


def norm_of(model: onnx.ModelProto) -> onnx.NodeProto:
    norm: onnx.NodeProto
    (norm,) = (n for n in model.graph.node if n.op_type == "BatchNormalization")
    return norm


def output(name: str, shape: list[int]) -> Callable[[onnx.ModelProto], None]:
    """Make a value an output of the graph."""
    info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
    return lambda model: model.graph.output.append(info)


def reader(*inputs: str) -> Callable[[onnx.ModelProto], None]:
    """Give values another reader."""
    op = "Relu" if len(inputs) == 1 else "Conv"
    return lambda model: model.graph.node.append(node(op, inputs, "other"))


def constant(name: str, array: Array) -> Callable[[onnx.ModelProto], None]:
    """Store another array under a name."""

    def change(model: onnx.ModelProto) -> None:
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), name))

    return change


def computed(name: str) -> Callable[[onnx.ModelProto], None]:
    """Compute a value from a constant instead of storing it."""

    def change(model: onnx.ModelProto) -> None:
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        tensor.name = f"{name}_stored"
        model.graph.node.insert(0, node("Abs", [tensor.name], name))

    return change


def scale_and_variance(scale: float, variance: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        constant("scale", np.full(4, scale))(model)
        constant("var", np.full(4, variance))(model)

    return change


def without_conv(model: onnx.ModelProto) -> None:
    norm_of(model).input[0] = "x"
    del model.graph.node[0]


def attribute(name: str, number: int) -> Callable[[onnx.ModelProto], None]:
    item = onnx.helper.make_attribute(name, number)
    return lambda model: norm_of(model).attribute.append(item)


CASES: dict[Refusal, tuple[Callable[[onnx.ModelProto], object], int]] = {
    Refusal.NO_CONV: (without_conv, 17),
    Refusal.GRAPH_OUTPUT: (output("c", [2, 4, 5, 6]), 17),
    Refusal.OTHER_READER: (reader("c"), 17),
    Refusal.INPUT_COUNT: (lambda model: norm_of(model).input.pop(), 17),
    Refusal.OUTPUT_COUNT: (lambda model: norm_of(model).output.append("saved"), 13),
    Refusal.TRAINING: (attribute("training_mode", 1), 17),
    Refusal.NOT_SPATIAL: (attribute("spatial", 0), 7),
    Refusal.OVERRIDABLE: (
        lambda model: model.graph.input.append(
            onnx.helper.make_tensor_value_info("scale", onnx.TensorProto.FLOAT, [4])
        ),
        17,
    ),
    Refusal.WEIGHT_COMPUTED: (computed("k"), 17),
    Refusal.WEIGHT_SHARED: (reader("x", "k"), 17),
    Refusal.WEIGHT_OUTPUT: (output("k", [4, 4, 3, 3]), 17),
    Refusal.PARAMETER_COMPUTED: (computed("mean"), 17),
    Refusal.BIAS_COMPUTED: (computed("b"), 17),
    Refusal.SHAPES: (constant("shift", np.ones(1)), 17),
    Refusal.VARIANCE: (scale_and_variance(1.0, -1.0), 17),
    Refusal.OVERFLOW: (scale_and_variance(1e38, 1e-9), 17),
}


@pytest.mark.parametrize("refusal", Refusal, ids=lambda refusal: refusal.name)
def test_a_refusal_says_why_and_leaves_the_model_as_it_is(refusal: Refusal) -> None:
    change, opset = CASES[refusal]
    proto = conv_and_norm(opset)
    change(proto)
    model = ir.from_proto(proto)
    before = to_proto(model)
    folding = fold_batch_norms(model)
    assert folding.count == 0
    assert [(n.op_type, why) for n, why in folding.refusals.items()] == [
        ("BatchNormalization", refusal)
    ]
    assert to_proto(model) == before


@pytest.mark.parametrize("opset", [7, 13, 17])
def test_without_a_reason_it_is_folded(opset: int) -> None:
    model = ir.from_proto(conv_and_norm(opset))
    folding = fold_batch_norms(model)
    assert (folding.count, folding.refusals) == (1, {})
    assert [n.op_type for n in model.graph] == ["Conv", "Relu"]


def test_one_is_folded_and_one_refused() -> None:
    proto = conv_and_norm()
    scale = ["shift", "scale", "mean", "var"]
    proto.graph.node.append(node("BatchNormalization", ["y", *scale], "z", "second"))
    proto.graph.output[0].name = "z"
    folding = fold_batch_norms(ir.from_proto(proto))
    assert folding.count == 1
    assert {n.name: why for n, why in folding.refusals.items()} == {"second": Refusal.NO_CONV}
