"""Models of variants, written into files."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from onnxlr.errors import OutputError
from onnxlr.methods.choice import plan_digest
from onnxlr.model.constants import count_params
from onnxlr.model.save import save
from onnxlr.prepare.prepared import Prepared
from onnxlr.rewrite.replace import rewrite
from onnxlr.rewrite.variant import Variant
from onnxlr.system.files import write_failure
from onnxlr.version import __version__


@dataclass(frozen=True)
class Built:
    """A model that was written: where, its bytes, and its weight elements."""

    path: Path
    nbytes: int
    params: int


@dataclass
class Builder:
    """Writes the models of variants, each into a new folder.

    The same variant gives the same bytes. Models are large: one file is there at a time, and the
    next build removes it. Asked again for the variant of the latest build, the builder gives that
    very file, so that what is handed over is what was verified.

    Attributes
    ----------
    prepared : Prepared
        The original.
    folder : Path
        Where the folders are made; nothing else is in it.
    file_name : str
    calibration : str
        Digest of the samples that factors are fitted to, for the plan's digest.
    """

    prepared: Prepared
    folder: Path
    file_name: str
    calibration: str = ""
    _builds: int = 0
    _latest: tuple[Variant, Built] | None = None

    def build(self, variant: Variant) -> Built:
        """Write the model of a variant.

        The file carries onnxlr's version and the plan's digest in its ``metadata_props``.

        Raises
        ------
        OutputError
            If it can't be written.
        """
        if self._latest is not None:
            latest, built = self._latest
            if latest == variant:
                return built
            self._latest = None
            shutil.rmtree(built.path.parent, ignore_errors=True)
        narrowing = variant.narrowing
        prepared = self.prepared if narrowing is None else narrowing.prepared
        model = rewrite(prepared.model, prepared.shapes, variant.choices, variant.factors)
        chosen = {name: (c.graph_pass.name, c.rank) for name, c in variant.choices.items()}
        model.metadata_props["onnxlr_version"] = __version__
        model.metadata_props["onnxlr_plan"] = plan_digest(
            self.prepared.source.digest,
            chosen,
            self.calibration if narrowing is None else narrowing.samples,
            {} if narrowing is None else narrowing.kept,
        )
        self._builds += 1
        folder = self.folder / str(self._builds)
        try:
            folder.mkdir()
        except OSError as error:
            raise OutputError(write_failure(folder, error)) from None
        path = folder / self.file_name
        params, outside = count_params(model), bool(self.prepared.source.external)
        built = Built(path, save(model, path, outside=outside), params)
        self._latest = variant, built
        return built


def why_grown(nbytes: int, most: int, file: str = "the file") -> str | None:
    """Why a file is larger than allowed; None if it isn't.

    Examples
    --------
    >>> why_grown(2048, 1024)
    'the file would grow from 1,024 to 2,048 bytes'
    """
    return None if nbytes <= most else f"{file} would grow from {most:,} to {nbytes:,} bytes"
