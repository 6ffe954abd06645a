"""Factors of sibling layers, which share the factor that multiplies their input."""

import math

import numpy as np

from onnxlr.decompose import (
    Form,
    Moments,
    closed_form,
    leading_outputs,
    outer_and_inner,
)
from onnxlr.layers.layer import Layer
from onnxlr.layers.siblings import Stack, stack_of
from onnxlr.methods.base import GraphPass
from onnxlr.types import Array, Rank


def fit_shared(
    graph_pass: GraphPass, layer: Layer, rank: Rank, moments: Moments
) -> tuple[Array, ...]:
    """The factors that lose least of the outputs of all siblings, each relative to its energy.

    Parameters
    ----------
    graph_pass : GraphPass
        One that shares.
    layer : Layer
    rank : tuple of int
    moments : Moments
        Of the inputs: the same for all siblings, so that each of them gets the same common factor.
    """
    form = graph_pass.form(layer)
    assert form is not None
    stack = _stack(layer, moments)
    outer, _ = outer_and_inner(form)
    axis = form.terms[outer].index(form.result[0])
    shapes = graph_pass.factor_shapes(layer, rank)
    (empty,) = graph_pass.unpack(layer, rank, tuple(np.empty(shape) for shape in shapes))
    whole = list(empty[outer].shape)
    whole[axis] = len(stack.matrix)
    empty[outer] = np.empty(whole)
    leading = leading_outputs(stack.matrix, moments, rank[0])
    factors = closed_form(form, empty, stack.matrix, leading)
    rows = np.moveaxis(factors[outer], axis, 0)[stack.rows]
    factors[outer] = stack.size * np.moveaxis(rows, 0, axis)
    return graph_pass.pack(layer, rank, [factors])


def refit_shared(
    graph_pass: GraphPass,
    layer: Layer,
    rank: Rank,
    weight: Array,
    moments: Moments,
    factors: tuple[Array, ...],
) -> tuple[Array, ...]:
    """The factor of the outputs that is best for a weight, beside the common one as it is.

    Parameters
    ----------
    weight : ndarray of shape (m, n)
        What the factors are to stand for.
    factors : tuple of ndarray
    """
    form = graph_pass.form(layer)
    assert form is not None
    (group,) = graph_pass.unpack(layer, rank, factors)
    outer, inner = outer_and_inner(form)
    turned = form.terms[outer][0] != form.result[0]  # a regression wants the outputs first
    terms = [form.terms[outer][::-1] if turned else form.terms[outer], form.terms[inner]]
    ordered = Form(f"{','.join(terms)}->{form.result}")
    start = [group[outer].T if turned else group[outer], group[inner]]
    square, right = moments.regression(ordered, start, 0, weight)
    solved = np.asarray(np.linalg.lstsq(square, right.T, rcond=None)[0].T, np.float64)  # (m, r)
    group[outer] = solved.T if turned else solved
    return graph_pass.pack(layer, rank, [group])


def shared_energies(layer: Layer, moments: Moments, metric: Array | None) -> Array:
    """What each component of the common factor adds to the energy of a layer's output.

    Parameters
    ----------
    layer : Layer
    moments : Moments
    metric : ndarray of shape (m, m), optional
        What errors of its outputs are multiplied by before they are squared.
    """
    stack = _stack(layer, moments)
    vectors = leading_outputs(stack.matrix, moments, min(stack.matrix.shape))
    energies = np.diag(moments.output_moments(vectors.T @ stack.matrix))
    rows = vectors[stack.rows] if metric is None else metric @ vectors[stack.rows]
    return np.asarray(np.maximum(energies, 0.0) * np.square(rows).sum(axis=0))


def _stack(layer: Layer, moments: Moments) -> Stack:
    return stack_of(layer, lambda weight: math.sqrt(max(moments.energy(weight), 0.0)))
