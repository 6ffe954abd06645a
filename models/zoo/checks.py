"""Checks of every optimized model of the zoo: of its report, and of its file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from models.zoo.table import speed_words
from onnxlr.model.load import load
from onnxlr.prepare.feeding import choose_feeding
from onnxlr.prepare.opening import open_session
from onnxlr.system.session import Machine


def report_failures(report: dict[str, Any]) -> Iterator[str]:
    """Yield what the report admits and must never admit: growth, slowness, a missing reason."""
    before, after = report["input"]["bytes"], report["output"]["bytes"]
    if after > before:
        yield f"the report says that the file grew from {before:,} to {after:,} bytes"
    if report["speed"]["verdict"] == "slower":
        yield f"slower than the original: {speed_words(report['speed'])}"
    for layer in report["layers"]:
        if (
            not layer["decision"]
            or not layer["reason"]
            or "no method was chosen" in layer["reason"]
        ):
            yield f"{layer['op']} {layer['name']!r} has no decision or no reason"


def file_failures(path: Path, out: Path, data: Path | None, threads: int) -> Iterator[str]:
    """Yield what is wrong with the optimized file compared to the original."""
    before, after = path.stat().st_size, out.stat().st_size
    if after > before:
        yield f"the file grew from {before:,} to {after:,} bytes"
    if _complaint(path) is None and (complaint := _complaint(out)) is not None:
        yield f"onnx.checker refuses the output, but not the input: {complaint}"
    source = load(path)
    original = open_session(source, Machine("cpu", threads))
    feed = choose_feeding(source, original, data=data).first_feed
    expected = original.run(feed)
    # A plain session: the file must run without the options that onnxlr sets for its sessions.
    session = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    outputs = session.run(list(expected), dict(feed))
    for (name, one), other in zip(expected.items(), outputs, strict=True):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            yield (
                f"the output {name!r} is {other.dtype}{list(other.shape)}, "
                f"the original's is {one.dtype}{list(one.shape)}"
            )
        elif not np.array_equal(np.isfinite(one), np.isfinite(other)):
            yield f"the output {name!r} is not finite where the original's is"


def _complaint(path: Path) -> str | None:
    """Return what onnx.checker says against a file, or None if it passes."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        return " ".join(str(error).split())
    return None
