"""Predicted beside measured damage of random plans: a scatter plot and its rank correlation.

``python -m models.experiments.predicted --out FOLDER MODEL DATA VALIDATION …`` (threes of files)
draws plans for each model: some of its layers at random, each replaced by one of the candidates
weighed for it. What their sensitivities predict of the outputs' relative error stands against what
the written model has on the validation samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import scipy.stats
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from rich.console import Console

import onnxlr
from models.reference.files import tell_table
from onnxlr.plan.plan import Alternative, Decision, Plan

_MILD, _BOLD = 0.02, 0.6  # predicted relative errors that plans are drawn between
_REPLACED = 0.6  # of the layers
_SPREAD = 0.7  # of the layers' shares in it, as the deviation of a logarithm


def usable(decision: Decision) -> list[Alternative]:
    """Return the alternatives of a layer whose harm was measured."""
    return [a for a in decision.alternatives if a.harm is not None and a.harm > 0]


def draw(plan: Plan, rng: np.random.Generator) -> tuple[Plan, float]:
    """Return a plan of random candidates, and its predicted relative error."""
    whole = float(np.exp(rng.uniform(np.log(_MILD), np.log(_BOLD))))
    rows, squares = [], 0.0
    layers = sum(bool(usable(d)) for d in plan.decisions)
    for decision in plan.decisions:
        others = usable(decision)
        if not others or rng.uniform() > _REPLACED:
            rows.append(replace(decision, decision="keep", rank=None))
            continue
        share = whole / np.sqrt(_REPLACED * layers) * np.exp(_SPREAD * rng.standard_normal())
        chosen = min(others, key=lambda a: abs(np.log((a.harm or 1.0) / share)))
        squares += (chosen.harm or 0.0) ** 2
        rows.append(replace(decision, decision=chosen.method, rank=chosen.rank))
    return replace(plan, decisions=tuple(rows)), float(np.sqrt(squares))


def points(model: Path, data: Path, validation: Path, count: int) -> list[tuple[float, float]]:
    """Return predicted and measured relative errors of random plans for a model."""
    start = onnxlr.optimize(
        model,
        data=data,
        validation=validation,
        metric="rel-error",
        target="macs",
        max_drop=1,
        without="sequential",
    )
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(count):
        plan, predicted = draw(start.plan, rng)
        if plan.replaced:
            written = onnxlr.apply(plan, model)
            measured = onnxlr.compare(model, written, data=validation, metric="rel-error")
            pairs.append((predicted, measured.quality.fidelity.rel_error))
    return pairs


def plot(points_of: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Plot one point for each plan and one colour for each model, on logarithmic axes."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot(
        xscale="log",
        yscale="log",
        xlabel="predicted relative error of the outputs",
        ylabel="measured",
    )
    for name, pairs in points_of.items():
        axes.plot(*zip(*pairs, strict=True), "o", markersize=4, alpha=0.7, label=name)
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color="grey", linewidth=1)
    axes.legend()
    FigureCanvasSVG(figure)
    figure.savefig(path, format="svg")


def tabulate(points_of: dict[str, list[tuple[float, float]]]) -> Sequence[str]:
    """Return the rank correlation and the usual ratio for each model."""
    lines = [
        "| model | plans | rank correlation | measured / predicted: median (10% to 90%) |",
        "|---|---|---|---|",
    ]
    for name, pairs in points_of.items():
        predicted, measured = np.array(pairs).T
        low, middle, high = np.quantile(measured / predicted, (0.1, 0.5, 0.9))
        correlation = scipy.stats.spearmanr(predicted, measured).statistic
        ratios = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {name} | {len(pairs)} | {correlation:.3f} | {ratios} |")
    return lines


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--count", default=40, show_default=True, help="Plans for each model.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the table here too.")
def main(files: tuple[Path, ...], out: Path, count: int, markdown: Path | None) -> None:
    """Set predicted beside measured damage."""
    if len(files) % 3:
        raise click.UsageError("name MODEL, DATA and VALIDATION for each model")
    points_of = {}
    for model, data, validation in zip(*(iter(files),) * 3, strict=True):
        Console(stderr=True).print(f"{model}: {count} plans", highlight=False)
        points_of[model.stem] = points(model, data, validation, count)
    plot(points_of, out / "predicted.svg")
    tell_table(tabulate(points_of), markdown)


if __name__ == "__main__":
    main()
