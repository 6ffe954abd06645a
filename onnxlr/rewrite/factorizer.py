"""Factors of layers, each fitted by itself, made once and kept for whoever asks again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnxlr.calibrate.statistics import Statistics
from onnxlr.candidates.fitting import fit_layer
from onnxlr.candidates.spectra import DECOMPOSING, STORED_FROM
from onnxlr.errors import OutputError
from onnxlr.methods.choice import Choice, Factored
from onnxlr.prepare.prepared import Prepared
from onnxlr.rewrite.variant import Variant
from onnxlr.system.cache import Cache, key_of
from onnxlr.system.files import write_failure
from onnxlr.system.pool import Pool
from onnxlr.types import Rank
from onnxlr.widths.narrowing import Narrowing

_MEMORY = 256 << 20  # bytes of factors that are held in memory; more lie in files

_Key = tuple[str, str, Rank]  # the names of a layer and of a method, and the rank


def _no_step(_: str) -> None:
    """Show no progress."""


@dataclass
class Factorizer:
    """Factorizes layers, each by itself.

    Factors beyond a budget of memory lie in files; large ones are in the cache too, for the next
    run. The same choice gets the same factors whenever it is asked for.

    Attributes
    ----------
    prepared : Prepared
    scratch : Path
        Folder of a run, in which factors may lie.
    statistics : mapping of str to Statistics
        What factors are fitted to, by layer name; without them they are fitted to the weight.
    origin : str
        Digest of all that factors depend on besides the method and the rank; without one nothing is
        cached.
    narrowing : Narrowing or None
        The model with fewer channels whose layers these are; None for the original's.
    """

    prepared: Prepared
    scratch: Path
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    pool: Pool = field(default_factory=lambda: Pool(1))
    cache: Cache = field(default_factory=lambda: Cache(None))
    origin: str = ""
    narrowing: Narrowing | None = None
    _in_memory: int = 0  # bytes
    _factors: dict[_Key, Factored] = field(default_factory=dict)

    def variant(
        self, choices: Mapping[str, Choice], step: Callable[[str], None] = _no_step
    ) -> Variant:
        """The variant of these choices, every layer fitted by itself.

        Parameters
        ----------
        choices : mapping of str to Choice
            By layer name.
        step : callable
            Called with the name of each layer that was not factorized before.

        Raises
        ------
        ModelError
            If factors are beyond what their dtype holds.
        OutputError
            If they can't be kept in files.
        """
        keys = {name: (name, c.graph_pass.name, c.rank) for name, c in choices.items()}
        missing: dict[_Key, Choice] = {}
        for name, key in keys.items():
            if key in self._factors:
                continue
            if (cached := self._cached(key, choices[name])) is not None:
                self._keep(key, cached)
                step(name)
            else:
                missing[key] = choices[name]
        items = [
            (name, choice, self.statistics.get(name)) for (name, *_), choice in missing.items()
        ]
        needs = max(
            (DECOMPOSING * self.prepared.layer(name).params for name, *_ in missing), default=0
        )
        results = self.pool.map(fit_layer, items, self.prepared, needs=needs)
        for key, factored in zip(missing, results, strict=True):
            self._write_cache(key, factored)
            self._keep(key, factored)
            step(key[0])
        factors = {name: self._factors[key] for name, key in keys.items()}
        return Variant(dict(choices), factors, 0, self.narrowing)

    def _keep(self, key: _Key, factored: Factored) -> None:
        """Hold factors in memory as far as the budget goes, then in files."""
        size = sum(factor.nbytes for factor in factored.factors)
        if self._in_memory + size > _MEMORY:
            folder = self.scratch / "factors"
            try:
                folder.mkdir(exist_ok=True)
                factored = factored.filed(folder / str(len(self._factors)))
            except OSError as error:
                raise OutputError(write_failure(folder, error)) from None
        else:
            self._in_memory += size
        self._factors[key] = factored

    def _entry(self, key: _Key) -> str | None:
        """Where factors are in the cache; None for those that are quickly made."""
        if not self.origin or self.prepared.layer(key[0]).params < STORED_FROM:
            return None
        return key_of(self.origin, key)

    def _write_cache(self, key: _Key, factored: Factored) -> None:
        if (entry := self._entry(key)) is not None:
            arrays = {f"factor {i}": _as_bytes(f) for i, f in enumerate(factored.factors)}
            shift = {} if factored.shift is None else {"shift": factored.shift}
            self.cache.write_arrays("factors", entry, arrays | shift)

    def _cached(self, key: _Key, choice: Choice) -> Factored | None:
        """What the cache has; None where it has nothing, or what nobody here wrote."""
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
        except (KeyError, ValueError, TypeError):
            return None
        return Factored(factors, arrays.get("shift"))


def _as_bytes(factor: NDArray[np.generic]) -> NDArray[np.uint8]:
    """An array of any type, bfloat16 too, as what every file format knows."""
    return np.ascontiguousarray(factor).view(np.uint8)
