"""``onnxlr cache``: what it shows, what it removes, and how it ends."""

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from click.testing import CliRunner, Result

import onnxlr
from onnxlr.cli.commands import main
from onnxlr.system.cache import Cache, key_of
from tests.support.clocks import comparison
from tests.support.networks import products


def run(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["cache", *words])
    assert result.exit_code == code, result.output
    assert not isinstance(result.exception, Exception)
    return result


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with entries of three kinds, and somebody's file."""
    monkeypatch.setenv("ONNXLR_CACHE", str(tmp_path))
    cache = Cache(tmp_path)
    for i in range(3):
        cache.write_arrays("statistics", key_of(i), {"x": np.ones(125_000)})
    cache.write("candidates", key_of(0), {"x": 1})
    cache.write("latency", key_of(0), {"x": 1})
    for i, path in enumerate(sorted(tmp_path.iterdir())):
        os.utime(path, (1e9, 1e9 + i))
    (tmp_path / "statistics.npz").write_bytes(b"somebody's")
    return tmp_path


def test_it_shows_what_is_there(folder: Path) -> None:
    text = run().stdout
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert rows["statistics"][1:4] == ["3", "3.002", "MB"]
    assert rows["candidates"][1:2] == ["1"]
    assert rows["latency"][3:4] == ["B"]
    assert text.splitlines()[-1].startswith(f"{folder}: 5 entries, 3.00")
    assert " of at most 1 GB, last used " in text
    local = datetime.fromtimestamp(1e9 + 4).astimezone()
    assert f"{local:%Y-%m-%d %H:%M}" in text.splitlines()[-1]


