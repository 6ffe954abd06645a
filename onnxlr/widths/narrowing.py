"""A narrowed model as a model of its own, from which the search for chains goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from onnxlr.calibrate.statistics import Statistics
from onnxlr.errors import OutputError
from onnxlr.model.load import load
from onnxlr.model.protobuf import serialize, to_proto
from onnxlr.model.save import save
from onnxlr.prepare.originals import Originals
from onnxlr.prepare.prepared import Prepared, prepare
from onnxlr.prepare.samples import Samples
from onnxlr.progress import Progress
from onnxlr.system.files import write_failure
from onnxlr.system.session import ONE_CPU_THREAD, Feed, Machine
from onnxlr.widths.find import Widths, find_widths
from onnxlr.widths.narrow import Kept, Solved, narrowed
from onnxlr.widths.places import inputs_known
from onnxlr.widths.readings import Moments, alike, readers_of, sampled_moments
from onnxlr.widths.sequential import correct_readers
from onnxlr.widths.solve import solve

_IN_MEMORY = 1 << 30  # bytes of a model, beyond which it lies in a file


@dataclass(frozen=True, eq=False)
class Narrowing:
    """A model with fewer channels.

    Attributes
    ----------
    kept : mapping of str to tuple of int
        Channels that stay, by the names of the widths that are narrowed.
    sequential : int
        How many samples the readers were corrected on in sequence; 0 where each was fitted by
        itself.
    samples : str
        Digest of those that its readers were fitted to; empty where it was by the weights.
    origin, prepared : Prepared
        The model as it was, and as it is with fewer channels.
    """

    kept: Kept
    sequential: int
    samples: str
    origin: Prepared
    prepared: Prepared

    @cached_property
    def key(self) -> tuple[object, ...]:
        """What tells it from others of the same original."""
        return (*sorted(self.kept.items()), self.sequential)


@dataclass(frozen=True, eq=False)
class Narrower:
    """Makes narrowed models of one original.

    Attributes
    ----------
    origin : Prepared
    widths : Widths
        All of its widths.
    statistics : mapping of str to Statistics
        Moments of the inputs of layers, by name; empty where there are no samples.
    moments : mapping of (str, str) to Moments
        Of the channels that the other readers see, by the names of layer and width.
    scratch : Path
        Where large models lie.
    samples : str
        Digest of those that the moments come from.
    feed : feed or None
        What shapes are inferred for.
    """

    origin: Prepared
    widths: Widths
    statistics: Mapping[str, Statistics]
    moments: Mapping[tuple[str, str], Moments]
    scratch: Path
    samples: str = ""
    feed: Feed | None = None
    machine: Machine = ONE_CPU_THREAD
    shapes: Sequence[str] = ()
    batch: int = 1

    @cached_property
    def originals(self) -> Originals:
        """What readers are given in the original."""
        return Originals(self.origin)

    def solved(self, kept: Kept) -> dict[str, Solved]:
        """The readers of narrowed widths, each fitted by itself."""
        return solve(self.widths, kept, self.statistics, self.moments)

    def model(self, kept: Kept, solved: Mapping[str, Solved]) -> ir.Model:
        """The graph with fewer channels."""
        return narrowed(self.origin.model, self.origin.shapes, kept, solved)

    def narrow(self, kept: Kept) -> Narrowing:
        """The narrowed model whose readers are each fitted by themselves."""
        return self._narrowing(kept, 0, self.solved(kept))

    def corrected(self, kept: Kept, samples: Samples, seed: int, progress: Progress) -> Narrowing:
        """The narrowed model whose readers are fitted in graph order, on these samples.

        Raises
        ------
        ModelError
            If a model on the way fails on the samples.
        """
        solved = correct_readers(
            *(self.origin, self.widths, kept, self.solved(kept)),
            *(samples, self.originals, seed, progress),
        )
        return self._narrowing(kept, len(samples), solved)

    def _narrowing(self, kept: Kept, sequential: int, solved: Mapping[str, Solved]) -> Narrowing:
        prepared = self._prepared(self.model(kept, solved))
        return Narrowing(kept, sequential, self.samples, self.origin, prepared)

    def _prepared(self, model: ir.Model) -> Prepared:
        """A narrowed graph, loaded as any other model: other processes get it as a source too."""
        origin = self.origin.source
        if origin.external or origin.nbytes > _IN_MEMORY:
            folder = self.scratch / f"narrowed-{len(list(self.scratch.glob('narrowed-*')))}"
            try:
                folder.mkdir()
            except OSError as error:
                raise OutputError(write_failure(folder, error)) from None
            save(model, folder / "model.onnx", outside=bool(origin.external))
            source = load(folder / "model.onnx")
        else:
            source = load(serialize(to_proto(model), origin.label))
        return prepare(
            replace(source, label=origin.label),
            feed=self.feed,
            machine=self.machine,
            shapes=self.shapes,
            batch=self.batch,
        )


def widths_of(prepared: Prepared) -> Widths:
    """All widths of a prepared model."""
    return find_widths(prepared.model, prepared.layers, prepared.shapes)


def reader_names(widths: Widths) -> tuple[str, ...]:
    """The layers that read a width which may be narrowed, in graph order."""
    found = {name for width in widths.usable for name in width.readers}
    cuts = widths.weight_cuts("in")
    return tuple(cut.layer.name for cut in cuts if cut.layer.name in found)


def moments_for(
    prepared: Prepared,
    statistics: Mapping[str, Statistics],
    samples: Samples | None,
    seed: int,
) -> dict[tuple[str, str], Moments]:
    """Moments of channels at the readers whose inputs have no statistics.

    Without samples it is by the weights alone: which channels are equal for certain. What a user
    leaves out is looked at too, so that a replay sees the same.
    """
    widths = widths_of(prepared)
    if samples is None:
        return {
            (cut.layer.name, width.name): found
            for width in widths.usable
            for found in [alike(widths, width)]
            for cut, _ in readers_of(widths, width)
        }
    missing = [
        name
        for name in reader_names(widths)
        if inputs_known(prepared.layer(name), statistics.get(name)) is None
    ]
    return sampled_moments(prepared, widths, missing, samples, seed)
