"""Hostile samples, pipes, caches and paths: what the command reads beside the model."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import onnxlr
from onnxlr.cli.commands import main
from onnxlr.system import npz
from tests.support.hostile_seeds import SEEDS, mlp
from tests.support.refusals import refusal_of

pytestmark = pytest.mark.usefixtures("trials")


@pytest.mark.usefixtures("here")
def test_samples_that_are_no_numbers() -> None:
    """A signalling NaN, infinity and the largest double are among sound samples."""
    onnx.save(SEEDS["mlp-double"](), "in.onnx")
    x = np.random.default_rng(0).standard_normal((40, 24))
    x[3, 4], x[9], x[17] = np.inf, 1e308, -1e200
    x[5].view(np.uint64)[:] = 0x7FF0000000000001
    np.save("data.npy", x)
    result = onnxlr.optimize("in.onnx", data="data.npy", rank=4, max_drop=1, measure=False)
    assert len(result.plan.decisions) == 2


class _Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path("unpickled").touch, ()


def _npz(header: dict[str, Any], content: bytes) -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    with zipfile.ZipFile("data.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", file.getvalue() + content)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("descr", "shape", "content", "word"),
    [
        ("|O", (1,), pickle.dumps(_Canary()), "Python objects"),
        ("<f4", (2**40, 24), b"1234", "needs 105,553,116,266,496 bytes and has 4"),
        ("<f4", (2, 24), b"1234", "needs 192 bytes and has 4"),
    ],
    ids=["objects", "huge", "short"],
)
def test_samples_that_lie(descr: str, shape: tuple[int, ...], content: bytes, word: str) -> None:
    onnx.save(mlp(), "in.onnx")
    _npz({"descr": descr, "fortran_order": False, "shape": shape}, content)
    assert word in refusal_of("optimize in.onnx out.onnx --data data.npz")


@pytest.mark.usefixtures("here")
def test_samples_that_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "available_memory", lambda: 1 << 20)
    monkeypatch.setattr(npz, "_ALWAYS_READ", 1 << 20)
    onnx.save(mlp(), "in.onnx")
    _npz({"descr": "<f4", "fortran_order": False, "shape": (10**6,)}, bytes(4 * 10**6))
    assert "1,048,576 bytes of memory are free" in refusal_of(
        "optimize in.onnx out.onnx --data data.npz"
    )


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "command",
    [
        "optimize in.onnx out.onnx --data pipe.npy",
        "optimize in.onnx out.onnx --data folder",
        "optimize in.onnx out.onnx --latency-table pipe.npy",
        "apply pipe.npy in.onnx out.onnx",
    ],
)
def test_nothing_waits_for_a_pipe(command: str) -> None:
    onnx.save(mlp(), "in.onnx")
    os.mkfifo("pipe.npy")
    Path("folder").mkdir()
    os.mkfifo("folder/a.npy")
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code in (1, 2)
    (line,) = result.stderr.splitlines()
    assert "not a regular file" in line or "no latency table" in line


def test_a_cache_that_was_tampered_with_is_done_without(here: Path) -> None:
    cache = Path(os.environ["ONNXLR_CACHE"])
    onnx.save(mlp(), "in.onnx")
    x = np.random.default_rng(3).standard_normal((12, 24)).astype(np.float32)
    np.savez("data.npz", x=x)

    def plan() -> str:
        result = onnxlr.optimize("in.onnx", data="data.npz", measure=False, jobs=1)
        return json.dumps([(d.name, d.decision, d.rank) for d in result.plan.decisions])

    expected = plan()
    files = sorted(cache.iterdir())
    assert {f.suffix for f in files} == {".json", ".npz"}
    for file in files:
        if file.suffix == ".json":
            text = json.loads(file.read_text(encoding="utf-8"))
            text["entry"] = {"fc1": 7}
            file.write_text(json.dumps(text), encoding="utf-8")
        else:
            with np.load(file) as held:
                odd = {name: np.array([np.nan]) for name in held.files}
            np.savez(file, allow_pickle=False, **odd)
    assert plan() == expected
    assert here.exists()


def test_a_path_that_is_no_text(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"in\xff.onnx")
    onnx.save(mlp(), tmp_path / "in.onnx")
    (tmp_path / "in.onnx").rename(odd)
    for command in (["inspect", str(odd)], ["optimize", "in.onnx", str(odd)]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1
        assert "isn't text in UTF-8" in result.stderr
