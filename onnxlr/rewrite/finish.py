"""The step of ``--behind``, done to the original and to every model that is built."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from onnxlr.behind.step import Behind
from onnxlr.errors import ModelError, OutputError
from onnxlr.model.constants import count_params
from onnxlr.model.load import Source, load
from onnxlr.model.save import copy_source
from onnxlr.prepare.feeding import Feeding
from onnxlr.rewrite.builder import Built, why_grown
from onnxlr.system.files import write_failure
from onnxlr.system.session import Feed, Machine, Session
from onnxlr.system.trial import Trial

CALIBRATION = 64  # samples that a step may see, of those that factors are fitted to


@dataclass
class Finisher:
    """Does to models what will be done to them afterwards, each in a new folder.

    A copy of the model is given away: what is handed over stays as it was built. One file is there
    at a time beside the original's, as of those that are built.

    Attributes
    ----------
    behind : Behind
    folder : Path
        Where the folders are made; nothing else is in it.
    feeding : Feeding
    most_bytes : int
        What a built model may have before it is given away: as much as the original.
    """

    behind: Behind
    folder: Path
    feeding: Feeding
    most_bytes: int
    _count: int = 0
    _latest: tuple[Built, Built] | None = None

    def finish(self, built: Built) -> Built:
        """The file behind a model; the same again for that of the latest call.

        Raises
        ------
        ModelError
            If it can't be done, what comes out is no model, or the built one is larger than the
            original.
        OutputError
            If the copy can't be made.
        """
        if self._latest is not None:
            latest, made = self._latest
            if latest is built:
                return made
            self._latest = None
            shutil.rmtree(self.folder / str(self._count), ignore_errors=True)
        if (why := why_grown(built.nbytes, self.most_bytes)) is not None:
            raise ModelError(why)
        self._count += 1
        folder = self.folder / str(self._count)
        try:
            shutil.copytree(built.path.parent, folder)
        except OSError as error:
            raise OutputError(write_failure(folder, error)) from None
        made = self.applied(replace(built, path=folder / built.path.name), "the optimized model")
        self._latest = built, made
        return made

    def applied(self, built: Built, label: str) -> Built:
        """What a model becomes, which nobody else needs."""
        path = self.behind.apply(built.path, label, self._feeds)
        try:
            return Built(path, load(path).nbytes, built.params)
        except ModelError as error:
            raise ModelError(
                f"--behind {self.behind} gave a file for {label} that can't be used: {error}"
            ) from None

    def _feeds(self) -> Iterator[Feed]:
        """Feeds of the samples that factors are fitted to; none without samples."""
        if self.feeding.fit is not None:
            for feed, _, _ in self.feeding.fit.take(CALIBRATION).batches():
                yield feed


@dataclass(frozen=True)
class Finish:
    """The original after the step of ``--behind``, and who does the same to models.

    Attributes
    ----------
    finisher : Finisher
    original : Built
        The file behind the original.
    session : Session
        That in the runtime.
    """

    finisher: Finisher
    original: Built
    session: Session

    @property
    def name(self) -> str:
        """What is done."""
        return self.finisher.behind.name


def finish_original(
    source: Source, behind: Behind, feeding: Feeding, machine: Machine, folder: Path
) -> Finish:
    """Do to the original what will be done to the result, and open that in the runtime.

    Parameters
    ----------
    source : Source
    behind : Behind
    feeding : Feeding
        What the model is run on.
    machine : Machine
    folder : Path
        Where the files are made; it is made too.

    Raises
    ------
    ModelError
        If it can't be done, or the runtime refuses what comes out.
    OutputError
        If the original can't be copied.
    """
    finisher = Finisher(behind, folder, feeding, source.nbytes)
    place = folder / "original"
    try:
        place.mkdir(parents=True)
    except OSError as error:
        raise OutputError(write_failure(place, error)) from None
    name = "model.onnx" if source.path is None else source.path.name
    path, nbytes = copy_source(source, place, name)
    made = finisher.applied(Built(path, nbytes, count_params(source.model)), source.label)
    label = f"{source.label} after {behind}"
    with Trial(made.path, machine, label, made.nbytes) as trial:
        trial.run(feeding.first_feed)
    return Finish(finisher, made, Session(made.path, machine, label))
