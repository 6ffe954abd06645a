"""What each ingredient brings on a residual network, without training, beside usual rank rules.

``python -m models.experiments.ablation --data-dir DIR --out FOLDER`` factorizes the ResNet-32 that
``python -m models.reference.resnet`` exports into the folder, to shares of its
multiply-accumulates: with all that onnxlr does, with chains or fewer channels alone, with one
ingredient left out at a time, and by
uniform ranks, energy ranks and EVBMF on the weights alone. 896 unlabelled training images are
fitted to, 128 others decide whether sequential correction is kept; no label is read but to tell the
accuracy. The drop is over the exact test images, with the 95% interval of the paired difference;
agreement with the original is over the JPEG test set besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import torch
from numpy.typing import NDArray

import onnxlr
from models.reference.cifar import read_jpegs
from models.reference.datasets import DATASETS, pixels
from models.reference.files import tell_table
from models.reference.resnet import load_exact
from onnxlr.system.session import ONE_CPU_THREAD, Session

SHARES = (0.7, 0.5, 0.4, 0.3)
_FITTED = 896
_BATCH = 100
_HALVINGS = 8

# What is left out, or done instead, in the words of the table.
VARIANTS: dict[str, dict[str, Any]] = {
    "onnxlr": {},
    "chains alone": {"without": "widths"},
    "fewer channels alone": {"method": "interpolative"},
    "without data": {"without": "data"},
    "without sensitivities": {"without": "sensitivity"},
    "without sequential correction": {"without": "sequential"},
    "with one method (channel-svd)": {"method": ("channel-svd", "svd")},
}
RULES = {"uniform ranks, plain SVD": "{:.4f}", "energy ranks, plain SVD": "energy:{:.4f}"}


@dataclass(frozen=True)
class Images:
    """Exact test images with labels, and JPEG images, which only agreement is measured on."""

    exact: NDArray[np.float32]
    labels: NDArray[np.int64]
    jpeg: NDArray[np.float32]


def load_images(data_dir: Path, jpegs: int) -> Images:
    """Return the test images of CIFAR-10 as float32 in 0..1."""
    _, exact = load_exact(data_dir)
    path = data_dir / "cifar10-jpeg-test.npz"
    jpeg, _ = read_jpegs(path, DATASETS["cifar10"].remedy, jpegs)
    return Images(
        pixels(exact.image).numpy(), exact.label.numpy(), pixels(torch.from_numpy(jpeg)).numpy()
    )


def classes(model: bytes | Path, images: NDArray[np.float32]) -> NDArray[np.intp]:
    """Return the class that a model gives to each image."""
    session = Session(model, ONE_CPU_THREAD)
    name = session.raw.get_inputs()[0].name
    parts = [images[i : i + _BATCH] for i in range(0, len(images), _BATCH)]
    return np.concatenate([next(iter(session.run({name: p}).values())).argmax(1) for p in parts])


def paired_interval(lost: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the mean of a paired difference and its 95% interval, in percentage points.

    >>> [round(x, 2) for x in paired_interval(np.array([1.0, 0, 0, -1] * 100))]
    [0.0, -6.94, 6.94]
    """
    mean, reach = float(lost.mean()), 1.96 * float(lost.std()) / len(lost) ** 0.5
    return 100 * mean, 100 * (mean - reach), 100 * (mean + reach)


@dataclass
class Bench:
    """The classes by the original, to which those of every variant are compared."""

    source: Path
    images: Images

    def __post_init__(self) -> None:
        self.exact = classes(self.source, self.images.exact)
        self.jpeg = classes(self.source, self.images.jpeg)

    def row(self, name: str, result: onnxlr.Result) -> str:
        """Return one row of the table."""
        content = result.model.SerializeToString()
        exact = classes(content, self.images.exact)
        before, after = (c == self.images.labels for c in (self.exact, exact))
        drop, low, high = paired_interval(before.astype(float) - after.astype(float))
        agreed = float((classes(content, self.images.jpeg) == self.jpeg).mean())
        macs = result.report.output.macs / result.report.input.macs - 1
        methods = ", ".join(f"{m} {n}" for m, n in result.report.methods().most_common())
        same = float((exact == self.exact).mean())
        return (
            f"| {name} | {macs:.1%} | {after.mean():.2%} | {drop:+.2f} ({low:+.2f} to {high:+.2f}) "
            f"| {same:.2%} | {agreed:.2%} | {methods} |"
        )


def by_rule(source: Path, pattern: str, share: float) -> onnxlr.Result:
    """Return plain SVD by a rank rule, at the parameter that is nearest to a share from below."""
    low, high = 0.0, 1.0
    best: onnxlr.Result | None = None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        result = onnxlr.optimize(
            source, rank=pattern.format(middle), method=("channel-svd", "svd"), verify="none"
        )
        if result.report.output.macs <= share * result.report.input.macs:
            low, best = middle, result
        else:
            high = middle
    if best is None:
        raise click.ClickException(f"{pattern} never comes down to {share:.0%}")
    return best


def rows(
    source: Path, data: Path, validation: Path, bench: Bench, only: Sequence[str]
) -> Iterator[str]:
    """Yield all rows of the table, share by share, or only those of some names."""
    options: dict[str, Any] = {"data": data, "validation": validation, "metric": "rel-error"}
    variants = {name: row for name, row in VARIANTS.items() if not only or name in only}
    rules = {name: row for name, row in RULES.items() if not only or name in only}
    for share in SHARES:
        for name, variant in variants.items():
            try:
                result = onnxlr.optimize(
                    source, target=f"macs={share}", max_drop=1, **options, **variant
                )
            except onnxlr.BudgetError as error:
                yield f"| {name} | −{1 - share:.0%}: {error} | | | | | |"
            else:
                yield bench.row(name, result)
        for name, pattern in rules.items():
            yield bench.row(name, by_rule(source, pattern, share))
    if only:
        return
    evbmf = onnxlr.optimize(source, rank="evbmf", method=("tucker2", "svd"), verify="none")
    yield bench.row("EVBMF ranks, Tucker-2", evbmf)


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--jpegs", default=2000, show_default=True, help="Images of the JPEG test set.")
@click.option("--only", multiple=True, help="Rows of this name alone; may be repeated.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the table here too.")
def main(
    data_dir: Path, out: Path, jpegs: int, only: tuple[str, ...], markdown: Path | None
) -> None:
    """Tabulate what each ingredient brings."""
    source = out / "resnet32.onnx"
    onnx.checker.check_model(str(source))
    with np.load(out / "calibration.npz") as file:
        image = file["image"]
    order = np.random.default_rng(0).permutation(len(image))
    data, validation = out / "fitted.npz", out / "judged.npz"
    np.savez(data, image=image[np.sort(order[:_FITTED])])
    np.savez(validation, image=image[np.sort(order[_FITTED:])])
    lines = [
        "| what | MACs | top-1 | drop in pp (95%) | agreement | on JPEGs | layers by method |",
        "|---|---|---|---|---|---|---|",
    ]
    bench = Bench(source, load_images(data_dir, jpegs))
    for row in rows(source, data, validation, bench, only):
        lines.append(row)
        click.echo(row, err=True)
    tell_table(lines, markdown)


if __name__ == "__main__":
    main()
