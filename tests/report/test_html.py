"""The HTML report: whole in one file, safe against names, and true to the report it shows."""

import re
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from onnxlr.plan.plan import KEEP, Alternative, Decision
from onnxlr.report.html import write_page
from onnxlr.report.plots import log_ticks, method_looks, tradeoff_of
from onnxlr.report.report import Circumstances, LayerSpectrum, Report, Size
from onnxlr.system.session import Machine
from onnxlr.verify.fidelity import Fidelity, Quality
from onnxlr.verify.latency import Comparison, Timing

VOID = {"meta", "link", "img", "br", "hr", "input"}
HOSTILE = (
    "<script>alert(1)</script>",
    "</style></td><img src=x onerror=alert(1)>",
    "\" onload='alert(1)' x=\"&amp;",
    "слой/注意/𝛍/שכבה\u202eevil",
    "a\x00\x07\ud800b",
    "$\\frac{1}{2}$ & $unclosed",
    "layer/" + "x" * 3000,
)


class Page(HTMLParser):
    """Every element with its attributes and text; complains about tags that don't pair up."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[dict[str, Any]] = []
        self.elements: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        self.feed(html)
        self.close()
        self.wrong += [f"{e['tag']} left open" for e in self.stack]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        path = [e["tag"] for e in self.stack]
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "path": path}
        self.elements.append(element)
        if tag not in VOID:
            self.stack.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.stack or self.stack[-1]["tag"] != tag:
            self.wrong.append(f"</{tag}> closes {self.stack[-1]['tag'] if self.stack else 'none'}")
        else:
            self.stack.pop()

    def handle_data(self, data: str) -> None:
        for element in self.stack:
            element["text"] += data

    def all(self, tag: str, kind: str = "") -> list[dict[str, Any]]:
        return [
            e
            for e in self.elements
            if e["tag"] == tag and (not kind or kind in (e["attrs"].get("class") or "").split())
        ]


def decision(name: str, method: str = "svd", rank: tuple[int, ...] | None = (8,)) -> Decision:
    kept = method == KEEP
    return Decision(
        name,
        "MatMul",
        (64, 32),
        method,
        None if kept else rank,
        "why so",
        2048,
        2048 if kept else 768,
        4096,
        4096 if kept else 1536,
        None if kept else 0.123,
        None if kept else 0.045,
    )


def weighed(name: str, method: str = "svd", rank: tuple[int, ...] | None = (8,)) -> Decision:
    others = [
        Alternative(m, r, 96 * r[0], 192 * r[0], 0.5 / r[0], 0.01, 0.2, 0.01 * r[0])
        for m, ranks in (("svd", ((4,), (8,), (16,))), ("tucker2", ((4, 6), (8, 12))))
        for r in ranks
    ]
    ms = (None, None) if method == KEEP else (0.2, 0.08)
    return replace(
        decision(name, method, rank), before_ms=ms[0], after_ms=ms[1], alternatives=tuple(others)
    )


def spectrum(layer: str, chosen: int | None = 8, component: int = 0) -> LayerSpectrum:
    values = tuple(np.exp(-np.arange(32) / 6).tolist())
    return LayerSpectrum(layer, "svd", component, values, 11, chosen)


def report(decisions: tuple[Decision, ...] = (), **changes: Any) -> Report:
    made = Report(
        "0.1.0",
        Size("models/some net.onnx", 10_000, 2_500, 40_000),
        Size("out.onnx", 4_000, 1_000, 10_000),
        Quality("top1", 0.91, 0.905, Fidelity(0.0312, 0.999512, 0.9875)),
        Comparison(Timing(0.9, 1.0, 1.2), Timing(0.35, 0.4, 0.5), 50, 2.5, 2.4, 2.6),
        Machine("cpu", 2),
        1,
        decisions or (weighed("first"), decision("second", KEEP)),
        "1 of 2 layers replaced",
        "the saved file, in full, on 40 samples",
        12.34,
        ("mind this",),
        (spectrum("first"),),
        Circumstances(
            "onnxlr optimize 'some net.onnx'",
            (("onnx", "1.17.0"), ("numpy", "1.26.0")),
            "a processor",
            "40 samples of validation.npz",
            (("model", "ab" * 32), ("samples", "cd" * 32)),
        ),
    )
    return replace(made, **changes)


@cache
def plain() -> str:
    return write_page(report())


def figures(html: str) -> list[str]:
    return re.findall(r'<svg [^>]*role="img".*?</svg>', html, flags=re.DOTALL)


def layer_rows(page: Page) -> list[dict[str, Any]]:
    """The row headers of the last table."""
    start = page.elements.index(page.all("table")[-1])
    return [e for e in page.elements[start:] if e["attrs"].get("scope") == "row"]


def hostile() -> Report:
    decisions = tuple(weighed(name) for name in HOSTILE)
    spectra = tuple(spectrum(name) for name in HOSTILE)
    bad = HOSTILE[0]
    return report(
        (*(replace(d, op=bad, reason=HOSTILE[1]) for d in decisions), decision("kept", KEEP)),
        spectra=spectra,
        notes=HOSTILE,
        verdict=bad,
        verified=HOSTILE[1],
        input=Size(f"dir/{HOSTILE[1]}.onnx", 1, 1, 1),
        quality=Quality(f"module:{bad}", 1.0, 1.0, Fidelity(0.0, 1.0, None)),
        circumstances=Circumstances(
            HOSTILE[2], ((bad, bad),), HOSTILE[4], HOSTILE[1], ((bad, HOSTILE[2]),)
        ),
    )


@pytest.mark.parametrize("made", [report(), hostile()], ids=["plain", "hostile"])
def test_the_file_needs_nothing_else_and_runs_nothing(made: Report) -> None:
    html = write_page(made)
    page = Page(html)
    assert not page.wrong
    tags = {e["tag"] for e in page.elements}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "base", "image"}
    for element in page.elements:
        for name, value in element["attrs"].items():
            assert not name.startswith("on"), element
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                assert (value or "").startswith("#"), element
    style = "".join(e["text"] for e in page.all("style"))
    for text in (style, *(e["attrs"].get("style") or "" for e in page.elements)):
        assert "@import" not in text
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", text))
    assert "http:" not in html
    assert "https:" not in html
    policy = [e["attrs"] for e in page.all("meta") if "http-equiv" in e["attrs"]]
    assert "default-src 'none'" in (policy[0]["content"] or "")
    assert html.encode("utf-8").decode("utf-8") == html


def test_hostile_names_are_shown_and_not_obeyed() -> None:
    page = Page(write_page(hostile()))
    shown = [r["text"] for r in layer_rows(page)]
    assert shown[0] == "<script>alert(1)</script>"
    assert shown[1] == HOSTILE[1]
    assert shown[2] == HOSTILE[2]
    assert shown[3] == "слой/注意/𝛍/שכבה\ufffdevil"
    assert shown[4] == "a\ufffd\ufffd\ufffdb"
    assert shown[5] == HOSTILE[5]
    assert shown[6] == HOSTILE[6]
    labels = [e["attrs"]["aria-label"] for e in page.all("svg") if e["attrs"].get("role") == "img"]
    assert sum(HOSTILE[2] in label for label in labels) == 2
    assert page.all("title")[0]["text"].endswith(HOSTILE[0])


def test_every_layer_has_a_row_in_order_with_its_numbers() -> None:
    made = report(
        (weighed("a"), decision("b", KEEP), weighed("c", "tucker2", (8, 12)), decision("d", KEEP))
    )
    page = Page(write_page(made))
    assert [r["text"] for r in layer_rows(page)] == ["a", "b", "c", "d"]
    rows = [r["text"] for r in page.all("tr")][-4:]
    assert rows[0] == "aMatMul64×32svd82,048 → 7684,096 → 1,5360.1230.0450.200 → 0.080why so"
    assert rows[1] == "bMatMul64×32keep–2,0484,096–––why so"
    assert rows[2].startswith("cMatMul64×32tucker28,12")
    heads = [e for e in page.all("th") if e["attrs"].get("scope") == "col"]
    assert len(heads) == 4 + 11
    assert all(e["attrs"].get("scope") in ("col", "row") for e in page.all("th"))


def test_the_headline_says_before_after_and_the_drop() -> None:
    page = Page(plain())
    text = " ".join(page.all("main")[0]["text"].split())
    rows = [r["text"] for r in page.all("tr")]
    assert page.all("h1")[0]["text"] == "some net.onnx"
    assert "1 of 2 layers replaced." in text
    assert "top10.91000.9050drop 0.0050" in rows
    assert "bytes10,0004,000-60.0%" in rows
    assert "parameters2,5001,000-60.0%" in rows
    assert "MACs40,00010,000-75.0%" in rows
    assert "median ms1.00000.40002.50× (95% 2.40 to 2.60), faster" in rows
    # 2.5 / 4 of what the MACs promise.
    assert "would run 4.00× as fast; 2.50× was measured, 62% of that" in text
    assert "relative error 0.031, cosine 0.999512, the same class for 98.75%" in text
    assert "Verified: the saved file, in full, on 40 samples." in text
    assert "mind this" in text


@pytest.mark.parametrize(
    ("metric", "before", "after", "words"),
    [
        ("top1", 0.9, 0.93, "no drop"),
        ("top1", 0.9, 0.9, "no drop"),
        ("rel-error", 0.0, 0.02, "drop 0.0200"),
        ("agreement", 1.0, float("nan"), "drop inf"),
    ],
)
def test_a_drop_is_what_the_metric_calls_worse(
    metric: str, before: float, after: float, words: str
) -> None:
    made = report(quality=Quality(metric, before, after, Fidelity(0.1, 0.9, None)))
    rows = [r["text"] for r in Page(write_page(made)).all("tr")]
    assert next(r for r in rows if r.startswith(metric)).endswith(words)


def test_what_was_not_measured_is_said() -> None:
    made = report(
        (decision("a", KEEP), replace(decision("b", KEEP), macs_before=None, macs_after=None)),
        output=Size(None, 10_000, 2_500, 40_000),
        quality=None,
        speed=None,
        verdict="no gain: the output equals the input",
        verified="not run (--verify none): only the graph was checked",
        notes=(),
        spectra=(),
        circumstances=None,
    )
    page = Page(write_page(made))
    text = page.all("main")[0]["text"]
    rows = [r["text"] for r in page.all("tr")]
    assert "No gain: the output equals the input." in text
    assert "metric––not measured (--verify none)" in rows
    assert "median ms––not measured (--verify none)" in rows
    assert "bytes10,00010,000unchanged" in rows
    assert "not written to a file" in text
    assert "were not recorded" in text
    assert "as fast" not in text
    assert not page.all("figure")
    assert not page.all("svg")
    assert [h["text"] for h in page.all("h2")] == ["Before and after", "Decisions", "Circumstances"]
    assert not page.all("h3")


def test_a_saving_without_a_measurement_promises_nothing() -> None:
    text = Page(write_page(report(speed=None))).all("main")[0]["text"]
    assert "would run 4.00× as fast; how fast it runs was not measured" in text


def test_without_a_replacement_the_times_are_the_originals_own() -> None:
    html = write_page(report((decision("a", KEEP),)))
    assert "the original was timed against itself" in html
    assert "as fast" not in html
    assert "against itself" not in plain()


def test_circumstances_are_those_recorded() -> None:
    page = Page(plain())
    text = page.all("section")[-1]["text"]
    for words in (
        "onnxlr optimize 'some net.onnx'",
        "onnx 1.17.0, numpy 1.26.0",
        "a processor",
        "40 samples of validation.npz",
        "SHA-256, model" + "ab" * 32,
        "SHA-256, samples" + "cd" * 32,
        "cpu, 2 thread(s), batch 1",
        "12.3 s",
        "models/some net.onnx",
    ):
        assert words in text
    assert "not recorded" not in text


def test_sections_come_in_order_and_only_with_data() -> None:
    titles = [h["text"] for h in Page(plain()).all("h2")]
    assert titles == [
        "Before and after",
        "Singular values and ranks",
        "Error against cost",
        "Latency of the replaced layers",
        "Decisions",
        "Circumstances",
    ]
    untimed = (replace(weighed("a"), after_ms=None),)
    assert "Latency" not in write_page(report(untimed))
    assert "Error against cost" not in write_page(report((decision("a"),)))
    assert "Singular values" not in write_page(report(spectra=()))
    unpredicted = tuple(replace(o, error=None) for o in weighed("a").alternatives)
    assert "Error against cost" not in write_page(
        report((replace(weighed("a"), alternatives=unpredicted),))
    )


def test_figures_are_well_formed_and_share_no_identifier() -> None:
    html = plain()
    found = re.findall(r"<svg .*?</svg>", html, flags=re.DOTALL)
    assert len(found) == 2 + 2 + 4  # panels, methods, marks
    for text in found:
        root = ElementTree.fromstring(text)
        inner = {e.get("id") for e in root.iter()} - {None}
        for e in root.iter():
            if target := e.get("href"):
                assert target[1:] in inner
    identifiers = Counter(re.findall(r' id="([^"]*)"', html))
    assert identifiers
    assert max(identifiers.values()) == 1
    assert all('aria-label="' in figure for figure in figures(html))


def test_figures_take_every_colour_from_the_page() -> None:
    html = plain()
    style = files("onnxlr.report").joinpath("page.css").read_text(encoding="utf-8")
    for text in re.findall(r"<svg .*?</svg>", html, flags=re.DOTALL):
        assert not re.search(r"#[0-9a-f]{6}\b|<style|font-family|fill: (?!none|var)", text)
        for variable in re.findall(r"var\((--[a-z0-9-]+)\)", text):
            assert style.count(f"{variable}: #") == 2  # light and dark


def texts(figure: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", figure)


def test_a_spectrum_marks_the_chosen_rank_and_that_above_the_noise() -> None:
    html = write_page(report(spectra=(spectrum("first", 13),)))
    panel = figures(html)[0]
    assert "13" in texts(panel)
    assert "rank 13; EVBMF 11" in panel
    assert "svd: rank 13; EVBMF 11" in Page(html).all("figcaption")[0]["text"]
    kept = figures(write_page(report(spectra=(spectrum("first", None),))))[0]
    assert "13" not in texts(kept)
    assert "not chosen; EVBMF 11" in kept


def curve_of(panel: str) -> list[tuple[float, float]]:
    paths = re.findall(r'd="([^"]*)"[^>]*--accent', panel)
    path = max(paths, key=lambda p: p.count("L"))
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]


def test_a_spectrum_falls_in_a_straight_line_when_it_falls_by_a_constant_factor() -> None:
    values = tuple((0.5 ** np.arange(9)).tolist())
    made = LayerSpectrum("first", "svd", 0, values, 3, 5)
    panel = figures(write_page(report(spectra=(made,))))[0]
    points = curve_of(panel)
    # Ends and mark on the one line: y is logarithmic, and the mark is at index 5 of the curve.
    (x0, y0), (x1, y1) = points[0], points[-1]
    marks = re.findall(
        r'<use href="[^"]*" x="([\d.]+)" y="([\d.]+)" style="fill: var\(--ink', panel
    )
    x, y = map(float, marks[-1])
    assert (x - x0) / (x1 - x0) == pytest.approx(4 / 8, abs=2e-3)
    assert (y - y0) / (y1 - y0) == pytest.approx(4 / 8, abs=2e-3)


def test_small_shares_are_labelled_in_full() -> None:
    made = LayerSpectrum("first", "svd", 0, (1.0, 0.1, 0.004), 1, 2)
    assert {"0.005", "0.01", "0.1", "1"} <= set(
        texts(figures(write_page(report(spectra=(made,))))[0])
    )


@pytest.mark.parametrize(
    "values",
    [(1.0,), (0.0, 0.0), (float("nan"), float("nan")), (1.0, 1.0, 1.0), (1.0, 1e-30, 0.0)],
    ids=["one", "zero", "nan", "flat", "deficient"],
)
def test_odd_spectra_are_drawn(values: tuple[float, ...]) -> None:
    made = LayerSpectrum("first", "svd", 0, values, 0, 7)
    panel = figures(write_page(report(spectra=(made,))))[0]
    ElementTree.fromstring(panel)
    assert "nan" not in panel.lower().replace("first", "")
    assert "7" in texts(panel)


def test_an_empty_spectrum_is_no_figure() -> None:
    made = LayerSpectrum("first", "svd", 0, (), 0, 7)
    assert "Singular values" not in write_page(report(spectra=(made,)))


def test_a_long_spectrum_stays_small() -> None:
    steps = np.random.default_rng(0).exponential(size=4096)
    values = tuple(np.exp(-np.cumsum(steps) / 1000).tolist())
    made = LayerSpectrum("first", "svd", 0, values, 11, 40)
    assert len(figures(write_page(report(spectra=(made,))))[0]) < 20_000


def test_the_numbers_of_one_rank_share_a_panel() -> None:
    html = write_page(report(spectra=(spectrum("first", 8), spectrum("first", 9, 1))))
    panels = [f for f in figures(html) if "Singular values" in f]
    assert len(panels) == 1
    assert {"8", "9"} <= set(texts(panels[0]))
    assert "rank 8,9; EVBMF 11,11" in panels[0]


def test_the_chosen_candidate_is_ringed_where_it_was_weighed() -> None:
    html = write_page(report((weighed("a", "tucker2", (8, 12)),), spectra=()))
    panel = figures(html)[0]
    assert "8,12" in texts(panel)
    assert "tucker2 at rank 8,12, predicted error 0.0625; 5 weighed" in panel
    kept = figures(write_page(report((weighed("a", KEEP),), spectra=())))[0]
    assert "8,12" not in texts(kept)
    assert "kept; 5 weighed" in kept


def test_candidates_stand_at_their_cost_and_the_logarithm_of_their_error() -> None:
    panel = figures(write_page(report((weighed("a"),), spectra=())))[0]
    drawn = r'<use href="[^"]*" x="([\d.]+)" y="([\d.]+)" style="fill: var\(--series-0\)'
    points = sorted((float(x), float(y)) for x, y in re.findall(drawn, panel))
    (x0, y0), (x1, y1), (x2, y2) = points  # rank 4, 8 and 16 at 0.04, 0.08 and 0.16 ms
    assert (x1 - x0) / (x2 - x0) == pytest.approx(1 / 3, abs=2e-3)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(1 / 2, abs=2e-3)
    assert y2 > y0  # downwards on the screen
    zero = float(re.findall(r'x="([\d.]+)"[^>]*>0<', panel)[0])
    assert (x1 - zero) / (x2 - zero) == pytest.approx(1 / 2, abs=2e-3)
    original = re.findall(r'd="M ([\d.]+) [^"]*"[^>]*stroke-dasharray[^>]*--muted', panel)
    assert (float(original[0]) - zero) / (x2 - zero) == pytest.approx(0.2 / 0.16, abs=2e-3)


def test_costs_are_times_where_the_chosen_was_timed_else_macs_else_parameters() -> None:
    made = weighed("a")
    assert tradeoff_of(made).unit == "ms, the layer alone"
    assert tradeoff_of(made).original == 0.2
    assert [p.cost for p in tradeoff_of(made).points[:2]] == [0.04, 0.08]
    assert [p.chosen for p in tradeoff_of(made).points] == [False, True, False, False, False]
    kept = tradeoff_of(weighed("a", KEEP))
    assert kept.original == 0.2  # its alternatives know
    assert not any(p.chosen for p in kept.points)
    first, chosen, *rest = made.alternatives
    partly = replace(made, alternatives=(replace(first, after_ms=None), chosen, *rest))
    assert tradeoff_of(partly).unit == "ms, the layer alone"
    assert [p.cost for p in tradeoff_of(partly).points[:2]] == [0.08, 0.16]
    untimed = replace(made, alternatives=(first, replace(chosen, after_ms=None), *rest))
    assert tradeoff_of(untimed).unit == "MACs"
    assert tradeoff_of(untimed).original == 4096
    assert [p.cost for p in tradeoff_of(untimed).points[:2]] == [768, 1536]
    unknown = replace(made, alternatives=(first, replace(chosen, after_ms=None, macs=None), *rest))
    assert tradeoff_of(unknown).unit == "parameters"
    assert tradeoff_of(unknown).original == 2048
    assert [p.cost for p in tradeoff_of(unknown).points[:2]] == [384, 768]
    lookup = replace(untimed, macs_before=0)
    assert tradeoff_of(lookup).unit == "parameters"
    html = write_page(report((partly,), spectra=()))
    assert "5 weighed, 4 shown" in Page(html).all("figcaption")[0]["text"]


@pytest.mark.parametrize("error", [None, float("nan"), float("inf")])
def test_a_candidate_without_an_error_has_no_place(error: float | None) -> None:
    made = weighed("a")
    first, *rest = made.alternatives
    assert (
        len(tradeoff_of(replace(made, alternatives=(replace(first, error=error), *rest))).points)
        == 4
    )


def test_no_two_methods_look_alike() -> None:
    others = tuple(Alternative(f"m{i:02}", (1,), 1, 1, 0.1) for i in range(30))
    looks = method_looks([replace(decision("a"), alternatives=others)])
    assert len(set(looks.values())) == 30


@pytest.mark.parametrize(
    ("low", "high"), [(1e-6, 1), (3e-4, 0.7), (0.04, 1), (0.3, 0.5), (0.61, 0.93), (0.98, 1.2)]
)
def test_ticks_lie_within_and_apart(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert len(ticks) >= 2
    assert all(low * 0.999 <= t <= high * 1.001 for t in ticks)
    room = np.log10(high / low) / 8
    assert all(np.log10(b / a) >= room for a, b in pairwise(ticks))


def test_bars_are_in_proportion_and_the_most_saving_comes_first() -> None:
    made = report(
        (
            replace(weighed("small"), before_ms=0.2, after_ms=0.1),
            replace(weighed("large"), before_ms=0.8, after_ms=0.2),
            replace(decision("kept", KEEP), before_ms=5.0, after_ms=1.0),
        )
    )
    page = Page(write_page(made))
    listed = page.all("ol", "bars")[0]["text"]
    assert listed.index("large") < listed.index("small")
    assert "kept" not in listed
    widths = [e["attrs"]["style"] for e in page.all("div", "bar")]
    assert widths == ["width:100.00%", "width:25.00%", "width:25.00%", "width:12.50%"]
    assert "svd, 0.800 → 0.200 ms (4.00×)" in listed
    assert "Together 1.000 → 0.300 ms (3.33×)" in page.all("figcaption")[-1]["text"]


def test_many_layers_are_folded_but_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxlr.report.figures.OPEN", 2)
    count = 5
    names = [f"replaced-{i}" for i in range(count)]
    decisions = [weighed(name) for name in names] + [weighed(f"kept-{i}", KEEP) for i in range(3)]
    spectra = [spectrum(d.name, None if d.decision == KEEP else 8) for d in decisions]
    page = Page(write_page(report(tuple(reversed(decisions)), spectra=tuple(spectra))))
    panels = page.all("figure", "panel")
    assert len(panels) == 2 * (count + 3)
    seen = [p for p in panels if "details" not in p["path"]]
    assert len(seen) == 2 * 2
    assert all("replaced-" in p["text"] for p in seen)
    assert [s["text"] for s in page.all("summary")] == [
        "3 more, replaced",
        "3 more, not chosen",
        "3 more, replaced",
        "3 more, kept",
        "3 more layers",
    ]
    assert len(layer_rows(page)) == count + 3


def test_the_same_report_gives_the_same_bytes_whatever_the_user_s_settings() -> None:
    used_pyplot = "matplotlib.pyplot" in sys.modules
    theirs: dict[Any, Any] = {"font.size": 30, "lines.linewidth": 9, "svg.fonttype": "path"}
    theirs |= {"figure.autolayout": True, "savefig.pad_inches": 3.0, "savefig.bbox": "tight"}
    with matplotlib.rc_context(theirs):
        assert write_page(report()) == plain()
        assert {name: matplotlib.rcParams[name] for name in theirs} == theirs
    assert ("matplotlib.pyplot" in sys.modules) == used_pyplot
    assert write_page(report(seconds=12.44)) != plain()


def test_the_document_is_accessible() -> None:
    page = Page(plain())
    assert page.all("html")[0]["attrs"]["lang"] == "en"
    metas = [e["attrs"] for e in page.all("meta")]
    assert {"charset": "utf-8"} in metas
    assert any(m.get("name") == "viewport" for m in metas)
    levels = [int(e["tag"][1]) for e in page.elements if re.fullmatch("h[1-6]", e["tag"])]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    for svg in page.all("svg"):
        assert svg["attrs"].get("aria-label") or svg["attrs"].get("aria-hidden") == "true"
    assert len(page.all("figcaption")) == len(page.all("figure"))
    assert all("div" in t["path"] for t in page.all("table"))  # what scrolls instead of the page
    assert len(page.all("div", "scroll")) == len(page.all("table"))
    assert all(t["attrs"]["tabindex"] == "0" for t in page.all("div", "scroll"))


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_stand_out_from_the_page_in_both_themes(theme: str) -> None:
    style = files("onnxlr.report").joinpath("page.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    colours = dict(
        re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", light if theme == "light" else dark)
    )

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(colours[a]), luminance(colours[b])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    # WCAG 2.2, 1.4.3 (text) and 1.4.11 (graphics).
    for text in ("ink", "muted", "accent"):
        assert contrast(text, "page") >= 4.5, text
        assert contrast(text, "panel") >= 4.5, text
    graphics = ["axis", "before", *(name for name in colours if name.startswith("series"))]
    assert len(graphics) == 9
    for name in graphics:
        assert contrast(name, "page") >= 3, name
