"""Write the README's table of methods anew from the installed passes."""

from pathlib import Path

from onnxlr.cli.tables import PASS_COLUMNS, pass_rows
from onnxlr.methods.registry import installed_passes

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- passes -->\n", "<!-- /passes -->"


def passes_table() -> str:
    """The built-in passes as Markdown."""
    rows = [row[:-1] for row in pass_rows(installed_passes()) if row[-1] == "onnxlr"]
    columns = PASS_COLUMNS[:-1]
    lines = [columns, ("---",) * len(columns), *((f"`{name}`", *rest) for name, *rest in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Replace what stands between the marks."""
    text = README.read_text(encoding="utf-8")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(f"{head}{BEGIN}{passes_table()}{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
