"""Comparing each replaced layer alone with what replaces it, for models too large to run whole."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.errors import CrashError, ModelError
from onnxlr.layers.find import find_layers
from onnxlr.layers.layer import Layer, Use
from onnxlr.model.graph import Names, opset
from onnxlr.model.protobuf import serialize, to_proto
from onnxlr.prepare.opening import model_of_values
from onnxlr.prepare.prepared import Prepared
from onnxlr.progress import Progress
from onnxlr.rewrite.replace import replace_layer
from onnxlr.rewrite.variant import Variant
from onnxlr.system.deadline import Deadline, trial_seconds
from onnxlr.system.sandbox import run_in_sandbox
from onnxlr.system.session import ONE_CPU_THREAD, Feed, Session, open_exposed
from onnxlr.verify.fidelity import Fidelity, Quality
from onnxlr.verify.layer_latency import layer_model

METRIC = "rel-error"
_ROWS = 64  # of a matrix's input, where its shape isn't inferred
_MOST_ELEMENTS = 2**25  # of an input: beyond that a usual one tells as much
_EXTENT = 16  # of an image, likewise


def check_layers(
    prepared: Prepared,
    variant: Variant,
    feeds: Sequence[Feed],
    seed: int,
    progress: Progress,
) -> tuple[dict[str, Quality], dict[str, str]]:
    """Relative error of each replaced layer's output, run alone in ONNX Runtime.

    Parameters
    ----------
    prepared : Prepared
    variant : Variant
        Which layers are replaced, and with which factors.
    feeds : sequence of feeds
        What the whole model is run on to see its layers' real inputs; without any, inputs are drawn
        from the standard normal distribution, and nothing is run whole.
    seed : int
        Of those.

    Returns
    -------
    dict of str to Quality
        By layer name.
    dict of str to str
        Of those whose replacement brought the runtime down: what is said of it.
    """
    qualities, crashed = {}, {}
    with progress.stage("compare layers alone", len(variant.choices)) as step:
        for layer in prepared.layers:
            if layer.name in variant.choices:
                try:
                    inputs = _inputs(prepared, layer, feeds, seed)
                    qualities[layer.name] = _check(prepared, layer, variant, inputs)
                except CrashError as crash:
                    crashed[layer.name] = str(crash)
                except ModelError:  # bfloat16 on the CPU, for one: its weight tells
                    qualities[layer.name] = _by_weight(layer, variant)
                step(layer.name)
    return qualities, crashed


def worst(qualities: Mapping[str, Quality]) -> Quality:
    """What is said of all of them: the largest error, the smallest cosine."""
    fidelity = Fidelity(
        max((q.fidelity.rel_error for q in qualities.values()), default=0.0),
        min((q.fidelity.cosine for q in qualities.values()), default=1.0),
        None,
    )
    return Quality(METRIC, 0.0, fidelity.rel_error, fidelity)


def _check(
    prepared: Prepared,
    layer: Layer,
    variant: Variant,
    inputs: Sequence[NDArray[np.generic]],
) -> Quality:
    # Of the shape at hand, which need not be the one that MACs are counted for.
    use = replace(layer.uses[0], x_shape=inputs[0].shape, y_shape=None)
    alone = layer_model(layer, use, opset(prepared.model), layer.array())
    replaced = alone.clone()
    (target,) = find_layers(replaced, {"x": inputs[0].shape})
    choice, factored = variant.choices[layer.name], variant.factors[layer.name]
    replace_layer(replaced, target, choice, factored, Names(replaced))
    before, after = (_run(model, layer, inputs) for model in (alone, replaced))
    if before.shape != after.shape:
        raise CrashError(f"the output of {layer.name!r} would differ in shape")
    with np.errstate(over="ignore", invalid="ignore"):  # where outputs overflow, so does the error
        centre = before.mean(axis=0)
        spread, apart = (float(np.linalg.norm(a)) for a in (before - centre, before - after))
        whole = float(np.linalg.norm(before)) * float(np.linalg.norm(after))
        scale = spread or float(np.linalg.norm(before))
        error = apart / scale if scale > 0 else (0.0 if apart == 0 else math.inf)
    return _quality(error, float(np.vdot(before, after)) / whole if whole > 0 else 1.0)


def _by_weight(layer: Layer, variant: Variant) -> Quality:
    error = variant.weight_error(layer)
    return _quality(error, math.sqrt(max(0.0, 1 - error**2)))


def _quality(error: float, cosine: float) -> Quality:
    error = error if math.isfinite(error) else math.inf
    return Quality(METRIC, 0.0, error, Fidelity(error, min(1.0, cosine), None))


def _run(
    model: ir.Model, layer: Layer, inputs: Sequence[NDArray[np.generic]]
) -> NDArray[np.float64]:
    """Outputs of a one-layer model, run in the child process, as (positions, outputs)."""
    blob = serialize(to_proto(model), layer.name)
    batches = run_in_sandbox(
        _outputs, blob, layer.name, list(inputs), task=f"running {layer.name!r} alone"
    )
    outputs = []
    for y in batches:
        y = y.astype(np.float64)
        y = np.moveaxis(y, 1, -1) if layer.kind in ("conv", "conv-transpose") else y
        outputs.append(y.reshape(-1, y.shape[-1]))
    return np.concatenate(outputs)


def _seen(
    model: bytes, label: str, folder: str | None, name: str, feeds: Sequence[Feed]
) -> list[NDArray[np.generic]]:
    session = open_exposed(model, ONE_CPU_THREAD, label, folder)
    return [np.asarray((dict(feed) | session.run(feed))[name]) for feed in feeds]


def _outputs(
    model: bytes, label: str, inputs: Sequence[NDArray[np.generic]]
) -> list[NDArray[np.generic]]:
    session = Session(model, ONE_CPU_THREAD, label)
    return [session.run({"x": x})["y"] for x in inputs]


def _inputs(
    prepared: Prepared, layer: Layer, feeds: Sequence[Feed], seed: int
) -> list[NDArray[np.generic]]:
    """Real inputs of a layer where the model is run, else random ones.

    Raises
    ------
    ModelError
        For operators that no model of one node is made of.
    """
    use = layer.uses[0]
    if layer.kind not in ("matrix", "conv", "conv-transpose", "gather", "tied"):
        raise ModelError(f"{layer.op} isn't run alone")
    name = use.x.name or ""
    if feeds and use.node.graph is prepared.model.graph:
        source, seen = prepared.source, list[NDArray[np.generic]]()
        blob, longest = (
            model_of_values(prepared.model, [name], source),
            trial_seconds(source.nbytes),
        )
        run = blob, source.label, source.folder, name, list(feeds)
        # With other outputs it is another model to the runtime, which may crash on it.
        with contextlib.suppress(CrashError):
            seen = (
                _seen(*run)
                if longest is None
                else run_in_sandbox(
                    _seen, *run, deadline=Deadline(longest), task=f"the input of {layer.name!r}"
                )
            )
        if any(x.size for x in seen):
            return [x for x in seen if x.size]
    rng = np.random.default_rng(seed)
    shape = use.x_shape or ()
    if not 0 < math.prod(shape) <= _MOST_ELEMENTS or not shape:
        shape = _usual_shape(layer, use)
    # As many as it takes to see a spread of outputs: one row of a product has none.
    draws = -(-_ROWS // max(1, math.prod(shape) // shape[-1])) if layer.kind == "matrix" else 1
    if layer.kind in ("gather", "tied"):  # which is looked up first
        return [rng.integers(0, layer.shape[layer.lookup_axis(use)], shape)]
    return [rng.standard_normal(shape).astype(use.dtype.numpy()) for _ in range(draws)]


def _usual_shape(layer: Layer, use: Use) -> tuple[int, ...]:
    """The shape of an input large enough for a layer's kernel, where shapes aren't inferred."""
    if layer.convolves:
        inputs = layer.shape[0] if layer.kind == "conv-transpose" else layer.shape[1] * layer.group
        return (1, inputs, *(_EXTENT + k for k in layer.shape[2:]))
    if layer.kind in ("gather", "tied"):  # which is looked up first
        return (_ROWS,)
    contracted = layer.shape[-1] if use.contracts_last else layer.shape[-2]
    return (contracted, _ROWS) if use.slot == 0 else (_ROWS, contracted)
