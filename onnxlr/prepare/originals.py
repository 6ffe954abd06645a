"""Values of the original model, kept from one sequential correction to the next."""

from collections.abc import Iterator

import onnx_ir as ir

from onnxlr.layers.layer import Layer
from onnxlr.prepare.prefix import Prefix, Values
from onnxlr.prepare.prepared import Prepared
from onnxlr.prepare.samples import Samples
from onnxlr.system.session import Feed


class Originals:
    """Values of the original on samples, which are the same in every correction.

    What there is memory for is kept, the rest is run anew.

    Parameters
    ----------
    prepared : Prepared
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._latest: tuple[bytes, Prefix] | None = None

    def values(self, names: frozenset[str], samples: Samples) -> Iterator[tuple[Feed, Values]]:
        """Each feed, and the values of these names on it, as far as they aren't inputs themselves.

        Raises
        ------
        ModelError
            If the model fails on one.
        """
        index = samples.index.tobytes()
        if self._latest is None or self._latest[0] != index:
            self._latest = index, Prefix(self._prepared.source, samples)
        return self._latest[1].values(self._prepared.model, names, names)


def inputs_in_both(
    layer: Layer, changed: ir.Model, so_far: Prefix, originals: Originals, samples: Samples
) -> Iterator[tuple[Values, Values]]:
    """What is fed and what a layer is given, in the model as changed before it and the original.

    Raises
    ------
    ModelError
        If one of the models fails on a sample.
    """
    names = frozenset(use.x.name or "" for use in layer.uses)
    # Behind the layer's first use others will change, as soon as the layer does.
    after = so_far.values(changed, names, names if len(layer.uses) == 1 else ())
    for (feed, before), (_, now) in zip(originals.values(names, samples), after, strict=True):
        yield dict(feed) | now, dict(feed) | before
