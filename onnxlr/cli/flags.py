"""Flags that several commands share."""

from collections.abc import Callable
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _together(*flags: Decorator) -> Decorator:
    """One decorator that adds several flags; they are listed in this order."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for flag in reversed(flags):
            function = flag(function)
        return function

    return add


def no_dash(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Refuse - as the name of a file that isn't printed."""
    if value == "-":
        raise click.UsageError("- prints, which only --json does: name a file, or ./-")
    return value


labels_flag = click.option(
    "--labels", metavar="NAME", help="Name of the array of integer labels in the samples."
)
shape_flag = click.option(
    "--shape",
    multiple=True,
    metavar="NAME:1,3,224,224",
    help="Size of an input with dynamic axes; repeat the flag for more inputs.",
)
seed_flag = click.option(
    "--seed",
    default=0,
    show_default=True,
    help="Seed of the random splits and of synthetic inputs.",
)
json_flag = click.option(
    "--json", "json_out", metavar="FILE", help="Write the result here as JSON; - prints it."
)

# Where and how speed is measured.
machine_flags = _together(
    click.option(
        "--provider",
        multiple=True,
        default=("cpu",),
        show_default=True,
        metavar="NAME",
        help="Execution provider of ONNX Runtime, such as openvino, cuda or tensorrt; repeat the "
        "flag, or separate names by commas, for several in their order.",
    ),
    click.option(
        "--provider-option",
        multiple=True,
        metavar="KEY=VALUE",
        help="Option of the first provider; NAME:KEY=VALUE for another. Repeat the flag for more.",
    ),
    click.option(
        "--provider-library",
        multiple=True,
        metavar="NAME=PATH",
        help="Library of a plugin that brings a provider, registered by this name.",
    ),
    click.option(
        "--threads",
        default=1,
        show_default=True,
        help="Number of intra-op threads of ONNX Runtime, and of a provider that has its own.",
    ),
    click.option(
        "--batch", default=1, show_default=True, help="Number of samples in the timed batch."
    ),
    shape_flag,
)

# What will be done to the result.
behind_flags = _together(
    click.option(
        "--behind",
        metavar="NAME",
        help="Step that will follow onnxlr: int8-dynamic, int8-static, fp16, or module:function, "
        "which takes the path of a model and returns that of another. IN and all that is tried are "
        "judged and timed after this step; OUT is the file before it.",
    ),
    click.option(
        "--behind-out",
        metavar="FILE",
        callback=no_dash,
        help="Write what --behind makes of OUT here: the very file that was judged and timed.",
    ),
)

# Which layers may be replaced, and by which methods.
choice_flags = _together(
    click.option(
        "--method",
        multiple=True,
        default=("auto",),
        show_default=True,
        metavar="NAME",
        help="Limit the choice to this method; repeat the flag, or separate names by commas, for "
        "more. `onnxlr passes` lists them.",
    ),
    click.option(
        "--include",
        metavar="REGEX",
        help="Take only layers whose own name, or that of their weight or a node, matches.",
    ),
    click.option(
        "--exclude",
        metavar="REGEX",
        help="Leave alone layers whose own name, or that of their weight or a node, matches.",
    ),
)

# What the second of two models may be worse by.
gate_flags = _together(
    click.option(
        "--max-drop",
        type=float,
        metavar="X",
        help="Exit with 3 if the metric loses more than that; 1 = no limit.",
    ),
    click.option(
        "--max-slowdown",
        type=float,
        metavar="X",
        help="Exit with 3 if B takes longer than A by more than this share: 0.05 is 5%. What may "
        "be noise isn't counted.",
    ),
    click.option(
        "--markdown",
        metavar="FILE",
        callback=no_dash,
        help="Write the comparison here as Markdown, for the summary of a step in CI.",
    ),
)
