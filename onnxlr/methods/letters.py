"""What the letters of a convolution's form stand for: channels, spatial axes, ranks."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from onnxlr.decompose import Form
from onnxlr.layers.kernel import Kernel
from onnxlr.types import Rank, Shape


@dataclass(frozen=True)
class Letters:
    """A form read for a kernel, whose result is outputs, inputs and letters of spatial axes.

    Examples
    --------
    >>> letters = Letters(Form("rsa,trb->tsab"), Kernel(1, 8, 6, (3, 5, 2)))
    >>> letters.joins, letters.sides, letters.shape("sab")
    ('r', (('sa', 'tb'),), (6, 3, 10))
    """

    form: Form
    kernel: Kernel

    @property
    def joins(self) -> str:
        """Letters that join factors, in the order of the form: each is a component of the rank."""
        result = self.form.result
        joins = (c for term in self.form.terms for c in term if c not in result)
        return "".join(dict.fromkeys(joins))

    @property
    def sides(self) -> tuple[tuple[str, str], ...]:
        """Rows and columns of the unfolding whose spectrum decides each component of the rank.

        The rows are the other letters of the smallest factor with that component.
        """
        sides = []
        for join in self.joins:
            smallest = min((term for term in self.form.terms if join in term), key=len)
            rows = smallest.replace(join, "")
            sides.append((rows, "".join(c for c in self.form.result if c not in rows)))
        return tuple(sides)

    def axes(self, letters: Iterable[str]) -> list[int]:
        """The spatial axes among letters: one for each, for the last of the result all others."""
        spatial, count = self.form.result[2:], len(self.kernel.spatial)
        starts = [spatial.index(letter) for letter in letters if letter in spatial]
        ends = (i + 1 if i + 1 < len(spatial) else count for i in starts)
        return [axis for i, end in zip(starts, ends, strict=True) for axis in range(i, end)]

    def slides(self, term: str) -> bool:
        """Whether a factor has spatial axes, so that it slides over the data."""
        return not set(self.form.result[2:]).isdisjoint(term)

    def shape(self, letters: str, rank: Rank = ()) -> Shape:
        """Sizes of one group's axes with these letters."""
        sizes = {
            letter: math.prod(self.kernel.spatial[axis] for axis in self.axes(letter))
            for letter in self.form.result[2:]
        }
        channels = self.kernel.outputs, self.kernel.inputs
        sizes |= dict(zip(self.form.result[:2], channels, strict=True))
        sizes |= dict(zip(self.joins, rank, strict=False))
        return tuple(sizes[letter] for letter in letters)

    def kernel_of(self, term: str, rank: Rank) -> Kernel:
        """The kernel of a factor: outputs, inputs and axes, or one channel letter if depthwise."""
        kernel, along = self.kernel, self.axes(term)
        spatial = tuple(size if axis in along else 1 for axis, size in enumerate(kernel.spatial))
        transposed = kernel.transposed and self.slides(term)
        channels = "".join(letter for letter in term if letter not in self.form.result[2:])
        if len(channels) == 1:
            (each,) = self.shape(channels, rank)
            return Kernel(kernel.group * each, 1, 1, spatial, transposed)
        outputs, inputs = self.shape(channels, rank)
        return Kernel(kernel.group, outputs, inputs, spatial, transposed)
