"""What layers are given in the original, kept from one sequential correction to the next."""

from collections.abc import Iterator

from onnxlr.prepare.opening import session_of_values
from onnxlr.prepare.prepared import Prepared
from onnxlr.prepare.samples import Samples
from onnxlr.system.session import ONE_CPU_THREAD, Feed, Session

_MEMORY = 256 << 20  # bytes that are kept


class Originals:
    """Values of the original on samples, which are the same in every correction.

    What there is memory for is kept, the rest is run anew.

    Parameters
    ----------
    prepared : Prepared
    most : int
        Bytes that are kept, at most.
    """

    def __init__(self, prepared: Prepared, most: int = _MEMORY) -> None:
        self._prepared = prepared
        self._free = most
        self._kept: dict[tuple[frozenset[str], bytes], list[Feed]] = {}

    def values(self, names: frozenset[str], samples: Samples) -> Iterator[tuple[Feed, Feed]]:
        """Each feed, and the values of these names on it, as far as they aren't inputs themselves.

        Raises
        ------
        ModelError
            If the model fails on one.
        """
        kept = self._kept.setdefault((names, samples.index.tobytes()), [])
        session: Session | None = None
        for i, (feed, _, _) in enumerate(samples.batches()):
            if i < len(kept):
                yield feed, kept[i]
                continue
            session = session or self._session(names)
            values = session.run(feed)
            nbytes = sum(value.nbytes for value in values.values())
            if i == len(kept) and nbytes <= self._free:
                kept.append(values)
                self._free -= nbytes
            yield feed, values

    def _session(self, names: frozenset[str]) -> Session:
        prepared = self._prepared
        return session_of_values(prepared.model, names, ONE_CPU_THREAD, prepared.source)
