"""Command that writes the generated parts of the documents anew, between their markers.

``python -m models.documents`` writes the README's table of methods from the installed passes, and
the commands, flags and exit codes of REFERENCE.md from the command line. All other text is written
by hand.
"""

from collections.abc import Iterator, Sequence
from inspect import cleandoc
from pathlib import Path

import click

from onnxlr.cli.commands import main as onnxlr_command
from onnxlr.cli.method_tables import PASS_COLUMNS, pass_rows
from onnxlr.errors import OnnxlrError
from onnxlr.methods.registry import installed_passes
from onnxlr.system.signals import EXIT_INTERRUPTED

ROOT = Path(__file__).parent.parent
README, REFERENCE = ROOT / "README.md", ROOT / "REFERENCE.md"


def replace_part(text: str, name: str, part: str) -> str:
    """Return a document with ``part`` between its markers ``<!-- name -->`` and ``<!-- /name -->``.

    >>> replace_part("a <!-- x -->old<!-- /x --> b", "x", "new")
    'a <!-- x -->\\nnew<!-- /x --> b'
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n{part}{end}{tail}"


def readme(text: str) -> str:
    """Return the README with its generated part as it should be."""
    return replace_part(text, "passes", passes_table())


def reference(text: str) -> str:
    """Return REFERENCE.md with its generated parts as they should be."""
    sections = [_command_section(name, c) for name, c in onnxlr_command.commands.items()]
    text = replace_part(text, "commands", "\n".join(sections))
    return replace_part(text, "exit codes", exit_codes_table())


def passes_table() -> str:
    """Return the built-in methods as a table of Markdown; `onnxlr passes` has numbers of papers."""
    rows = [row[:-1] for row in pass_rows(installed_passes()) if row[-1] == "onnxlr"]
    cells = [(f"`{name}`", *rest, paper.split(", arXiv")[0]) for name, *rest, paper in rows]
    return _table(PASS_COLUMNS[:-1], cells)


def exit_codes_table() -> str:
    """Return what each exit code means as a table of Markdown."""
    causes: dict[int, list[str]] = {}
    for error in _errors(OnnxlrError):
        causes.setdefault(error.exit_code, []).append(_one_line(error.__doc__))
    causes[0] = ["OUT, or what was asked for, is written. OUT may equal IN: that is “no gain”."]
    causes[1].append("Memory ran out, or onnxlr itself has a defect.")
    causes[2].append("A flag is unknown, or its value has the wrong form.")
    causes[EXIT_INTERRUPTED] = ["The command was interrupted, by Ctrl-C, SIGTERM or SIGHUP."]
    rows = [(str(code), " ".join(texts)) for code, texts in sorted(causes.items())]
    return _table(("exit code", "meaning"), rows)


def _errors(kind: type[OnnxlrError]) -> Iterator[type[OnnxlrError]]:
    """Yield the kinds of errors below one, in the order in which they are defined."""
    for inner in kind.__subclasses__():
        if inner.__module__ == OnnxlrError.__module__:
            yield inner
            yield from _errors(inner)


def _command_section(name: str, command: click.Command) -> str:
    """Return the section of one command: its usage, its help, its examples and its flags."""
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    usage = " ".join(["onnxlr", name, *(a.metavar or (a.name or "").upper() for a in arguments)])
    options = [p for p in command.params if isinstance(p, click.Option)]
    rows = [(f"`{_spelled(o)}`", _default(o), _one_line(o.help)) for o in options if not o.hidden]
    parts = [f"### `{usage}`", *_paragraphs(command.help or "")]
    if rows:
        parts.append(_table(("flag", "default", "meaning"), rows).rstrip())
    return "\n\n".join(parts) + "\n"


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of a command's help; examples, which click doesn't wrap, as code."""
    for paragraph in cleandoc(text).split("\n\n"):
        if not paragraph.startswith("\b\n"):
            yield _one_line(paragraph)
            continue
        _, _title, *lines = paragraph.splitlines()
        yield "\n".join(["```", *(line.strip() for line in lines), "```"])


def _spelled(option: click.Option) -> str:
    """Return a flag with the placeholder of its value."""
    if option.is_flag:
        return option.opts[0]
    if isinstance(option.type, click.Choice):
        value = "|".join(map(str, option.type.choices))
    else:
        value = option.metavar or {"integer": "N", "float": "X"}.get(option.type.name, "VALUE")
    return f"{option.opts[0]} {value}"


def _default(option: click.Option) -> str:
    """Return the default of a flag if its help shows it."""
    if not option.show_default:
        return ""
    default = option.default
    return ", ".join(map(str, default)) if isinstance(default, (tuple, list)) else str(default)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    cells = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Write the generated parts of README.md and REFERENCE.md anew."""
    for path, renew in ((README, readme), (REFERENCE, reference)):
        path.write_text(renew(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
