"""Building and saving models for sets of choices."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnxlr.calibrate.statistics import Statistics
from onnxlr.candidates.fitting import fit_layer, output_error, rest_of
from onnxlr.candidates.spectra import DECOMPOSING, STORED_FROM
from onnxlr.errors import OutputError
from onnxlr.layers.layer import Layer
from onnxlr.methods.base import GraphPass, WeightPass
from onnxlr.methods.choice import Choice, Factored, plan_digest
from onnxlr.methods.cost import weight_error
from onnxlr.model.graph import count_params
from onnxlr.model.save import save
from onnxlr.prepare.prepared import Prepared
from onnxlr.rewrite.graph import rewrite
from onnxlr.system.cache import Cache, key_of
from onnxlr.system.files import write_failure
from onnxlr.system.pool import Pool
from onnxlr.types import Rank
from onnxlr.version import __version__

_BUDGET = 256 << 20  # bytes of factors that are held in memory


def _silent(_: str) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Built:
    """A model that was written: where, its bytes, and its weight elements."""

    path: Path
    nbytes: int
    params: int


@dataclass
class Factory:
    """Builds and saves models for sets of choices; each factorization is made once.

    There is one file, that of the last build. Asked for the same choices again, it is given as it
    lies there: what is handed over is the very file that was verified. Factors beyond a budget of
    memory lie in files beside that folder; large ones are in the cache too, for the next run.

    Attributes
    ----------
    folder : Path
        Of the model that is built, and nothing else.
    calibration : str
        Digest of the samples that the statistics come from.
    origin : str
        Digest of all that factors depend on besides the method and the rank.
    """

    prepared: Prepared
    folder: Path
    file_name: str
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    calibration: str = ""
    pool: Pool = field(default_factory=lambda: Pool(1))
    cache: Cache = field(default_factory=lambda: Cache(None))
    origin: str = ""
    _held: int = 0  # bytes of factors in memory
    _sequence: tuple[Mapping[str, Choice], Mapping[str, Factored]] | None = None
    _last: tuple[Mapping[str, Choice], Built] | None = None
    _factors: dict[tuple[str, str, Rank], Factored] = field(default_factory=dict)

    def build(self, choices: Mapping[str, Choice]) -> Built:
        """Write the model for these choices.

        The file carries onnxlr's version and the plan's digest in its ``metadata_props``.
        """
        if self._last is not None and self._last[0] == choices:
            return self._last[1]
        self._last = None
        prepared = self.prepared
        corrected = self._sequence is not None and self._sequence[0] == choices
        if not corrected:
            self.fit(choices)
        factorize = self._factorize if corrected else self._own
        model = rewrite(prepared.model, prepared.shapes, choices, factorize)
        chosen = {n: (c.graph_pass.name, c.rank) for n, c in choices.items()}
        model.metadata_props["onnxlr_version"] = __version__
        model.metadata_props["onnxlr_plan"] = plan_digest(
            prepared.source.digest, chosen, self.calibration
        )
        path = self.folder / self.file_name
        params = count_params(model)
        built = Built(path, save(model, path, outside=bool(prepared.source.external)), params)
        self._last = (dict(choices), built)
        return built

    def correct(self, choices: Mapping[str, Choice], corrected: Mapping[str, Factored]) -> None:
        """Build this very set of choices with factors that were corrected in sequence."""
        self._sequence, self._last = (dict(choices), corrected), None

    def forget(self) -> None:
        """Build every set with each layer's own factors again."""
        self._sequence = self._last = None

    @property
    def corrects(self) -> bool:
        """Whether the last file was built with corrected factors."""
        return (
            self._sequence is not None
            and self._last is not None
            and (self._last[0] == self._sequence[0])
        )

    def factored(self, layer: Layer, choice: Choice) -> Factored:
        """A layer's factors, each fitted by itself."""
        return self._own(layer, choice.graph_pass, choice.rank)

    def error(self, layer: Layer, choice: Choice) -> float:
        """Relative error of a layer's weight by its factors as they are stored."""
        factors = self._factorize(layer, choice.graph_pass, choice.rank).factors
        return weight_error(layer, choice.graph_pass, choice.rank, factors)

    def output_error(self, layer: Layer, choice: Choice) -> float | None:
        """Relative error of its output on the calibration data; None where it wasn't looked at."""
        statistics = self.statistics.get(layer.name)
        if statistics is None or isinstance(choice.graph_pass, WeightPass):
            return None
        factors = self._factorize(layer, choice.graph_pass, choice.rank).factors
        rest = rest_of(choice.graph_pass, layer, choice.rank, factors)
        return output_error(layer, rest, statistics)

    def _factorize(self, layer: Layer, graph_pass: GraphPass, rank: Rank) -> Factored:
        found = self._sequence[1].get(layer.name) if self._sequence is not None else None
        return found or self._own(layer, graph_pass, rank)

    def _own(self, layer: Layer, graph_pass: GraphPass, rank: Rank) -> Factored:
        self.fit({layer.name: Choice(graph_pass, rank)})
        return self._factors[layer.name, graph_pass.name, rank]

    def fit(self, choices: Mapping[str, Choice], step: Callable[[str], None] = _silent) -> None:
        """Factorize what neither is there nor in the cache."""
        missing: dict[tuple[str, str, Rank], Choice] = {}
        for name, choice in choices.items():
            key = (name, choice.graph_pass.name, choice.rank)
            if key not in self._factors:
                if (found := self._stored(key, choice)) is not None:
                    self._keep(key, found)
                    step(name)
                else:
                    missing[key] = choice
        items = [
            (name, choice, self.statistics.get(name)) for (name, *_), choice in missing.items()
        ]
        needs = max(
            (DECOMPOSING * self.prepared.layer(name).params for name, *_ in missing), default=0
        )
        results = self.pool.map(fit_layer, items, self.prepared, needs=needs)
        for key, found in zip(missing, results, strict=True):
            self._store(key, found)
            self._keep(key, found)
            step(key[0])

    def _keep(self, key: tuple[str, str, Rank], found: Factored) -> None:
        """Hold factors in memory as far as the budget goes, then in files."""
        size = sum(factor.nbytes for factor in found.factors)
        if self._held + size > _BUDGET:
            scratch = self.folder.parent / "factors"
            try:
                scratch.mkdir(exist_ok=True)
                found = found.filed(scratch / str(len(self._factors)))
            except OSError as error:
                raise OutputError(write_failure(scratch, error)) from None
        else:
            self._held += size
        self._factors[key] = found

    def _entry(self, key: tuple[str, str, Rank]) -> str | None:
        """Where factors are in the cache: those that took long to make."""
        if not self.origin or self.prepared.layer(key[0]).params < STORED_FROM:
            return None
        return key_of(self.origin, key)

    def _store(self, key: tuple[str, str, Rank], found: Factored) -> None:
        if (entry := self._entry(key)) is not None:
            arrays = {f"factor {i}": _as_bytes(f) for i, f in enumerate(found.factors)}
            shift = {} if found.shift is None else {"shift": found.shift}
            self.cache.write_arrays("factors", entry, arrays | shift)

    def _stored(self, key: tuple[str, str, Rank], choice: Choice) -> Factored | None:
        if (entry := self._entry(key)) is None:
            return None
        arrays = self.cache.read_arrays("factors", entry)
        layer = self.prepared.layer(key[0])
        shapes = choice.graph_pass.factor_shapes(layer, choice.rank)
        try:
            factors = tuple(
                arrays[f"factor {i}"].view(layer.dtype.numpy()).reshape(shape)
                for i, shape in enumerate(shapes)
            )
        except (KeyError, ValueError, TypeError):  # not what was written
            return None
        return Factored(factors, arrays.get("shift"))


def _as_bytes(factor: NDArray[np.generic]) -> NDArray[np.uint8]:
    """An array of any type, bfloat16 too, as what every file format knows."""
    return np.ascontiguousarray(factor).view(np.uint8)
