"""The mathematics: pure functions from arrays to factors, ranks and errors, without ONNX.

It imports errors, types and, for one thread of linear algebra, system.
"""

from onnxlr.decompose.evbmf import Evbmf, evbmf
from onnxlr.decompose.form import Form, has_closed_form, outer_and_inner
from onnxlr.decompose.moments import Covariance, Moments
from onnxlr.decompose.outer_products import Cp, compose, exact_rank
from onnxlr.decompose.polyadic import cp
from onnxlr.decompose.ranks import (
    AUTO,
    RankRule,
    Spectrum,
    parse_rank,
    spectrum_of,
    tail_error,
)
from onnxlr.decompose.sampled import SampledMoments, shrunk_moments
from onnxlr.decompose.svd import singular_values, truncated_svd
from onnxlr.decompose.tiles import cut_tiles, join_tiles, tiled_svd
from onnxlr.decompose.tucker import tucker2
from onnxlr.decompose.weighted import (
    closed_form,
    leading_eigenvectors,
    leading_outputs,
    output_energies,
    weighted_fit,
)

__all__ = [
    "AUTO",
    "Covariance",
    "Cp",
    "Evbmf",
    "Form",
    "Moments",
    "RankRule",
    "SampledMoments",
    "Spectrum",
    "closed_form",
    "compose",
    "cp",
    "cut_tiles",
    "evbmf",
    "exact_rank",
    "has_closed_form",
    "join_tiles",
    "leading_eigenvectors",
    "leading_outputs",
    "outer_and_inner",
    "output_energies",
    "parse_rank",
    "shrunk_moments",
    "singular_values",
    "spectrum_of",
    "tail_error",
    "tiled_svd",
    "truncated_svd",
    "tucker2",
    "weighted_fit",
]
