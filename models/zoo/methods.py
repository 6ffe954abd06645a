"""Layers of real models by named methods, compared with the error that theory predicts.

``python -m models.zoo.methods --cache zoo-cache`` takes the unusual layers of five public models:
weights that several nodes share, convs in the bodies of an If, padding that the runtime works out,
transposed convs, an embedding, LSTM weights. Each group is replaced by several methods, one after
the other, with no limit on accuracy. Theory: on white noise the output of a replaced layer is, in
expectation, as far from the original's as its weight is. Each replaced layer runs alone in ONNX
Runtime, on noise, to see whether it is.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir

import onnxlr
from models.zoo.data import write_samples
from models.zoo.models import ZOO
from models.zoo.tasks import set_task
from onnxlr.layers.find import find_layers
from onnxlr.layers.layer import Layer, Use
from onnxlr.methods.choice import Choice, Factored
from onnxlr.methods.registry import choose_passes
from onnxlr.model.graph import Names, opset
from onnxlr.model.load import load
from onnxlr.model.protobuf import to_proto
from onnxlr.plan.plan import Decision
from onnxlr.prepare.prepared import prepare
from onnxlr.rewrite.replace import replace_layer
from onnxlr.system.session import ONE_CPU_THREAD, Session
from onnxlr.verify.layer_latency import layer_model

_DRAWS = 20  # of white noise, for each layer


@dataclass(frozen=True)
class Group:
    """Layers of one model, and the methods and ranks that replace them."""

    model: str
    words: str
    matches: Callable[[Layer], bool]
    methods: tuple[tuple[str, str], ...]


HALF = "0.5"
GROUPS = (
    Group(
        "basic-pitch",
        "weights shared by nodes",
        lambda layer: len(layer.uses) > 1,
        (("channel-svd", HALF), ("tucker2", "1,18"), ("tiled-svd", "9,2,1")),
    ),
    Group(
        "silero",
        "convs in bodies of an If",
        lambda layer: layer.op == "Conv",
        (("channel-svd", HALF), ("tucker2", HALF), ("input-channel-svd", HALF)),
    ),
    Group(
        "silero",
        "LSTM weights in bodies of an If",
        lambda layer: layer.op == "LSTM",
        (("expand-at-load", "0.4"), ("expand-at-load", "16,2,2")),
    ),
    Group(
        "dnsmos",
        "convs with auto_pad",
        lambda layer: layer.op == "Conv",
        (("channel-svd", HALF), ("spatial-svd", HALF), ("tucker2", HALF)),
    ),
    Group(
        "ppocr-det",
        "ConvTranspose",
        lambda layer: layer.op == "ConvTranspose",
        (("channel-svd", "8"), ("spatial-svd", HALF), ("tucker2", "8,8")),
    ),
    Group(
        "minilm",
        "embedding",
        lambda layer: layer.op == "Gather",
        (("embedding-svd", HALF), ("tiled-svd", "64,1,2"), ("expand-at-load", "0.3")),
    ),
)


def measured(layer: Layer, decision: Decision, version: int) -> float:
    """Return the relative error of a replaced layer on white noise, alone in ONNX Runtime."""
    use = layer.uses[0]
    if layer.kind == "gather":  # every row once
        use = replace(use, x_shape=layer.shape[:1], y_shape=layer.shape)
    elif use.x_shape is None or use.y_shape is None:
        use = _guessed(layer, use)
    alone = layer_model(layer, use, version)
    weight = alone.graph.initializers["weight"]
    array = layer.array().swapaxes(-1, -2) if use.swapped else layer.array()
    weight.const_value = ir.Tensor(np.ascontiguousarray(array), name="weight")
    other = alone.clone()
    x = use.x_shape or ()
    (target,) = find_layers(other, {"x": x, "y": use.y_shape or ()})
    (graph_pass,) = choose_passes((decision.decision,))
    rank = decision.rank or ()
    factors = tuple(f.astype(layer.dtype.numpy()) for f in graph_pass.factorize(target, rank))
    replace_layer(other, target, Choice(graph_pass, rank), Factored(factors), Names(other))
    sessions = [Session(to_proto(m).SerializeToString(), ONE_CPU_THREAD) for m in (alone, other)]
    rng = np.random.default_rng(0)
    apart = size = 0.0
    for _ in range(_DRAWS):
        feed = {
            "x": rng.permutation(layer.shape[0])
            if layer.kind == "gather"
            else rng.standard_normal(x).astype(np.float32)
        }
        a, b = (session.run(feed)["y"].astype(np.float64) for session in sessions)
        apart += float(np.sum((a - b) ** 2))
        size += float(np.sum(a**2))
    return float(np.sqrt(apart / size))


def _guessed(layer: Layer, use: Use) -> Use:
    """Return a use with shapes for a conv in a body; any length will do for noise."""
    channels = layer.shape[1] * layer.group
    return replace(
        use, x_shape=(1, channels, *(1000,) * (len(layer.shape) - 2)), y_shape=(1, layer.shape[0])
    )


def tabulate(group: Group, cache: Path) -> None:
    """Print the rows of one group."""
    model = next(m for m in ZOO if m.name == group.model)
    path = model.fetch(cache)
    files = write_samples(model, path, cache)
    set_task(path, files.judged, files.truth)
    source = load(path)
    for method, rank in group.methods:
        prepared = prepare(source, feed=None)
        names = [layer.name for layer in prepared.layers if group.matches(layer)]
        result = onnxlr.optimize(
            path,
            data=files.fitted,
            validation=files.judged,
            metric=model.metric,
            max_drop=1,
            method=method,
            rank=rank,
            include=f"^({'|'.join(map(re.escape, names))})$",
        )
        report = result.report
        by_name = {layer.name: layer for layer in prepared.layers}
        ratios = [
            measured(by_name[d.name], d, opset(prepared.model)) / (d.error or 1.0)
            for d in report.replaced
            if method != "expand-at-load" and (d.error or 0) > 1e-6
        ]
        errors = [d.error or 0.0 for d in report.replaced]
        assert report.quality is not None
        assert report.speed is not None
        theory = f"{min(ratios):.3f} to {max(ratios):.3f}" if ratios else "the same operators"
        least, most = (min(errors), max(errors)) if errors else (0.0, 0.0)
        click.echo(
            f"| {model.title}: {group.words} | `{method}` {rank} | {len(report.replaced)} of "
            f"{len(names)} | {least:.3f} to {most:.3f} | {theory} | "
            f"{report.quality.fidelity.rel_error:.3f} | "
            f"{report.input.bytes / 1e6:.2f} → {report.output.bytes / 1e6:.2f} | "
            f"{report.speed.speedup:.2f}× ({report.speed.low:.2f} to {report.speed.high:.2f}) |"
        )


@click.command()
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("zoo-cache"),
    show_default=True,
    help="Folder for the packages and the samples.",
)
@click.option("--only", default="", help="Models whose name contains this.")
def main(cache: Path, only: str) -> None:
    """Print the table."""
    click.echo(
        "| layers | method and rank | replaced | weight errors | noise error / weight error | "
        "rel. error of the model | MB | measured speed-up (95%) |"
    )
    click.echo("|" + " --- |" * 8)
    for group in GROUPS:
        if only in group.model:
            tabulate(group, cache)


if __name__ == "__main__":
    main()
