"""Tucker-2 of stacks, and from a factor nearby."""

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxlr.decompose import tucker2

Array = NDArray[np.float64]
RANKS = (5, 4)


def composed(v: Array, core: Array, u: Array) -> Array:
    return np.asarray(np.einsum("ta,abp,sb->tsp", u, core, v))


def kernels() -> Array:
    """One that is done at once, one that takes many sweeps, zeros, and a tiny one."""
    rng = np.random.default_rng(0)
    low = composed(*(rng.standard_normal(s) for s in ((12, 5), (4, 5, 9), (14, 4))))
    noise = rng.standard_normal((14, 12, 9))
    return np.stack([low, noise, np.zeros_like(low), 1e-30 * noise[::-1]])


@pytest.mark.parametrize("sweeps", [0, 50])
def test_a_stack_is_decomposed_as_each_alone(sweeps: int) -> None:
    stack = kernels()
    together = tucker2(stack, RANKS, sweeps)
    for i, kernel in enumerate(stack):
        alone = composed(*tucker2(kernel, RANKS, sweeps))
        stacked = composed(*(part[i] for part in together))
        norm = np.linalg.norm(kernel)
        # A stack goes on until the last one is done: the others may only gain.
        assert np.linalg.norm(stacked - kernel) <= np.linalg.norm(alone - kernel) + 1e-9 * norm
        assert np.linalg.norm(stacked - alone) <= 0.05 * norm


def test_it_goes_on_from_the_factor_that_is_given() -> None:
    kernel = kernels()[1]
    rng = np.random.default_rng(1)
    start = np.linalg.qr(rng.standard_normal((14, 4)))[0]
    _, core, u = tucker2(kernel, RANKS, 0, start)
    assert u is start or np.array_equal(u, start)
    assert core.shape == (4, 5, 9)
    # From where it ends, one sweep more changes next to nothing.
    v, core, u = tucker2(kernel, RANKS)
    again = tucker2(kernel, RANKS, 1, u)
    assert np.linalg.norm(again[1]) == pytest.approx(np.linalg.norm(core), rel=1e-4)
    # From anywhere, an optimum is reached.
    far = tucker2(kernel, RANKS, 50, start)
    best = np.linalg.norm(kernel - composed(v, core, u))
    assert np.linalg.norm(kernel - composed(*far)) <= 1.05 * best
