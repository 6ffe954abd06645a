"""The pieces of HTML that the report is built from; all that a user named is escaped here."""

import re
from collections.abc import Iterable, Sequence
from html import escape

# What HTML or XML can't hold (control characters, half surrogates, noncharacters), and what turns
# the reading direction of the text behind it.
_UNWRITABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]"
)


def said(text: object) -> str:
    """Any text as the content of an element or of a quoted attribute.

    Examples
    --------
    >>> said('<conv "1">')
    '&lt;conv &quot;1&quot;&gt;'
    """
    return escape(_UNWRITABLE.sub("\ufffd", str(text)))


def named(name: str) -> str:
    """A name from the user's model: it wraps anywhere, and its direction stays its own."""
    return f'<bdi class="name">{said(name)}</bdi>'


def section(title: str, *parts: str) -> str:
    """A part of the page under its own heading."""
    return (
        f"<section>\n<h2>{said(title)}</h2>\n" + "\n".join(p for p in parts if p) + "\n</section>"
    )


def folded(title: str, content: str) -> str:
    """Content that is shown when it is asked for."""
    return f"<details><summary>{said(title)}</summary>\n{content}\n</details>"


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Terms with what they stand for; the latter is HTML already."""
    rows = "\n".join(f"<div><dt>{said(term)}</dt><dd>{value}</dd></div>" for term, value in pairs)
    return f"<dl>\n{rows}\n</dl>"


def table(caption: str, columns: Sequence[tuple[str, str]], rows: Iterable[str]) -> str:
    """A table that scrolls inside its own box: columns of (class, title), rows from ``row``."""
    head = "".join(f'<th scope="col"{_class(kind)}>{said(title)}</th>' for kind, title in columns)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{said(caption)}">\n<table>\n'
        f"<caption>{said(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody>\n</table>\n</div>"
    )


def row(head: str, cells: Iterable[tuple[str, str]], kind: str = "") -> str:
    """A row of a table: what it is about, and cells of (class, text).

    Examples
    --------
    >>> row("bytes", [("number", "12")])
    '<tr><th scope="row">bytes</th><td class="number">12</td></tr>'
    """
    written = "".join(f"<td{_class(style)}>{said(text)}</td>" for style, text in cells)
    return f'<tr{_class(kind)}><th scope="row">{head}</th>{written}</tr>'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
