"""Command line that runs onnxlr and other tools on a model, in either order, and tabulates.

``python -m models.composition --work FOLDER`` takes two models of the zoo through ONNX Runtime's
dynamic and static INT8 quantization, float16 and onnxslim: alone, behind ``onnxlr optimize`` and
before it. Every file is kept in the folder, with its row of the table: a second call only adds what
is missing, ``--time`` times every file beside its original. ``--behind int8-dynamic``, which may be
repeated, has ``onnxlr optimize --behind`` say of each model which is best: low rank, that, both or
neither. onnxlr times layers as it chooses: figures to quote are made in a new folder, on a machine
that does nothing else.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx

import onnxlr
from models.composition.table import Row, behind_table, tables
from models.composition.tools import TOOLS, read_samples
from models.reference.files import replace_file, tell_table
from models.zoo.data import write_samples
from models.zoo.models import ZOO
from models.zoo.table import kept_words
from models.zoo.tasks import set_task
from onnxlr.behind.ready import READY
from onnxlr.model.load import load
from onnxlr.prepare.feeding import choose_feeding
from onnxlr.prepare.opening import open_session
from onnxlr.prepare.prepared import prepare
from onnxlr.system.session import ONE_CPU_THREAD, Session
from onnxlr.verify.judge import Judge

_MODELS = Path(__file__).parent.parent
_CHOSEN = ("ppocr-det", "minilm")  # a convolutional network and a transformer, both of which gain
_SHIPPED = ("fashion-mlp", "fashion-cnn")
_SECONDS = 12.0  # of one benchmark


@dataclass(frozen=True)
class Subject:
    """A model, its samples and what judges it; ``truth`` is for ``models.zoo.tasks``."""

    name: str
    title: str
    path: Path
    fitted: Path
    judged: Path
    truth: Path | None
    labels: str | None
    metric: str
    max_drop: float


@dataclass(frozen=True)
class Step:
    """One file: the step whose file it is made from (None: the original), and the function."""

    name: str
    title: str
    source: str | None
    make: Callable[[Subject, Path, Path, Path], dict[str, Any]]


@dataclass
class Course:
    """Does the steps of one model, or reads them from what an earlier call left."""

    subject: Subject
    work: Path
    _judge: Judge | None = field(default=None)

    def run(self, step: Step) -> Row:
        """Return one row, from an earlier call unless that failed."""
        folder = self.work / self.subject.name
        note, out = folder / f"{step.name}.json", folder / f"{step.name}.onnx"
        if note.exists():
            row = Row(**json.loads(note.read_text(encoding="utf-8")))
            if not row.failure:
                return row
        folder.mkdir(parents=True, exist_ok=True)
        source = self.subject.path if step.source is None else folder / f"{step.source}.onnx"
        row = Row(self.subject.title, step.name, step.title)
        try:
            if not source.exists():
                raise RuntimeError("there is nothing to begin with: see the tool alone")
            columns = step.make(self.subject, source, out, self.work)
            row = self._measured(row, out, columns)
        except Exception as error:  # a step that fails is a row
            row.failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
            out.unlink(missing_ok=True)
        self._keep(row)
        return row

    def time(self, row: Row) -> None:
        """Add the speed beside the original, on one thread."""
        out = self.work / self.subject.name / f"{row.step}.onnx"
        if row.failure or row.step == "original" or row.speed is not None:
            return
        speed = onnxlr.bench(
            self.subject.path, out, data=self.subject.judged, seconds=_SECONDS
        ).comparison
        assert speed is not None
        row.speed = (speed.speedup, speed.low, speed.high)
        row.milliseconds = (speed.a.median_ms, speed.b.median_ms)
        self._keep(row)

    def _measured(self, row: Row, out: Path, columns: dict[str, Any]) -> Row:
        """Add the file's quality on the samples that judge and its weights to the row."""
        row.complaint = _complaint(out)
        if self._judge is None:
            self._judge = _judge(self.subject)
        session = Session(out, ONE_CPU_THREAD)
        quality = self._judge.judge(session)
        row.bytes, row.metric = out.stat().st_size, self.subject.metric
        row.value, row.drop = quality.optimized, quality.drop
        row.rel_error = quality.fidelity.rel_error
        row.weights = _stored(out)
        for name, value in columns.items():
            setattr(row, name, value)
        return row

    def _keep(self, row: Row) -> None:
        note = self.work / self.subject.name / f"{row.step}.json"
        replace_file(note, json.dumps(vars(row), indent=1).encode())


def _judge(subject: Subject) -> Judge:
    source = load(subject.path)
    session = open_session(source, ONE_CPU_THREAD)
    feeding = choose_feeding(
        source, session, data=subject.fitted, validation=subject.judged, labels=subject.labels
    )
    return Judge(session, feeding.judging, subject.metric)


def _stored(path: Path) -> dict[str, int]:
    """Return how many of the weights that onnxlr lists are stored in which type."""
    layers = prepare(load(path), feed=None).layers
    return dict(Counter(layer.dtype.name.lower() for layer in layers).most_common())


def _complaint(path: Path) -> str | None:
    """Return what onnx.checker says against a file, or None if it passes."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        return " ".join(str(error).split())
    return None


def _copy(_: Subject, source: Path, out: Path, __: Path) -> dict[str, Any]:
    replace_file(out, source.read_bytes())
    return {}


def _optimized(subject: Subject, source: Path, out: Path, **options: Any) -> onnxlr.Result:
    """Run onnxlr with the defaults."""
    return onnxlr.optimize(
        source,
        out,
        data=subject.fitted,
        validation=subject.judged,
        labels=subject.labels,
        metric=subject.metric,
        max_drop=subject.max_drop,
        **options,
    )


def _optimize(subject: Subject, source: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Run onnxlr with the defaults, and return how many layers it replaced and why not the rest."""
    report = _optimized(subject, source, out, **options).report
    return {
        "replaced": len(report.replaced),
        "layers": len(report.decisions),
        "kept": kept_words(report.to_dict()),
    }


