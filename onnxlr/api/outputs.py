"""The files that a run writes: checked before the long work begins, filled when it is done."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxlr.api.arguments import FileName, path_of
from onnxlr.errors import OutputError, UsageError
from onnxlr.jobs.pipeline import Result, optimize
from onnxlr.model.destinations import check_destination, check_distinct, check_external
from onnxlr.model.load import Model, Source, load
from onnxlr.options import Options
from onnxlr.progress import Progress
from onnxlr.report.html import write_page
from onnxlr.report.report import json_text
from onnxlr.report.svg import start_figures
from onnxlr.system.files import path_exists, write_failure
from onnxlr.system.in_memory import InMemory


@dataclass(frozen=True)
class OutputNames:
    """Where what tells of a run goes: the plan, the page, the JSON; None for what isn't written.

    ``frontier`` is a new folder for the plans of all models that were judged.
    """

    plan: FileName | None = None
    page: FileName | None = None
    json: FileName | None = None
    frontier: FileName | None = None


def optimize_to_files(
    model: Model,
    out: FileName | None,
    names: OutputNames,
    options: Options,
    progress: Progress,
) -> Result:
    """Optimize a model and write OUT, with the plan, the HTML report and the JSON report.

    Parameters
    ----------
    model : path, bytes, ModelProto or Source
    out : path or None
    names : OutputNames
    options : Options
    progress : Progress

    Raises
    ------
    OnnxlrError
        If one of them can't be written, before the work begins; and whatever the work refuses.
    """
    data = (d for d in (options.data, options.validation) if not isinstance(d, InMemory))
    inputs = (*data, options.latency_table)
    path = model_destination(out, model, *inputs)
    plan_path, page_path, json_path, folder = (
        None if n is None else Path(n) for n in (names.plan, names.page, names.json, names.frontier)
    )
    behind_path = None if options.behind_out is None else Path(options.behind_out)
    paths = [p for p in (plan_path, page_path, json_path, behind_path) if p is not None]
    for text_path in paths:
        check_destination(text_path, path_of(model), *inputs)
    if page_path is not None:
        start_figures()
    source = load(model)
    table = None if options.latency_table is None else Path(options.latency_table)
    _check_outputs(source, path, paths, table)

    def texts(result: Result) -> dict[Path, str]:
        contents = {}
        if plan_path is not None:
            contents[plan_path] = result.plan.to_json()
        if page_path is not None:
            contents[page_path] = write_page(result.report)
        if json_path is not None:
            contents[json_path] = json_text(result.report.to_dict())
        if folder is not None:
            points = result.report.frontier
            contents |= {folder / p.file_name: p.plan.to_json() for p in points}
        return contents

    with _new_folder(folder):
        return optimize(source, path, options, progress, texts)


@contextlib.contextmanager
def _new_folder(folder: Path | None) -> Iterator[None]:
    """A folder with nothing in it, which goes again if nothing comes into it.

    Raises
    ------
    OnnxlrError
        If there is something already, or the folder can't be made.
    """
    if folder is None:
        yield
        return
    try:
        folder.mkdir(exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"--frontier {folder}: the folder isn't empty, name a new one")
    except OSError as error:
        raise OutputError(write_failure(folder, error)) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it isn't empty
            folder.rmdir()


def model_destination(out: FileName | None, model: Model, *inputs: FileName | None) -> Path | None:
    """The path that a model is to be written to, which is none of the files that are read.

    Raises
    ------
    OnnxlrError
        If nothing can be written there, it is one of the inputs, or it ends in ``.ort``.
    """
    if out is None:
        return None
    path = Path(out)
    if path.suffix == ".ort":
        raise UsageError(
            f"{path}: ONNX Runtime takes what ends in .ort for a format of its own: name it .onnx"
        )
    check_destination(path, path_of(model), *inputs)
    return path


def _check_outputs(
    source: Source, out: Path | None, texts: Sequence[Path], latency_table: Path | None
) -> None:
    """Refuse one file for two outputs, and a file that holds weights of IN or may hold some of OUT.

    Raises
    ------
    OnnxlrError
        If an output can't be written, is named twice, or is such a file.
    """
    outputs = [path for path in (out, *texts, latency_table) if path is not None]
    check_distinct(*outputs)
    if latency_table is not None and path_exists(latency_table):
        outputs.remove(latency_table)  # it is read
    for path in outputs:
        check_external(path, source, out)
