"""Statistics in the cache: half as large, the same to the bit, and only where that saves time."""

from pathlib import Path

import numpy as np
import pytest

from onnxlr.calibrate.kept import (
    pack_symmetric,
    read_statistics,
    unpack_symmetric,
    write_statistics,
)
from onnxlr.calibrate.statistics import RunningMoments, Statistics, merge_statistics
from onnxlr.layers.layer import Layer
from onnxlr.system.cache import Cache, key_of
from onnxlr.types import Array
from tests.support.builders import layers_of
from tests.support.pass_cases import conv

RNG = np.random.default_rng(0)


def bits(array: Array) -> list[bytes]:
    return [array.dtype.str.encode(), str(array.shape).encode(), array.tobytes()]


@pytest.mark.parametrize("n", [1, 2, 3, 8, 65, 200])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_triangle_is_all_of_a_symmetric_matrix(n: int, groups: int) -> None:
    matrices = RNG.standard_normal((groups, n, n))
    matrices += matrices.swapaxes(1, 2)
    packed = pack_symmetric(matrices)
    assert packed.size == groups * n * (n + 1) / 2
    assert bits(unpack_symmetric(packed)) == bits(matrices)
    assert unpack_symmetric(packed).flags.c_contiguous


@pytest.mark.parametrize("place", [(0, 1, 2), (1, 2, 0)])
@pytest.mark.parametrize("value", [np.nextafter(1.0, 2.0), -1.0])
def test_one_bit_of_difference_keeps_the_whole(place: tuple[int, ...], value: float) -> None:
    matrices = np.ones((2, 3, 3))
    matrices[place] = value
    assert bits(unpack_symmetric(pack_symmetric(matrices))) == bits(matrices)
    signed = np.zeros((2, 3, 3))
    signed[place] = -0.0  # equals zero, and is another number
    assert bits(unpack_symmetric(pack_symmetric(signed))) == bits(signed)


def grouped() -> Layer:
    """A convolution of two groups."""
    _, _, (layer,) = layers_of(conv((4, 6, 9, 8), (8, 3, 3, 3), group=2))
    return layer


def moments(layer: Layer, seed: int) -> Statistics:
    running = RunningMoments(layer, 2, seed)
    rng = np.random.default_rng(seed)
    for _ in range(2):
        running.add(layer.uses[0], rng.standard_normal((4, 6, 9, 8)).astype(np.float32))
    return running.statistics()


def test_statistics_come_back_to_the_bit_from_half_the_bytes(tmp_path: Path) -> None:
    layer, cache, key = grouped(), Cache(tmp_path), key_of("k")
    whole = merge_statistics(moments(layer, 0), moments(layer, 1))
    assert whole.covariance.shape == (2, 27, 27)
    write_statistics(cache, key, {layer.name: whole}, seconds=1.0)
    again = read_statistics(cache, key, [layer])[layer.name]
    assert bits(again.covariance) == bits(whole.covariance)
    assert bits(again.mean) == bits(whole.mean)
    assert again.rows == whole.rows
    (entry,) = tmp_path.iterdir()
    triangles = 2 * 27 * 28 // 2 * 8
    assert triangles < entry.stat().st_size < triangles + 3000 < whole.covariance.nbytes


def test_what_is_made_as_fast_as_it_is_read_is_not_kept(tmp_path: Path) -> None:
    layer, cache, key = grouped(), Cache(tmp_path), key_of("k")
    made = {layer.name: moments(layer, 0)}
    nbytes = 8 * (2 * 27 + 2 * 27 * 28 // 2 + 1)
    write_statistics(cache, key, made, seconds=0.99 * nbytes / 20e6)
    assert read_statistics(cache, key, [layer]) == {}
    write_statistics(cache, key, made, seconds=1.01 * nbytes / 20e6)
    assert list(read_statistics(cache, key, [layer])) == [layer.name]


@pytest.mark.parametrize("shape", [(2, 377), (2, 379), (1, 378), (2, 27, 28), (378,)])
def test_a_covariance_of_another_size_is_none(shape: tuple[int, ...], tmp_path: Path) -> None:
    layer, cache, key = grouped(), Cache(tmp_path), key_of("k")
    write_statistics(cache, key, {layer.name: moments(layer, 0)}, seconds=1.0)
    arrays = cache.read_arrays("statistics", key)
    cache.write_arrays("statistics", key, {**arrays, f"covariance {layer.name}": np.ones(shape)})
    assert read_statistics(cache, key, [layer]) == {}