def test_it_says_so_in_json(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXLR_CACHE_SIZE", "2.5GB")
    told = json.loads(run("--json", "-").stdout)
    sizes = [p.stat().st_size for p in folder.iterdir() if p.name != "statistics.npz"]
    assert told["folder"] == str(folder)
    assert (told["entries"], told["bytes"], told["limit_bytes"]) == (5, sum(sizes), 2_500_000_000)
    assert datetime.fromisoformat(told["last_used"]).timestamp() == 1e9 + 4
    assert [(k["kind"], k["entries"]) for k in told["kinds"]] == [
        ("candidates", 1),
        ("latency", 1),
        ("statistics", 3),
    ]
    assert sum(kind["bytes"] for kind in told["kinds"]) == sum(sizes)
    assert datetime.fromisoformat(told["kinds"][0]["last_used"]).timestamp() == 1e9
    assert "removed" not in told
    file = tmp_path.parent / "told.json"
    assert "of at most 2.5 GB" in run("--json", str(file)).stdout
    assert json.loads(file.read_text(encoding="utf-8")) == told


def test_showing_makes_no_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXLR_CACHE_SIZE", "1MB")
    assert "5 entries, 3.00" in run().stdout
    assert len(list(folder.iterdir())) == 6


def test_clear_removes_its_own_files_only(folder: Path) -> None:
    before = json.loads(run("--json", "-").stdout)
    text = run("--clear").stdout
    assert text.startswith(f"{folder}: removed 5 entries, 3.00")
    assert [p.name for p in folder.iterdir()] == ["statistics.npz"]
    assert run("--clear").stdout == f"{folder}: removed 0 entries, 0 B\n"
    assert run().stdout == f"{folder}: 0 entries, 0 B of at most 1 GB\n"
    Cache(folder).write("candidates", key_of(0), {"x": 1})
    told = json.loads(run("--clear", "--json", "-").stdout)
    assert (told["entries"], told["bytes"], told["last_used"], told["kinds"]) == (0, 0, None, [])
    assert told["removed"]["entries"] == 1
    assert told["removed"]["bytes"] == before["kinds"][0]["bytes"]


def test_a_folder_that_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXLR_CACHE", str(tmp_path / "none"))
    assert run().stdout == f"{tmp_path / 'none'}: 0 entries, 0 B of at most 1 GB\n"
    assert run("--clear").stdout == f"{tmp_path / 'none'}: removed 0 entries, 0 B\n"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("words", [(), ("--clear",)])
def test_a_cache_that_is_off(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXLR_CACHE", "off")
    said = "the cache is off: with ONNXLR_CACHE=off nothing is kept, shown or removed\n"
    assert run(*words).stdout == said
    told = json.loads(run(*words, "--json", "-").stdout)
    assert (told["folder"], told["entries"]) == (None, 0)
    assert not list(tmp_path.iterdir())


def test_nobody_has_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(*_: object) -> str:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ONNXLR_CACHE")
    monkeypatch.setattr("platformdirs.user_cache_dir", homeless)
    assert run().stdout.startswith("nothing is kept: this user has no home folder; name another")


def _refuse(*_: object, **__: object) -> NoReturn:
    raise PermissionError(13, "Permission denied")


def test_what_can_not_be_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpatched = Path.unlink

    def unlink(path: Path, **options: Any) -> None:
        if path.name.startswith("statistics-"):
            _refuse()
        unpatched(path, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    (line,) = run("--clear", code=1).stderr.splitlines()
    assert line.startswith(f"onnxlr: can't remove 3 of the 5 entries in {folder}: statistics-")
    assert line.endswith("make the folder writable, or name another folder with ONNXLR_CACHE")
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("words", [(), ("--clear",)])
def test_what_can_not_be_listed(
    words: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXLR_CACHE", str(folder / "statistics.npz"))
    (line,) = run(*words, code=1).stderr.splitlines()
    assert line == (
        f"onnxlr: can't list the cache in {folder / 'statistics.npz'}: Not a directory; "
        "name another folder with ONNXLR_CACHE"
    )
    monkeypatch.setenv("ONNXLR_CACHE", str(folder))
    monkeypatch.setattr(os, "scandir", _refuse)
    assert "Permission denied" in run(*words, code=1).stderr
    monkeypatch.undo()
    assert len(list(folder.iterdir())) == 6


@pytest.mark.usefixtures("folder")
def test_words_that_make_no_sense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "doesn't exist" in run("--json", str(tmp_path / "a" / "b"), code=1).stderr
    assert "No such option" in run("--size", "5MB", code=2).stderr
    monkeypatch.setenv("ONNXLR_CACHE_SIZE", "much")
    for words in ((), ("--clear",)):
        (line,) = run(*words, code=2).stderr.splitlines()
        assert line.startswith("onnxlr: ONNXLR_CACHE_SIZE=much is no size")
    assert len(list(tmp_path.iterdir())) == 6


def test_a_run_beyond_the_size_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has no room is computed anew."""
    data = tmp_path / "d.npz"
    x = np.random.default_rng(0).standard_normal((96, 48)).astype(np.float32)
    np.savez(data, x=x)
    options: dict[str, Any] = {"data": data, "metric": "rel-error", "target": "macs=0.6"}
    plans = []
    for size in ("1GB", "1GB", "2kB", "0MB"):
        monkeypatch.setenv("ONNXLR_CACHE_SIZE", size)
        plans.append(onnxlr.optimize(products(), max_drop=1, measure=False, **options).plan)
        total = json.loads(run("--json", "-").stdout)["bytes"]
        assert total <= {"1GB": 10**9, "2kB": 2000, "0MB": 0}[size]
        assert size != "1GB" or total > 2000
    assert plans[1:] == plans[:1] * 3


def test_latencies_count_when_they_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = "onnxlr.verify.layer_latency.timed_apart"
    monkeypatch.setattr(timed, lambda *_, **__: comparison(2.0))
    for size in (10**9, 100):
        monkeypatch.setenv("ONNXLR_CACHE_SIZE", f"{size / 1000}kB")
        onnxlr.optimize(products())
        told = json.loads(run("--json", "-").stdout)
        kept = {kind["kind"]: kind["bytes"] for kind in told["kinds"]}
        assert kept["latency"] > 100 if size > 100 else not kept
