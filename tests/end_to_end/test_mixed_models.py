"""Whole models through the command: partly quantized ones, and a convolution post's two steps."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import onnxlr
from onnxlr.cli.commands import main
from onnxlr.decompose import compose
from tests.support.builders import Array, low_rank, make_model, node, relative, run

RNG = np.random.default_rng(0)


def quantized(array: Array) -> tuple[Array, Any, Any]:
    scale = np.float32(np.abs(array).max() / 127)
    return np.round(array / scale).astype(np.int8), scale, np.int8(0)


def tensor(name: str, array: Any) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.asarray(array), name)


def partly_quantized(kind: str) -> onnx.ModelProto:
    """A conv that is quantized in one of three ways, and a product that is not."""
    kernel = RNG.standard_normal((8, 4, 3, 3)).astype(np.float32)
    stored, scale, zero = quantized(kernel)
    more = [tensor("q", stored), tensor("s", scale), tensor("z", zero)]
    u8 = [tensor("xs", np.float32(0.03)), tensor("xz", np.uint8(128))]
    if kind == "QDQ":
        nodes = [
            node("QuantizeLinear", ["x", "xs", "xz"], "xq"),
            node("DequantizeLinear", ["xq", "xs", "xz"], "xd"),
            node("DequantizeLinear", ["q", "s", "z"], "w"),
            node("Conv", ["xd", "w"], "c", "conv"),
        ]
    elif kind == "QLinearConv":
        nodes = [
            node("QuantizeLinear", ["x", "xs", "xz"], "xq"),
            node("QLinearConv", ["xq", "xs", "xz", "q", "s", "z", "ys", "xz"], "yq", "conv"),
            node("DequantizeLinear", ["yq", "ys", "xz"], "c"),
        ]
        u8.append(tensor("ys", np.float32(0.2)))
    else:
        nodes = [
            node("QuantizeLinear", ["x", "xs", "xz"], "xq"),
            node("ConvInteger", ["xq", "u", "xz", "xz"], "ci", "conv"),
            node("Cast", ["ci"], "cf", to=onnx.TensorProto.FLOAT),
            node("Mul", ["cf", "both"], "c"),
        ]
        # Of uint8, by the same zero: not every runtime has the product with int8.
        more = [tensor("u", (stored.astype(np.int16) + 128).astype(np.uint8))]
        u8.append(tensor("both", np.float32(0.03) * scale))
    nodes += [node("Flatten", ["c"], "f"), node("MatMul", ["f", "v"], "y", "fc")]
    weights = {"v": low_rank(RNG, 8 * 16, 32, 4)}
    model = make_model(nodes, {"x": (2, 4, 6, 6)}, ["y"], weights)
    model.graph.initializer.extend(more + u8)
    return model


@pytest.mark.parametrize("kind", ["QDQ", "QLinearConv", "ConvInteger"])
def test_what_is_quantized_stays_and_the_rest_is_treated(kind: str) -> None:
    model = partly_quantized(kind)
    result = onnxlr.optimize(model, rank="exact", expand_at_load=True)
    rows = {d.name: d for d in result.plan.decisions}
    assert rows["conv"].decision == "keep"
    assert "quantized" in rows["conv"].reason
    assert (rows["fc"].decision, rows["fc"].rank) == ("svd", (4,))
    x = np.random.default_rng(1).standard_normal((2, 4, 6, 6)).astype(np.float32)
    assert relative(run(model, {"x": x})[0], run(result.model, {"x": x})[0]) < 1e-5
    before = next(t for t in model.graph.initializer if t.name in ("q", "u"))
    assert before in result.model.graph.initializer


def alexnet_like() -> onnx.ModelProto:
    """Two 5×5 convs with pooling and three products, for CIFAR's 3 × 32 × 32."""
    parts = tuple(RNG.standard_normal((n, 5)) for n in (16, 6, 5, 5))
    second = compose(parts) / np.sqrt(5) + 0.02 * RNG.standard_normal((16, 6, 5, 5))
    weights: dict[str, Array] = {
        "w1": RNG.standard_normal((6, 3, 5, 5)) / 9,
        "b1": RNG.standard_normal(6) / 9,
        "w2": second / 12,
        "b2": RNG.standard_normal(16) / 12,
    }
    nodes = []
    x = "x"
    for i in (1, 2):
        nodes += [
            node("Conv", [x, f"w{i}", f"b{i}"], f"c{i}", f"conv{i}"),
            node("Relu", [f"c{i}"], f"r{i}"),
            node("MaxPool", [f"r{i}"], f"p{i}", kernel_shape=[2, 2], strides=[2, 2]),
        ]
        x = f"p{i}"
    nodes.append(node("Flatten", [x], "f0"))
    sizes = (400, 120, 84, 10)
    for i in (1, 2, 3):
        weights[f"v{i}"] = RNG.standard_normal((sizes[i], sizes[i - 1])) / np.sqrt(sizes[i - 1])
        weights[f"a{i}"] = np.zeros(sizes[i])
        y = "y" if i == 3 else f"g{i}"
        nodes.append(node("Gemm", [f"f{i - 1}", f"v{i}", f"a{i}"], y, f"fc{i}", transB=1))
        if i < 3:
            nodes.append(node("Relu", [y], f"f{i}"))
    stored = {name: array.astype(np.float32) for name, array in weights.items()}
    return make_model(nodes, {"x": ("n", 3, 32, 32)}, ["y"], stored)


def test_the_convolution_post_in_two_commands(tmp_path: Path) -> None:
    """The first command factorizes slices at rank 1, the second fits a CP at a multiple of 8."""
    onnx.save(alexnet_like(), tmp_path / "net.onnx")

    def optimize(source: str, out: str, *options: str) -> dict[str, Any]:
        report = tmp_path / f"{out}.json"
        names = (str(tmp_path / source), str(tmp_path / out))
        command = ("optimize", *names, "--max-drop", "1", "--json", str(report), *options)
        done = CliRunner().invoke(main, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        rows = json.loads(report.read_text(encoding="utf-8"))["layers"]
        return {row["name"]: row for row in rows}

    first = optimize(
        *("net.onnx", "mid.onnx", "--method", "slice-svd", "--rank", "1", "--include", "conv1")
    )
    assert (first["conv1"]["decision"], first["conv1"]["rank"]) == ("slice-svd", 1)
    assert first["conv1"]["params_after"] == 3 * 6 * (5 + 5)
    second = optimize(
        *("mid.onnx", "out.onnx", "--method", "cp", "--rank", "evbmf", "--include", "conv2")
    )
    assert (second["conv2"]["decision"], second["conv2"]["rank"]) == ("cp", 8)
    assert second["conv2"]["params_after"] == 8 * (6 + 5 + 5 + 16)
    assert second["conv2"]["error"] < 0.05
    written = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(written, full_check=True)
    assert [n.op_type for n in written.graph.node].count("Conv") == 2 + 4
    x = np.random.default_rng(1).standard_normal((3, 3, 32, 32)).astype(np.float32)
    between, after = (
        run(onnx.load(tmp_path / name), {"x": x})[0] for name in ("mid.onnx", "out.onnx")
    )
    assert relative(between, after) < 0.1
