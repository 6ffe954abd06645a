"""Variants that were judged: their quality and size, and what is remembered of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from onnxlr.calibrate.calibration import Calibration
from onnxlr.methods.choice import Choice
from onnxlr.rewrite.variant import Key, Variant
from onnxlr.verify.fidelity import Quality
from onnxlr.widths.narrowing import Narrowing


@dataclass(frozen=True)
class Evaluation:
    """A variant with its quality, measured on the saved file, and the bytes of that.

    With ``--behind``, both are those of the file after that step.
    """

    variant: Variant
    quality: Quality
    nbytes: int


@dataclass(frozen=True)
class Judged:
    """What is remembered of a variant that was judged: its factors are too large for that.

    Attributes
    ----------
    choices : mapping of str to Choice
        By layer name.
    sequential : int
        As in ``Variant``.
    quality : Quality
        On the samples that choose.
    nbytes : int
        Of the file.
    narrowing : Narrowing or None
        As in ``Variant``.
    calibration : Calibration or None
        The samples that its factors were fitted to.
    """

    choices: Mapping[str, Choice]
    sequential: int
    quality: Quality
    nbytes: int
    narrowing: Narrowing | None = None
    calibration: Calibration | None = None

    @property
    def key(self) -> Key:
        """What tells it from others."""
        return Variant(self.choices, {}, self.sequential, self.narrowing).key
