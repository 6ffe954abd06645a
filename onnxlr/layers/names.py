"""Names of layers: those by which the owner of a model knows them."""

import re
from collections import Counter
from collections.abc import Sequence

from onnxlr.layers.layer import Layer

# What exporters call a node after: its operator, or the function of the framework that it was.
_FUNCTIONS = frozenset(
    f"{name}{dimensions}"
    for name in ("conv", "convolution", "conv_transpose")
    for dimensions in ("", "1d", "2d", "3d")
) | {"", "addmm", "baddbmm", "bmm", "einsum", "embedding", "linear", "matmul", "mm"}
_NUMBERED = re.compile(r"(?P<prefix>node_|n)?(?P<word>.*?)(?P<number>_?\d+)?", re.DOTALL)
# A place in the network: words with dots or slashes between them, or something's weight.
_PLACE = re.compile(r"[\w-]+([./][\w-]+)+(:\d+)?|[\w-]+_(weight|kernel)", re.ASCII)
# Where torch's exporter keeps the modules that a node is in, the outermost first.
_SCOPES = "pkg.torch.onnx.name_scopes"
_FOLDED = re.compile(r"(/(batch_norm_)?folded(_\d+)?)+$")  # what folding adds to a weight's name
_SCOPE = re.compile(r"'([\w.-]+)', '[^']*'\]", re.ASCII)  # the innermost, before the function


def layer_names(layers: Sequence[Layer]) -> list[str]:
    """A name for each layer, no two alike.

    It is the first user's, unless that is none, or another layer's too: then the weight's. If it
    says nothing ("node_Conv_211"), it is what says where in the network the layer is: the weight
    ("r3.a.0.weight") or the module that the node was exported from. A name that is taken gets a
    number. A user of several weights gives its name to the one that it
    multiplies by, if there is one.
    """
    known = Counter(layer.name for layer in layers if layer.kind != "other")
    users = Counter(layer.name for layer in layers if layer.name not in known) + known
    names: dict[str, None] = {}
    for layer in layers:
        beside = layer.kind == "other" and layer.name in known
        unique = bool(layer.name) and users[layer.name] == 1 and not beside
        stem = layer.name if unique else layer.weight.name or "weight"
        if unique and _says_nothing(layer.name, layer.op):
            place = _place(layer)
            if place and place not in users:
                stem, unique = place, False
        name, i = stem, 1
        while name in names or (not unique and users[name] == 1):
            name, i = f"{stem}_{i}", i + 1
        names[name] = None
    return list(names)


def _place(layer: Layer) -> str:
    """Where in the network a layer is; empty where nothing says it."""
    weight = _FOLDED.sub("", layer.weight.name or "")
    if _PLACE.fullmatch(weight):
        return weight
    if len(layer.uses) != 1:  # of several modules, perhaps
        return ""
    scopes = _SCOPE.search(layer.uses[0].node.metadata_props.get(_SCOPES, ""))
    return "" if scopes is None else scopes[1]


def _says_nothing(name: str, op: str) -> bool:
    """Whether a node's name is that of what it computes, and a number."""
    parts = _NUMBERED.fullmatch(name)
    assert parts is not None
    if not (parts["prefix"] or parts["number"]):
        return False
    word = parts["word"].lower()
    return word == op.lower() or word in _FUNCTIONS
