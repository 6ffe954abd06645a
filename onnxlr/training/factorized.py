"""Modules factorized in place: the chains of a plan, to be trained themselves."""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from onnxlr.errors import UsageError
from onnxlr.layers.layer import Layer
from onnxlr.methods.choice import Choice
from onnxlr.model.load import load
from onnxlr.plan.plan import Decision, Plan
from onnxlr.prepare.prepared import prepare
from onnxlr.system.blas_threads import one_blas_thread
from onnxlr.training.chains import chain_module
from onnxlr.training.inputs import is_watching, look_at, unfit
from onnxlr.training.modules import ModuleLayer, Refused, module_layers, unwrapped

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def factorize_(
    model: nn.Module,
    plan: Plan | str | os.PathLike[str],
    exported: str | os.PathLike[str] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    inputs: Iterable[Any] | None = None,
) -> nn.Module:
    """Replace a model's modules by the chains that a plan names, in place.

    What is exported after training has the graph that ``onnxlr apply`` makes of the exported
    original with that plan. The factors start from the decomposition of each weight by itself, or,
    with ``inputs``, from what loses least of the layers' outputs; a plan's samples aren't looked
    at. Parameters are new: make the optimizer afterwards, or hand it over. Code of
    the model that reads a replaced module's ``weight`` itself, or calls it with more than its
    input, can't be seen from here: leave those layers out of the plan.

    Parameters
    ----------
    model : torch.nn.Module
        Wrappers that compile or distribute it come after this.
    plan : Plan or path
        Of ``onnxlr optimize --plan-out`` for the exported model, or ``DeepTwist.plan``. A layer is
        the module of its path, or of its weight's name in the exported model.
    exported : path, optional
        The model that the plan was made for. Exporters give new names to weights that they
        transpose (a Linear on more than two axes): there the values tell which module is meant.
    optimizer : torch.optim.Optimizer, optional
        One that trains the model: factors take the place of their weight, in its group and under
        its learning rate. What it has gathered of the weight (momentum) is dropped, since it's of
        another shape, and gathered anew; that of all other parameters stays. Schedulers go on.
    inputs : iterable of Tensor or tuple of Tensor, optional
        Batches that the model is fed, in eval mode, to see what each layer is given: factors are
        fitted to that, but those of layers that look their inputs up.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    UsageError
        If the plan isn't for this model, or a module can't be replaced; nothing is changed then.
    ModelError
        If a weight holds NaN or infinity.

    Examples
    --------
    >>> from onnxlr.training import DeepTwist
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> factorize_(model, DeepTwist(model, method="svd", rank=4).plan)[0]
    Sequential(
      (0): Linear(in_features=64, out_features=4, bias=False)
      (1): Linear(in_features=4, out_features=32, bias=True)
    )
    """
    finder = _Finder(model, exported)
    root = unwrapped(model)
    if root is not model:
        raise UsageError("factorize the model before it is compiled or distributed")
    if not isinstance(plan, Plan):
        if not isinstance(plan, str | os.PathLike):
            raise UsageError(f"plan={plan!r}: give a Plan, or the path of one")
        path = Path(plan)
        try:
            plan = Plan.from_json(path.read_text(encoding="utf-8"), str(path))
        except (OSError, ValueError) as error:  # not UTF-8, or no name at all
            raise UsageError(f"can't read the plan {path}: {error}") from None
    if plan.widths.kept:
        raise UsageError(
            "the plan narrows widths, which modules keep: make one that names methods for chains, "
            "as with --method svd"
        )
    choices = plan.choices()
    chosen: dict[str, tuple[ModuleLayer, Choice]] = {}
    for decision in plan.replaced:
        for item, turned in finder.find(decision):
            choice = choices[decision.name]
            if item.name in chosen:
                raise UsageError(f"the plan replaces the module {item.name!r} twice")
            if turned:
                choice = replace(choice, rank=choice.graph_pass.turned(choice.rank))
            if (reason := _misfit(root, item, choice)) is not None:
                raise UsageError(f"the plan replaces {decision.name!r}, but {reason}")
            chosen[item.name] = item, choice
    fitted = {}
    if inputs is not None:
        items = [item for item, choice in chosen.values() if unfit(item, choice) is None]
        fitted = look_at(root, items, inputs)
    chains = {}
    for name, (item, choice) in chosen.items():
        with one_blas_thread():  # as in DeepTwist
            factors = choice.graph_pass.factorize(item.read(), choice.rank)
            if name in fitted:
                factors = fitted[name].fit(choice, [factors])
        chains[name] = chain_module(item, choice, factors)
    for name, chain in chains.items():
        if optimizer is not None:
            weight = root.get_submodule(name).weight
            _hand_over(optimizer, weight, list(chain.parameters()))
        root.set_submodule(name, chain)
    return model