def _by_onnxlr(subject: Subject, source: Path, out: Path, _: Path) -> dict[str, Any]:
    return _optimize(subject, source, out)


def which_is_best(subject: Subject, name: str, work: Path) -> dict[str, Any]:
    """Return what ``onnxlr optimize --behind`` says, from an earlier call if there was one."""
    folder = work / subject.name
    folder.mkdir(parents=True, exist_ok=True)
    note, out = folder / f"behind-{name}.json", folder / f"behind-{name}.onnx"
    if not note.exists():
        report = _optimized(subject, subject.path, out, behind=name).report
        said = {"model": subject.title, "metric": subject.metric, **report["behind"]}
        replace_file(note, json.dumps(said, indent=1).encode())
    found: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
    return found


def _expanded(subject: Subject, source: Path, out: Path, _: Path) -> dict[str, Any]:
    return _optimize(
        subject, source, out, method="expand-at-load", expand_at_load=True, target="bytes"
    )


def _by_tool(
    apply: Callable[..., None],
) -> Callable[[Subject, Path, Path, Path], dict[str, Any]]:
    def make(subject: Subject, source: Path, out: Path, work: Path) -> dict[str, Any]:
        names = [i.name for i in onnx.load(source).graph.input]
        apply(source, out, read_samples(subject.fitted, names), work)
        return {}

    return make


def steps(expand: bool) -> Iterator[Step]:
    """Yield a model's steps: the original, onnxlr, each tool alone, behind and before it."""
    yield Step("original", "original", None, _copy)
    yield Step("onnxlr", "onnxlr", None, _by_onnxlr)
    for tool in TOOLS:
        make = _by_tool(tool.apply)
        yield Step(tool.name, tool.title, None, make)
        yield Step(f"onnxlr-{tool.name}", f"onnxlr → {tool.title}", "onnxlr", make)
        yield Step(f"{tool.name}-onnxlr", f"{tool.title} → onnxlr", tool.name, _by_onnxlr)
    if not expand:
        return
    title = "onnxlr --expand-at-load"
    yield Step("expanded", title, None, _expanded)
    for tool in TOOLS:
        make = _by_tool(tool.apply)
        yield Step(f"expanded-{tool.name}", f"{title} → {tool.title}", "expanded", make)


def _zoo_subject(name: str, cache: Path) -> Subject:
    model = next(m for m in ZOO if m.name == name)
    path = model.fetch(cache)
    files = write_samples(model, path, cache)
    return Subject(
        name,
        model.title,
        path,
        files.fitted,
        files.judged,
        files.truth,
        None,
        model.metric or "rel-error",
        model.max_drop,
    )


def _shipped_subject(name: str, work: Path) -> Subject:
    """Return a shipped network; every other sample judges it."""
    with np.load(_MODELS / "fashion-samples.npz") as samples:
        arrays = dict(samples)
    folder = work / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    fitted, judged = folder / "fashion-fitted.npz", folder / "fashion-judged.npz"
    for i, path in enumerate((fitted, judged)):
        named: dict[str, Any] = {key: array[i::2] for key, array in arrays.items()}
        np.savez_compressed(path, **named)
    return Subject(
        name, name, _MODELS / f"{name}.onnx", fitted, judged, None, "label", "top1", 0.01
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("zoo-cache"),
    help="Folder of models.zoo, for the packages and the samples.",
)
@click.option(
    "--models",
    "names",
    type=click.Choice([*(m.name for m in ZOO), *_SHIPPED]),
    multiple=True,
    help=f"A model, in place of {' and '.join(_CHOSEN)}; may be repeated.",
)
@click.option("--quick", is_flag=True, help="The two shipped networks; nothing is downloaded.")
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0),
    help="Largest loss by onnxlr, for every model.  [default: as each model sets it]",
)
@click.option(
    "--behind",
    "steps_behind",
    type=click.Choice(list(READY)),
    multiple=True,
    help="Only say which is best: low rank, this, both or neither; may be repeated.",
)
@click.option("--time", "timed", is_flag=True, help="Time every file beside its original.")
@click.option("--markdown", type=click.Path(path_type=Path), help="File for the tables.")
def main(
    work: Path,
    cache: Path,
    names: tuple[str, ...],
    quick: bool,
    max_drop: float | None,
    steps_behind: tuple[str, ...],
    timed: bool,
    markdown: Path | None,
) -> None:
    """Compose onnxlr with other tools, in both orders, and tabulate what comes out."""
    rows: list[Row] = []
    said: list[dict[str, Any]] = []
    for name in names or (_SHIPPED if quick else _CHOSEN):
        shipped = name in _SHIPPED
        subject = _shipped_subject(name, work) if shipped else _zoo_subject(name, cache)
        if max_drop is not None:
            subject = replace(subject, max_drop=max_drop)
        if subject.truth is not None:
            set_task(subject.path, subject.judged, subject.truth)
        if steps_behind:
            said += [which_is_best(subject, step, work) for step in steps_behind]
            continue
        course = Course(subject, work)
        for step in steps(expand=shipped):
            row = course.run(step)
            if timed:
                course.time(row)
            click.echo(f"{subject.title}: {step.title}: {row.failure or 'done'}", err=True)
            rows.append(row)
    if steps_behind:
        tell_table([line for item in said for line in behind_table(item)], markdown)
        return
    tell_table(list(tables(rows)), markdown)
    content = json.dumps([vars(row) for row in rows], indent=1)
    replace_file(work / "composition.json", content.encode())


if __name__ == "__main__":
    main()
