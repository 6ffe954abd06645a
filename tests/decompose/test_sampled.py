"""Sampled rows in place of a covariance: the same answers, where both can be had."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from onnxlr.decompose import Covariance, Form, SampledMoments, shrunk_moments, weighted_fit
from onnxlr.decompose import sampled as sampled_module
from onnxlr.types import Array
from tests.support.forms import FORMS

SCALE = 0.02


def both(n: int = 24, rows: int = 90, seed: int = 0) -> tuple[SampledMoments, Covariance]:
    """Rows with a variance for each element, and the matrix that they stand for."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((n, n)) * 0.7 ** np.arange(n)
    x = (rng.standard_normal((rows, n)) @ mixing.T).astype(np.float32)
    variances = rng.uniform(0.1, 2.0, n)
    wide = x.astype(np.float64)
    return SampledMoments(x, SCALE, variances), Covariance(
        SCALE * wide.T @ wide + np.diag(variances)
    )


BOTH: tuple[SampledMoments, Covariance] = both()


def factors_of(name: str, rank: int, seed: int) -> tuple[Form, list[Array]]:
    form, shapes = FORMS[name]
    rng = np.random.default_rng(seed)
    return form, [rng.standard_normal(shape) for shape in shapes(rank)]


@pytest.mark.parametrize("name", FORMS)
def test_rows_answer_as_the_matrix_does(name: str) -> None:
    sampled, covariance = both()
    form, factors = factors_of(name, 3, 1)
    weight = np.random.default_rng(2).standard_normal((8, 24))
    close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-4)
    assert sampled.energy(weight) == pytest.approx(covariance.energy(weight), rel=1e-6)
    close(sampled.output_moments(weight), covariance.output_moments(weight))
    wanted = covariance.loss(form, factors, weight)
    assert sampled.loss(form, factors, weight) == pytest.approx(wanted, rel=1e-6)
    for k in range(len(factors)):
        close(
            sampled.gradient(form, factors, k, weight),
            covariance.gradient(form, factors, k, weight),
        )
        (change, energy), (other, other_energy) = (
            moments.curve(form, factors, k) for moments in (sampled, covariance)
        )
        close(change, other)
        assert energy == pytest.approx(other_energy, rel=1e-6)


