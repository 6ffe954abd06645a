"""The figures of the HTML report with their headings, legends and captions."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from onnxlr.plan.plan import KEEP, Decision
from onnxlr.report.markup import details, escape, name_element, section
from onnxlr.report.plots import (
    Tradeoff,
    mark_swatch,
    method_looks,
    method_swatch,
    spectrum_plot,
    tradeoff_of,
    tradeoff_plot,
)
from onnxlr.report.report import LayerSpectrum, Report
from onnxlr.types import ms_text, rank_text

T = TypeVar("T")

OPEN = 12  # panels, or bars, that the reader sees at once; the others are folded


def spectra_section(report: Report) -> str:
    """The section of the layers' singular values; empty if the report has none."""
    panels: dict[tuple[str, str], list[LayerSpectrum]] = {}
    for spectrum in report.spectra:
        if spectrum.values:
            panels.setdefault((spectrum.layer, spectrum.method), []).append(spectrum)
    if not panels:
        return ""
    chosen = [p for p in panels.values() if any(s.chosen is not None for s in p)]
    others = [p for p in panels.values() if all(s.chosen is None for s in p)]
    marks = _legend(
        [
            (mark_swatch("chosen", "mark-chosen"), "chosen rank"),
            (mark_swatch("evbmf", "mark-evbmf"), "EVBMF rank: what stands out of the noise"),
        ]
    )
    words = (
        "The spectrum of a layer: the singular values of its weight as the method unfolds it, as "
        "shares of the largest. The steeper they fall, the less a rank leaves out. EVBMF (the "
        "empirical variational Bayes matrix factorization) takes small ones for noise, which it "
        "estimates, and keeps those that stand out. Where a method has several ranks, each has "
        "its curve: solid for the first, dashed for the second, dotted for the third."
    )
    return section(
        "Singular values and ranks",
        f"<p>{escape(words)}</p>",
        marks,
        _gallery(chosen, others, "not chosen", _spectrum_panel, "spectrum"),
    )


def tradeoff_section(report: Report) -> str:
    """The section of every layer's candidates, error against cost; empty if there are none."""
    tradeoffs = [(d, tradeoff_of(d)) for d in report.decisions]
    tradeoffs = [(d, tradeoff) for d, tradeoff in tradeoffs if tradeoff.points]
    if not tradeoffs:
        return ""
    looks = method_looks(d for d, _ in tradeoffs)
    methods = [
        (method_swatch(look, f"method-{i}"), method)
        for i, (method, look) in enumerate(looks.items())
    ]
    marks = [
        (mark_swatch("ring", "mark-ring"), "chosen, with its rank"),
        (mark_swatch("original", "mark-original"), "cost of the original layer"),
    ]
    words = (
        "The candidates of each layer: the relative error predicted for its output (for its weight "
        "where its inputs weren't sampled) against its cost. Lower and further left is better. "
        "Where candidates were timed, those that weren't are left out."
    )

    def panel(item: tuple[Decision, Tradeoff], key: str) -> str:
        decision, tradeoff = item
        words = _tradeoff_words(decision, tradeoff)
        label = f"Relative error of {decision.name} against {tradeoff.unit}; {words}"
        return _panel(tradeoff_plot(tradeoff, looks, label, key), decision.name, words)

    return section(
        "Error against cost",
        f"<p>{escape(words)}</p>",
        _legend(methods + marks),
        _gallery(
            [item for item in tradeoffs if item[0].decision != KEEP],
            [item for item in tradeoffs if item[0].decision == KEEP],
            "kept",
            panel,
            "tradeoff",
        ),
    )


