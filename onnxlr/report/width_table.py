"""The section of the HTML page on widths."""

from onnxlr.plan.plan import KEEP
from onnxlr.plan.width_plan import WidthDecision
from onnxlr.report.markup import escape, name_element, section, table, table_row
from onnxlr.report.report import Report

_COLUMNS = (
    ("", "width"),
    ("word", "decision"),
    ("number", "channels"),
    ("number", "stay"),
    ("number", "error"),
    ("word", "read by"),
    ("reason", "reason"),
)


def widths_section(report: Report) -> str:
    """Every width and why; empty where none was looked for."""
    if not report.widths:
        return ""
    narrowed = sum(d.kept is not None for d in report.widths)
    words = f"{narrowed} of {len(report.widths)} widths narrowed"
    return section(
        "Widths",
        f"<p>{escape(words)}. A width is the channels between the weights that write them and "
        "those that read them; where some are removed, the readers are fitted to the others. "
        "Errors are predicted, and relative to what the readers compute.</p>",
        table("Every width, and why", _COLUMNS, map(_row, report.widths)),
    )


def _row(decision: WidthDecision) -> str:
    d = decision
    texts = (
        d.decision,
        f"{d.size:,}",
        "–" if d.kept is None else f"{len(d.kept):,}",
        "–" if d.error is None else f"{d.error:.3f}",
        ", ".join(d.readers) or "–",
        d.reason,
    )
    return table_row(name_element(d.name), _COLUMNS, texts, "kept" if d.decision == KEEP else "")