@pytest.mark.parametrize("name", [name for name, (form, _) in FORMS.items() if form.outputs == 1])
def test_the_regression_on_rows_is_least_squares(name: str) -> None:
    """Beside an oracle that builds the features of every row, and of every variance."""
    form, factors = factors_of(name, 3, 1)
    k = next(i for i, term in enumerate(form.terms) if form.result[0] in term)
    if form.terms[k][0] != form.result[0]:
        return
    sampled, covariance = both()
    weight = np.random.default_rng(2).standard_normal((8, 24))
    size = math.prod(factors[k].shape[1:])
    features = np.empty((size, 24))
    for i in range(size):  # one output, made by one element of the factor
        one = np.zeros((1, size))
        one[0, i] = 1.0
        own = [*factors[:k], one.reshape(1, *factors[k].shape[1:]), *factors[k + 1 :]]
        features[i] = form.compose(own)[0]
    rows = np.vstack(
        [math.sqrt(SCALE) * sampled.rows.astype(np.float64), np.diag(np.sqrt(sampled.variances))]
    )
    solution = np.linalg.lstsq(rows @ features.T, rows @ weight.T, rcond=None)[0].T
    for moments in (sampled, covariance):
        gram, right = moments.regression(form, factors, k, weight)
        np.testing.assert_allclose(np.linalg.solve(gram, right.T).T, solution, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solved", [1000, 7])  # as a matrix, and with a few of the rows
@pytest.mark.parametrize("name", FORMS)
def test_the_preconditioner_solves(name: str, solved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rows in a matrix it is that of the covariance; beyond, it still lowers the error."""
    monkeypatch.setattr(sampled_module, "_SOLVED", solved)
    sampled, covariance = both()
    form, start = factors_of(name, 2, 3)
    weight = np.random.default_rng(2).standard_normal((8, 24))
    ends = []
    for moments in (sampled, covariance):
        fitted, errors = weighted_fit(form, start, weight, moments, 3, 2)
        assert all(b <= a for a, b in pairwise(errors))
        ends.append(covariance.loss(form, fitted, weight))
    assert ends[0] == pytest.approx(ends[1], rel=1e-2 if solved > 24 else 0.3)


def test_inner_factors_are_averaged_over_what_lies_beside_them() -> None:
    """A solver for rows (x, p) of a core behind a 1×1 factor, and one for its inputs alone."""
    covariance = BOTH[1]
    a = np.random.default_rng(0).standard_normal((2, 4))
    sizes = {"x": 2, "s": 4, "p": 6}
    right = np.random.default_rng(1).standard_normal((12, 3))
    answers = [m.average_solver(sizes, "sp", [("xs", a)], "", "xp")(right) for m in BOTH]
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-4, atol=1e-5)
    whole = np.kron(a, np.eye(6))
    matrix = whole @ covariance.matrix @ whole.T
    np.testing.assert_allclose(matrix @ answers[1], right, atol=1e-6)
    answers = [m.average_solver(sizes, "sp", [], "p", "s")(right[:4]) for m in BOTH]
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-4, atol=1e-5)
    mean = np.einsum("spzp->sz", covariance.matrix.reshape(4, 6, 4, 6))
    np.testing.assert_allclose(mean @ answers[1], right[:4], atol=1e-6)


def test_a_solver_of_few_rows_inverts(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Woodbury's identity, as exactly as the matrix would."""
    monkeypatch.setattr(sampled_module, "_SOLVED", 23)
    sampled, _ = both(rows=20)
    rows = sampled.rows.astype(np.float64)
    matrix = SCALE * rows.T @ rows + np.diag(sampled.variances)
    right = np.random.default_rng(0).standard_normal((24, 3))
    solution = sampled.average_solver({"n": 24}, "n", [], "", "n")(right)
    np.testing.assert_allclose(matrix @ solution, right, atol=1e-4)


@pytest.mark.parametrize("rows", [12, 60, 1000])
def test_shrunk_moments_come_closer_to_the_true_ones(rows: int) -> None:
    """Than the sample alone, and than its variances alone; with many rows they are the sample."""
    rng = np.random.default_rng(rows)
    mixing = rng.standard_normal((50, 50)) * 0.8 ** np.arange(50)
    true = mixing @ mixing.T
    apart = {"sample": 0.0, "variances": 0.0, "shrunk": 0.0}
    shares = []
    for _ in range(20):
        x = (rng.standard_normal((rows, 50)) @ mixing.T).astype(np.float32)
        shrunk = shrunk_moments(x)
        matrix = shrunk.scale * x.T @ x + np.diag(shrunk.variances)
        np.testing.assert_allclose(np.diag(matrix), np.mean(np.square(x), axis=0), rtol=1e-4)
        tried = {"sample": x.T @ x / rows, "variances": np.diag(np.diag(matrix)), "shrunk": matrix}
        for kind, item in tried.items():
            apart[kind] += float(np.sum((item - true) ** 2))
        shares.append(1 - shrunk.scale * rows)
    assert apart["shrunk"] < apart["variances"]
    assert apart["shrunk"] < apart["sample"] * (1.0 if rows < 100 else 1.02)
    # What the best share is in truth, by the true moments.
    best = best_share(mixing, rows)
    assert np.mean(shares) == pytest.approx(best, rel=0.2)


def best_share(mixing: Array, rows: int) -> float:
    """The share that brings the expected distance to its least, for Gaussian rows."""
    true = mixing @ mixing.T
    variances = np.diag(true)
    noise = (np.outer(variances, variances) + true**2) / rows  # of each product
    np.fill_diagonal(noise, 0.0)
    signal = true**2
    np.fill_diagonal(signal, 0.0)
    return float(noise.sum() / (noise.sum() + signal.sum()))


@pytest.mark.parametrize("rows", [9, 40])
def test_the_share_is_that_of_its_definition(rows: int) -> None:
    """Σ var(cᵢⱼ) / (Σ var(cᵢⱼ) + Σ cᵢⱼ²) off the diagonal, without a bias, element by element."""
    rng = np.random.default_rng(rows)
    x = (rng.standard_normal((rows, 6)) @ rng.standard_normal((6, 6))).astype(np.float32)
    noise = signal = 0.0
    for i in range(6):
        for j in range(6):
            if i == j:
                continue
            products = (x[:, i] * x[:, j]).astype(np.float64)
            pairs = np.outer(products, products)
            square = float(pairs.sum() - np.trace(pairs)) / (rows * (rows - 1))
            noise += (float(np.mean(products**2)) - square) / rows
            signal += square
    # What is on the diagonal is left out by the sample's variances, which have a bias of their own.
    for i in range(6):
        squares = x[:, i].astype(np.float64) ** 2
        pairs = np.outer(squares, squares)
        square = float(pairs.sum() - np.trace(pairs)) / (rows * (rows - 1))
        apart = square - squares.mean() ** 2
        noise += -apart / rows
        signal += apart
    share = noise / (noise + signal)
    assert 0.01 < share < 0.9
    assert 1 - shrunk_moments(x).scale * rows == pytest.approx(share, rel=1e-4)
