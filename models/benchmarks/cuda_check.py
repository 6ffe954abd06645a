"""Speed on ONNX Runtime's CUDA provider: models before and after, by batch and precision.

``python -m models.benchmarks.cuda_check --markdown cuda.md`` factorizes the shipped networks and
two larger ones at ranks on the GPU's grid, and times each pair in turn on CUDA. A session that
falls back to the CPU is an error. ``--dry-run`` shows without a GPU that the script still works.
"""

import contextlib
import tempfile
from pathlib import Path

import click
import numpy as np
import onnx

import onnxlr

MODELS = Path(__file__).parent.parent
BATCHES = (1, 16, 64)
_FLOAT, _HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def conv_stack(channels: int = 256, depth: int = 8, size: int = 28) -> onnx.ModelProto:
    """Return a model of 3×3 convolutions of equal width with ReLU and random weights."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for i in range(depth):
        kernel = rng.standard_normal((channels, channels, 3, 3)) * (2 / (9 * channels)) ** 0.5
        weights.append(onnx.numpy_helper.from_array(kernel.astype(np.float32), f"k{i}"))
        nodes += [
            onnx.helper.make_node("Conv", [last, f"k{i}"], [f"c{i}"], f"conv{i}", pads=[1] * 4),
            onnx.helper.make_node("Relu", [f"c{i}"], [f"r{i}"], f"relu{i}"),
        ]
        last = f"r{i}"
    return _model(nodes, weights, ["batch", channels, size, size], last)


def dense_stack(width: int = 4096, depth: int = 6) -> onnx.ModelProto:
    """Return a model of matrix products of equal width with ReLU and random weights."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for i in range(depth):
        matrix = rng.standard_normal((width, width)) * (2 / width) ** 0.5
        weights.append(onnx.numpy_helper.from_array(matrix.astype(np.float32), f"w{i}"))
        nodes += [
            onnx.helper.make_node("MatMul", [last, f"w{i}"], [f"m{i}"], f"fc{i}"),
            onnx.helper.make_node("Relu", [f"m{i}"], [f"r{i}"], f"relu{i}"),
        ]
        last = f"r{i}"
    return _model(nodes, weights, ["batch", width], last)


def _model(
    nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], shape: list[int | str], last: str
) -> onnx.ModelProto:
    graph = onnx.helper.make_graph(
        nodes,
        "stack",
        [onnx.helper.make_tensor_value_info("x", _FLOAT, shape)],
        [onnx.helper.make_tensor_value_info(last, _FLOAT, shape)],
        weights,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph without Cast nodes in float16, with its inputs and outputs."""
    half = onnx.ModelProto()
    half.CopyFrom(model)
    del half.graph.value_info[:]
    for value in (*half.graph.input, *half.graph.output):
        if value.type.tensor_type.elem_type == _FLOAT:
            value.type.tensor_type.elem_type = _HALF
    tensors = list(half.graph.initializer)
    tensors += [a.t for n in half.graph.node for a in n.attribute if a.HasField("t")]
    for tensor in tensors:
        if tensor.data_type == _FLOAT:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return half


Case = tuple[str, onnx.ModelProto, int]  # a model's name, the model and the rank of its layers


def cases(dry_run: bool) -> list[Case]:
    """Return the models that are timed: small ones in a dry run."""
    shipped = [
        ("fashion-mlp", onnx.load(MODELS / "fashion-mlp.onnx"), 64),
        ("fashion-cnn", onnx.load(MODELS / "fashion-cnn.onnx"), 32),
    ]
    if dry_run:
        return [
            *shipped,
            ("2 convs 32→32 at 8²", conv_stack(32, 2, 8), 8),
            ("2 products 64→64", dense_stack(64, 2), 8),
        ]
    return [
        *shipped,
        ("8 convs 256→256 at 28²", conv_stack(), 64),
        ("6 products 4096→4096", dense_stack(), 512),
    ]


@click.command()
@click.option("--seconds", default=3.0, show_default=True, help="For each pair.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the table here too.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Do all of it on the CPU provider, with small models and batches: the times mean nothing.",
)
def main(seconds: float, markdown: Path | None, dry_run: bool) -> None:
    """Print a row for every model, precision and batch."""
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401 - brings cuDNN and cuBLAS where no system copy is
    provider, batches = ("cpu", BATCHES[:1]) if dry_run else ("cuda", BATCHES)
    rows = [
        "| model | type | rank | batch | before ms | after ms | speed-up (95%) | by MACs "
        "| verdict |",
        "|---|---|--:|--:|--:|--:|---|--:|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, single, rank in cases(dry_run):
            for precision, model in (("fp32", single), ("fp16", to_half(single))):
                before, after = (Path(folder) / f"{side}.onnx" for side in "ab")
                onnx.save(model, before)
                report = onnxlr.optimize(before, after, rank=rank, verify="none").report
                for batch in batches:
                    result = onnxlr.bench(
                        before, after, provider=provider, batch=batch, seconds=seconds
                    )
                    pair = result.comparison
                    assert pair is not None
                    rows.append(
                        f"| {name} | {precision} | {rank} | {batch} | {pair.a.median_ms:.3f} | "
                        f"{pair.b.median_ms:.3f} | {pair.speedup:.2f}× ({pair.low:.2f} to "
                        f"{pair.high:.2f}) | {report.theoretical_speedup:.2f}× | {pair.verdict} |"
                    )
                    click.echo(rows[-1])
    if markdown is not None:
        markdown.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
