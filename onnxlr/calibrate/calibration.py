"""The samples that factors are fitted to, as a plan names them."""

from dataclasses import dataclass

from onnxlr.prepare.samples import share_of


@dataclass(frozen=True)
class Calibration:
    """The samples that factors were fitted to: without them a plan can't be replayed.

    Attributes
    ----------
    data : str
        Path as it was given.
    share : tuple of int
        Numerator and denominator of the share of it that was taken, the first samples in a seeded
        order; the others choose and test.
    digest : str
        SHA-256 of the samples that were taken.
    samples : int
        How many they are.
    batch : int
        How many of them were run at once for the shapes of what is between the layers.
    sequential : int
        How many of them the factors were corrected on in sequence; 0 if each is its own.
    influence : bool
        Whether errors of outputs were weighted by how far later layers pass them on.
    layers : tuple of str
        Those whose inputs were looked at together: what a runtime fuses, and so the last bit of
        what is seen, depends on it. Empty: those that are replaced.
    """

    data: str
    share: tuple[int, int]
    digest: str
    samples: int
    batch: int = 1
    sequential: int = 0
    influence: bool = False
    layers: tuple[str, ...] = ()

    def count(self, samples: int) -> int:
        """How many of so many samples were taken."""
        return share_of(samples, self.share)
