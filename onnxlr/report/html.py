"""The HTML report: one file that needs no other, nor a network, nor a script."""

from importlib.resources import files
from pathlib import PurePath

from onnxlr.plan.plan import KEEP, Decision
from onnxlr.report.combined_table import combined_section
from onnxlr.report.figures import latency_section, spectra_section, tradeoff_section
from onnxlr.report.frontier_figure import frontier_section
from onnxlr.report.markup import definition_list, escape, name_element, section, table, table_row
from onnxlr.report.reasons import counted
from onnxlr.report.report import Report, where_words
from onnxlr.report.width_table import widths_section
from onnxlr.types import ms_text, rank_text
from onnxlr.verify.fidelity import Quality

# Nothing is fetched and nothing runs, whatever a model's names may hold.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_NOT_RUN = "not measured (--verify none)"

# The columns of the tables: the class of a cell, and its heading.
_BEFORE_AFTER = (("", "quantity"), ("number", "original"), ("number", "optimized"), ("", "change"))
_LAYER_COLUMNS = (
    ("", "layer"),
    ("word", "op"),
    ("number", "shape"),
    ("word", "decision"),
    ("number", "rank"),
    ("number", "parameters"),
    ("number", "MACs"),
    ("number", "weight error"),
    ("number", "output error"),
    ("number", "ms alone"),
    ("reason", "reason"),
)


def write_page(report: Report) -> str:
    """The whole report as the text of one HTML file.

    Figures are there for what the report has: spectra, alternatives and layers' times. The same
    report gives the same text.

    Parameters
    ----------
    report : Report

    Returns
    -------
    str
        To be written as UTF-8. Names from the model are escaped.
    """
    style = files("onnxlr.report").joinpath("page.css").read_text(encoding="utf-8")
    sections = (
        _outcome(report),
        combined_section(report),
        _decisions(report),
        widths_section(report),
        frontier_section(report),
        spectra_section(report),
        tradeoff_section(report),
        latency_section(report),
        _circumstances(report),
    )
    content = "\n".join(s for s in sections if s)
    model = _model_name(report)
    choice = f'\n<p class="kicker">{escape(_capital(report.choice))}</p>' if report.choice else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="generator" content="onnxlr {escape(report.version)}">
