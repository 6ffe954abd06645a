"""The ``onnxlr`` command: the flags of each of its commands, and their help.

Only what is needed to read words is imported here; what a command does is in ``actions``, which is
imported once they are read.
"""

from typing import Any

import click

from onnxlr.cli.flags import (
    behind_flags,
    choice_flags,
    gate_flags,
    json_flag,
    labels_flag,
    machine_flags,
    no_dash,
    seed_flag,
    shape_flag,
)
from onnxlr.cli.group import EPILOG, CommandGroup
from onnxlr.cli.housekeeping import cache, completion, olive_config, passes
from onnxlr.version import __version__

_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=CommandGroup, context_settings=_HELP, epilog=EPILOG)
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
@click.argument("model", metavar="IN")
@click.argument("out", metavar="OUT", callback=no_dash)
@click.option(
    "--data",
    metavar="FILE",
    help="Samples to fit factors to, to choose by and to test on: a .npz with one array per input, "
    "a .npy, or a folder of such files. Without them, synthetic inputs judge.",
)
@click.option(
    "--validation", metavar="FILE", help="Samples to test on, in place of half of --data."
)
@labels_flag
@click.option(
    "--metric",
    metavar="NAME",
    help="Metric that judges: top1, agreement, rel-error, cosine or module:function. By default it "
    "is what fits the outputs: for class scores top1 with labels, else agreement; cosine for "
    "embeddings; rel-error for all else.",
)
@click.option(
    "--max-drop",
    type=float,
    metavar="X",
    help="Largest loss of the metric that is allowed: 0.01 is a point of accuracy, 1 is no limit. "
    "By default 0.01 for top1, agreement and a function, 0.02 for cosine, and 0.05 for rel-error.",
)
@click.option(
    "--confidence",
    type=float,
    metavar="P",
    help="Confidence at which the test samples have to show that the loss is within --max-drop "
    "[default: 0.95, or the highest that so many samples can show]. 0.5 is about as strict as "
    "comparing two numbers.",
)
@click.option(
    "--target",
    metavar="NAME[=FRACTION]",
    help="What to save: latency (the default), macs, params or bytes. With latency, layers that "
    "aren't measurably faster are put back; beside a named --rank, only if latency is named here. "
    "With a fraction (macs=0.5) the result is the least damaging model within that share of the "
    "original's.",
)
@choice_flags
@click.option(
    "--rank",
    default="auto",
    show_default=True,
    metavar="RANK",
    help="Rank of every layer: auto, evbmf, exact, a number, a pair (16,32), a rank on p×q tiles "
    "(8,2,2), a fraction of the full rank (0.5), or energy:0.95.",
)
@machine_flags
@click.option(
    "--verify",
    type=click.Choice(["full", "layers", "none"]),
    default="full",
    show_default=True,
    help="full runs the saved model beside the original; layers runs each replaced layer alone, "
    "for models that can't be run here; none only checks the graph.",
)
@click.option(
    "--expand-at-load",
    is_flag=True,
    help="Also store weights, of any operator, as factors that are multiplied when the session "
    "loads: the file gets smaller, the run time stays the same.",
)
@behind_flags
@click.option(
    "--no-measure",
    "measure",
    flag_value=False,
    default=True,
    help="Time nothing: latencies are estimated from the work, for a machine that isn't at hand.",
)
@click.option(
    "--remeasure",
    is_flag=True,
    help="Take all timings anew, in place of those that earlier runs left.",
)
@click.option(
    "--latency-table",
    metavar="FILE",
    help="Latencies to use in place of this machine's. If there is no such file, it is written: "
    "make it by a run on the target machine. A table of another machine is used as it is.",
)
@click.option(
    "--without",
    multiple=True,
    metavar="NAME",
    help="Leave out data, sensitivity, sequential or widths, to see what each brings; repeat the "
    "flag for more.",
)
@click.option(
    "--plan-out",
    metavar="FILE",
    callback=no_dash,
    help="Write the plan here, for `onnxlr apply`.",
)
@click.option(
    "--report",
    metavar="FILE",
    callback=no_dash,
    help="Write the report here as a self-contained HTML page.",
)
@click.option(
    "--frontier",
    metavar="DIR",
    callback=no_dash,
    help="Write the plan of every model that was judged into this new folder: `onnxlr apply` makes "
    "any of them.",
)
@json_flag
@seed_flag
@click.option(
    "--time-limit",
    type=float,
    metavar="SECONDS",
    help="Longest time that the run should take: to keep it, less is tried and timed, and a note "
    "says what was left out.",
)
@click.option(
    "--jobs",
    type=int,
    help="Number of processes for what can be computed side by side [default: as many as there are "
    "cores]. Nothing is timed while they work.",
)
@click.option(
    "--dask",
    metavar="ADDRESS",
    help="Let the workers of this dask scheduler do that work; OUT has the same bytes. They read "
    "IN from the path it has here.",
)
@click.option("--quiet", is_flag=True, help="Print no progress and no tables.")
def optimize(**arguments: Any) -> None:
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
    from onnxlr.cli import actions

    actions.optimize(**arguments)


