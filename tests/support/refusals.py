"""Commands that have to be refused in a line, and leave every file as it was."""

from pathlib import Path

from click.testing import CliRunner

from onnxlr.cli.commands import main


def refusal_of(command: str) -> str:
    """Run a command that must be refused, and return its line."""
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("onnxlr: ")
    assert "internal error" not in line
    assert line.isprintable()
    assert len(line) < 2000
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before
    return line
