"""Sessions of a model in ONNX Runtime: memory is checked, and a child process tries it first."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from onnxlr.errors import ModelError
from onnxlr.model.graph import all_graphs
from onnxlr.model.lifting import lift
from onnxlr.model.load import Source
from onnxlr.model.protobuf import serialize, to_proto
from onnxlr.system.memory import available_memory, format_bytes
from onnxlr.system.session import Feed, Machine, Session, open_exposed
from onnxlr.system.trial import Trial

# Times the size of its weights that a model takes while the runtime opens it: measured, rounded up.
_OPENING, _OPENING_HALF = 2, 3


def opening_words(machine: Machine) -> str:
    """What is done when a model is opened, for who watches."""
    if not machine.compiles:
        return "open the model"
    return f"open the model, which {machine.providers[0]} may compile"


def open_session(source: Source, machine: Machine) -> Session:
    """A model in ONNX Runtime, opened in this process.

    Raises
    ------
    ModelError
        If there is not enough memory for it, or the runtime refuses it.
    """
    check_memory(source, machine, 1)
    return Session(_runnable(source), machine, source.label)


def _runnable(source: Source) -> Path | bytes:
    """What a session opens: the model's file, or its bytes where there is none."""
    if source.path is not None:
        return source.path
    return serialize(to_proto(source.model), source.label)


def check_memory(source: Source, machine: Machine, models: int) -> None:
    """Refuse to open a model that will not fit into memory.

    Parameters
    ----------
    models : int
        How many models of its size are open at the same time.

    Raises
    ------
    ModelError
        If memory is short; the message says by how much, and what to do.
    """
    needed, room = models * runtime_bytes(source.model, machine), available_memory()
    if needed > room:
        raise ModelError(
            f"{source.label} takes about {format_bytes(needed)} of memory to be run"
            f"{' beside the optimized model' if models > 1 else ''}, {format_bytes(room)} are "
            "free: --verify layers compares each layer alone, --verify none runs nothing; else use "
            "a machine with more memory"
        )


def runtime_bytes(model: ir.Model, machine: Machine) -> int:
    """Roughly how many bytes ONNX Runtime takes for a model's weights while it opens it."""
    total = 0
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            narrow = tensor.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
            # CPUs have no kernels for half precision: weights are cast once, and stay float32.
            widened = narrow and machine.provider == "cpu"
            total += (_OPENING_HALF if widened else _OPENING) * tensor.nbytes
    return total


def open_after_trial(source: Source, machine: Machine, feed: Feed) -> Session:
    """A model in ONNX Runtime, opened here once a child process has run it on a feed.

    Raises
    ------
    ModelError
        If it fails in either process, or there is not enough memory for it.
    """
    trial_run(source, machine, feed)
    return open_session(source, machine)


def trial_run(source: Source, machine: Machine, feed: Feed) -> None:
    """Run a model once in a child process.

    Raises
    ------
    ModelError
        If it fails there, or there is not enough memory for it.
    """
    with open_trial(source, machine) as trial:
        trial.run(feed)


def open_trial(source: Source, machine: Machine) -> Trial:
    """A child process that can open and run a model.

    Raises
    ------
    ModelError
        If there is not enough memory for the model.
    """
    check_memory(source, machine, 1)
    return Trial(_runnable(source), machine, source.label, source.nbytes)


def session_of_values(
    model: ir.Model,
    names: Iterable[str],
    machine: Machine,
    source: Source,
    inner: Mapping[str, ir.DataType] | None = None,
) -> Session:
    """A session that gives the values of these names, as far as they aren't inputs.

    Parameters
    ----------
    model : onnx_ir.Model
    names : iterable of str
        Names of values of the main graph.
    machine : Machine
    source : Source
        The source that the model comes from, by which messages call it.
    inner : mapping of str to onnx_ir.DataType, optional
        Names and types of values in bodies: what can't be had of them is left out.
    """
    exposed = model_of_values(model, names, source, inner)
    return open_exposed(exposed, machine, source.label, source.folder)


def model_of_values(
    model: ir.Model,
    names: Iterable[str],
    source: Source,
    inner: Mapping[str, ir.DataType] | None = None,
) -> bytes:
    """A model, serialized, whose outputs are the values of these names; inputs are left out.

    The runtime leaves out what is only behind them. Where all are inputs, outputs are as before.
    Values of bodies are called as ``lifted_name`` says.
    """
    proto = to_proto(model)
    inputs = {v.name for v in proto.graph.input} - {t.name for t in proto.graph.initializer}
    wanted = [name for name in sorted(set(names)) if name not in inputs]
    for name, dtype in sorted((inner or {}).items()):
        if (lifted := lift(proto.graph, name, int(dtype))) is not None:
            renamed = lifted_name(name)
            proto.graph.node.append(onnx.helper.make_node("Identity", [lifted], [renamed]))
            wanted.append(renamed)
    if wanted:
        give_out(proto.graph, wanted)
    return serialize(proto, source.label)


def give_out(graph: onnx.GraphProto, names: Iterable[str]) -> None:
    """Have a graph give these values, as they are declared, and no others."""
    declared = {value.name: value for value in graph.output}
    outputs = [declared.get(name, onnx.ValueInfoProto(name=name)) for name in names]
    del graph.output[:]
    graph.output.extend(outputs)


def lifted_name(name: str) -> str:
    """What a session calls a value of a body."""
    return f"{name}/lifted"
