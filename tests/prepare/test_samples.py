"""The user's samples: every kind of file, halves, batches, and what doesn't fit the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxlr.errors import DataError
from onnxlr.model.load import load
from onnxlr.prepare.inputs import input_specs
from onnxlr.prepare.samples import load_samples
from tests.support.builders import make_model, node


def specs_of(dims: tuple[Any, ...], dtype: str = "float32") -> Any:
    return input_specs(
        load(make_model([node("Relu", ["x"], "y")], {"x": dims}, ["y"], {}, dtype=dtype)).model
    )


@pytest.mark.parametrize("suffix", ["npz", "npy", "folder"])
def test_samples_from_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    x = np.arange(60, dtype=np.float32).reshape(20, 3)
    path = tmp_path / f"data.{suffix}"
    if suffix == "npz":
        np.savez(path, x=x, label=np.arange(20))
    elif suffix == "npy":
        np.save(path, x)
    else:
        path.mkdir()
        np.savez(path / "b.npz", x=x[7:])
        np.savez(path / "a.npz", x=x[:7])
    samples = load_samples(path, specs_of(("n", 3)), None)
    assert len(samples) == 20
    rows = np.concatenate([feed["x"] for feed, *_ in samples.batches(6)])
    np.testing.assert_array_equal(rows, x)


def test_parts_are_disjoint_seeded_and_complete(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((21, 3), np.float32), label=np.arange(21))
    samples = load_samples(tmp_path / "d.npz", specs_of(("n", 3)), "label")
    first, second, third = samples.in_parts(3, 7, 3, 11)
    assert sorted([*first.index, *second.index, *third.index]) == list(range(21))
    assert (len(first), len(second), len(third)) == (7, 3, 11)
    np.testing.assert_array_equal(samples.in_parts(3, 7, 3, 11)[1].index, second.index)
    np.testing.assert_array_equal(samples.in_parts(3, 7)[0].index, first.index)
    assert list(samples.in_parts(4, 7, 3, 11)[2].index) != list(third.index)


def test_a_fixed_batch_is_padded_and_an_unbatched_input_goes_alone(tmp_path: Path) -> None:
    x = np.arange(30, dtype=np.float32).reshape(10, 3)
    np.savez(tmp_path / "d.npz", x=x)
    samples = load_samples(tmp_path / "d.npz", specs_of((4, 3)), None)
    feeds = list(samples.batches())
    assert [len(f["x"]) for f, *_ in feeds] == [4, 4, 4]
    assert [(len(i), rows) for _, i, rows in feeds] == [(4, 4), (4, 4), (2, 4)]
    np.testing.assert_array_equal(feeds[2][0]["x"], x[[8, 9, 9, 9]])
    np.savez(tmp_path / "e.npz", x=x.reshape(5, 2, 3))
    alone = load_samples(tmp_path / "e.npz", specs_of((2, 3)), None)
    assert alone.batch == 1
    assert [f["x"].shape for f, *_ in alone.batches()] == [(2, 3)] * 5


def test_a_wrong_shape_names_the_axis(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((5, 4), np.float32))
    with pytest.raises(DataError, match="axis 1 is 4, not 3"):
        load_samples(tmp_path / "d.npz", specs_of(("n", 3)), None)


def test_files_of_different_lengths_are_never_in_one_batch(tmp_path: Path) -> None:
    """Sentences and images differ in size from file to file."""
    model = make_model([node("Relu", ["x"], "y")], {"x": ("n", "t", 3)}, ["y"], {})
    files = {
        name: np.random.default_rng(t).standard_normal((20, t, 3)).astype(np.float32)
        for name, t in (("a", 5), ("b", 9), ("c", 9))
    }
    files["d"] = np.ones((2, 1, 4, 3), np.float32)  # whole inputs, one a sample
    for name, array in files.items():
        np.save(tmp_path / f"{name}.npy", array)
    samples = load_samples(tmp_path, input_specs(load(model).model), None)
    batches = [(feed["x"], index) for feed, index, _ in samples.batches(16)]
    assert [len(index) for _, index in batches] == [16, 4, 16, 16, 8, 1, 1]
    np.testing.assert_array_equal(np.concatenate([i for _, i in batches]), np.arange(62))
    np.testing.assert_array_equal(batches[3][0][:4], files["b"][16:])
    np.testing.assert_array_equal(batches[3][0][4:], files["c"][:12])
    assert batches[5][0].shape == (1, 4, 3)
    first, second = samples.in_parts(0, 31, 31)
    assert sum(len(i) for _, i, _ in first.batches()) == len(first)
    assert sum(len(i) for _, i, _ in second.batches()) == len(second)
