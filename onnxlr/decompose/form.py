"""How a weight is made of factors: an einsum, its letters and the sizes they stand for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxlr.types import Array


@dataclass(frozen=True)
class Form:
    """How a weight is made of factors: an einsum, whose result is (outputs…, inputs…).

    Attributes
    ----------
    equation : str
        The einsum, its terms in the order of the factors: for example ``"rsp,tr->tsp"``.
    outputs : int
        How many letters of the result are outputs.
    """

    equation: str
    outputs: int = 1

    @property
    def terms(self) -> tuple[str, ...]:
        """The letters of each factor."""
        return tuple(self.equation.split("->")[0].split(","))

    @property
    def result(self) -> str:
        """The letters of the weight."""
        return self.equation.split("->")[1]

    @property
    def mixes(self) -> bool:
        """Whether mixed outputs are of the same form: one factor alone has them."""
        return self.outputs == 1 and sum(self.result[0] in term for term in self.terms) == 1

    def compose(self, factors: Sequence[Array]) -> Array:
        """The weight that factors make, as a matrix of shape (outputs, inputs)."""
        weight = np.einsum(self.equation, *factors, optimize=True)
        return np.asarray(weight.reshape(math.prod(weight.shape[: self.outputs]), -1))

    def sizes(self, factors: Sequence[Array]) -> dict[str, int]:
        """The length that each letter stands for, by the factors' shapes."""
        return dict(
            pair
            for term, factor in zip(self.terms, factors, strict=True)
            for pair in zip(term, factor.shape, strict=True)
        )


def has_closed_form(form: Form) -> bool:
    """Whether ``closed_form`` applies: one bottleneck lies between all outputs and all inputs."""
    if len(form.terms) != 2 or form.outputs != 1:
        return False
    outer, inner = outer_and_inner(form)
    bottleneck = form.terms[outer].replace(form.result[0], "")
    rest = form.terms[inner].replace(bottleneck, "")
    return len(bottleneck) == 1 and rest == form.result[1:] and bottleneck not in form.result


def outer_and_inner(form: Form) -> tuple[int, int]:
    """Of two factors the index of the one that has the outputs, then that of the other."""
    outer = next(i for i, term in enumerate(form.terms) if form.result[0] in term)
    return outer, 1 - outer
