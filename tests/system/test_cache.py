"""What runs leave for the next: read back as written, and done without where it can't be."""

import os
from pathlib import Path

import numpy as np
import pytest

from onnxlr.system.cache import Cache, key_of, open_cache
from onnxlr.system.files import read_json


def test_entries_come_back(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new" / "folder")
    assert cache.read("latency", "k") == {}
    cache.write("latency", "k", {"conv": [1.5, None]})
    assert cache.read("latency", "k") == {"conv": [1.5, None]}
    assert cache.read("latency", "other") == {}
    arrays = {"mean of a/b": np.arange(6.0).reshape(2, 3), "rows": np.array(7)}
    cache.write_arrays("statistics", "k", arrays)
    stored = cache.read_arrays("statistics", "k")
    assert stored.keys() == arrays.keys()
    assert all(
        np.array_equal(stored[n], a) and stored[n].dtype == a.dtype for n, a in arrays.items()
    )
    assert not list((tmp_path / "new" / "folder").glob(".*"))


DAMAGED = [
    *(b"", b"{", b"[1]", b"\xff\xfe", b"PK\x03\x04broken", b"{}", b'{"rows": 1}'),
    b'{"rows": {"x": 5}, "digest": "of something else"}',
]


@pytest.mark.parametrize("content", DAMAGED)
def test_what_cannot_be_read_is_done_without(content: bytes, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    (tmp_path / "candidates-k.json").write_bytes(content)
    (tmp_path / "factors-k.npz").write_bytes(content)
    assert cache.read("candidates", "k") == {}
    assert cache.read_arrays("factors", "k") == {}
    cache.write("candidates", "k", {"x": 1})
    assert cache.read("candidates", "k") == {"x": 1}


def test_a_folder_that_is_none_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    cache = Cache(tmp_path / "file" / "below")
    cache.write("candidates", "k", {"x": 1})
    cache.write_arrays("factors", "k", {"x": np.ones(2)})
    assert cache.read("candidates", "k") == {}
    assert cache.read_arrays("factors", "k") == {}


def test_the_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXLR_CACHE", str(tmp_path))
    open_cache().write("candidates", "k", {"x": 1})
    assert read_json(tmp_path / "candidates-k.json")["rows"] == {"x": 1}
    monkeypatch.setenv("ONNXLR_CACHE", "off")
    assert open_cache().path("latency", "k") is None


def test_a_key_tells_everything_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [key_of("a", 1), key_of("a", 2), key_of("a", "1"), key_of("a1"), key_of(("a", 1))]
    assert len(set(keys)) == len(keys)
    assert key_of("a", 1) == keys[0]
    monkeypatch.setattr("onnxlr.system.cache.__version__", "9.9")
    assert key_of("a", 1) != keys[0]


def test_one_bit_that_flips_is_seen(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.write("candidates", "k", {"x": 1.0})
    cache.write_arrays("factors", "k", {"x": np.ones(100)})
    text = tmp_path / "candidates-k.json"
    text.write_text(text.read_text().replace("1.0", "1.5"))
    packed = bytearray((tmp_path / "factors-k.npz").read_bytes())
    packed[len(packed) // 2] ^= 1
    (tmp_path / "factors-k.npz").write_bytes(packed)
    assert cache.read("candidates", "k") == {}
    assert cache.read_arrays("factors", "k") == {}


def test_names_that_no_file_could_have(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    arrays = {
        "L" * 70_000: np.ones(2),
        "a\0b": np.zeros(3),
        "a\0c": np.ones(4),
        "names": np.ones(1),
    }
    cache.write_arrays("factors", "k", arrays)
    stored = cache.read_arrays("factors", "k")
    assert set(stored) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(stored[name], array)


def test_two_runs_add_to_one_entry(tmp_path: Path) -> None:
    one, other = Cache(tmp_path), Cache(tmp_path)
    one.write("candidates", "k", {"x": 1})
    other.write("candidates", "k", {"y": 2})
    assert one.read("candidates", "k") == {"x": 1, "y": 2}


def test_a_pipe_in_the_place_of_an_entry_is_not_waited_for(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.write("candidates", "k", {"a": 1})
    cache.write_arrays("factors", "k", {"a": np.ones(3)})
    for entry in list(tmp_path.iterdir()):
        entry.unlink()
        os.mkfifo(entry)
    assert cache.read("candidates", "k") == {}
    assert cache.read_arrays("factors", "k") == {}
    cache.write("candidates", "k", {"a": 2})
    assert cache.read("candidates", "k") == {"a": 2}
