"""Spectra of all layers, side by side; those of large weights are kept for the next run."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxlr.candidates.fits import Fit, Fits, fit_methods
from onnxlr.decompose import Spectrum
from onnxlr.decompose.ranks import spectrum_from
from onnxlr.layers.layer import Layer
from onnxlr.methods.registry import find_pass
from onnxlr.prepare.prepared import Prepared
from onnxlr.system.cache import Cache, key_of
from onnxlr.system.pool import Pool

DECOMPOSING = 56  # bytes that decomposing takes for each element of a weight, measured
STORED_FROM = 1 << 18  # elements of a weight, from which on what is made of it is worth a file


def decompose(
    prepared: Prepared, fits: Fits, pool: Pool, cache: Cache, step: Callable[[str], None]
) -> Fits:
    """The same fits with the spectra of all layers; ``step`` is called for each of them."""
    spectra: dict[str, Sequence[tuple[Spectrum, ...]]] = {}
    missing = []
    for name, rows in fits.by_layer.items():
        layer = prepared.layer(name)
        cached = _cached(prepared, layer, rows, cache) if rows else []
        if cached is None:
            missing.append(layer)
            continue
        spectra[name] = cached
        step(name)
    items = [(layer.name, _methods(fits.by_layer[layer.name])) for layer in missing]
    needs = DECOMPOSING * max((layer.params for layer in missing), default=0)
    results = pool.map(layer_spectra, items, prepared, needs=needs)
    for layer, computed in zip(missing, results, strict=True):
        spectra[layer.name] = computed
        _write_cache(prepared, layer, fits.by_layer[layer.name], computed, cache)
        step(layer.name)
    by_layer = {
        name: tuple(replace(fit, spectra=s) for fit, s in zip(rows, spectra[name], strict=True))
        for name, rows in fits.by_layer.items()
    }
    return Fits(by_layer, fits.refusals)


def layer_spectra(
    prepared: Prepared, name: str, methods: Sequence[str]
) -> list[tuple[Spectrum, ...]]:
    """For each of some methods that fit a layer, the spectra that it looks at."""
    fits, _ = fit_methods(prepared.layer(name), [find_pass(method) for method in methods])
    return [tuple(fit.spectra) for fit in fits]


def _methods(fits: Sequence[Fit]) -> tuple[str, ...]:
    return tuple(fit.graph_pass.name for fit in fits)


def _entry(prepared: Prepared, layer: Layer, fits: Sequence[Fit]) -> str | None:
    if layer.params < STORED_FROM:
        return None
    return key_of(prepared.source.digest, layer.name, _methods(fits))


def _write_cache(
    prepared: Prepared,
    layer: Layer,
    fits: Sequence[Fit],
    computed: Sequence[Sequence[Spectrum]],
    cache: Cache,
) -> None:
    if (entry := _entry(prepared, layer, fits)) is None:
        return
    arrays: dict[str, NDArray[Any]] = {}
    for i, spectra in enumerate(computed):
        arrays[f"count {i}"] = np.array(len(spectra))
        for j, spectrum in enumerate(spectra):
            arrays[f"values {i} {j}"] = spectrum.values
            arrays[f"shape {i} {j}"] = np.array([spectrum.m, spectrum.n])
    cache.write_arrays("spectra", entry, arrays)


def _cached(
    prepared: Prepared, layer: Layer, fits: Sequence[Fit], cache: Cache
) -> list[tuple[Spectrum, ...]] | None:
    """What the cache has; None where it has nothing of this layer, or not all of it."""
    if (entry := _entry(prepared, layer, fits)) is None:
        return None
    arrays = cache.read_arrays("spectra", entry)
    try:
        return [
            tuple(
                spectrum_from(arrays[f"values {i} {j}"], *arrays[f"shape {i} {j}"].tolist())
                for j in range(int(arrays[f"count {i}"]))
            )
            for i in range(len(fits))
        ]
    except (KeyError, TypeError, ValueError):
        return None
