"""Second moments of inputs with tens of thousands of elements: sampled rows, and their variances.

C = (1 − λ)·XᵀX/N + λ·diag(v) is never built. Far fewer rows than elements say nothing of most
directions: λ is the share of the variances v that brings C closest to the true one (Schäfer &
Strimmer 2005, doi 10.2202/1544-6115.1175), so that factors keep to the weight there, each element
by its variance. Every factor contracts most of the elements away before anything is squared.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from onnxlr.decompose.form import Form
from onnxlr.decompose.moments import Solver, Term, contracted, solver, without
from onnxlr.types import Array, Shape

Rows = NDArray[np.float32]

_ROW = "Z"  # a letter that no form uses
_SOLVED = 3072  # elements, up to which averaged moments are a matrix; beyond, as many rows serve
_WEIGHED = 512  # rows that tell how far the others can be trusted
_FLOOR = 1e-9  # of the mean variance: where there is none, a preconditioner is no inverse
# Elements between contractions. NumPy's own limit, the largest operand, would have it run one loop
# over all letters.
_BETWEEN = 1 << 27
_FEW_OPERANDS = 5  # of which the best order is found soon


class SampledMoments:
    """C = c·XᵀX + diag(d), with products in single precision.

    Parameters
    ----------
    rows : ndarray of shape (N, n)
        Inputs about their mean, in single precision; there may be none.
    scale : float
        c.
    variances : ndarray of shape (n,)
        d, in double precision.
    """

    def __init__(self, rows: Rows, scale: float, variances: Array) -> None:
        self.rows = rows
        self.scale = scale
        self.variances = variances
        self._target: tuple[Array, Rows] | None = None
        self._narrow: tuple[int, list[Array], _Narrow] | None = None

    def energy(self, weight: Array) -> float:
        """See ``Moments``."""
        return self._of_rows(self._target_of(weight)) + self._of_variances(weight)

    def output_moments(self, weight: Array) -> Array:
        """See ``Moments``."""
        made = (weight * self.variances) @ weight.T
        if len(self.rows):
            outputs = self._target_of(weight).astype(np.float64)
            made += self.scale * (outputs.T @ outputs)
        return np.asarray(made)

    def loss(self, form: Form, factors: Sequence[Array], weight: Array) -> float:
        """See ``Moments``."""
        rest = self._target_of(weight) - _Narrow(form, factors, None, self.rows).outputs(factors)
        return self._of_rows(rest) + self._of_variances(weight - form.compose(factors))

    def regression(
        self, form: Form, factors: Sequence[Array], k: int, weight: Array
    ) -> tuple[Array, Array]:
        """See ``Moments``."""
        inner, inputs = form.terms[k][1:], form.result[1:]
        others, terms = without(factors, k), without(form.terms, k)
        sizes = form.sizes(factors)
        spread = tuple(sizes[letter] for letter in inputs)
        rest = math.prod(factors[k].shape[1:])
        pairs = list(zip(terms, others, strict=True))
        gram = _variance_gram(sizes, pairs, inputs, self.variances.reshape(spread), inner)
        right = contracted(form, factors, k, weight * self.variances).reshape(len(weight), rest)
        if len(self.rows):
            features = _contract(
                f"{_ROW}{inputs},{','.join(terms)}->{inner}{_ROW}",
                self.rows.reshape(-1, *spread),
                *_single(others),
            ).reshape(rest, -1)
            features = features.astype(np.float64)
            gram += self.scale * (features @ features.T)  # half the work, as a product with itself
            right += self.scale * (features @ self._target_of(weight)).T
        return gram, right

    def gradient(self, form: Form, factors: Sequence[Array], k: int, weight: Array) -> Array:
        """See ``Moments``."""
        narrow = self._narrowed(form, factors, k)
        apart = self._target_of(weight) - narrow.outputs(factors)
        return self._back(form, factors, k, narrow, apart, weight - form.compose(factors))

    def curve(self, form: Form, factors: Sequence[Array], k: int) -> tuple[Array, float]:
        """See ``Moments``."""
        narrow = self._narrowed(form, factors, k)
        outputs, made = narrow.outputs(factors), form.compose(factors)
        energy = self._of_rows(outputs) + self._of_variances(made)
        return self._back(form, factors, k, narrow, outputs, made), energy

    def average_solver(
        self, sizes: Mapping[str, int], inputs: str, inner: Sequence[Term], shared: str, right: str
    ) -> Solver:
        """See ``Moments``: exact for up to 3,072 elements; beyond, with as many of the rows."""
        spread = tuple(sizes[letter] for letter in inputs)
        n = math.prod(sizes[letter] for letter in right)
        terms = ",".join([f"{_ROW}{inputs}", *(t for t, _ in inner)])
        features = _contract(
            f"{terms}->{_ROW}{shared}{right}",
            self.rows.reshape(-1, *spread),
            *_single([f for _, f in inner]),
        ).reshape(-1, n)
        variances = self.variances.reshape(spread)
        every = -(-len(features) // _SOLVED)  # what only guides the steps may be less exact
        features = features[::every] * np.float32(math.sqrt(every * self.scale))
        if n <= _SOLVED:
            gram = _variance_gram(sizes, inner, inputs, variances, right)
            doubles = features.astype(np.float64)
            return solver(gram + doubles.T @ doubles)
        squares = [(t, f**2) for t, f in inner]
        diagonal = _contract(
            ",".join([inputs, *(t for t, _ in squares)]) + f"->{right}",
            variances,
            *(f for _, f in squares),
        ).reshape(n)
        return _low_rank_solver(features, diagonal)

    def _target_of(self, weight: Array) -> Rows:
        """X·Wᵀ; that of the last weight is kept, since all factors are fitted to one."""
        if self._target is None or self._target[0] is not weight:
            self._target = weight, self.rows @ weight.T.astype(np.float32)
        return self._target[1]

    def _narrowed(self, form: Form, factors: Sequence[Array], k: int) -> "_Narrow":
        """What the factors that stay make of the rows, kept until one of them changes."""
        others = without(factors, k)
        if self._narrow is not None:
            index, before, narrow = self._narrow
            if index == k and all(a is b for a, b in zip(before, others, strict=True)):
                return narrow
        narrow = _Narrow(form, factors, k, self.rows)
        self._narrow = k, others, narrow
        return narrow

    def _back(
        self,
        form: Form,
        factors: Sequence[Array],
        k: int,
        narrow: "_Narrow",
        outputs: Rows,
        weight: Array,
    ) -> Array:
        """c·outputsᵀ·X and weight · diag(d), contracted with all factors but the k-th."""
        back = contracted(form, factors, k, weight * self.variances)
        return back + self.scale * narrow.back(factors, outputs) if len(self.rows) else back

    def _of_rows(self, outputs: Rows) -> float:
        return self.scale * float(np.sum(np.square(outputs, dtype=np.float64)))

    def _of_variances(self, weight: Array) -> float:
        return float(np.sum(np.square(weight) @ self.variances))


class _Narrow:
    """Rows after all that other factors than the k-th make of them: what that one's problem is in.

    Parameters
    ----------
    form : Form
    factors : sequence of ndarray
    k : int or None
        None where all factors stay.
    rows : ndarray of shape (N, n)
    """

    def __init__(self, form: Form, factors: Sequence[Array], k: int | None, rows: Rows) -> None:
        inputs, outputs = form.result[form.outputs :], form.result[: form.outputs]
        sizes = form.sizes(factors)
        self._k, self._terms = k, form.terms
        self._outputs, self._sizes = outputs, sizes
        self._rows = rows.reshape(-1, *(sizes[letter] for letter in inputs))
        self._letters = inputs
        self._left = list(range(len(factors)))
        # Those that meet the inputs and not the outputs: the rows get narrower by them, or stay.
        first = [
            i
            for i, term in enumerate(form.terms)
            if i != k and set(term) & set(inputs) and not set(term) & set(outputs)
        ]
        left = [i for i in self._left if i not in first]
        needed = set(outputs).union(*(form.terms[i] for i in left))
        held = set(inputs).union(*(form.terms[i] for i in first))
        mine = "" if k is None else form.terms[k]
        letters = _last("".join(sorted(held & needed)), mine)
        if first and math.prod(sizes[letter] for letter in letters) <= rows.shape[1]:
            terms = ",".join([_ROW + inputs, *(form.terms[i] for i in first)])
            self._rows = _contract(
                f"{terms}->{_ROW}{letters}", self._rows, *_single([factors[i] for i in first])
            )
            self._letters, self._left = letters, left
        elif (letters := _last(inputs, mine)) != inputs:
            order = [0, *(1 + inputs.index(letter) for letter in letters)]
            self._rows, self._letters = np.ascontiguousarray(self._rows.transpose(order)), letters

    def outputs(self, factors: Sequence[Array]) -> Rows:
        """What the factors make of the rows, (N, m)."""
        terms = ",".join([_ROW + self._letters, *(self._terms[i] for i in self._left)])
        made = _contract(
            f"{terms}->{_ROW}{self._outputs}",
            self._rows,
            *_single([factors[i] for i in self._left]),
        )
        return np.asarray(made.reshape(len(self._rows), -1))

    def back(self, factors: Sequence[Array], outputs: Rows) -> Array:
        """Outputs (N, m) contracted with the rows and all factors but the k-th."""
        assert self._k is not None
        others = [i for i in self._left if i != self._k]
        terms = [_ROW + self._outputs, _ROW + self._letters, *(self._terms[i] for i in others)]
        made = _contract(
            f"{','.join(terms)}->{self._terms[self._k]}",
            outputs.reshape(-1, *(self._sizes[letter] for letter in self._outputs)),
            self._rows,
            *_single([factors[i] for i in others]),
        )
        return np.asarray(made, np.float64)


def shrunk_moments(rows: Rows) -> SampledMoments:
    """Moments that the true ones are likely closest to, from a sample of rows.

    Parameters
    ----------
    rows : ndarray of shape (N, n)
        Inputs about their mean.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((1000, 1)) + 0.1 * rng.standard_normal((1000, 500))
    >>> few, many = (shrunk_moments(rows.astype(np.float32)) for rows in (x[:10], x))
    >>> bool(few.variances.mean() > 10 * many.variances.mean() > 0)
    True
    """
    count = max(1, len(rows))
    variances = np.einsum("zn,zn->n", rows, rows, dtype=np.float64) / count
    share = _shrinkage(rows, variances)
    return SampledMoments(rows, (1 - share) / count, share * variances)


def _shrinkage(rows: Rows, variances: Array) -> float:
    """The share of the variances: noise of the products off the diagonal against all of them."""
    some = rows[:: max(1, len(rows) // _WEIGHED)][:_WEIGHED]
    count = len(some)
    if count < 2:
        return 1.0
    products = np.square((some @ some.T).astype(np.float64))
    fourth = float(np.trace(products)) / count
    # Products of different rows tell the sum of squares of the true moments without a bias.
    squares = (float(products.sum()) - count * fourth) / (count * (count - 1))
    own_squares = float(np.sum(variances**2))
    own_fourth = float(np.sum(np.square(np.square(some, dtype=np.float64)))) / count
    noise = max(0.0, (fourth - squares) - (own_fourth - own_squares)) / len(rows)
    signal = max(0.0, squares - own_squares)
    return noise / (noise + signal) if noise + signal > 0 else 1.0


def _contract(equation: str, *arrays: NDArray[np.floating]) -> NDArray[Any]:
    """np.einsum in an order with few operations."""
    path = _path(equation, tuple(array.shape for array in arrays))
    return np.asarray(np.einsum(equation, *arrays, optimize=path))


@functools.lru_cache(1024)
def _path(equation: str, shapes: tuple[Shape, ...]) -> list[Any]:
    """The order of a contraction: it depends on shapes alone, and finding it takes time."""
    kind = "optimal" if len(shapes) <= _FEW_OPERANDS else "greedy"
    empty = [np.broadcast_to(np.float32(0), shape) for shape in shapes]
    path: list[Any] = np.einsum_path(equation, *empty, optimize=(kind, _BETWEEN))[0]
    return path


def _last(letters: str, last: str) -> str:
    """The same letters, with some at the end: what is contracted there needn't be copied first."""
    return "".join(sorted(letters, key=lambda letter: letter in last))


