"""The models of the ``onnx`` package's backend tests, with what they are fed, as cases to check.

Single-operator models take their weights as inputs: here all inputs but the first, or the first
alone, become initializers. The light CNNs compute their weights from shapes, all values alike; a
variant has seeded weights of low rank in their place, so that there is something to factorize.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from tests.support.node_tests import node_tests

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
FOLDERS = ("pytorch-converted", "pytorch-operator", "simple")
Feed = Mapping[str, Any]

# Which inputs of which operators may be weights: a second list, independent of onnxlr's.
HEAVY: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("MatMul", "Gemm", "MatMulInteger"), (0, 1)),
    **dict.fromkeys(("Conv", "ConvTranspose", "DeformConv", "ConvInteger"), (1,)),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), (1, 2)),
    "QLinearConv": (3,),
    "QLinearMatMul": (0, 3),
    "Gather": (0,),
    "Einsum": (0, 1, 2, 3),
}
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
_IR_VERSION = 10  # that every supported runtime reads
_VIEWS = ("Identity", "Transpose", "Cast")


@dataclass(frozen=True)
class Material:
    """A model, feeds that it runs on, and the outputs that the test data promises for each."""

    model: onnx.ModelProto
    feeds: tuple[Feed, ...]
    expected: tuple[Sequence[Any], ...] = ()


@dataclass(frozen=True)
class Case:
    """A model to check, which is built on demand.

    Attributes
    ----------
    name, group : str
    opset : int or None
        What it is converted to; None leaves it as it is.
    make : callable
    ways : tuple of str or None
        Those of ``models.conformance.trial.WAYS`` that it is checked in; None for ``ALWAYS``.
    """

    name: str
    group: str
    make: Callable[[], Material] = field(repr=False)
    opset: int | None = None
    ways: tuple[str, ...] | None = None


def node_cases() -> Iterator[Case]:
    """Yield each single-operator model with constant inputs; twice if a weight may be first."""
    for i, test in enumerate(node_tests()):
        inputs = test.model.graph.input
        slots = [s for s in HEAVY.get(test.model.graph.node[0].op_type, ()) if s < len(inputs)]
        floats = any(inputs[s].type.tensor_type.elem_type in _FLOATS for s in slots)
        for head in (False, True)[: 1 + (0 in slots and len(inputs) > 1)]:
            make = partial(_node_material, i, head=head)
            yield Case(f"{test.name} (first)" if head else test.name, "node", make)
            if floats and len(inputs) > 1:
                name = f"{test.name} ({'first, ' if head else ''}low rank)"
                yield Case(name, "node", partial(_planted, make), ways=("least", "exact"))


def _node_material(number: int, *, head: bool) -> Material:
    test = node_tests()[number]
    model = onnx.ModelProto()
    model.CopyFrom(test.model)
    # The newest is stamped on all, older runtimes would refuse it; the opset says what is in it.
    model.ir_version = min(model.ir_version, _IR_VERSION)
    values = [list(inputs) for inputs, _ in test.data_sets]
    expected = tuple(outputs for _, outputs in test.data_sets)
    graph, count = model.graph, len(model.graph.input)
    inputs = list(graph.input)
    fixed: list[int] = []
    for slot in (0,) if head else range(1, count):
        tensor = _as_tensor(values[0][slot], inputs[slot])
        if tensor is not None and len(values) == 1 and count > 1:
            graph.initializer.append(tensor)
            fixed.append(slot)
    del graph.input[:]
    # Before IR 4 an initializer had to be an input as well.
    graph.input.extend(v for i, v in enumerate(inputs) if i not in fixed or model.ir_version < 4)
    feeds = tuple(
        {v.name: x for i, (v, x) in enumerate(zip(inputs, one, strict=True)) if i not in fixed}
        for one in values
    )
    return Material(model, feeds, expected)


def _as_tensor(value: Any, info: onnx.ValueInfoProto) -> onnx.TensorProto | None:
    """Return an array as an initializer, or None if its type isn't the declared one."""
    if not isinstance(value, (np.ndarray, np.generic)):
        return None
    try:
        tensor = numpy_helper.from_array(np.asarray(value), info.name)
    except (KeyError, ValueError, TypeError, NotImplementedError):
        return None
    return tensor if tensor.data_type == info.type.tensor_type.elem_type else None


def data_cases() -> Iterator[Case]:
    """Yield the small models that come as files."""
    for folder in FOLDERS:
        for path in sorted((DATA / folder).glob("*/model.onnx")):
            yield Case(path.parent.name, folder, partial(_read_material, path))


def _read_material(path: Path) -> Material:
    model = onnx.load(path)
    constants = {t.name for t in model.graph.initializer}
    inputs = [v for v in model.graph.input if v.name not in constants]
    feeds, expected = [], []
    for folder in sorted(path.parent.glob("test_data_set_*")):
        values = [_read_value(folder / f"input_{i}.pb", v) for i, v in enumerate(inputs)]
        feeds.append({v.name: x for v, x in zip(inputs, values, strict=True)})
        outputs = enumerate(model.graph.output)
        expected.append([_read_value(folder / f"output_{i}.pb", v) for i, v in outputs])
    return Material(model, tuple(feeds), tuple(expected))


def _read_value(path: Path, info: onnx.ValueInfoProto) -> Any:
    if info.type.WhichOneof("value") == "sequence_type":
        sequence = onnx.SequenceProto()
        sequence.ParseFromString(path.read_bytes())
        return numpy_helper.to_list(sequence)
    tensor = onnx.TensorProto()
    tensor.ParseFromString(path.read_bytes())
    return numpy_helper.to_array(tensor)


# The others have spectra, and searches, of many minutes.
_SMALLEST = ("squeezenet", "shufflenet")
# Of the fully connected layers of three of them, which have 100 million weights, these features
# become fewer.
_MANY, _FEW = 4096, 64


