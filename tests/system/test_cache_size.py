"""The size of the cache: what was not used for the longest time makes room, and only entries do."""

import contextlib
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from onnxlr.errors import UsageError
from onnxlr.system.cache import Cache, cache_place, key_of, open_cache
from onnxlr.system.entries import find_entries
from onnxlr.system.npz import read_npz

KEYS = [key_of(i) for i in range(40)]
FOREIGN = [
    "data.npz",
    "data.json",
    f"notes-{KEYS[0]}.json",
    f"statistics-{KEYS[0]}.json",  # rows of a kind that has arrays
    f"latency-{KEYS[0]}.npz",
    f"statistics-{KEYS[0]}.npz.bak",
    f"statistics-{KEYS[0].upper()}F.npz",
    f"statistics-{KEYS[0][:19]}.npz",
    f".statistics-{KEYS[0]}.npz",
    ".onnxlr-notes",
]


def aged(path: Path, seconds: float) -> Path:
    """A file that was last used so many seconds after the beginning of 1970."""
    os.utime(path, (seconds, seconds))
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_of(size: int) -> dict[str, str]:
    """Rows whose file takes about so many bytes."""
    return {"x": "y" * size}


def test_entries_of_every_kind_count_and_those_used_last_stay(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 20_000)
    cache.write("candidates", KEYS[0], write_of(6000))
    cache.write_arrays("factors", KEYS[1], {"x": np.ones(700)})
    table = cache.path("latency", KEYS[2])
    assert table is not None
    table.write_text("5" * 3000)  # tables of latencies are written by whoever has them
    for i, entry in enumerate(("candidates-{}.json", "factors-{}.npz", "latency-{}.json")):
        aged(tmp_path / entry.format(KEYS[i]), i)
    total = sum(entry.nbytes for entry in find_entries(tmp_path))
    assert 15_000 < total < 16_000
    assert cache.read("candidates", KEYS[0])  # asked for again: the factors are the oldest now
    cache.write("sensitivities", KEYS[3], write_of(6000))
    assert names(tmp_path) == {
        f"candidates-{KEYS[0]}.json",
        f"latency-{KEYS[2]}.json",
        f"sensitivities-{KEYS[3]}.json",
    }
    aged(tmp_path / f"candidates-{KEYS[0]}.json", 1)
    aged(tmp_path / f"sensitivities-{KEYS[3]}.json", 3)
    cache.path("latency", KEYS[2])  # whoever asks for the path is about to use it
    cache.write_arrays("spectra", KEYS[4], {"x": np.ones(700)})
    cache.write_arrays("spectra", KEYS[5], {"x": np.ones(200)})
    assert names(tmp_path) == {
        f"latency-{KEYS[2]}.json",
        f"spectra-{KEYS[4]}.npz",
        f"spectra-{KEYS[5]}.npz",
        f"sensitivities-{KEYS[3]}.json",
    }


def test_arrays_that_are_read_were_used(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 20_000)
    for i in range(2):
        cache.write_arrays("factors", KEYS[i], {"x": np.full(1000, float(i))})
        aged(tmp_path / f"factors-{KEYS[i]}.npz", i)
    cache.read_arrays("factors", KEYS[0])
    cache.write_arrays("factors", KEYS[2], {"x": np.ones(1000)})
    assert names(tmp_path) == {f"factors-{KEYS[0]}.npz", f"factors-{KEYS[2]}.npz"}


def test_what_takes_more_than_half_is_not_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 20_000)
    cache.write_arrays("factors", KEYS[0], {"x": np.ones(1200)})
    cache.write_arrays("factors", KEYS[1], {"x": np.ones(1300)})
    assert names(tmp_path) == {f"factors-{KEYS[0]}.npz"}


def test_the_size_holds_after_every_write(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 50_000)
    for i, key in enumerate(KEYS):
        cache.write_arrays("factors", key, {"x": np.ones(100 * (i % 9))})
        cache.write("candidates", key, write_of(211 * (i % 7)))
        entries = find_entries(tmp_path)
        assert sum(entry.nbytes for entry in entries) <= 50_000
        assert cache.read_arrays("factors", key)
        assert cache.read("candidates", key)
    assert sum(entry.nbytes for entry in entries) > 40_000  # and is made use of


