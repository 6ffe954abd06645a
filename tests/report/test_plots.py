"""The figures of the report: marks where their numbers lie, and every odd case drawn."""

import re
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from onnxlr.plan.plan import KEEP, Alternative
from onnxlr.report.html import write_page
from onnxlr.report.plots import log_ticks, method_looks, tradeoff_of
from onnxlr.report.report import LayerSpectrum
from tests.support.reports import Page, decision, figures, plain, report, spectrum, texts, weighed


def test_figures_are_well_formed_and_share_no_identifier() -> None:
    html = plain()
    drawings = re.findall(r"<svg .*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) == 2 + 2 + 4  # panels, methods, marks
    for text in drawings:
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
