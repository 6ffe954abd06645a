"""Low rank, the step of ``--behind``, both or neither: the rows, and the section of the page."""

from collections.abc import Iterator

from onnxlr.report.markup import escape, section, table, table_row
from onnxlr.report.report import Report
from onnxlr.types import ms_text

COLUMNS = (
    ("word", "what is used"),
    ("number", "loss"),
    ("number", "between"),
    ("number", "ms"),
    ("number", "speed-up"),
    ("number", "bytes"),
    ("word", "within the limit"),
)
_WORDS = (
    "Each file beside the original as it is, on the test samples; times were taken of all of "
    "them in turn."
)


def combined_rows(report: Report) -> Iterator[tuple[str, ...]]:
    """The cells of a row for each file; none without ``--behind``."""
    promise, combined = report.promise, report.behind
    if promise is None or combined is None:
        return
    for row in combined.rows:
        yield (
            row.what,
            promise.text(row.loss),
            "–" if row.interval is None else " to ".join(map(promise.text, row.interval)),
            "–" if row.ms is None else ms_text(row.ms),
            "–" if row.speedup is None else f"{row.speedup:.2f}×",
            f"{row.bytes:,}",
            "no" if row.why_not else "yes",
        )


def combined_section(report: Report) -> str:
    """The section of the page; empty without ``--behind``."""
    if report.behind is None:
        return ""
    title = f"Low rank, {report.behind.name}, both or neither"
    rows = [table_row(escape(head), COLUMNS, texts, "") for head, *texts in combined_rows(report)]
    return section(
        title,
        f"<p>{escape(report.behind.verdict)}.</p>",
        f"<p>{escape(_WORDS)}</p>",
        table(title, COLUMNS, rows),
    )
