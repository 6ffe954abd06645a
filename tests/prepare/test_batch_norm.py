"""Batch normalization folded into the convolution before it, or left with a reason."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxlr.model.load import load
from onnxlr.model.protobuf import to_proto
from onnxlr.prepare.batch_norm import fold_batch_norms
from tests.support.builders import make_model, node, relative, run


def bn_model(
    *, outputs: int, inputs: int, group: int, bias: bool, opset: int, epsilon: float, seed: int
) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    weights = {
        "k": rng.standard_normal((outputs, inputs // group, 3, 3)),
        "scale": rng.uniform(0.2, 3, outputs),
        "shift": rng.standard_normal(outputs),
        "mean": rng.standard_normal(outputs),
        "var": rng.uniform(0.01, 4, outputs),
    } | ({"b": rng.standard_normal(outputs)} if bias else {})
    return make_model(
        [
            node(
                "Conv",
                ["x", "k", "b"] if bias else ["x", "k"],
                "c",
                "conv",
                group=group,
                pads=[1, 0, 1, 2],
                strides=[2, 1],
            ),
            node(
                "BatchNormalization", ["c", "scale", "shift", "mean", "var"], "n", epsilon=epsilon
            ),
            node("Relu", ["n"], "y"),
        ],
        {"x": (2, inputs, 7, 8)},
        ["y"],
        {n: w.astype(np.float32) for n, w in weights.items()},
        opset=opset,
    )


@settings(max_examples=40, deadline=None)
@given(
    group=st.integers(1, 2),
    per=st.integers(1, 3),
    bias=st.booleans(),
    opset=st.sampled_from([7, 9, 13, 17, 21]),
    epsilon=st.sampled_from([1e-5, 1e-3, 0.1]),
    seed=st.integers(0, 99),
)
def test_batch_norm_folds_without_a_trace(
    group: int, per: int, bias: bool, opset: int, epsilon: float, seed: int
) -> None:
    model = bn_model(
        outputs=group * per,
        inputs=group * 2,
        group=group,
        bias=bias,
        opset=opset,
        epsilon=epsilon,
        seed=seed,
    )
    graph = load(model).model
    assert fold_batch_norms(graph).count == 1
    folded = to_proto(graph)
    onnx.checker.check_model(folded, full_check=True)
    assert [n.op_type for n in folded.graph.node] == ["Conv", "Relu"]
    assert len(folded.graph.initializer) == 2
    x = np.random.default_rng(1).standard_normal((2, group * 2, 7, 8)).astype(np.float32)
    assert relative(run(model, {"x": x})[0], run(folded, {"x": x})[0]) < 1e-5


@pytest.mark.parametrize("reader", ["Relu", "output"])
def test_batch_norm_stays_where_the_conv_is_read_elsewhere(reader: str) -> None:
    model = bn_model(outputs=4, inputs=4, group=1, bias=True, opset=17, epsilon=1e-5, seed=0)
    if reader == "output":
        model.graph.output.append(onnx.helper.make_tensor_value_info("c", 1, [2, 4, 4, 8]))
    else:
        model.graph.node.append(node("Relu", ["c"], "other"))
    graph = load(model).model
    assert fold_batch_norms(graph).count == 0


def test_parameters_that_a_caller_may_feed_are_not_folded() -> None:
    model = bn_model(outputs=4, inputs=4, group=1, bias=True, opset=17, epsilon=1e-5, seed=0)
    model.graph.input.append(onnx.helper.make_tensor_value_info("scale", 1, [4]))
    assert fold_batch_norms(load(model).model).count == 0


@pytest.mark.parametrize("opset", [7, 9, 13])
def test_batch_norm_in_training_is_not_folded(opset: int) -> None:
    """Before opset 14 further outputs, read or not, mean that it normalizes by the batch."""
    model = bn_model(outputs=4, inputs=4, group=1, bias=True, opset=opset, epsilon=1e-5, seed=0)
    (norm,) = (n for n in model.graph.node if n.op_type == "BatchNormalization")
    norm.output.extend(["dead_1", "dead_2", "dead_3", "dead_4"])
    assert fold_batch_norms(load(model).model).count == 0


def test_what_overflows_its_type_is_not_folded() -> None:
    model = bn_model(outputs=4, inputs=4, group=1, bias=True, opset=17, epsilon=1e-5, seed=0)
    (scale,) = (t for t in model.graph.initializer if t.name == "scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(np.full(4, 1e38, np.float32), "scale"))
    (var,) = (t for t in model.graph.initializer if t.name == "var")
    var.CopyFrom(onnx.numpy_helper.from_array(np.full(4, 1e-9, np.float32), "var"))
    assert fold_batch_norms(load(model).model).count == 0


def test_shared_kernels_are_not_folded() -> None:
    model = bn_model(outputs=4, inputs=4, group=1, bias=True, opset=17, epsilon=1e-5, seed=0)
    model.graph.node.append(node("Conv", ["x", "k"], "other"))
    graph = load(model).model
    assert fold_batch_norms(graph).count == 0
