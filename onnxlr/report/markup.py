"""The pieces of HTML that the report is built from; all text of the user's is escaped here."""

import re
from collections.abc import Iterable, Sequence
from html import escape as escape_html

# What HTML or XML can't hold (control characters, half surrogates, noncharacters), and what turns
# the reading direction of the text behind it.
_UNWRITABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]"
)


def escape(text: object) -> str:
    """Any text, made safe as the content of an element or of a quoted attribute.

    Examples
    --------
    >>> escape('<conv "1">')
    '&lt;conv &quot;1&quot;&gt;'
    """
    return escape_html(_UNWRITABLE.sub("\ufffd", str(text)))


def name_element(name: str) -> str:
    """A name from the user's model as an element that wraps anywhere, in any reading direction."""
    return f'<bdi class="name">{escape(name)}</bdi>'


def section(title: str, *parts: str) -> str:
    """A part of the page under a heading; empty parts are left out."""
    return (
        f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(p for p in parts if p) + "\n</section>"
    )


def details(title: str, content: str) -> str:
    """Content that is folded under its title until the reader opens it."""
    return f"<details><summary>{escape(title)}</summary>\n{content}\n</details>"


def definition_list(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of (term, description); the description is HTML already."""
    rows = "\n".join(f"<div><dt>{escape(term)}</dt><dd>{value}</dd></div>" for term, value in pairs)
    return f"<dl>\n{rows}\n</dl>"


def table(caption: str, columns: Sequence[tuple[str, str]], rows: Iterable[str]) -> str:
    """A table that scrolls inside its box: columns of (class, title), rows of ``table_row``."""
    head = "".join(f'<th scope="col"{_class(kind)}>{escape(title)}</th>' for kind, title in columns)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">\n<table>\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody>\n</table>\n</div>"
    )


def table_row(
    head: str, columns: Sequence[tuple[str, str]], texts: Sequence[str], kind: str = ""
) -> str:
    """A row of a table: its heading, which is HTML already, and a cell for each other column.

    Where the page is narrow, a row is a card: the title of its column stands before each cell.

    Examples
    --------
    >>> table_row("bytes", [("", "size"), ("number", "original")], ["12"])
    '<tr><th scope="row">bytes</th><td class="number" data-title="original">12</td></tr>'
    """
    cells = "".join(
        f'<td{_class(style)} data-title="{escape(title)}">{escape(text)}</td>'
        for (style, title), text in zip(columns[1:], texts, strict=True)
    )
    return f'<tr{_class(kind)}><th scope="row">{head}</th>{cells}</tr>'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
