"""Static shapes of a model's tensors for given input shapes."""

from collections.abc import Iterable, Mapping, Sequence

import onnx
import onnx_ir as ir

from onnxlr.errors import ModelError
from onnxlr.model.protobuf import serialize, to_proto
from onnxlr.system.deadline import trials_enabled
from onnxlr.system.sandbox import run_in_sandbox
from onnxlr.system.session import Feed, Machine, open_exposed
from onnxlr.types import Shape

Sizes = tuple[int | None, ...]

_SMALL = 1024  # elements up to which an initializer may decide shapes; data of others isn't sent


def infer_shapes(model: ir.Model, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes of the main graph's tensors by ONNX shape inference with data propagation.

    Parameters
    ----------
    model : onnx_ir.Model
    inputs : mapping of str to tuple of int
        A static shape for every graph input.

    Returns
    -------
    dict of str to tuple of int
        The shape of every tensor for which it is static; the others are absent.
    """
    shapes = dict(inputs)
    for name, dims in _inferred(model, inputs).items():
        static = tuple(d for d in dims if d is not None)
        if len(static) == len(dims):
            shapes[name] = static
    return shapes


def declared_sizes(model: ir.Model) -> dict[str, Sizes]:
    """The sizes of the main graph's tensors that hold for all inputs that the model takes.

    They follow from the weights and from what the inputs declare, which the runtime enforces.
    Shapes that the file tells of other values aren't believed.

    Returns
    -------
    dict of str to tuple of (int or None)
        None for a size that depends on the inputs; values of unknown rank are absent.
    """
    ends = (*model.graph.inputs, *model.graph.initializers.values())
    sizes = {
        value.name or "": tuple(d if isinstance(d, int) else None for d in value.shape)
        for value in ends
        if value.shape is not None
    }
    return sizes | _inferred(model, {})


def _inferred(model: ir.Model, inputs: Mapping[str, Shape]) -> dict[str, Sizes]:
    """The sizes of the outputs of nodes, for inputs of these shapes, or as they are declared.

    Empty where inference stops, at what it can't merge: running the model decides then.
    """
    sketch = model.clone()
    for name, value in list(sketch.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.size > _SMALL:
            sketch.graph.initializers.pop(name)
            if value not in sketch.graph.inputs:
                sketch.graph.inputs.append(value)
    for value in sketch.graph.inputs:
        if (shape := inputs.get(value.name or "")) is not None:
            value.shape = ir.Shape(shape)
    # Shapes stored for the dynamic model would be merged with, and may contradict, the static.
    for node in sketch.graph:
        for output in node.outputs:
            output.shape = None
    proto = to_proto(sketch)
    del proto.graph.value_info[:]
    try:
        graph = _run_inference(serialize(proto, "the model"))
    except Exception:
        return {}
    return {
        info.name: tuple(
            d.dim_value if d.HasField("dim_value") else None
            for d in info.type.tensor_type.shape.dim
        )
        for info in (*graph.value_info, *graph.output)
        if info.type.tensor_type.HasField("shape")
    }


def _run_inference(model: bytes) -> onnx.GraphProto:
    """The types of values and outputs; from a child process, since inference crashes on some."""
    if not trials_enabled():
        return _infer(model)
    return run_in_sandbox(_infer, model, task="inferring shapes")


def _infer(model: bytes) -> onnx.GraphProto:
    """The types of values and outputs by ONNX shape inference, in this process."""
    proto = onnx.shape_inference.infer_shapes(model, data_prop=True)
    return onnx.GraphProto(value_info=proto.graph.value_info, output=proto.graph.output)


def observe_shapes(
    model: ir.Model, names: Iterable[str], feed: Feed, machine: Machine, folder: str | None = None
) -> dict[str, Shape]:
    """Shapes of intermediate tensors in one run of the model, which gives them as outputs.

    Parameters
    ----------
    model : onnx_ir.Model
    names : iterable of str
        Names of values of the main graph.
    feed : feed
    machine : Machine
    folder : str or None
        Where the model's external data lie.

    Returns
    -------
    dict of str to tuple of int
        Empty where the model doesn't run with these outputs.
    """
    proto = to_proto(model)
    present = {o.name for o in proto.graph.output}
    outputs = [n for n in dict.fromkeys(names) if n]
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in outputs if n not in present)
    try:
        arguments = serialize(proto, "the model"), machine, folder, dict(feed), outputs
        # With other outputs it is another model to the runtime, which may crash on it.
        return (
            run_in_sandbox(_observe, *arguments, task="observing shapes")
            if trials_enabled()
            else _observe(*arguments)
        )
    except (ModelError, ValueError):
        return {}


def _observe(
    blob: bytes, machine: Machine, folder: str | None, feed: Feed, names: Sequence[str]
) -> dict[str, Shape]:
    """The shapes of these outputs in one run of a serialized model."""
    outputs = open_exposed(blob, machine, "the model", folder).run(feed)
    return {n: tuple(outputs[n].shape) for n in names if n in outputs}
