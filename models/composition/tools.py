"""What composition is tried with: two quantizers, a converter to half precision, a simplifier."""

from __future__ import annotations

import contextlib
import importlib
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.zoo.models import ZooError
from onnxlr.behind.step import Behind

Arrays = dict[str, NDArray[Any]]

CALIBRATION = 32  # samples that the static quantizer sees
# What onnxslim needs beside what onnxlr and ONNX Runtime bring; no version but this was tried.
_SLIM = ("onnxslim==0.1.98", "colorama==0.4.6", "sympy==1.14.0", "mpmath==1.3.0")


@dataclass(frozen=True)
class Tool:
    """A tool that rewrites a model.

    Attributes
    ----------
    name : str
        In file names.
    title : str
        In the table.
    apply : callable
        ``(source, out, samples, work)``: writes a file, raises whatever the tool raises.
    """

    name: str
    title: str
    apply: Callable[[Path, Path, Arrays, Path], None]


def _step(name: str) -> Callable[[Path, Path, Arrays, Path], None]:
    """What ``--behind`` calls so; a step that calibrates sees some of the samples, one by one."""

    def apply(source: Path, out: Path, samples: Arrays, _: Path) -> None:
        def feeds() -> Iterator[Arrays]:
            count = min(CALIBRATION, len(next(iter(samples.values()))))
            for i in range(count):
                yield {key: array[i : i + 1] for key, array in samples.items()}

        with tempfile.TemporaryDirectory() as folder:
            copy = Path(shutil.copy(source, folder))
            shutil.copyfile(Behind(name).apply(copy, source.name, feeds), out)

    return apply


def _slim(source: Path, out: Path, _: Arrays, work: Path) -> None:
    _install(work / "tools")
    onnxslim = importlib.import_module("onnxslim")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a table
        onnxslim.slim(str(source), str(out))


def _install(folder: Path) -> None:
    """Make onnxslim importable: from where it is installed, else from ``folder``.

    Raises
    ------
    ZooError
        If it can't be had.
    """
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last: what is installed goes first
    with contextlib.suppress(ImportError):
        for name in ("colorama", "onnxslim"):
            importlib.import_module(name)
        return
    if (folder / "onnxslim").is_dir():
        raise ZooError(f"onnxslim in {folder} can't be imported: remove that folder")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run(  # noqa: S603 - the names and versions are those of this file
        [*pip, *_SLIM], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or "pip says nothing").splitlines()[-1]
        raise ZooError(f"pip can't install {_SLIM[0]}: {last}; pip install onnxslim yourself")
    importlib.invalidate_caches()
    _install(folder)


TOOLS = (
    Tool("dynamic", "dynamic INT8", _step("int8-dynamic")),
    Tool("static", "static INT8 (QDQ)", _step("int8-static")),
    Tool("half", "float16", _step("fp16")),
    Tool("slim", "onnxslim", _slim),
)


def read_samples(path: Path, names: list[str]) -> Arrays:
    """Return the inputs of a model among the arrays of an ``.npz`` file."""
    with np.load(path) as arrays:
        return {name: arrays[name] for name in names}
