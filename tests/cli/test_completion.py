"""Completion in real shells, by the lines that ``onnxlr completion`` prints."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from onnxlr.cli.commands import main

# What each shell does when Tab is pressed behind some words; the candidates are printed.
_COMPLETES = {
    "bash": (
        "{script}\nCOMP_WORDS=({words}); COMP_CWORD={last}; _onnxlr_completion onnxlr; "
        'printf "%s\\n" "${{COMPREPLY[@]}}"'
    ),
    "zsh": (
        "compdef() {{ :; }}; compadd() {{ print -l -- $completions; }}\n"
        "_describe() {{ print -l -- $completions_with_descriptions; }}\n"
        "{script}\nwords=({words}); CURRENT=$(({last} + 1)); _onnxlr_completion"
    ),
    "fish": "{script}\ncomplete --do-complete '{line}'",
}


def candidates(shell: str, *words: str) -> set[str]:
    """What a shell offers for the last of some words."""
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} isn't installed")
    script = CliRunner().invoke(main, ["completion", shell]).output
    line = " ".join(words)
    quoted = " ".join(f"'{word}'" for word in words)
    code = _COMPLETES[shell].format(script=script, words=quoted, last=len(words) - 1, line=line)
    folder = str(Path(sys.executable).parent)  # where the command is
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    flags = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    result = subprocess.run(
        [program, *flags, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return {part.split("\t")[0].split(":")[0] for part in result.stdout.split("\n") if part}


@pytest.mark.parametrize("shell", list(_COMPLETES))
def test_commands_flags_and_values_are_offered(shell: str) -> None:
    commands = candidates(shell, "onnxlr", "com")
    assert commands == {"compare", "completion"}
    assert {"--max-drop", "--max-slowdown"} <= candidates(shell, "onnxlr", "compare", "--max")
    assert candidates(shell, "onnxlr", "optimize", "--verify", "l") == {"layers"}


def test_an_unknown_shell_is_refused() -> None:
    result = CliRunner().invoke(main, ["completion", "tcsh"])
    assert result.exit_code == 2
    assert "'bash', 'zsh', 'fish'" in result.output
