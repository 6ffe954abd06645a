"""What each command does once its arguments are parsed: it calls the public function and prints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from onnxlr.api import functions, measure
from onnxlr.cli import storage, tables
from onnxlr.cli.console import ProgressBars, open_console
from onnxlr.cli.method_tables import show_passes
from onnxlr.errors import BudgetError
from onnxlr.methods.registry import broken_passes, installed_passes
from onnxlr.model.constants import count_params
from onnxlr.model.destinations import check_destination, check_distinct, check_external
from onnxlr.model.load import Source, load
from onnxlr.olive.package import installed_config, with_our_pass
from onnxlr.progress import Progress, Silent
from onnxlr.report.notes import fed_note, quantized_note
from onnxlr.report.report import json_text
from onnxlr.system.files import write_text

STANDARD_OUTPUT = "-"  # what --json calls it


def optimize(
    model: str,
    out: str,
    *,
    json_out: str | None,
    quiet: bool,
    method: Sequence[str],
    **options: Any,
) -> None:
    """Factorize a model; the options are those of ``onnxlr.optimize``."""
    outputs = (out, options["plan_out"], json_out, options["report"], options["behind_out"])
    table = options["latency_table"]
    check_distinct(*_files((*outputs, table)))
    progress = Silent() if quiet else ProgressBars()
    inputs = (options["data"], options["validation"], table)
    source = _read_model(progress, model, outputs, inputs, beside=Path(out))
    prints = json_out == STANDARD_OUTPUT
    result = functions.optimize(
        source,
        out,
        method=_split(method),
        json=None if prints else json_out,
        progress=progress,
        **options,
    )
    if prints:
        _write_json(STANDARD_OUTPUT, result.report.to_dict())
    elif not quiet:
        tables.show_report(open_console(), result.report)


def inspect(
    model: str, *, json_out: str | None, quiet: bool, method: Sequence[str], **options: Any
) -> None:
    """Show the layers of a model; the options are those of ``onnxlr.inspect``."""
    progress = Silent() if quiet else ProgressBars()
    source = _read_model(progress, model, (json_out,))
    rows = functions.inspect(source, method=_split(method), progress=progress, **options)
    params = count_params(source.model)
    if json_out:
        _write_json(json_out, tables.inspection_dict(rows, params))
    if not quiet and json_out != STANDARD_OUTPUT:
        notes = [*fed_note(source.model), *quantized_note(row.layer for row in rows)]
        tables.show_inspection(open_console(), rows, params, notes)


def apply(plan: str, model: str, out: str, *, data: str | None, quiet: bool) -> None:
    """Replay a plan on a model."""
    functions.apply(plan, model, out, data=data, progress=None if quiet else ProgressBars())
    if not quiet:
        open_console().print(f"{plan} replayed on {model}: wrote {out}")


def compare(a: str, b: str, *, json_out: str | None, **options: Any) -> None:
    """Compare two models; the options are those of ``onnxlr.compare``.

    Raises
    ------
    BudgetError
        If the second is outside of the limits, once everything is written and printed.
    """
    progress = ProgressBars()
    outputs, inputs = (json_out, options["markdown"]), (a, b, options["data"])
    check_distinct(*_files(outputs))
    sources = [_read_model(progress, path, outputs, inputs) for path in (a, b)]
    result = measure.compare(*sources, progress=progress, **options)
    if json_out:
        _write_json(json_out, tables.comparison_dict(result))
    if json_out != STANDARD_OUTPUT:
        tables.show_comparison(open_console(), result)
    if result.violations:
        raise BudgetError("; ".join(result.violations))


def bench(a: str, b: str | None, *, json_out: str | None, **options: Any) -> None:
    """Time one model, or two in turn; the options are those of ``onnxlr.bench``."""
    progress = ProgressBars()
    inputs = (a, b, options["data"])
    paths = [path for path in (a, b) if path is not None]
    sources = [_read_model(progress, path, (json_out,), inputs) for path in paths]
    result = measure.bench(*sources, progress=progress, **options)
    if json_out:
        _write_json(json_out, tables.benchmark_dict(result))
    if json_out != STANDARD_OUTPUT:
        tables.show_benchmark(open_console(), a, b, result)


def passes() -> None:
    """List the installed methods."""
    show_passes(open_console(), installed_passes(), broken_passes())


def completion(*, command: click.Command, shell: str) -> None:
    """Print the script with which a shell completes the words of a command."""
    kind = get_completion_class(shell)
    assert kind is not None  # the words of the command allow no other
    click.echo(kind(command, {}, "onnxlr", "_ONNXLR_COMPLETE").source())


def olive_config(*, out: str) -> None:
    """Write Olive's package configuration with our pass among its own."""
    installed = installed_config()
    check_destination(Path(out), installed)
    _write_json(out, with_our_pass(installed))
    open_console().print(
        f"wrote {out}: Olive's passes and Onnxlr; olive run … --package-config {out}"
    )


def cache(*, clear: bool, json_out: str | None) -> None:
    """Show the cache, or empty it."""
    for output in _files([json_out]):
        check_destination(output)
    state = storage.look()
    removed = storage.clear(state) if clear else None
    if removed is not None:
        state = storage.look()
    if json_out:
        _write_json(json_out, storage.cache_dict(state, removed))
    if json_out == STANDARD_OUTPUT:
        return
    if removed is None:
        storage.show_cache(open_console(), state)
    else:
        storage.show_removed(open_console(), state, removed)


def _read_model(
    progress: Progress,
    path: str,
    outputs: Sequence[str | None],
    inputs: Sequence[str | None] = (),
    beside: Path | None = None,
) -> Source:
    """Read a model, once every output can be written and none of them is a file that is read.

    Nor may an output be the external data of the model, or the file that may have to hold those of
    OUT (``beside``).
    """
    for output in _files(outputs):
        check_destination(output, path, *inputs)
    with progress.stage(f"read {path}", None):
        source = load(path)
    for output in _files(outputs):
        check_external(output, source, beside)
    return source


def _files(names: Sequence[str | None]) -> list[Path]:
    """The paths among the outputs that a user named."""
    return [Path(name) for name in names if name is not None and name != STANDARD_OUTPUT]


def _split(names: Sequence[str]) -> tuple[str, ...]:
    """Names that were repeated or separated by commas."""
    return tuple(part.strip() for name in names for part in name.split(",") if part.strip())


def _write_json(target: str, content: dict[str, Any]) -> None:
    text = json_text(content)
    if target == STANDARD_OUTPUT:
        click.echo(text, nl=False)
    else:
        write_text(Path(target), text)