<title>{escape(model)}: {escape(report.verdict)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
<p class="kicker">Low-rank factorization by onnxlr {escape(report.version)}</p>
<h1>{name_element(model)}</h1>
<p class="verdict">{escape(_headline(report))}</p>
<p class="kicker">{escape(_capital(report.claim))}</p>{choice}
</header>
{content}
</main>
</body>
</html>
"""


def _headline(report: Report) -> str:
    """The verdict with the speed-up and the limit: what a reader takes away."""
    speed, promise = report.speed, report.promise
    sentences = [f"{_capital(report.verdict)}."]
    if report.replaced and speed is not None:
        sentences.append(f"{speed.speedup:.2f}× measured ({speed.verdict}).")
    if report.replaced and promise is not None and report.loss_words:
        sentences.append(f"{_capital(report.loss_words)}; the limit is {promise.limit_text}.")
    return " ".join(sentences)


def _outcome(report: Report) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return section(
        "Before and after",
        _tiles(report),
        table("The model before and after", _BEFORE_AFTER, _rows(report)),
        *(f"<p>{escape(sentence)}</p>" for sentence in _sentences(report)),
        f"<h3>Notes</h3>\n<ul>{notes}</ul>" if notes else "",
    )


def _tiles(report: Report) -> str:
    """The figures that a reader looks for first: speed, the metric, and size."""
    speed, quality = report.speed, report.quality
    tiles = [("speed-up", "?", "not measured"), ("metric", "?", "not measured")]
    if speed is not None:
        interval = f"{speed.verdict}; 95% {speed.low:.2f} to {speed.high:.2f}"
        tiles[0] = ("speed-up", f"{speed.speedup:.2f}×", interval)
    if quality is not None:
        values = f"{quality.original:.4f} → {quality.optimized:.4f}"
        lost, _, ends = (report.loss_words or _drop(quality)).partition(" (")
        aside = f"{ends.rstrip(')')}; {values}" if ends else values
        tiles[1] = (quality.metric, lost, aside)
    for name, before, after in _sizes(report)[:2]:
        tiles.append((name, _percent(before, after), f"{before:,} → {after:,}"))
    content = definition_list(
        (name, f"<strong>{escape(value)}</strong> {escape(aside)}") for name, value, aside in tiles
    )
    return f'<div class="tiles">{content}</div>'


def _rows(report: Report) -> list[str]:
    quality, speed = report.quality, report.speed
    unmeasured = ("–", "–", _NOT_RUN)
    rows = []
    if quality is None:
        rows.append(("metric", *unmeasured))
    else:
        values = (f"{quality.original:.4f}", f"{quality.optimized:.4f}")
        rows.append((quality.metric, *values, report.loss_words or _drop(quality)))
    rows += [(name, f"{a:,}", f"{b:,}", _percent(a, b)) for name, a, b in _sizes(report)]
    if speed is None:
        rows.append(("median ms", *unmeasured))
    else:
        times = (ms_text(speed.a.median_ms), ms_text(speed.b.median_ms))
        ratio = f"{speed.speedup:.2f}× (95% {speed.low:.2f} to {speed.high:.2f})"
        rows.append(("median ms", *times, f"{ratio}, {speed.verdict}"))
    return [table_row(escape(name), _BEFORE_AFTER, values) for name, *values in rows]


def _sizes(report: Report) -> tuple[tuple[str, int, int], ...]:
    before, after = report.input, report.output
    return (
        ("bytes", before.bytes, after.bytes),
        ("parameters", before.params, after.params),
        ("MACs", before.macs, after.macs),
    )


def _sentences(report: Report) -> list[str]:
    """The sentences that say what the table of before and after can't hold."""
    sentences = []
    theory, speed = report.theoretical_speedup, report.speed
    if report.replaced and theory != 1.0:
        words = f"By its MACs alone the model would run {theory:.2f}× as fast"
        if speed is None:
            sentences.append(f"{words}; how fast it runs was not measured.")
        else:
            sentences.append(
                f"{words}; {speed.speedup:.2f}× was measured, {speed.speedup / theory:.0%} of that."
            )
    if speed is not None and not report.replaced:
        sentences.append("Nothing was replaced: the original was timed against itself.")
    if report.quality is not None:
        fidelity = report.quality.fidelity
        words = (
            f"Beside the original's outputs: relative error {fidelity.rel_error:.2g}, cosine "
            f"{fidelity.cosine:.6f}"
        )
        if fidelity.agreement is not None:
            words += f", the same class for {fidelity.agreement:.2%}"
        sentences.append(f"{words}.")
    sentences.append(f"Verified: {report.verified}.")
    sentences += [f"{p.samples:,} {p.name} samples, used for {p.used_for}." for p in report.parts]
    return sentences


def _decisions(report: Report) -> str:
    methods = ", ".join(f"{method} {count}" for method, count in report.methods().most_common())
    words = f"{len(report.replaced)} of {len(report.decisions)} layers replaced"
    kept = counted(d.reason for d in report.decisions if d.decision == KEEP)
    return section(
        "Decisions",
        f"<p>{escape(f'{words}: {methods}' if methods else words)}.</p>",
        f"<p>{escape(f'Kept: {kept}')}.</p>" if kept else "",
        "<p>Errors are relative; – is what does not apply or was not measured.</p>",
        table("Every layer, and why", _LAYER_COLUMNS, map(_decision, report.decisions)),
    )


def _decision(decision: Decision) -> str:
    d = decision
    times = "–"
    if d.before_ms is not None:
        times = ms_text(d.before_ms) + ("" if d.after_ms is None else f" → {ms_text(d.after_ms)}")
    texts = (
        d.op,
        "×".join(map(str, d.shape)),
        d.decision,
        rank_text(d.rank) if d.rank else "–",
        _change(d.params_before, d.params_after),
        _change(d.macs_before, d.macs_after),
        "–" if d.error is None else f"{d.error:.3f}",
        "–" if d.output_error is None else f"{d.output_error:.3f}",
        times,
        d.reason,
    )
    kind = "kept" if d.decision == KEEP else ""
    return table_row(name_element(d.name), _LAYER_COLUMNS, texts, kind)


def _circumstances(report: Report) -> str:
    pairs = [
        ("original", name_element(report.input.path or "given as an object")),
        ("optimized", name_element(report.output.path or "not written to a file")),
        ("execution", where_words(report.machine, report.batch)),
        ("took", f"{report.seconds:.1f} s"),
    ]
    if (recorded := report.circumstances) is None:
        remark = "<p>Command, versions, processor and digests were not recorded.</p>"
        return section("Circumstances", definition_list(pairs), remark)
    versions = ", ".join(f"{name} {version}" for name, version in recorded.versions)
    pairs = [
        ("command", f"<pre><code>{escape(recorded.command)}</code></pre>"),
        *pairs,
        ("processor", escape(recorded.processor)),
        ("data", escape(recorded.data)),
        ("versions", escape(versions)),
        *(
            (f"SHA-256, {name}", f"<code>{escape(value)}</code>")
            for name, value in recorded.digests
        ),
    ]
    return section("Circumstances", definition_list(pairs))


def _drop(quality: Quality) -> str:
    return f"drop {quality.drop:.4f}" if quality.drop > 0 else "no drop"


def _percent(before: int, after: int) -> str:
    if before == after or not before:
        return "unchanged" if before == after else ""
    return f"{after / before - 1:+.1%}"


def _change(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return "?"
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"


def _model_name(report: Report) -> str:
    return PurePath(report.input.path).name if report.input.path else "the model"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
