"""Factors fitted to inputs: the optimum in closed form, never worse anywhere."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxlr.decompose import (
    Covariance,
    Form,
    closed_form,
    has_closed_form,
    leading_outputs,
    output_energies,
    weighted_fit,
)
from onnxlr.types import Array
from tests.support.forms import FORMS


def problem(m: int, n: int, seed: int, rows: int = 400) -> tuple[Array, Array, Array]:
    """A weight, inputs whose directions differ much in size, and their covariance."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((n, n)) * 0.7 ** np.arange(n)
    inputs = mixing @ rng.standard_normal((n, rows))
    return rng.standard_normal((m, n)), inputs, inputs @ inputs.T / rows


def lost(weight: Array, other: Array, inputs: Array) -> float:
    """Relative error of the output, from the inputs themselves."""
    return float(np.linalg.norm((weight - other) @ inputs) / np.linalg.norm(weight @ inputs))


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 3))
def test_the_error_is_that_of_the_output_and_never_rises(name: str, seed: int, rank: int) -> None:
    form, shapes = FORMS[name]
    weight, inputs, covariance = problem(8, 24, seed)
    rng = np.random.default_rng(seed)
    start = [rng.standard_normal(shape) for shape in shapes(rank)]
    fitted, errors = weighted_fit(form, start, weight, Covariance(covariance), 30, 30)
    assert errors[0] == pytest.approx(lost(weight, form.compose(start), inputs), rel=1e-6)
    assert errors[-1] == pytest.approx(lost(weight, form.compose(fitted), inputs), rel=1e-5)
    assert all(b <= a for a, b in pairwise(errors))
    assert errors[-1] < 1.0


@pytest.mark.parametrize(
    ("form", "shapes"),
    [
        (Form("rsp,tr->tsp"), ((3, 4, 6), (8, 3))),
        (Form("ar,rb->ab"), ((8, 3), (3, 24))),
        (Form("ar,rb->ba"), ((24, 3), (3, 8))),
    ],
)
def test_the_closed_form_is_the_optimum(form: Form, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Beside the whitened SVD, an oracle that takes a square root of the covariance."""
    assert has_closed_form(form)
    weight, inputs, covariance = problem(8, 24, 3)
    fitted = closed_form(
        form,
        [np.empty(s) for s in shapes],
        weight,
        leading_outputs(weight, Covariance(covariance), 3),
    )
    assert [f.shape for f in fitted] == list(shapes)
    values = np.linalg.svd(weight @ inputs, compute_uv=False)
    best = np.linalg.norm(values[3:]) / np.linalg.norm(values)
    assert lost(weight, form.compose(fitted), inputs) == pytest.approx(best, rel=1e-9)
    # Plain truncation is worse, and alternation from it comes to the same.
    u, s, vt = np.linalg.svd(weight)
    plain = (u[:, :3] * s[:3]) @ vt[:3]
    assert lost(weight, plain, inputs) > 1.05 * best
    _, errors = weighted_fit(
        form, [f + 0.1 for f in fitted], weight, Covariance(covariance), 200, 60
    )
    assert errors[-1] == pytest.approx(best, rel=1e-2)


def test_forms_without_a_closed_form_are_known() -> None:
    assert [name for name, (form, _) in FORMS.items() if has_closed_form(form)] == [
        "channel",
        "product",
    ]


def test_a_singular_covariance_is_no_problem() -> None:
    """Inputs in a few directions only: what they don't have costs nothing, and stays finite."""
    weight, inputs, _ = problem(8, 24, 1, rows=5)
    covariance = inputs @ inputs.T / 5
    for name in ("channel", "spatial", "tucker2"):
        form, shapes = FORMS[name]
        rng = np.random.default_rng(0)
        start = [rng.standard_normal(shape) for shape in shapes(3)]
        fitted, errors = weighted_fit(form, start, weight, Covariance(covariance), 40, 40)
        assert all(np.isfinite(f).all() for f in fitted)
        assert errors[-1] < 0.5 * errors[0]
    form, shapes = FORMS["channel"]
    exact = closed_form(
        form,
        [np.empty(s) for s in shapes(5)],
        weight,
        leading_outputs(weight, Covariance(covariance), 5),
    )
    assert lost(weight, form.compose(exact), inputs) < 1e-6


def test_a_weight_that_is_a_chain_already_stays_one() -> None:
    form, shapes = FORMS["spatial"]
    rng = np.random.default_rng(0)
    factors = [rng.standard_normal(shape) for shape in shapes(3)]
    _, _, covariance = problem(8, 24, 2)
    fitted, errors = weighted_fit(form, factors, form.compose(factors), Covariance(covariance))
    assert errors[-1] < 1e-6
    np.testing.assert_allclose(form.compose(fitted), form.compose(factors), atol=1e-6)


def test_many_outputs_are_decomposed_on_the_side_of_the_inputs() -> None:
    """The leading directions of 60 outputs of 8 inputs: those of the outputs themselves."""
    weight, inputs, covariance = problem(60, 8, 5)
    u, s, _ = np.linalg.svd(weight @ inputs, full_matrices=False)
    leading = leading_outputs(weight, Covariance(covariance), 3)
    np.testing.assert_allclose(leading.T @ leading, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(leading @ (leading.T @ u[:, :3]), u[:, :3], atol=1e-7)
    energies = output_energies(weight, Covariance(covariance))
    np.testing.assert_allclose(energies, s[:8] ** 2 / 400, rtol=1e-9, atol=1e-9 * energies[0])
    assert leading_outputs(weight, Covariance(covariance), 20).shape == (60, 8)
