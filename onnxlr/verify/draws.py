"""Models that draw random numbers: recognised by two runs, and compared on the same numbers."""

from pathlib import Path

import numpy as np
import onnx

from onnxlr.model.protobuf import serialize
from onnxlr.model.randomness import functions_draw, set_seeds
from onnxlr.system.session import Feed, Session
from onnxlr.verify.fidelity import Outputs, Totals, outputs_of_numbers

_ROUNDING = 1e-3  # relative difference of two runs that threads may make


class Draws:
    """The same random numbers for an original and whatever is compared with it.

    A session of ONNX Runtime goes on drawing from run to run: two models draw the same numbers
    where their random operators have the same seeds, and both run the same feeds in the same order
    from the first on.

    Parameters
    ----------
    original : Session
    feed : feed
        What it is run on to see whether that works.

    Attributes
    ----------
    same : bool
        Whether it does: operators of other domains may have no seeds.
    """

    def __init__(self, original: Session, feed: Feed) -> None:
        self._apart = not functions_draw(_read(original)[0])
        first, second = (self.begin(original).run(feed) for _ in range(2))
        self.same = not differ(first, second)

    @property
    def line(self) -> str:
        """What it is and how it is judged, in a sentence."""
        words = "the model is random: two runs of it on the same inputs differ"
        if self.same:
            return f"{words}; it and its candidates are judged on the same random numbers"
        return f"{words}, and its random numbers can't be fixed: they are part of measured losses"

    def begin(self, session: Session) -> Session:
        """A new session of the same model, which draws from the beginning."""
        proto, folder = _read(session)
        set_seeds(proto, apart=self._apart)
        content = serialize(proto, session.label)
        return Session(content, session.machine, session.label, folder)


def differ(first: Outputs, second: Outputs) -> bool:
    """Whether two runs on the same feed gave different outputs."""
    for name in outputs_of_numbers(first):
        totals, y = Totals(), np.nan_to_num(first[name].astype(np.float64))
        totals.add(first[name], second[name])
        if not totals.same_shape or totals.rel_error(float(np.vdot(y, y))) > _ROUNDING:
            return True
    return False


def _read(session: Session) -> tuple[onnx.ModelProto, str | None]:
    """The model that a session runs, and the folder of its external data."""
    if isinstance(session.content, bytes):
        return onnx.load_model_from_string(session.content), session.folder
    path = Path(session.content)
    return onnx.load_model(path, load_external_data=False), str(path.parent)
