"""Commands around the work: what is installed, what is kept, and what other programs need."""

from typing import Any

import click

from onnxlr.cli.flags import json_flag, no_dash
from onnxlr.cli.group import Command


@click.command(cls=Command)
def passes() -> None:
    """List the installed methods, built-in and third-party.

    \b
    Example:
      onnxlr passes
    """
    from onnxlr.cli import actions

    actions.passes()


@click.command(cls=Command)
@click.option("--clear", is_flag=True, help="Empty the cache; other files in its folder stay.")
@json_flag
def cache(**arguments: Any) -> None:
    """Show what the cache keeps for later runs, or empty it.

    The output says where the cache is, its size, and when it was last used. The variable
    ONNXLR_CACHE names another folder, or turns the cache off with "off"; ONNXLR_CACHE_SIZE=500MB
    sets another size than 1 GB. When it is full, the entries that were not used for the longest
    time are removed.

    \b
    Examples:
      onnxlr cache
      onnxlr cache --clear
    """
    from onnxlr.cli import actions

    actions.cache(**arguments)


@click.command(cls=Command)
@click.argument("shell", metavar="SHELL", type=click.Choice(["bash", "zsh", "fish"]))
def completion(**arguments: Any) -> None:
    """Print what a SHELL needs to complete commands and flags.

    \b
    Examples:
      onnxlr completion bash >> ~/.bashrc
      onnxlr completion zsh >> ~/.zshrc
      onnxlr completion fish > ~/.config/fish/completions/onnxlr.fish
    """
    from onnxlr.cli import actions

    actions.completion(command=click.get_current_context().find_root().command, **arguments)


@click.command("olive-config", cls=Command)
@click.argument("out", metavar="[FILE]", default="olive_config.json", callback=no_dash)
def olive_config(**arguments: Any) -> None:
    """Write what Microsoft Olive needs to find the pass Onnxlr.

    FILE, olive_config.json by default, is the package configuration of the Olive that is installed
    here, with that pass among its own.

    \b
    Example:
      onnxlr olive-config
      olive run --config run.json --package-config olive_config.json
    """
    from onnxlr.cli import actions

    actions.olive_config(**arguments)