@main.command()
@click.argument("model", metavar="IN")
@choice_flags
@click.option(
    "--batch",
    default=1,
    show_default=True,
    help="Number of samples in the batch that MACs are counted for.",
)
@shape_flag
@json_flag
@click.option("--quiet", is_flag=True, help="Print no progress and no table.")
def inspect(**arguments: Any) -> None:
    """Show every layer of IN, and which methods fit it.

    For each layer: its shape, spectrum, EVBMF rank and reasons. Nothing is run and nothing is
    written.

    \b
    Example:
      onnxlr inspect net.onnx --include 'conv'
    """
    from onnxlr.cli import actions

    actions.inspect(**arguments)


@main.command()
@click.argument("plan", metavar="PLAN")
@click.argument("model", metavar="IN")
@click.argument("out", metavar="OUT")
@click.option(
    "--data", metavar="FILE", help="Samples that factors were fitted to, if they have moved."
)
@click.option("--quiet", is_flag=True, help="Print nothing.")
def apply(**arguments: Any) -> None:
    """Replay a PLAN on the model it was made for.

    The same plan gives the same OUT, byte for byte.

    \b
    Example:
      onnxlr optimize net.onnx small.onnx --plan-out plan.json
      onnxlr apply plan.json net.onnx again.onnx
    """
    from onnxlr.cli import actions

    actions.apply(**arguments)


@main.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--data", metavar="FILE", help="Samples to compare on. Without them, inputs are synthetic."
)
@labels_flag
@click.option(
    "--metric",
    metavar="NAME",
    help="Metric that judges: top1, agreement, rel-error, cosine or module:function.",
)
@gate_flags
@machine_flags
@seed_flag
@json_flag
def compare(**arguments: Any) -> None:
    """Set B beside A: fidelity, accuracy, size, MACs and speed.

    With limits it is a gate: the exit code is 3 where B breaks one.

    \b
    Examples:
      onnxlr compare net.onnx small.onnx --data samples.npz --labels label
      onnxlr compare main.onnx mine.onnx --data s.npz --max-drop 0.01 --max-slowdown 0.05
    """
    from onnxlr.cli import actions

    actions.compare(**arguments)


@main.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="[B]", required=False)
@click.option(
    "--data", metavar="FILE", help="Samples to time on. Without them, inputs are synthetic."
)
@machine_flags
@click.option(
    "--seconds", default=5.0, show_default=True, help="Seconds that the timing takes, roughly."
)
@seed_flag
@json_flag
def bench(**arguments: Any) -> None:
    """Time A on ONNX Runtime, or A and B in turn in one run.

    A difference inside the noise is not called a gain.

    \b
    Example:
      onnxlr bench net.onnx small.onnx --batch 16 --threads 2
    """
    from onnxlr.cli import actions

    actions.bench(**arguments)


for command in (passes, cache, completion, olive_config):
    main.add_command(command)