def test_a_tenth_is_freed_at_once(tmp_path: Path) -> None:
    """Otherwise every write beyond the size would have to make room."""
    paths = [tmp_path / f"statistics-{key}.npz" for key in KEYS[:20]]
    for i, path in enumerate(paths):
        path.write_bytes(b"y" * 1000)
        aged(path, i)
    Cache(tmp_path, 20_000).make_room()
    assert names(tmp_path) == {path.name for path in paths}
    Cache(tmp_path, 19_999).make_room()
    assert names(tmp_path) == {path.name for path in paths[-17:]}


def test_a_smaller_size_holds_from_the_next_run_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXLR_CACHE", str(tmp_path))
    for i in range(3):
        open_cache().write("candidates", KEYS[i], write_of(3000))
        aged(tmp_path / f"candidates-{KEYS[i]}.json", i)
    assert len(names(tmp_path)) == 3
    monkeypatch.setenv("ONNXLR_CACHE_SIZE", "6kB")
    open_cache()
    assert names(tmp_path) == {f"candidates-{KEYS[2]}.json"}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500MB", 500_000_000),
        ("1.5gb", 1_500_000_000),
        ("2 kB", 2000),
        ("0MB", 0),
        ("3TB", 3 * 10**12),
        ("", 10**9),
    ],
)
def test_the_environment_names_the_size(
    text: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXLR_CACHE_SIZE", text)
    assert cache_place()[1] == size


@pytest.mark.parametrize(
    "text",
    ["5", "MB", "-1MB", "1e3MB", "500 megabytes", "off", "9" * 400 + "GB", "٣MB", "5MB\n6MB"],
)
def test_what_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXLR_CACHE_SIZE", text)
    with pytest.raises(UsageError, match="is no size: give a number and its unit, such as 500MB"):
        open_cache()


def test_files_of_others_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    for name in FOREIGN:
        (tmp_path / name).write_bytes(b"y" * 9000)
        aged(tmp_path / name, 1)
    (tmp_path / f"factors-{KEYS[1]}.npz").mkdir()
    (tmp_path / f"factors-{KEYS[2]}.npz").symlink_to(tmp_path / "data.npz")
    before = names(tmp_path)
    cache = Cache(tmp_path, 20_000)
    for i in range(3, 8):
        cache.write_arrays("factors", KEYS[i], {"x": np.ones(1000)})
    assert {e.path.name for e in find_entries(tmp_path)} == names(tmp_path) - before
    assert names(tmp_path) - before == {f"factors-{KEYS[i]}.npz" for i in (6, 7)}
    assert before < names(tmp_path)


def test_files_that_a_killed_run_began_go_after_a_while(tmp_path: Path) -> None:
    old, new = (tmp_path / f".onnxlr-{letter * 32}" for letter in "ab")
    for path in (old, new):
        path.write_text("begun")
    aged(old, 1)
    Cache(tmp_path).make_room()
    assert names(tmp_path) == {new.name}


def test_an_entry_that_goes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run makes room: what was opened is read, and no empty file comes of it."""
    cache, other = Cache(tmp_path), Cache(tmp_path, 0)
    cache.write_arrays("factors", KEYS[0], {"x": np.arange(9.0)})
    unpatched = read_npz

    def read(path: Path) -> Any:
        arrays = unpatched(path)
        other.make_room()
        return arrays

    monkeypatch.setattr("onnxlr.system.cache.read_npz", read)
    np.testing.assert_array_equal(cache.read_arrays("factors", KEYS[0])["x"], np.arange(9.0))
    assert not names(tmp_path)
    assert cache.read_arrays("factors", KEYS[0]) == {}


def test_what_another_run_removes_meanwhile_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path, 0)
    for i in range(3):
        (tmp_path / f"factors-{KEYS[i]}.npz").write_bytes(b"y" * 10)
    unpatched = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        for other in tmp_path.iterdir():
            unpatched(other)
        unpatched(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    cache.make_room()
    assert not names(tmp_path)


def _fail(*_: object, **__: object) -> NoReturn:
    raise PermissionError(13, "Permission denied")


def test_a_folder_that_may_only_be_read_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path)
    cache.write("candidates", KEYS[0], {"x": 1})
    cache.write_arrays("factors", KEYS[0], {"x": np.ones(3)})
    monkeypatch.setattr(os, "utime", _fail)
    monkeypatch.setattr(Path, "touch", _fail)
    monkeypatch.setattr(Path, "unlink", _fail)
    small = Cache(tmp_path, 0)
    small.make_room()
    for other in (cache, small):
        assert other.read("candidates", KEYS[0]) == {"x": 1}
        assert other.read_arrays("factors", KEYS[0])["x"].tolist() == [1, 1, 1]
    cache.write("candidates", KEYS[1], {"x": 1})
    cache.write_arrays("factors", KEYS[1], {"x": np.ones(3)})
    assert names(tmp_path) == {f"candidates-{KEYS[0]}.json", f"factors-{KEYS[0]}.npz"}


def test_a_disk_that_fills_up_leaves_nothing_half_written(tmp_path: Path) -> None:
    """In a process that may write files of 20 kB at most."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_write_with_little_room, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert names(tmp_path) == {f"candidates-{KEYS[0]}.json", f"factors-{KEYS[0]}.npz"}


def _write_with_little_room(folder: Path) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    cache = Cache(folder)
    for i, size in enumerate((2000, 5000)):
        cache.write("candidates", KEYS[i], write_of(8 * size))
        cache.write_arrays("factors", KEYS[i], {"x": np.ones(size)})
    assert cache.read_arrays("factors", KEYS[0])


def _write_many(folder: Path, seed: int) -> None:
    """Write and read what others write and read too; each value tells its entry."""
    cache, rng = Cache(folder, 60_000), np.random.default_rng(seed)
    for _ in range(50):
        i = int(rng.integers(len(KEYS)))
        cache.write_arrays("factors", KEYS[i], {"x": np.full(200 + 10 * i, float(i))})
        cache.write("candidates", KEYS[i], {f"row {seed}": [i] * 50})
        j = int(rng.integers(len(KEYS)))
        arrays, rows = cache.read_arrays("factors", KEYS[j]), cache.read("candidates", KEYS[j])
        assert not arrays or np.array_equal(arrays["x"], np.full(200 + 10 * j, float(j)))
        assert all(row == [j] * 50 for row in rows.values())


def test_runs_at_the_same_time_share_the_size(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    done, most = threading.Event(), 0

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, sum(entry.nbytes for entry in find_entries(tmp_path)))

    watcher = threading.Thread(target=watch)
    processes = [context.Process(target=_write_many, args=(tmp_path, s)) for s in range(3)]
    for process in processes:
        process.start()
    watcher.start()
    with contextlib.ExitStack() as stack:
        stack.callback(watcher.join)
        stack.callback(done.set)
        for process in processes:
            process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3
    assert 40_000 < most <= 60_000 + 3 * 5000  # beyond it at most what each has just written
    assert sum(entry.nbytes for entry in find_entries(tmp_path)) <= 60_000
    assert all(entry.path.is_file() for entry in find_entries(tmp_path))
    assert not list(tmp_path.glob(".onnxlr-*"))


@pytest.mark.parametrize("place", ["/proc/none", "/dev/null", "/dev/null/below"])
def test_a_place_where_nothing_can_be_kept(place: str) -> None:
    cache = Cache(Path(place), 1000)
    cache.make_room()
    cache.write("candidates", KEYS[0], {"x": 1})
    cache.write_arrays("factors", KEYS[0], {"x": np.ones(3)})
    assert cache.read("candidates", KEYS[0]) == {}
    assert cache.read_arrays("factors", KEYS[0]) == {}
