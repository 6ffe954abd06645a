"""Two models before and after, as rows that the console prints and Markdown shows."""

from onnxlr.jobs.comparison import ModelComparison
from onnxlr.report.report import Report, Size, where_words
from onnxlr.types import ms_text
from onnxlr.verify.fidelity import Fidelity, Quality
from onnxlr.verify.latency import Comparison
from onnxlr.verify.promise import compared

Row = tuple[str, str, str, str]  # a figure, before, after, and what is to be said of it


def headline(result: Report | ModelComparison) -> list[Row]:
    """Quality, sizes, work and time of a run, or of two models side by side."""
    if isinstance(result, Report):
        before, after, loss = result.input, result.output, result.loss_words
    else:
        before, after, quality = result.a, result.b, result.quality
        loss = compared(quality.metric).words(quality)
    rows = [] if result.quality is None else [_quality_row(result.quality, loss)]
    rows += _size_rows(before, after)
    if (speed := result.speed) is not None:
        where = where_words(result.machine, result.batch)
        words = f"{speed_words(speed)}; {result.theoretical_speedup:.2f}× by MACs; {where}"
        times = ms_text(speed.a.median_ms), ms_text(speed.b.median_ms)
        rows.append(("median ms", *times, words))
    return rows


def comparison_markdown(result: ModelComparison) -> str:
    """Two models side by side, and whether the second is within its bounds.

    It is a page for the summary of a step in continuous integration.
    """
    lines = [
        f"### {_escaped(result.b.path)} beside {_escaped(result.a.path)}",
        "",
        "| | A | B | |",
        "|---|---:|---:|---|",
        *(f"| {' | '.join(map(_escaped, row))} |" for row in headline(result)),
        "",
        f"Both ran on {_escaped(result.fed)}.",
    ]
    bounds = result.bounds
    if bounds.max_drop is not None or bounds.max_slowdown is not None:
        lines += ["", *(f"**Outside the limits:** {_escaped(why)}." for why in result.violations)]
        if not result.violations:
            lines.append("**Within the limits.**")
    return "\n".join(lines) + "\n"


def speed_words(speed: Comparison) -> str:
    """How the second of two models compares, with its interval."""
    ratio = f"{speed.speedup:.2f}× (95% {speed.low:.2f} to {speed.high:.2f})"
    return f"{ratio}, {speed.verdict}{speed.doubt}"


def _quality_row(quality: Quality, loss: str) -> Row:
    words = "; ".join(filter(None, (loss, _fidelity_words(quality.fidelity))))
    return quality.metric, f"{quality.original:.4f}", f"{quality.optimized:.4f}", words


def _size_rows(before: Size, after: Size) -> list[Row]:
    pairs = (
        ("bytes", before.bytes, after.bytes),
        ("parameters", before.params, after.params),
        ("MACs", before.macs, after.macs),
    )
    return [(name, f"{a:,}", f"{b:,}", f"{b / a - 1:+.1%}" if a else "") for name, a, b in pairs]


def _fidelity_words(fidelity: Fidelity) -> str:
    words = f"rel. error {fidelity.rel_error:.2g}, cosine {fidelity.cosine:.6f}"
    if not fidelity.same_shapes:
        words += " (some outputs have other shapes)"
    return words if fidelity.agreement is None else f"{words}, agreement {fidelity.agreement:.2%}"


def _escaped(text: object) -> str:
    """A text that Markdown shows as it is, in a cell as well."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in str(text))