def _single(arrays: Sequence[Array]) -> list[Rows]:
    return [array.astype(np.float32) for array in arrays]


def _variance_gram(
    sizes: Mapping[str, int], terms: Sequence[Term], inputs: str, variances: Array, kept: str
) -> Array:
    """F·diag(d)·Fᵀ, where F is what factors make of the inputs: its rows have the kept letters."""
    common = "".join(letter for letter in kept if letter in inputs)
    free = "".join(letter for letter in kept if letter not in inputs)
    twins = ["".join(c if c in inputs else c.upper() for c in t) for t, _ in terms]
    small = _contract(
        ",".join([*(t for t, _ in terms), inputs, *twins]) + f"->{free}{free.upper()}{common}",
        *(f for _, f in terms),
        variances,
        *(f for _, f in terms),
    )
    shape = tuple(sizes[letter] for letter in kept)
    gram = np.zeros((*shape, *shape))
    twin = "".join(c if c in inputs else c.upper() for c in kept)
    # Of letters of the inputs each goes with itself alone: a view of that diagonal.
    np.einsum(f"{kept}{twin}->{free}{free.upper()}{common}", gram)[...] = small
    n = math.prod(shape)
    return gram.reshape(n, n)


def _low_rank_solver(features: Rows, diagonal: Array) -> Solver:
    """Solves with diag + FᵀF by way of a matrix as small as F has rows (Woodbury 1950)."""
    floor = _FLOOR * (float(diagonal.mean()) + float(np.square(features).mean())) or 1.0
    inverse = 1.0 / (diagonal + floor)
    scaled = features * np.sqrt(inverse).astype(np.float32)
    small = (scaled @ scaled.T).astype(np.float64) + np.eye(len(features))
    cholesky = scipy.linalg.cho_factor(small, check_finite=False)

    def solve(right: Array) -> Array:
        first = inverse[:, None] * right
        middle = scipy.linalg.cho_solve(cholesky, features @ first, check_finite=False)
        return np.asarray(first - inverse[:, None] * (features.T @ middle))

    return solve