def _hand_over(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, parameters: list[nn.Parameter]
) -> None:
    """Have an optimizer train parameters in a weight's place, without the weight's state."""
    there = {id(p) for group in optimizer.param_groups for p in group["params"]}
    new = [p for p in parameters if id(p) not in there]  # the bias is, and stays where it is
    for group in optimizer.param_groups:
        group["params"] = [q for p in group["params"] for q in (new if p is weight else [p])]
    optimizer.state.pop(weight, None)


class _Finder:
    """Finds the module that a plan's layer stands for."""

    def __init__(self, model: nn.Module, exported: str | os.PathLike[str] | None) -> None:
        modules = list(module_layers(model))
        self._items = {m.name: m for m in modules if isinstance(m, ModuleLayer)}
        self._reasons = {m.name: m.reason for m in modules if isinstance(m, Refused)}
        layers = () if exported is None else prepare(load(exported), feed=None).layers
        self._exported = {layer.name: layer for layer in layers}
        self._matched: set[str] = set()

    def find(self, decision: Decision) -> list[tuple[ModuleLayer, bool]]:
        """The modules, and whether the exported weight is the transpose of theirs.

        They are several where an exporter has stored equal weights as one.
        """
        stem, _, key = decision.weight.rpartition(".")
        for name in (stem if key == "weight" else None, decision.name):
            if name in self._reasons:
                raise UsageError(f"the plan replaces {name!r}, but {self._reasons[name]}")
            if name in self._items:
                item = self._items[name]
                if item.layer.shape != decision.shape:
                    raise UsageError(
                        f"the plan's {decision.name!r} has shape {decision.shape}, the model's "
                        f"{name!r} has {item.layer.shape}: make a plan for this model"
                    )
                return [(item, False)]
        if decision.name in self._exported:
            return self._by_value(self._exported[decision.name])
        raise UsageError(
            f"the plan replaces {decision.name!r} (weight {decision.weight!r}), which no module of "
            "the model is called: name the exported model that the plan is for (exported=), so "
            "that weights can be compared"
        )

    def _by_value(self, exported: Layer) -> list[tuple[ModuleLayer, bool]]:
        array = exported.array()
        matches: list[tuple[ModuleLayer, bool]] = []
        for item in self._items.values():
            if item.name in self._matched or len(matches) == len(exported.uses):
                continue  # blocks that were copied have equal weights: each stands for itself
            weight = item.read().array()
            if np.array_equal(weight, array):
                matches.append((item, False))
            elif weight.ndim == 2 and np.array_equal(weight.T, array):
                matches.append((item, True))
        self._matched.update(item.name for item, _ in matches)
        if matches:
            return matches
        raise UsageError(
            f"no module of the model has the weight of {exported.name!r} in the exported model: "
            "export the model anew and make the plan for that"
        )


def _misfit(root: nn.Module, item: ModuleLayer, choice: Choice) -> str | None:
    """Why a choice can't be carried out on a module."""
    graph_pass, module = choice.graph_pass, item.module
    if graph_pass.at_load:
        return (
            f"{graph_pass.name} leaves the weight whole where it is used: train it with DeepTwist"
        )
    if (reason := graph_pass.refuse(item.layer)) is not None:
        return reason
    if (reason := graph_pass.misfit(item.layer, choice.rank)) is not None:
        return reason
    if not item.name:
        return "it is the whole model, which can't be replaced in place: put it in a Sequential"
    for path, other in root.named_modules(remove_duplicate=False):
        for key, value in other._parameters.items():
            if value is module.weight and (path, key) != (item.name, "weight"):
                return f"{f'{path}.{key}'.lstrip('.')!r} is the same weight, and would stay whole"
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for kind in kinds for hook in getattr(module, kind).values()]
    if module.weight._backward_hooks or not all(is_watching(hook) for hook in hooks):
        return "it has hooks, which its chain would not have"
    owner = root.get_submodule(item.name.rpartition(".")[0])
    for kind in type(owner).__mro__:
        library = kind.__module__.startswith("torch.nn.")
        if library and kind is not nn.Module and kind not in _CONTAINERS:
            return f"{kind.__name__} reads its weight itself"
    return None
