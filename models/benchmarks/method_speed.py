"""The measured part of the theoretical speed-up of each method, on single convolutions.

``python -m models.benchmarks.method_speed`` times C×C 3×3 convs of four sizes beside every chain
that replaces them, in turn, on one thread of ONNX Runtime, at ranks C/8, C/4 and C/2 (for a CP
twice that, for tiles C/8 and less on each of 2×2). Theory counts multiply-accumulates. Weights are
random: only shapes decide how long a layer takes.
"""

from collections.abc import Sequence

import click
import numpy as np
import onnx

from onnxlr.api.arguments import parse_machine
from onnxlr.limits import Limits
from onnxlr.methods.choice import Choice
from onnxlr.methods.cost import chain_macs
from onnxlr.methods.registry import choose_passes
from onnxlr.model.load import load
from onnxlr.prepare.prepared import prepare
from onnxlr.types import Rank
from onnxlr.verify.latency_table import LatencyTable

SIZES = ((64, 56), (128, 28), (256, 14), (512, 7), (512, 14))
METHODS = (
    "channel-svd",
    "input-channel-svd",
    "spatial-svd",
    "tucker2",
    "cp",
    "cp3",
    "tiled-svd",
    "slice-svd",
)


def make_model(channels: int, side: int) -> onnx.ModelProto:
    """Return a model of one Conv with bias."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((channels, channels, 3, 3)).astype(np.float32)
    bias = rng.standard_normal(channels).astype(np.float32)
    shape = [1, channels, side, side]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w", "b"], ["y"], "conv", pads=[1] * 4)],
        "conv",
        [onnx.helper.make_tensor_value_info("x", 1, shape)],
        [onnx.helper.make_tensor_value_info("y", 1, shape)],
        [onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(bias, "b")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


def rank_of(method: str, rank: int) -> Rank:
    """Return the rank of a method at a step of the table."""
    if method == "tucker2":
        return rank, rank
    if method == "tiled-svd":
        return rank // 2, 2, 2
    if method == "slice-svd":
        return (1,)
    return (2 * rank,) if method in ("cp", "cp3") else (rank,)


@click.command()
@click.option("--seconds", default=0.5, show_default=True, help="Length of each comparison.")
@click.option("--provider", default="cpu", show_default=True, help="As for onnxlr bench.")
@click.option("--methods", default=",".join(METHODS), show_default=True)
def main(seconds: float, provider: str, methods: str) -> None:
    """Print the table: realised of theoretical speed-up, in each cell."""
    names: Sequence[str] = methods.split(",")
    timer = LatencyTable(parse_machine(provider), limits=Limits(layer_seconds=seconds))
    click.echo("| conv 3×3 | rank | " + " | ".join(names) + " |")
    click.echo("|" + " --- |" * (len(names) + 2))
    for channels, side in SIZES:
        prepared = prepare(load(make_model(channels, side)), feed=None)
        (layer,) = prepared.layers
        for part in (8, 4, 2):
            cells = []
            for name in names:
                if name == "slice-svd" and (part < 8 or channels > 128):
                    cells.append("")  # its rank doesn't grow with channels, its width does
                    continue
                (graph_pass,) = choose_passes((name,))
                rank = rank_of(name, channels // part)
                timed = timer.time(prepared.model, layer, Choice(graph_pass, rank))
                macs = chain_macs(layer, graph_pass, rank)
                if timed is None or not macs or not layer.macs:
                    cells.append("refused")
                    continue
                realised = timed.before_ms / timed.after_ms
                cells.append(f"{realised:.2f} of {layer.macs / macs:.2f}")
            head = f"| {channels}@{side}² | {channels // part} | "
            click.echo(head + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
