"""Replaces a file in one step, so that an interruption leaves the old file or the new one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path`, making its folder if need be; never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def tell_table(lines: Sequence[str], path: Path | None) -> None:
    """Print a Markdown table, and write it to a file if one is named."""
    shown = "\n".join(lines)
    click.echo(shown)
    if path is not None:
        replace_file(path, f"{shown}\n".encode())