def latency_section(report: Report) -> str:
    """The section of the replaced layers' times, as bars; empty if none was timed."""
    timed = [
        (d, d.before_ms, d.after_ms)
        for d in report.replaced
        if d.before_ms is not None and d.after_ms is not None
    ]
    if not timed:
        return ""
    timed.sort(key=lambda t: t[2] - t[1])
    longest = max(max(before, after) for _, before, after in timed)
    items = [_bars(d, before, after, longest) for d, before, after in timed]
    more = f"{len(items) - OPEN} more layers"
    total = _milliseconds(sum(t[1] for t in timed), sum(t[2] for t in timed))
    words = (
        "Median time of each replaced layer, run alone, before and after; the one that saves most "
        f"comes first. Together {total}."
    )
    legend = _legend((f'<span class="key {kind}"></span>', kind) for kind in ("before", "after"))
    return section(
        "Latency of the replaced layers",
        f"<figure><figcaption>{escape(words)}</figcaption>{legend}",
        _list(items[:OPEN]),
        details(more, _list(items[OPEN:])) if len(items) > OPEN else "",
        "</figure>",
    )


def _spectrum_panel(curves: Sequence[LayerSpectrum], key: str) -> str:
    first = curves[0]
    chosen = [str(c.chosen) for c in curves if c.chosen is not None]
    evbmf = ",".join(str(c.evbmf) for c in curves)
    rank = f"rank {','.join(chosen)}" if chosen else "not chosen"
    words = f"{first.method}: {rank}; EVBMF {evbmf}"
    label = f"Singular values of {first.layer}, as shares of the largest; {words}"
    return _panel(spectrum_plot(curves, label, key), first.layer, words)


def _tradeoff_words(decision: Decision, tradeoff: Tradeoff) -> str:
    words = "kept"
    if decision.decision != KEEP:
        words = f"{decision.decision} at rank {rank_text(decision.rank or ())}"
    for point in tradeoff.points:
        if point.chosen:
            words += f", predicted error {point.error:.3g}"
    count, shown = len(decision.alternatives), len(tradeoff.points)
    return f"{words}; {count} weighed" + ("" if shown == count else f", {shown} shown")


def _bars(decision: Decision, before: float, after: float, longest: float) -> str:
    def bar(kind: str, ms: float) -> str:
        share = 100 * ms / longest if longest else 0.0
        return f'<div class="bar {kind}" style="width:{share:.2f}%"></div>'

    return (
        f'{name_element(decision.name)} <span class="aside">{escape(decision.decision)}, '
        f"{_milliseconds(before, after)}</span>{bar('before', before)}{bar('after', after)}"
    )


def _milliseconds(before: float, after: float) -> str:
    ratio = f" ({before / after:.2f}×)" if after else ""
    return f"{ms_text(before)} → {ms_text(after)} ms{ratio}"


def _gallery(
    first: Sequence[T], rest: Sequence[T], rest_is: str, panel: Callable[[T, str], str], key: str
) -> str:
    """Small multiples of the first items, then of the rest; those beyond ``OPEN`` are folded.

    Where there are first items, the rest, which is called ``rest_is``, is folded as a whole.
    """
    panels = [panel(item, f"{key}-{i}") for i, item in enumerate([*first, *rest])]
    split = len(first)
    shown = min(OPEN, split or len(panels))
    parts = [_grid(panels[:shown])]
    if split > shown:
        parts.append(details(f"{split - shown} more, replaced", _grid(panels[shown:split])))
    if (begin := max(split, shown)) < len(panels):
        parts.append(details(f"{len(panels) - begin} more, {rest_is}", _grid(panels[begin:])))
    return "\n".join(parts)


def _panel(plot: str, name: str, words: str) -> str:
    return (
        f'<figure class="panel"><figcaption>{name_element(name)}'
        f'<span class="aside">{escape(words)}</span></figcaption>{plot}</figure>'
    )


def _grid(panels: Iterable[str]) -> str:
    return '<div class="grid">\n' + "\n".join(panels) + "\n</div>"


def _list(items: Iterable[str]) -> str:
    return '<ol class="bars">\n' + "\n".join(f"<li>{item}</li>" for item in items) + "\n</ol>"


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    items = "".join(f"<li>{mark} {escape(words)}</li>" for mark, words in entries)
    return f'<ul class="legend">{items}</ul>'
