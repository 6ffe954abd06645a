"""The HTML report: whole in one file, safe against names, and true to the report it shows."""

import re
import sys
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
import pytest

from onnxlr.plan.plan import KEEP
from onnxlr.report.html import write_page
from onnxlr.report.report import Circumstances, Report, Size
from onnxlr.verify.fidelity import Fidelity, Quality
from tests.support.reports import (
    Page,
    decision,
    layer_rows,
    plain,
    report,
    spectrum,
    weighed,
)

HOSTILE = (
    "<script>alert(1)</script>",
    "</style></td><img src=x onerror=alert(1)>",
    "\" onload='alert(1)' x=\"&amp;",
    "слой/注意/𝛍/שכבה\u202eevil",
    "a\x00\x07\ud800b",
    "$\\frac{1}{2}$ & $unclosed",
    "layer/" + "x" * 3000,
)


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
    assert rows[0] == "aMatMul64×32svd82,048 → 7684,096 → 1,5360.1230.0450.2000 → 0.08000why so"
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
    assert "median ms1.0000.40002.50× (95% 2.40 to 2.60), faster" in rows
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
        "Decisions",
        "Singular values and ranks",
        "Error against cost",
        "Latency of the replaced layers",
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


def test_the_verdict_comes_with_the_speed_and_the_limit() -> None:
    made = report(tuple(weighed(name) for name in "ab"))
    (verdict,) = Page(write_page(made)).all("p", "verdict")
    assert verdict["text"].startswith(made.verdict[0].upper() + made.verdict[1:] + ". ")
    assert made.speed is not None
    assert f"{made.speed.speedup:.2f}× measured ({made.speed.verdict})." in verdict["text"]


def test_reasons_are_counted_by_kind() -> None:
    kept = [replace(decision(name, KEEP), reason="not measurably faster") for name in "abc"]
    others = [replace(decision("d", KEEP), reason="put back: top1 falls; the limit is 0.01")]
    page = Page(write_page(report((*kept, *others))))
    assert "Kept: 3 not faster alone, 1 put back: accuracy." in page.all("section")[1]["text"]


def test_a_cell_knows_the_title_of_its_column() -> None:
    """Where the page is narrow, a row is a card without the table's head."""
    page = Page(plain())
    titles = [h["text"] for h in page.all("th") if h["attrs"].get("scope") == "col"]
    cells = [td["attrs"]["data-title"] for td in page.all("td")]
    assert set(cells) <= set(titles)
    assert {"rank", "reason", "original", "change"} <= set(cells)


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
    assert "svd, 0.8000 → 0.2000 ms (4.00×)" in listed
    assert "Together 1.000 → 0.3000 ms (3.33×)" in page.all("figcaption")[-1]["text"]


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
