"""DeepTwist: a model trained as it is, its weights replaced by low-rank ones now and then."""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from onnxlr.candidates.fits import Candidate, candidate, fit_methods, named_candidates
from onnxlr.decompose import RankRule, parse_rank
from onnxlr.errors import ModelError, UsageError
from onnxlr.layers.layer import Layer
from onnxlr.layers.select import name_filter
from onnxlr.methods.base import GraphPass
from onnxlr.methods.choice import Choice
from onnxlr.methods.cost import weight_error
from onnxlr.methods.registry import choose_passes, find_pass
from onnxlr.plan.plan import KEEP, Decision, Plan, keep, use
from onnxlr.system.blas_threads import one_blas_thread
from onnxlr.training.modules import ModuleLayer, Predicate, Refused, module_layers, unwrapped
from onnxlr.types import Array


@dataclass
class _Twisted:
    """A weight that is distorted: how, and the factors that it was made of the last time."""

    item: ModuleLayer
    choice: Choice
    factors: tuple[Array, ...] | None = None
    error: float = 0.0


class DeepTwist:
    """Distorts weights to low rank every so many optimizer steps (Lee et al. 2019).

    The model keeps its structure and trains as ever; every ``every`` steps each chosen weight is
    replaced by what its factors at the rank make (``K ← K'``), and training goes on from there.
    ``finish`` distorts once more, so that the exported weights factorize without loss by
    ``onnxlr optimize --rank exact`` (of a CP, where its components are about as few as channels:
    beyond that no method is sure to find them again). The factors are those of the graph passes,
    in double precision, found from those of the last distortion where a method iterates.

    Where ``torch.distributed`` runs, every process calls ``step``, and the first one's weights go
    to all: make the DeepTwist after DistributedDataParallel, and save the first one's state.

    Parameters
    ----------
    model : torch.nn.Module
        May be compiled or wrapped. Weights are changed in place, so optimizers stay as they are.
    method : str or sequence of str
        Of several, the one that saves most is taken layer by layer.
    rank : int, tuple of int, float or str
        As ``--rank``: a number, a pair, a fraction of the full rank, ``"evbmf"``,
        ``"energy:0.95"``. What depends on singular values is decided once, on the weights as they
        are now.
    every : int
        S_D, the optimizer steps from one distortion to the next; 100 to 5000 as a rule.
    include, exclude : str or callable, optional
        A regular expression that is searched in a module's path, or ``f(path, module) -> bool``.

    Raises
    ------
    UsageError
        If an argument makes no sense, or no layer is left; the message says why for the first.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> twist = DeepTwist(model, method="svd", rank=4, every=2)
    >>> [twist.step() for _ in range(4)]
    [False, True, False, True]
    >>> twist.finish()
    >>> [int(torch.linalg.matrix_rank(model[i].weight, rtol=1e-5)) for i in (0, 2)]
    [4, 4]
    """

    def __init__(
        self,
        model: nn.Module,
        method: str | Sequence[str] = "tucker2",
        rank: int | tuple[int, ...] | float | str = 0.25,
        every: int = 200,
        include: str | Predicate | None = None,
        exclude: str | Predicate | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UsageError(f"every={every!r}: give the steps between distortions, 1 or more")
        self.every = every
        self._steps = 0
        self._twisted: dict[str, _Twisted] = {}
        self._kept: dict[str, Decision] = {}
        self._model = model
        names = [method] if isinstance(method, str) else method
        if (
            not isinstance(names, Sequence)
            or not all(isinstance(n, str) for n in names)
            or not names
        ):
            raise UsageError(f"method={method!r}: give the name of a method, or several")
        passes = choose_passes(tuple(names))
        rule = _rule(rank)
        self._order: list[str] = []
        meant: list[Decision] = []  # but not fitting
        for item in module_layers(model):
            self._order.append(item.name)
            if isinstance(item, Refused):
                self._kept[item.name] = _refused(item)
                continue
            if (reason := _left_out(item, include, exclude)) is not None:
                self._kept[item.name] = keep(item.layer, reason)
                continue
            found = _fitting(item.read(), passes, rule)
            item.forget()
            if isinstance(found, str):
                self._kept[item.name] = keep(item.layer, found)
                meant.append(self._kept[item.name])
            else:
                self._twisted[item.name] = _Twisted(item, found.choice)
        if not self._twisted:
            first = next(iter(meant or self._kept.values()), None)
            told = "it has none" if first is None else f"{first.name}: {first.reason}"
            raise UsageError(f"no layer of the model can be distorted: {told}")

    def __repr__(self) -> str:
        methods = sorted({t.choice.graph_pass.name for t in self._twisted.values()})
        return (
            f"DeepTwist({len(self._twisted)} layers by {', '.join(methods)} every {self.every} "
            f"steps, {len(self._kept)} left alone, {self._steps} steps done)"
        )

    @property
    def plan(self) -> Plan:
        """A decision for every layer, with its reason; ``factorize_`` takes it.

        The errors are those of the last distortion, relative to the weights before it.
        """
        decided = dict(self._kept)
        for name, twisted in self._twisted.items():
            layer, choice = twisted.item.layer, twisted.choice
            item = candidate(layer, choice.graph_pass, choice.rank, "params")
            reason = f"{100 * item.params / layer.params:.0f}% of the parameters"
            decided[name] = use(layer, item, reason, twisted.error)
        return Plan("", tuple(decided[name] for name in self._order))

    def step(self) -> bool:
        """Count an optimizer step; distort where one is due, and tell whether it was.

        Raises
        ------
        ModelError
            If a weight holds NaN or infinity by then; no weight is changed.
        """
        self._steps += 1
        if self._steps % self.every:
            return False
        self.distort()
        return True

    def finish(self) -> None:
        """Distort for the last time: the weights factorize without loss from here.

        Another optimizer step would undo it. Weights in half precision are rounded, and lose the
        rank with that: call ``model.float()`` first. Averages of weights (EMA) are of no low rank:
        make a DeepTwist for them, and finish that.

        Raises
        ------
        ModelError
            If a weight holds NaN or infinity; no weight is changed.
        """
        self.distort()

    def distort(self) -> None:
        """Replace every chosen weight by what its factors make."""
        spread = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if spread:
            self._agree()
        failed: Exception | None = None
        if not spread or dist.get_rank() == 0:
            try:
                self._distort()
            except Exception as error:  # the others wait: they are told, whatever it is
                failed = error
        if spread:
            failed = self._shared(failed)
        if failed is not None:
            raise failed
        if spread:
            for twisted in self._twisted.values():
                dist.broadcast(twisted.item.module.weight.data, 0)

    def _agree(self) -> None:
        """Hold the layers of all processes against each other: each would wait for its own."""
        names: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(names, list(self._twisted))
        if any(other != names[0] for other in names):
            raise UsageError(
                "the processes distort different layers: make the DeepTwist where all have the "
                "same weights, after DistributedDataParallel"
            )

    def _shared(self, failed: Exception | None) -> Exception | None:
        """What the first process did, told to all; so is what went wrong there."""
        rows = [(t.choice.graph_pass.name, t.choice.rank, t.error) for t in self._twisted.values()]
        told: list[Any] = [None if failed is None else str(failed) or type(failed).__name__, rows]
        dist.broadcast_object_list(told, 0)
        words, rows = told
        for twisted, (method, rank, error) in zip(self._twisted.values(), rows, strict=True):
            twisted.choice, twisted.error = Choice(find_pass(method), rank), error
        return None if words is None else failed or ModelError(words)

    def state_dict(self) -> dict[str, Any]:
        """Steps, methods, ranks and factors: what a resumed run needs to go on as if never cut."""
        return {
            "steps": self._steps,
            "layers": {
                name: {
                    "method": twisted.choice.graph_pass.name,
                    "rank": list(twisted.choice.rank),
                    "factors": None
                    if twisted.factors is None
                    else [torch.from_numpy(f.copy()) for f in twisted.factors],
                }
                for name, twisted in self._twisted.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; its methods and ranks win over those given here.

        Raises
        ------
        UsageError
            If it is of other layers.
        """
        try:
            rows, steps = state["layers"], operator.index(state["steps"])
            choices = {
                n: Choice(find_pass(r["method"]), tuple(map(operator.index, r["rank"])))
                for n, r in rows.items()
            }
            factors = {
                n: None if r["factors"] is None else tuple(map(_to_array, r["factors"]))
                for n, r in rows.items()
            }
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"this is no state of a DeepTwist ({type(error).__name__}: {error})"
            ) from None
        if steps < 0:
            raise UsageError(f"this is no state of a DeepTwist: it has made {steps} steps")
        if other := sorted(set(choices) ^ set(self._twisted)):
            raise UsageError(
                f"the state is of other layers ({', '.join(other[:3])}): make the DeepTwist with "
                "the arguments that it was made with"
            )
        for name, twisted in self._twisted.items():
            if (reason := _unlike(twisted.item.layer, choices[name], factors[name])) is not None:
                raise UsageError(f"the state doesn't fit {name!r}: {reason}")
        for name, twisted in self._twisted.items():
            twisted.choice, twisted.factors = choices[name], factors[name]
        self._steps = steps

    def _distort(self) -> None:
        for name, twisted in self._twisted.items():
            if unwrapped(self._model).get_submodule(name) is not twisted.item.module:
                raise UsageError(f"the module {name!r} was replaced: make a new DeepTwist")
            twisted.item.check()
        # Small matrices: handing each product to a pool of threads costs more than it saves.
        with one_blas_thread():
            for alike in self._alike():
                graph_pass, rank = alike[0].choice.graph_pass, alike[0].choice.rank
                layers = [twisted.item.read() for twisted in alike]
                known = [t.factors or graph_pass.sketch(t.item.layer, rank) for t in alike]
                made = graph_pass.follow(layers, rank, known)
                for twisted, layer, factors in zip(alike, layers, made, strict=True):
                    twisted.error = weight_error(layer, graph_pass, rank, factors)
                    twisted.factors = factors
                    twisted.item.write(graph_pass.compose(layer, rank, factors))
                    twisted.item.forget()

    def _alike(self) -> Iterable[list[_Twisted]]:
        """Weights of one shape, method and rank, which are decomposed side by side."""
        groups: dict[tuple[Any, ...], list[_Twisted]] = {}
        for twisted in self._twisted.values():
            layer, choice = twisted.item.layer, twisted.choice
            key = (layer.op, layer.shape, layer.group, choice.graph_pass.name, choice.rank)
            groups.setdefault(key, []).append(twisted)
        return groups.values()


def _rule(rank: int | tuple[int, ...] | float | str) -> RankRule:
    text = ",".join(map(str, rank)) if isinstance(rank, tuple | list) else str(rank)
    rule = parse_rank(text)
    if rule.kind == "auto":
        raise UsageError("rank='auto' needs a model that is judged as it is shrunk: name a rank")
    return rule


def _left_out(
    item: ModuleLayer, include: str | Predicate | None, exclude: str | Predicate | None
) -> str | None:
    """Why a module isn't asked for; None if it is."""
    for words in (include, exclude):
        if words is not None and not callable(words) and not isinstance(words, str):
            raise UsageError(f"include/exclude={words!r}: give an expression or a function")
    if not item.module.weight.requires_grad:
        return "it is frozen: training would not make up for what it loses"
    if callable(include):
        if not include(item.name, item.module):
            return "not taken by include"
        include = None
    if callable(exclude):
        if exclude(item.name, item.module):
            return "taken out by exclude"
        exclude = None
    return name_filter(include, exclude)(item.layer)


def _fitting(layer: Layer, passes: Sequence[GraphPass], rule: RankRule) -> Candidate | str:
    """The most saving method at the rank that a rule gives it, or why there is none."""
    fits, reasons = fit_methods(layer, passes)
    if not fits:
        return "; ".join(reasons)
    # Weights that are trained on are followed, which keeps factors usable.
    found = named_candidates(layer, fits, rule, "params", factorizing=False)
    return found if isinstance(found, str) else found[0]


def _refused(item: Refused) -> Decision:
    count = math.prod(item.shape)
    return Decision(
        item.name, item.kind, item.shape, KEEP, None, item.reason, count, count, None, None, None
    )


def _to_array(factor: torch.Tensor) -> Array:
    array: Array = factor.detach().to("cpu", torch.float64).numpy()
    return array


def _unlike(layer: Layer, choice: Choice, factors: tuple[Array, ...] | None) -> str | None:
    """Why a choice and its factors are not this layer's."""
    graph_pass, rank = choice.graph_pass, choice.rank
    reason = graph_pass.refuse(layer) or graph_pass.misfit(layer, rank)
    if reason is not None or factors is None:
        return reason
    found, wanted = tuple(f.shape for f in factors), tuple(graph_pass.factor_shapes(layer, rank))
    if found != wanted:
        return f"its factors have shapes {found}, not {wanted}"
    return None if all(np.isfinite(f).all() for f in factors) else "its factors aren't finite"
