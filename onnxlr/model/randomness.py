"""Random operators of a model: seeds by which two models draw the same numbers."""

from collections.abc import Iterable, Iterator

import onnx

from onnxlr.model.checks import ONNX_DOMAINS
from onnxlr.model.protobuf import bodies_of

_RANDOM = (
    *("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"),
    "RandomUniformLike",
)


def set_seeds(proto: onnx.ModelProto, *, apart: bool) -> None:
    """Give every random operator a seed, in place.

    Parameters
    ----------
    proto : onnx.ModelProto
    apart : bool
        Whether each gets another, by its place among them. Where functions draw numbers, whether
        they are inlined would change the places.
    """
    nodes = [*_nodes(proto.graph.node), *(n for f in proto.functions for n in _nodes(f.node))]
    random = (n for n in nodes if n.op_type in _RANDOM and n.domain in ONNX_DOMAINS)
    for seed, node in enumerate(random, 1):
        others = [a for a in node.attribute if a.name != "seed"]
        del node.attribute[:]
        node.attribute.extend(others)
        node.attribute.append(onnx.helper.make_attribute("seed", float(seed if apart else 1)))


def functions_draw(proto: onnx.ModelProto) -> bool:
    """Whether a local function draws random numbers."""
    return any(node.op_type in _RANDOM for f in proto.functions for node in _nodes(f.node))


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes in their order, each before those of its bodies."""
    for node in nodes:
        yield node
        for body in bodies_of(node):
            yield from _nodes(body.node)
