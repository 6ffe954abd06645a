"""The ``onnxlr`` command."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from onnxlr import api
from onnxlr.cli import tables
from onnxlr.cli.console import EXPECTED_ERRORS, ProgressBars, message_of, open_console
from onnxlr.cli.flags import filter_options, machine_options
from onnxlr.errors import OnnxlrError
from onnxlr.methods.registry import installed_passes
from onnxlr.model.destinations import check_destination, check_distinct, check_external
from onnxlr.model.load import Source, load
from onnxlr.progress import Progress, Silent
from onnxlr.report.report import json_text
from onnxlr.system.files import write_text
from onnxlr.system.signals import (
    EXIT_INTERRUPTED,
    Interrupt,
    handle_end_signals,
    ignore_signal,
    restore_default_handlers,
)
from onnxlr.version import __version__

_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Group(click.Group):
    """Turns what onnxlr refuses into one line and the exit code of its kind."""

    def invoke(self, ctx: click.Context) -> Any:
        stop = Interrupt()
        if threading.current_thread() is threading.main_thread():
            # A stop asked for by a scheduler, or a terminal that goes, cleans up as Ctrl-C does.
            handle_end_signals(stop)
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException):
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or stop.raised:  # or what a library made of it
                handle_end_signals(ignore_signal)
                click.echo("onnxlr: interrupted; no file was left half-written", err=True)
                ctx.exit(EXIT_INTERRUPTED)
            wanted = os.environ.get("ONNXLR_TRACEBACK") and not isinstance(error, EXPECTED_ERRORS)
            if wanted and isinstance(error, Exception):
                raise
            # Methods, and what they call, may have ends of their own: they aren't the command's.
            if text := message_of(error):
                click.echo(f"onnxlr: {text}", err=True)
            ctx.exit(error.exit_code if isinstance(error, OnnxlrError) else 1)


if hasattr(os, "register_at_fork"):  # a metric's own processes end as any others do
    os.register_at_fork(after_in_child=restore_default_handlers)


@click.group(cls=_Group, context_settings=_HELP)
@click.version_option(__version__, prog_name="onnxlr")
def main() -> None:
    """Replace the heavy weights of an ONNX model by low-rank chains.

    The result is an ONNX model of standard operators: smaller, measurably faster, within the
    accuracy you allow, with a reason for every layer.

    \b
    Example:
      onnxlr optimize model.onnx small.onnx --data samples.npz --labels label
    """


@main.command()
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT")
@click.option(
    "--data",
    metavar="FILE",
    help="Samples: .npz with an array per input, .npy, or a "
    "folder of such files. Without it, synthetic inputs judge.",
)
@click.option("--validation", metavar="FILE", help="Samples to judge on; default: half of --data.")
@click.option("--labels", metavar="NAME", help="Name of the array of labels in the samples.")
@click.option(
    "--metric",
    metavar="NAME",
    help="top1, agreement, rel-error, cosine or "
    "module:function. Default: top1 with labels, else agreement for class scores, else "
    "rel-error.",
)
@click.option(
    "--max-drop", default=0.01, show_default=True, help="Largest loss of the metric; 1 = no limit."
)
@click.option(
    "--target",
    metavar="NAME[=FRACTION]",
    help="What to save: latency, macs, params or bytes [default: latency, which puts back what "
    "isn't measurably faster; with a named --rank it only does so when asked for here]. With a "
    "fraction (macs=0.5) the least damaging model within that share of the original's.",
)
@filter_options
@click.option(
    "--rank",
    default="auto",
    show_default=True,
    metavar="RANK",
    help="auto, evbmf, exact, a number, a pair (16,32), a rank on p×q tiles (8,2,2), a fraction of "
    "the full rank (0.5), or energy:0.95.",
)
@machine_options
@click.option(
    "--verify",
    type=click.Choice(["full", "layers", "none"]),
    default="full",
    show_default=True,
    help="Run the saved model beside the original; or each replaced layer alone, for models that "
    "can't be run here; or only check the graph.",
)
@click.option(
    "--expand-at-load",
    is_flag=True,
    help="Also store weights, of any operator, as factors that are multiplied when the session "
    "loads: a smaller file, the same run time.",
)
@click.option(
    "--no-measure",
    "measure",
    flag_value=False,
    default=True,
    help="Time nothing: estimate latencies from the work, for a machine that isn't at hand.",
)
@click.option(
    "--latency-table",
    metavar="FILE",
    help="Latencies in place of this machine's own: written if it isn't there, so that a run on "
    "the machine that counts makes it; one of another machine is used as it is.",
)
@click.option(
    "--without",
    multiple=True,
    metavar="NAME",
    help="Leave out data, sensitivity or sequential, to see what each brings; repeat for more.",
)
@click.option("--plan-out", metavar="FILE", help="Write the plan, for `onnxlr apply`.")
@click.option("--report", metavar="FILE", help="Write the report as a self-contained HTML page.")
@click.option("--json", "json_out", metavar="FILE", help="Write the report as JSON (- to print).")
@click.option("--seed", default=0, show_default=True, help="Of splits and synthetic inputs.")
@click.option(
    "--jobs",
    type=int,
    help="Processes for what can be computed side by side [default: as many as cores]. Nothing is "
    "timed meanwhile.",
)
@click.option(
    "--dask",
    metavar="ADDRESS",
    help="Let the workers of a dask scheduler do that, to the same bytes; they read IN from the "
    "same path.",
)
@click.option("--quiet", is_flag=True, help="No progress and no tables.")
def optimize(
    source: str,
    out: str,
    json_out: str | None,
    quiet: bool,
    method: tuple[str, ...],
    **options: Any,
) -> None:
    """Factorize IN and write OUT, verified beside the original.

    Exit codes: 0 written (also "no gain", then OUT equals IN), 1 the model or data can't be used,
    2 wrong usage, 3 the budget asked for with --target can't be met.

    \b
    Examples:
      onnxlr optimize net.onnx small.onnx --data samples.npz --labels label
      onnxlr optimize net.onnx small.onnx --data samples.npz --target macs=0.5 --max-drop 0.02
      onnxlr optimize net.onnx small.onnx --rank energy:0.95 --max-drop 0.02
      onnxlr optimize net.onnx small.onnx --method svd --include 'ffn' --plan-out plan.json
    """
    outputs = (out, options["plan_out"], json_out, options["report"])
    if "-" in (out, options["plan_out"], options["report"]):
        raise click.UsageError("- prints, which only --json does: name a file, or ./-")
    table = options["latency_table"]
    check_distinct(*(Path(p) for p in (*outputs, table) if p is not None and p != "-"))
    told = Silent() if quiet else ProgressBars()
    given = _opened(
        told, source, outputs, options["data"], options["validation"], table, beside=Path(out)
    )
    file = None if json_out == "-" else json_out
    result = api.optimize(given, out, method=_split(method), json=file, progress=told, **options)
    if json_out == "-":
        _write_json(json_out, result.report.to_dict())
    if not quiet and json_out != "-":
        tables.show_report(open_console(), result.report)


@main.command()
@click.argument("source", metavar="IN")
@filter_options
@click.option("--batch", default=1, show_default=True, help="Batch that MACs are counted for.")
@click.option(
    "--shape",
    multiple=True,
    metavar="NAME:1,3,224,224",
    help="Size of an input with dynamic axes; repeat for more.",
)
@click.option("--json", "json_out", metavar="FILE", help="Write it as JSON (- to print).")
@click.option("--quiet", is_flag=True, help="No progress and no table.")
def inspect(
    source: str, method: tuple[str, ...], json_out: str | None, quiet: bool, **options: Any
) -> None:
    """Show every layer of IN: shape, spectrum, EVBMF rank, methods that fit, reasons.

    Nothing is run and nothing is written.

    \b
    Example:
      onnxlr inspect net.onnx --include 'conv'
    """
    told = Silent() if quiet else ProgressBars()
    given = _opened(told, source, (json_out,))
    rows = api.inspect(given, method=_split(method), progress=told, **options)
    if json_out:
        _write_json(json_out, tables.inspection_dict(rows))
    if not quiet and json_out != "-":
        tables.show_inspection(open_console(), rows)


@main.command()
@click.argument("plan", metavar="PLAN")
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT")
@click.option(
    "--data", metavar="FILE", help="The samples that factors were fitted to, if they have moved."
)
@click.option("--quiet", is_flag=True, help="Say nothing.")
def apply(plan: str, source: str, out: str, data: str | None, quiet: bool) -> None:
    """Replay a PLAN on the model it was made for: OUT is byte-identical.

    \b
    Example:
      onnxlr optimize net.onnx small.onnx --plan-out plan.json
      onnxlr apply plan.json net.onnx again.onnx
    """
    api.apply(plan, source, out, data=data, progress=None if quiet else ProgressBars())
    if not quiet:
        open_console().print(f"{plan} replayed on {source}: wrote {out}")


@main.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--data", metavar="FILE", help="Samples to compare on; default: synthetic inputs.")
@click.option("--labels", metavar="NAME", help="Name of the array of labels in the samples.")
@click.option(
    "--metric", metavar="NAME", help="top1, agreement, rel-error, cosine or module:function."
)
@machine_options
@click.option("--seed", default=0, show_default=True, help="Of splits and synthetic inputs.")
@click.option("--json", "json_out", metavar="FILE", help="Write it as JSON (- to print).")
def compare(a: str, b: str, json_out: str | None, **options: Any) -> None:
    """Set B beside A: fidelity, accuracy, size, MACs and speed.

    \b
    Example:
      onnxlr compare net.onnx small.onnx --data samples.npz --labels label
    """
    told = ProgressBars()
    sources = [_opened(told, path, (json_out,), a, b, options["data"]) for path in (a, b)]
    result = api.compare(*sources, progress=told, **options)
    if json_out:
        _write_json(json_out, tables.comparison_dict(result))
    if json_out != "-":
        tables.show_comparison(open_console(), result)


@main.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="[B]", required=False)
@click.option("--data", metavar="FILE", help="Samples to time on; default: synthetic inputs.")
@machine_options
@click.option("--seconds", default=5.0, show_default=True, help="Rough length of the run.")
@click.option("--seed", default=0, show_default=True, help="Of splits and synthetic inputs.")
@click.option("--json", "json_out", metavar="FILE", help="Write it as JSON (- to print).")
def bench(a: str, b: str | None, json_out: str | None, **options: Any) -> None:
    """Time A on ONNX Runtime, or A and B in turn in one run.

    A difference inside the noise is not called a gain.

    \b
    Example:
      onnxlr bench net.onnx small.onnx --batch 16 --threads 2
    """
    told = ProgressBars()
    paths = [path for path in (a, b) if path is not None]
    sources = [_opened(told, path, (json_out,), a, b, options["data"]) for path in paths]
    result = api.bench(*sources, progress=told, **options)
    if json_out:
        _write_json(json_out, tables.benchmark_dict(result))
    if json_out != "-":
        tables.show_benchmark(open_console(), a, b, result)


@main.command()
def passes() -> None:
    """List the installed methods, built-in and third-party.

    \b
    Example:
      onnxlr passes
    """
    tables.show_passes(open_console(), installed_passes())


def _opened(
    told: Progress,
    source: str,
    outputs: Sequence[str | None],
    *others: str | None,
    beside: Path | None = None,
) -> Source:
    """The model, once no output is one of the files that are read, its external data among them.

    Nor what may have to go beside OUT.
    """
    _check_outputs(outputs, source, *others)
    with told.stage(f"read {source}", None):
        given = load(source)
    for path in (Path(p) for p in outputs if p is not None and p != "-"):
        check_external(path, given, beside)
    return given


def _check_outputs(outputs: Sequence[str | None], *sources: str | None) -> None:
    """Refuse outputs that can't be written, or are files that are read."""
    for path in (Path(p) for p in outputs if p is not None and p != "-"):
        check_destination(path, *sources)


def _split(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(part.strip() for name in names for part in name.split(",") if part.strip())


def _write_json(target: str, content: dict[str, Any]) -> None:
    text = json_text(content)
    if target == "-":
        click.echo(text, nl=False)
    else:
        write_text(Path(target), text)
