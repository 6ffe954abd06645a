"""The reasons for which layers were kept, by kinds that can be counted."""

import re
from collections import Counter
from collections.abc import Iterable

# Which words in a reason make which kind. The first that match count: they name the hurdle at
# which the most promising method of the layer fell.
_KINDS = (
    ("the whole model is", "put back: not faster as a whole"),
    ("the file would grow", "put back: the file would grow"),
    ("other layers save more", "other layers save more for less loss"),
    ("the limit is", "put back: accuracy"),
    ("put back", "put back: other"),
    ("within the model", "not faster in place"),
    (": undecided", "timings undecided"),
    ("faster", "not faster alone"),
    ("saves anything (rank 1 takes", "no rank saves anything"),
    ("only up to", "needs too high a rank"),
    ("above the noise", "nothing above the noise"),
    ("all zeros", "all zeros"),
    ("quantized", "quantized"),
    ("is a vector of", "a vector"),
    ("computes the weight", "computed from constants"),
    ("also needs the whole weight", "needed whole elsewhere"),
    ("shared by", "shared between operators"),
    (" use it", "the nodes that use it rule it out"),
    (" replaces ", "operator without a method yet"),
)


def kind_of(reason: str) -> str:
    """The kind of a reason for which a layer was kept.

    Examples
    --------
    >>> kind_of("svd at rank 8 takes 0.009 ms, the original 0.008 ms: not faster")
    'not faster alone'
    """
    kinds = (kind for part, kind in _KINDS if part in reason)
    # A reason that isn't listed above makes one kind too, so its numbers are left out.
    return next(kinds, re.sub(r"[0-9][0-9.,]*", "#", reason))


def counted(reasons: Iterable[str]) -> str:
    """How many reasons there are of each kind, the most frequent first.

    Examples
    --------
    >>> counted(["put back: the limit is 0.01", "a vector", "put back: the limit is 0.02"])
    '2 put back: accuracy, 1 a vector'
    """
    return ", ".join(f"{n} {kind}" for kind, n in Counter(map(kind_of, reasons)).most_common())
