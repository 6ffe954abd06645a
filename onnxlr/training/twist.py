"""DeepTwist: a model trained as it is, its weights replaced by low-rank ones now and then."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from onnxlr.candidates.candidate import candidate
from onnxlr.errors import ModelError, UsageError
from onnxlr.layers.layer import Layer
from onnxlr.methods.channels import INTERPOLATIVE, names_channels
from onnxlr.methods.choice import Choice
from onnxlr.methods.cost import weight_error
from onnxlr.methods.registry import choose_passes, find_pass
from onnxlr.plan.plan import Decision, Plan, keep, use
from onnxlr.system.blas_threads import one_blas_thread
from onnxlr.training.inputs import InputMetric
from onnxlr.training.modules import ModuleLayer, Predicate, Refused, module_layers, unwrapped
from onnxlr.training.selection import best_candidate, excluded, rank_rule, refused_decision
from onnxlr.types import Array


@dataclass
class _Twisted:
    """A weight that is distorted: its method and rank, and the factors of the last distortion."""

    item: ModuleLayer
    choice: Choice
    factors: tuple[Array, ...] | None = None
    error: float = 0.0


class DeepTwist:
    """Distorts weights to low rank every so many optimizer steps (Lee et al. 2019).

    The model keeps its structure and trains as usual; every ``every`` steps each chosen weight is
    replaced by the product of its factors at the rank (``K ← K'``), and training goes on from
    there. ``finish`` distorts once more, so that the exported weights factorize without loss by
    ``onnxlr optimize --rank exact`` (a CP only if it has no more components than about the
    channels: beyond that no method is sure to find them again). The factors are those of the graph
    passes, in double precision; methods that iterate start from those of the last distortion.

    Where ``torch.distributed`` runs, every process calls ``step``, and the weights of the first
    process go to all: make the DeepTwist after DistributedDataParallel, and save the state of the
    first process.

    Parameters
    ----------
    model : torch.nn.Module
        May be compiled or wrapped. Weights are changed in place, so optimizers stay as they are.
    method : str or sequence of str
        Names of methods; of several, each layer gets the one that saves most parameters.
    rank : int, tuple of int, float or str
        As ``--rank``: a number, a pair, a fraction of the full rank, ``"evbmf"``,
        ``"energy:0.95"``. What depends on singular values is decided once, on the weights as they
        are now.
    every : int
        S_D, the optimizer steps from one distortion to the next; 100 to 5000 as a rule.
    include, exclude : str or callable, optional
        A regular expression that is searched in a module's path, or ``f(path, module) -> bool``.
    metric : {"weight", "data"}
        Which error a distortion minimises: that of the weight, ‖K − K'‖², or with ``"data"`` that
        of the module's output, E‖(K − K')·x‖² over inputs x of a few batches before it, which hooks
        observe while the model is in training mode. ``"data"`` is for linear modules and
        convolutions, and for methods that can be fitted to inputs: all but ``expand-at-load``. It
        is not for compiled models.

    Raises
    ------
    UsageError
        If an argument is invalid, or no layer is left; the message says why for the first.

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
        metric: str = "weight",
    ) -> None:
        if metric not in ("weight", "data"):
            raise UsageError(f"metric={metric!r}: give 'weight' or 'data'")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UsageError(f"every={every!r}: give the steps between distortions, 1 or more")
        self.every = every
        self._steps = 0
        self._twisted: dict[str, _Twisted] = {}
        self._skipped: dict[str, Decision] = {}
        self._model = model
        names = [method] if isinstance(method, str) else method
        if (
            not isinstance(names, Sequence)
            or not all(isinstance(n, str) for n in names)
            or not names
        ):
            raise UsageError(f"method={method!r}: give the name of a method, or several")
        if names_channels(names):
            raise UsageError(
                f"method {INTERPOLATIVE.name!r} takes channels away from widths between modules, "
                "which training keeps: optimize the exported model with it"
            )
        passes = choose_passes(tuple(names))
        rule = rank_rule(rank)
        self._order: list[str] = []
        unfit: list[Decision] = []  # of layers that the user means, but no method fits
        for item in module_layers(model):
            self._order.append(item.name)
            if isinstance(item, Refused):
                self._skipped[item.name] = refused_decision(item)
                continue
            if (reason := excluded(item, include, exclude)) is not None:
                self._skipped[item.name] = keep(item.layer, reason)
                continue
            best = best_candidate(item.read(), passes, rule)
            item.forget()
            if isinstance(best, str):
                self._skipped[item.name] = keep(item.layer, best)
                unfit.append(self._skipped[item.name])
            else:
                self._twisted[item.name] = _Twisted(item, best.choice)
        if not self._twisted:
            first = next(iter(unfit or self._skipped.values()), None)
            why = "it has none" if first is None else f"{first.name}: {first.reason}"
            raise UsageError(f"no layer of the model can be distorted: {why}")
        self._inputs: InputMetric | None = None
        if metric == "data":
            if any(hasattr(m, "_orig_mod") for m in (model, getattr(model, "module", None))):
                raise UsageError("metric='data' looks at inputs by hooks: don't compile the model")
            items = {name: (t.item, t.choice) for name, t in self._twisted.items()}
            self._inputs = InputMetric(items, every)

    def __repr__(self) -> str:
        methods = sorted({t.choice.graph_pass.name for t in self._twisted.values()})
        return (
            f"DeepTwist({len(self._twisted)} layers by {', '.join(methods)} every {self.every} "
            f"steps, {len(self._skipped)} left alone, {self._steps} steps done)"
        )

    @property
    def plan(self) -> Plan:
        """A decision for every layer, with its reason; ``factorize_`` takes it.

        The errors are those of the last distortion, relative to the weights before it.
        """
        decisions = dict(self._skipped)
        for name, twisted in self._twisted.items():
            layer, choice = twisted.item.layer, twisted.choice
            item = candidate(layer, choice.graph_pass, choice.rank, "params")
            reason = f"{100 * item.params / layer.params:.0f}% of the parameters"
            decisions[name] = use(layer, item, reason, twisted.error)
        return Plan("", tuple(decisions[name] for name in self._order))

    def step(self) -> bool:
        """Count an optimizer step, distort after every so many, and return whether it did.

        Raises
        ------
        ModelError
            If a weight holds NaN or infinity by then; no weight is changed.
        """
        self._steps += 1
        due = self._steps % self.every == 0
        if due:
            self.distort()
        if self._inputs is not None:
            self._inputs.look(self._steps)
        return due

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
        if self._inputs is not None:
            self._inputs.look(None)

    def distort(self) -> None:
        """Replace every chosen weight by what its factors make."""
        spread = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if spread:
            self._agree()
        failure: Exception | None = None
        if not spread or dist.get_rank() == 0:
            try:
                self._distort()
            except Exception as error:  # the others wait: they have to learn of it, whatever it is
                failure = error
        if spread:
            failure = self._shared(failure)
        if failure is not None:
            raise failure
        if spread:
            for twisted in self._twisted.values():
                dist.broadcast(twisted.item.module.weight.data, 0)

    def _agree(self) -> None:
        """Compare the layers of all processes: where they differ, each would wait for ever."""
        names: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(names, list(self._twisted))
        if any(other != names[0] for other in names):
            raise UsageError(
                "the processes distort different layers: make the DeepTwist where all have the "
                "same weights, after DistributedDataParallel"
            )

    def _shared(self, failure: Exception | None) -> Exception | None:
        """Give all processes the choices and errors of the first, and its failure if it failed."""
        rows = [(t.choice.graph_pass.name, t.choice.rank, t.error) for t in self._twisted.values()]
        message = None if failure is None else str(failure) or type(failure).__name__
        shared: list[Any] = [message, rows]
        dist.broadcast_object_list(shared, 0)
        message, rows = shared
        for twisted, (method, rank, error) in zip(self._twisted.values(), rows, strict=True):
            twisted.choice, twisted.error = Choice(find_pass(method), rank), error
        return None if message is None else failure or ModelError(message)

    def state_dict(self) -> dict[str, Any]:
        """Steps, methods, ranks and factors, from which a run goes on as if it was never cut."""
        return {
            "steps": self._steps,
            "inputs": self._inputs and self._inputs.state_dict(),
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
        """Go on from a state; its methods and ranks replace those of the arguments.

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
        if self._inputs is not None:
            self._inputs.load_state_dict(state.get("inputs") or {}, steps)
        for name, twisted in self._twisted.items():
            twisted.choice, twisted.factors = choices[name], factors[name]
        self._steps = steps

    def _distort(self) -> None:
        for name, twisted in self._twisted.items():
            if unwrapped(self._model).get_submodule(name) is not twisted.item.module:
                raise UsageError(f"the module {name!r} was replaced: make a new DeepTwist")
            twisted.item.check()
        if self._inputs is not None:
            self._inputs.check()
        # Small matrices: handing each product to a pool of threads costs more than it saves.
        with one_blas_thread():
            for alike in self._alike():
                graph_pass, rank = alike[0].choice.graph_pass, alike[0].choice.rank
                layers = [twisted.item.read() for twisted in alike]
                starts = [t.factors or graph_pass.sketch(t.item.layer, rank) for t in alike]
                followed = graph_pass.follow(layers, rank, starts)
                for twisted, layer, factors in zip(alike, layers, followed, strict=True):
                    if self._inputs is not None:
                        starts = [f for f in (factors, twisted.factors) if f is not None]
                        factors = self._inputs.fit(twisted.item.name, twisted.choice, starts)
                    twisted.error = weight_error(layer, graph_pass, rank, factors)
                    twisted.factors = factors
                    twisted.item.write(graph_pass.compose(layer, rank, factors))
                    twisted.item.forget()
        if self._inputs is not None:
            self._inputs.close()

    def _alike(self) -> Iterable[list[_Twisted]]:
        """Weights of one shape, method and rank, which are decomposed side by side."""
        groups: dict[tuple[Any, ...], list[_Twisted]] = {}
        for twisted in self._twisted.values():
            layer, choice = twisted.item.layer, twisted.choice
            key = (layer.op, layer.shape, layer.group, choice.graph_pass.name, choice.rank)
            groups.setdefault(key, []).append(twisted)
        return groups.values()


def _to_array(factor: torch.Tensor) -> Array:
    array: Array = factor.detach().to("cpu", torch.float64).numpy()
    return array


def _unlike(layer: Layer, choice: Choice, factors: tuple[Array, ...] | None) -> str | None:
    """Why a choice and its factors are not this layer's."""
    graph_pass, rank = choice.graph_pass, choice.rank
    reason = graph_pass.refuse(layer) or graph_pass.misfit(layer, rank)
    if reason is not None or factors is None:
        return reason
    shapes, right = tuple(f.shape for f in factors), tuple(graph_pass.factor_shapes(layer, rank))
    if shapes != right:
        return f"its factors have shapes {shapes}, not {right}"
    return None if all(np.isfinite(f).all() for f in factors) else "its factors aren't finite"
