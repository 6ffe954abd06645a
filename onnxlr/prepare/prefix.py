"""Runs of a model up to some of its values, each started from values that earlier runs kept."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.model.lifting import bodies
from onnxlr.model.load import Source
from onnxlr.model.protobuf import serialize, to_proto
from onnxlr.prepare.opening import give_out
from onnxlr.prepare.prepared import Prepared, samples_at_once
from onnxlr.prepare.samples import Samples
from onnxlr.system.session import ONE_CPU_THREAD, Feed, open_exposed

_MEMORY = 512 << 20  # bytes that are kept
_AT_ONCE = 2  # values of the largest size that a run begins at: a layer's input, and a shortcut's
_ELEMENT = 4  # bytes, of single precision

Values = dict[str, NDArray[Any]]


class Prefix:
    """Values of a model on samples: a run begins at those that earlier runs left.

    The model may change from one call to the next, though nothing that a kept value depends on.

    Parameters
    ----------
    source : Source
        Where the model comes from, by which messages call it.
    samples : Samples
    most : int
        Bytes that are kept, at most: the oldest go first.
    """

    def __init__(self, source: Source, samples: Samples, most: int = _MEMORY) -> None:
        self._source, self._samples, self._most = source, samples, most
        self._kept: dict[str, list[NDArray[Any]]] = {}

    def values(
        self, model: ir.Model, names: Collection[str], keep: Collection[str]
    ) -> Iterator[tuple[Feed, Values]]:
        """Each feed, and the values of these names on it, as far as they aren't inputs themselves.

        Parameters
        ----------
        model : onnx_ir.Model
        names : collection of str
            Of values of the main graph.
        keep : collection of str
            Those of them that no later model changes. They are kept if the iteration ends.

        Raises
        ------
        ModelError
            If the model fails on a feed.
        """
        inputs = {value.name for value in model.graph.inputs}
        ready = {name: self._kept[name] for name in names if name in self._kept}
        wanted = [name for name in sorted(names) if name not in inputs and name not in ready]
        fresh: dict[str, list[NDArray[Any]]] = {name: [] for name in wanted if name in keep}
        run = self._runner(model, wanted) if wanted else None
        for i, (feed, _, _) in enumerate(self._samples.batches()):
            values = {} if run is None else run(feed, i)
            for name, arrays in fresh.items():
                arrays.append(values[name])
            yield feed, values | {name: arrays[i] for name, arrays in ready.items()}
        for name, arrays in fresh.items():
            self._keep(name, arrays)

    def _runner(self, model: ir.Model, wanted: list[str]) -> Any:
        """Runs what is between the values that are kept, or the inputs, and those wanted."""
        proto = to_proto(model)
        types = {name: arrays[0].dtype for name, arrays in self._kept.items() if arrays}
        begins = cut(proto.graph, wanted, types)
        label, folder = self._source.label, self._source.folder
        session = open_exposed(serialize(proto, label), ONE_CPU_THREAD, label, folder)
        given = {value.name for value in proto.graph.input} - begins

        def run(feed: Feed, i: int) -> Values:
            at = {name: self._kept[name][i] for name in begins}
            return session.run({n: a for n, a in feed.items() if n in given} | at)

        return run

    def _keep(self, name: str, arrays: list[NDArray[Any]]) -> None:
        size = _nbytes(arrays)
        if size > self._most or any(a.dtype.hasobject for a in arrays):
            return
        while self._kept and size + sum(map(_nbytes, self._kept.values())) > self._most:
            del self._kept[next(iter(self._kept))]
        self._kept[name] = arrays


def most_samples(prepared: Prepared, names: Collection[str]) -> int:
    """Samples of which the inputs of some layers can be kept, so that runs begin at them."""
    sizes = [
        math.prod(use.x_shape)
        for layer in prepared.layers
        if layer.name in names
        for use in layer.uses
        if use.x_shape is not None
    ]
    largest = max(sizes, default=0) / samples_at_once(prepared)
    return int(_MEMORY / (_AT_ONCE * _ELEMENT * max(largest, 1)))


def _nbytes(arrays: Iterable[NDArray[Any]]) -> int:
    return sum(array.nbytes for array in arrays)


def cut(
    graph: onnx.GraphProto, wanted: Collection[str], known: Mapping[str, np.dtype[Any]]
) -> set[str]:
    """Leave of a graph what is between known values, or the inputs, and some others, in place.

    Returns
    -------
    set of str
        The known values that it begins at, which have become inputs.
    """
    producers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    usable = set(known)
    while True:
        begins, needed, names = _behind(graph, wanted, usable, producers)
        # A node that is needed for another output gives this one too.
        given_anyway = {name for name in begins if producers.get(name) in needed}
        if not given_anyway:
            break
        usable -= given_anyway
    give_out(graph, wanted)
    _leave(graph.node, needed)
    for field in (graph.input, graph.initializer):
        _leave(field, {i for i, item in enumerate(field) if item.name in names})
    graph.input.extend(_declared(name, known[name]) for name in sorted(begins))
    del graph.value_info[:]
    return begins


def _leave(field: Any, places: Collection[int]) -> None:
    """Delete all items of a repeated field but those in some places."""
    for i in reversed(range(len(field))):
        if i not in places:
            del field[i]


def _behind(
    graph: onnx.GraphProto, wanted: Iterable[str], usable: set[str], producers: Mapping[str, int]
) -> tuple[set[str], set[int], set[str]]:
    """Where a walk back from some values ends, the nodes on its way, and all names it has met."""
    begins: set[str] = set()
    needed: set[int] = set()
    names: set[str] = set()
    stack = list(wanted)
    while stack:
        name = stack.pop()
        if name in names:
            continue
        names.add(name)
        if name in usable:
            begins.add(name)
        elif (i := producers.get(name)) is not None and i not in needed:
            needed.add(i)
            stack += _read(graph.node[i])
    return begins, needed, names


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node reads, with those that its bodies do."""
    yield from node.input
    for body in bodies(node):
        yield from (value.name for value in body.output)
        for inner in body.node:
            yield from _read(inner)


def _declared(name: str, dtype: np.dtype[Any]) -> onnx.ValueInfoProto:
    element = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    return onnx.helper.make_tensor_value_info(name, element, None)
