"""CP of tensors that were made of few components: exact, whatever their sizes."""

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxlr.decompose import cp
from onnxlr.decompose.outer_products import compose


def planted(shape: tuple[int, ...], sizes: list[float], seed: int) -> NDArray[np.float64]:
    """Unit components of these sizes, rounded to float32 as an exported weight is."""
    rng = np.random.default_rng(seed)
    factors = [rng.standard_normal((n, len(sizes))) for n in shape]
    factors = [f / np.linalg.norm(f, axis=0) for f in factors]
    factors[0] = factors[0] * sizes
    return compose(tuple(factors)).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((16, 16, 3, 3), [1, 0.3, 0.01, 1e-3]),
        ((16, 16, 9), [1, 0.1, 0.01, 1e-4]),
        ((24, 16, 3), [1.0] * 8),
        ((32, 8, 9), [1.0] * 8),
        ((6, 1, 3, 3), [1.0] * 3),
        ((5, 4, 1), [1.0] * 3),
        ((8, 1, 9), [1.0] * 5),
        ((12, 10, 3, 3), [1.0] * 20),  # more components than channels
    ],
)
def test_planted_components_are_found_exactly(
    shape: tuple[int, ...], sizes: list[float], seed: int
) -> None:
    tensor = planted(shape, sizes, seed)
    result = cp(tensor, len(sizes))
    assert not result.degenerate
    assert result.error < 1e-6
    rest = np.linalg.norm(compose(result.factors) - tensor) / np.linalg.norm(tensor)
    assert rest == pytest.approx(result.error, rel=1e-3, abs=1e-9)


def test_a_tensor_of_no_low_rank_is_approximated_as_before() -> None:
    tensor = np.random.default_rng(0).standard_normal((16, 12, 3, 3))
    errors = [cp(tensor, rank).error for rank in (4, 8, 16)]
    # Of white noise a share of the parameters explains somewhat more than that share.
    assert errors == sorted(errors, reverse=True)
    assert 0.80 < errors[1] < 0.95
