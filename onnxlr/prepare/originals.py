"""What layers are given in the original, kept from one sequential correction to the next."""

from collections.abc import Iterator

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
