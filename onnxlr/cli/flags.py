"""Flags that several commands share."""

from collections.abc import Callable
from typing import Any

import click


def machine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags that say where and how speed is measured."""
    for option in (
        click.option(
            "--shape",
            multiple=True,
            metavar="NAME:1,3,224,224",
            help="Size of an input with dynamic axes; repeat for more.",
        ),
        click.option("--batch", default=1, show_default=True, help="Batch that is timed."),
        click.option("--threads", default=1, show_default=True, help="Intra-op threads."),
        click.option(
            "--provider",
            type=click.Choice(["cpu", "cuda"]),
            default="cpu",
            show_default=True,
            help="Execution provider of ONNX Runtime.",
        ),
    ):
        function = option(function)
    return function


def filter_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags that name the layers, methods and ranks."""
    for option in (
        click.option("--exclude", metavar="REGEX", help="Leave these layers as they are."),
        click.option("--include", metavar="REGEX", help="Only layers whose names match."),
        click.option(
            "--method",
            multiple=True,
            default=("auto",),
            show_default=True,
            metavar="NAME",
            help="Limit the choice to this method; repeat or separate "
            "by commas for more. `onnxlr passes` lists them.",
        ),
    ):
        function = option(function)
    return function
