"""Reports with made-up numbers, and an HTML page as its elements."""

import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from typing import Any

import numpy as np

from onnxlr.plan.plan import KEEP, Alternative, Decision
from onnxlr.report.html import write_page
from onnxlr.report.report import Circumstances, LayerSpectrum, Report, Size
from onnxlr.system.session import Machine
from onnxlr.verify.fidelity import Fidelity, Quality
from onnxlr.verify.latency import Comparison, Timing

VOID = {"meta", "link", "img", "br", "hr", "input"}


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


def texts(figure: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", figure)