def light_cases(opsets: Sequence[int]) -> Iterator[Case]:
    """Yield the light CNNs as they are, with weights of low rank, and those in other opsets."""
    for path in sorted((DATA / "light").glob("*.onnx")):
        name = path.stem.removeprefix("light_")
        shipped, planted = partial(light_material, path), partial(planted_light, path)
        yield Case(name, "light", shipped, ways=("exact", "drop", "half"))
        ways = ("planted", "exact", "drop", "half") if name in _SMALLEST else ("planted",)
        name = f"{name} (low rank)"
        yield Case(name, "light", planted, None, ways)
        yield from (Case(name, "light", planted, opset, ways[:1]) for opset in opsets)


def light_material(path: Path) -> Material:
    """Return a light CNN, the ramp that the backend tests feed it, and the output they expect."""
    model = onnx.load(path)
    constants = {t.name for t in model.graph.initializer}
    feed = {v.name: _ramp(v) for v in model.graph.input if v.name not in constants}
    tensor = onnx.TensorProto()
    tensor.ParseFromString(path.with_name(f"{path.stem}_output_0.pb").read_bytes())
    return Material(model, (feed,), ([numpy_helper.to_array(tensor)],))


def _ramp(info: onnx.ValueInfoProto) -> NDArray[np.float32]:
    shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
    count = math.prod(shape)
    return np.asarray(np.arange(count).reshape(shape) / count, dtype=np.float32)


def planted_light(path: Path) -> Material:
    """Return a light CNN with stored, seeded weights of an eighth of their rank."""
    material = light_material(path)
    model = material.model
    shapes = {t.name: numpy_helper.to_array(t).tolist() for t in model.graph.initializer}
    rng = np.random.default_rng(0)
    constants, nodes = [], []
    for node in model.graph.node:
        if node.op_type != "ConstantOfShape" or node.input[0] not in shapes:
            nodes.append(node)
            continue
        shape = [_FEW if side == _MANY else side for side in shapes[node.input[0]]]
        value = float(numpy_helper.to_array(node.attribute[0].t)[0]) if node.attribute else 0.0
        if len(shape) > 1:
            array = low_rank(rng, shape, max(1, min(shape[:2]) // 8))
        else:  # biases, scales, means and variances: positive as they were, no two alike
            array = (value * rng.uniform(0.5, 1.5, shape)).astype(np.float32)
        constants.append(numpy_helper.from_array(array, node.output[0]))
    used = {name for node in nodes for name in node.input}
    initializers = [t for t in model.graph.initializer if t.name in used]
    inputs = [v for v in model.graph.input if v.name in used]
    inputs += [onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in constants]
    for part, items in (
        ("node", nodes),
        ("initializer", initializers + constants),
        ("input", inputs),
    ):
        model.graph.ClearField(part)
        getattr(model.graph, part).extend(items)
    ((name, ramp),) = material.feeds[0].items()
    feeds = tuple({name: rng.random(ramp.shape, dtype=np.float32)} for _ in range(2))
    return Material(model, feeds)


def low_rank(rng: np.random.Generator, shape: Sequence[int], rank: int) -> NDArray[np.float32]:
    """Return a sum of ``rank`` outer products: a weight of this rank in every unfolding."""
    first, *rest = (rng.standard_normal((side, rank)) for side in shape)
    product = np.ones((1, rank))
    for factor in rest:
        product = (product[:, None] * factor[None]).reshape(-1, rank)
    scale = math.sqrt(2 / (rank * max(1, math.prod(shape[1:]))))
    return np.asarray(scale * (first @ product.T).reshape(shape), dtype=np.float32)


def _planted(make: Callable[[], Material]) -> Material:
    """Return the same model with weights of rank one, where they are stored as floats."""
    material = make()
    rng = np.random.default_rng(0)
    names = {name for name, _ in constant_weights(material.model)}
    for tensor in material.model.graph.initializer:
        if tensor.name in names and tensor.data_type in _FLOATS and len(tensor.dims) > 1:
            array = low_rank(rng, list(tensor.dims), 1)
            kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            if tensor.data_type != TensorProto.BFLOAT16:
                tensor.CopyFrom(numpy_helper.from_array(array.astype(kind), tensor.name))
    return Material(material.model, material.feeds)


def constant_weights(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """Return the name and the operator of every stored weight of a heavy operator.

    Views (Identity, Transpose, Cast) between the two are looked through. A lookup counts only with
    a table of floats, and a product only with one constant.
    """
    weights: list[tuple[str, str]] = []
    _search(model.graph, {}, {}, weights)
    return list(dict.fromkeys(weights))


def _search(
    graph: onnx.GraphProto,
    outer: Mapping[str, onnx.TensorProto],
    views: Mapping[str, str],
    weights: list[tuple[str, str]],
) -> None:
    tensors = {**outer, **{t.name: t for t in graph.initializer}}
    roots = dict(views)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _search(inner, tensors, roots, weights)
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensors[node.output[0]] = node.attribute[0].t
        if node.op_type in _VIEWS and (root := roots.get(node.input[0], node.input[0])) in tensors:
            roots[node.output[0]] = root
        slots = HEAVY.get(node.op_type, ()) if node.domain in ("", "ai.onnx") else ()
        names = [roots.get(node.input[s], node.input[s]) for s in slots if s < len(node.input)]
        constants = [name for name in names if name in tensors]
        if node.op_type in ("MatMul", "Gemm") and len(constants) > 1:
            continue
        for name in constants:
            table = tensors[name].data_type in _FLOATS and len(tensors[name].dims) > 1
            if node.op_type != "Gather" or table:
                weights.append((name, node.op_type))
