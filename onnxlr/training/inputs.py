"""Inputs of modules while they train: the metric in which DeepTwist may project weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from onnxlr.calibrate.sampling import doubled, is_finite, sample_rows
from onnxlr.calibrate.statistics import is_wide
from onnxlr.candidates.fitting import THOROUGH, fit_matrix, floored, rest_of
from onnxlr.decompose import Covariance
from onnxlr.errors import UsageError
from onnxlr.layers.kernel import as_matrix, matrix_sides
from onnxlr.methods.choice import Choice
from onnxlr.training.modules import ModuleLayer
from onnxlr.types import Array

_BATCHES = 4  # that are looked at before a distortion, at most
_EVERY = 50  # of so many steps one is looked at, but one at least
_ROWS = 16  # of a batch's inputs that are sampled, for each element of an input


def _unseen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Do nothing: what is left of the hook in a copy of the model."""


def _no_hook() -> Callable[..., None]:
    return _unseen


def is_watching(hook: object) -> bool:
    """Whether a hook only looks at a module's inputs, so that whoever replaces it may drop it."""
    return isinstance(hook, InputMoments) or hook is _unseen


class InputMoments:
    """E[x·xᵀ] of a module's inputs x, by sums over rows of some batches; it's the hook itself.

    It looks at inputs while the module is training, or while it isn't. For a convolution x is a
    patch. The moments are about zero: where only the weight changes, E‖(W − W̃)·x‖² =
    tr((W − W̃)·E[x·xᵀ]·(W − W̃)ᵀ) is what the output loses, mean and all.

    Attributes
    ----------
    second : ndarray of shape (g, n, n)
        The sum of x·xᵀ for each group, in double precision.
    rows : int
        Of how many rows.
    stale : bool
        Whether the next batch begins new sums: those of the last distortion serve until then.
    """

    def __init__(self, item: ModuleLayer, *, training: bool = True) -> None:
        self._item, self._training = item, training
        groups, _, n = matrix_sides(item.layer)
        self.second: Array = np.zeros((groups, n, n))
        self.rows = 0
        self.stale = False

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        """In a copy of the model nothing is summed."""
        return _no_hook, ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add rows of what the module is given in the mode that is looked at."""
        if module.training != self._training:
            return
        if self.stale:
            self.second, self.rows, self.stale = np.zeros_like(self.second), 0, False
        x = (*args, *kwargs.values())[0].detach()
        mode = getattr(module, "padding_mode", "zeros")
        if mode != "zeros":  # the layer's node stands behind its padding
            x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode)
        layer = self._item.layer
        # Drawn anew from what is in the sums already, so that a resumed run draws the same.
        rng = np.random.default_rng(self.rows)
        count = _ROWS * self.second.shape[1]
        rows = sample_rows(layer, layer.uses[0], x.float().cpu().numpy(), count, rng)
        rows = doubled(rows)
        if is_finite(rows):
            self.second += rows.swapaxes(1, 2) @ rows
            self.rows += rows.shape[1]

    def fit(self, choice: Choice, starts: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
        """Factors of the module's weight as it was read, fitted to its inputs.

        They begin with the one of the starts that loses least, and lose no more than that.
        """
        graph_pass, rank, layer = choice.graph_pass, choice.rank, self._item.layer
        # A floor, for the directions that these inputs don't have.
        moments = [Covariance(floored(second / self.rows)) for second in self.second]

        def loss(factors: tuple[Array, ...]) -> float:
            rest = rest_of(graph_pass, layer, rank, factors)
            return sum(m.energy(r) for m, r in zip(moments, rest, strict=True))

        weight, start = as_matrix(layer, layer.array()), min(starts, key=loss)
        return fit_matrix(graph_pass, layer, rank, weight, moments, None, THOROUGH, start)


class InputMetric:
    """The inputs of all modules that are distorted, looked at in a few batches now and then.

    Parameters
    ----------
    items : dict of str to (ModuleLayer, Choice)
        By path.
    every : int
        Steps between distortions; before each a fiftieth of them is looked at, four at most.

    Raises
    ------
    UsageError
        If a method can't be fitted to a module's inputs.
    """

    def __init__(self, items: Mapping[str, tuple[ModuleLayer, Choice]], every: int) -> None:
        for name, (item, choice) in items.items():
            if (reason := unfit(item, choice)) is not None:
                raise UsageError(
                    f"metric='data' can't distort {name!r}: {reason}; exclude it, or leave the "
                    "metric out"
                )
        self._every = every
        self._looked = min(_BATCHES, max(1, every // _EVERY))
        self._of = {name: InputMoments(item) for name, (item, _) in items.items()}
        self._modules = {name: item.module for name, (item, _) in items.items()}
        self._handles: list[RemovableHandle] = []
        self.look(0)

    def look(self, steps: int | None) -> None:
        """Have the next batch looked at if it's one of those, after so many steps; none if None."""
        wanted = steps is not None and (
            steps < self._looked or self._every - steps % self._every <= self._looked
        )
        if wanted and not self._handles:
            for name, module in self._modules.items():
                self._of[name].stale = True
                handle = module.register_forward_pre_hook(self._of[name], with_kwargs=True)
                self._handles.append(handle)
        elif not wanted:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def close(self) -> None:
        """Have the next batch that is looked at begin new sums."""
        for moments in self._of.values():
            moments.stale = True

    def check(self) -> None:
        """Hold against modules whose inputs weren't seen.

        Raises
        ------
        UsageError
            If there is one.
        """
        for name, moments in self._of.items():
            if not moments.rows:
                raise UsageError(
                    f"metric='data' has seen no inputs of {name!r}: train a batch before weights "
                    "are distorted, exclude what training doesn't run, and don't compile the model"
                )

    def fit(
        self, name: str, choice: Choice, starts: Sequence[tuple[Array, ...]]
    ) -> tuple[Array, ...]:
        """Factors of a module's weight as it is read, fitted to its inputs."""
        return self._of[name].fit(choice, starts)

    def state_dict(self) -> dict[str, Any]:
        """The sums so far."""
        return {
            name: {
                "second": torch.from_numpy(m.second.copy()),
                "rows": m.rows,
                "stale": m.stale,
            }
            for name, m in self._of.items()
        }

    def load_state_dict(self, state: Mapping[str, Any], steps: int) -> None:
        """Go on from sums after so many steps.

        Raises
        ------
        UsageError
            If they are of other modules.
        """
        sums = {name: _to_sums(state.get(name), m.second.shape) for name, m in self._of.items()}
        self.look(steps)
        for name, moments in self._of.items():
            moments.second, moments.rows, moments.stale = sums[name]


def look_at(
    model: nn.Module, items: Iterable[ModuleLayer], batches: Iterable[Any]
) -> dict[str, InputMoments]:
    """What modules are given in eval mode when their model is fed batches, by path.

    A batch is a tensor, or a tuple of all that the model takes.

    Raises
    ------
    UsageError
        If a module is given nothing.
    """
    seen = {item.name: InputMoments(item, training=False) for item in items}
    modes = [(module, module.training) for module in model.modules()]
    handles = [
        model.get_submodule(name).register_forward_pre_hook(moments, with_kwargs=True)
        for name, moments in seen.items()
    ]
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                model(*batch) if isinstance(batch, tuple | list) else model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    if empty := [name for name, moments in seen.items() if not moments.rows]:
        raise UsageError(
            f"inputs= has shown no inputs of {empty[0]!r}: give batches that the model takes and "
            "that reach it, or leave it out of the plan"
        )
    return seen


def _to_sums(row: Any, shape: tuple[int, ...]) -> tuple[Array, int, bool]:
    try:
        second = row["second"].detach().to("cpu", torch.float64).numpy().copy()
        rows, stale = int(row["rows"]), bool(row["stale"])
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError):
        second, rows, stale = np.empty(0), 0, False
    if second.shape != shape or rows < 0 or not np.isfinite(second).all():
        raise UsageError(
            "the state has no inputs of these layers: make the DeepTwist with the arguments that "
            "it was made with"
        )
    return second, rows, stale


def unfit(item: ModuleLayer, choice: Choice) -> str | None:
    """Why a method can't be fitted to a module's inputs."""
    layer, name = item.layer, choice.graph_pass.name
    if layer.kind == "gather":
        return "it looks its inputs up"
    if choice.graph_pass.form(layer) is None:
        return f"{name} doesn't say how its factors make the weight, and can't be fitted to inputs"
    if is_wide(layer):
        n = matrix_sides(layer)[2]
        return f"an input has {n:,} elements, too many for their second moments"
    return None
