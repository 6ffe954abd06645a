"""The mathematics: pure functions on arrays, no ONNX here."""

from onnxlr.decompose.evbmf import Evbmf, evbmf
from onnxlr.decompose.polyadic import Cp, compose, cp, exact_rank
from onnxlr.decompose.ranks import AUTO, RankRule, Spectrum, parse_rank, tail_error
from onnxlr.decompose.svd import spectrum, truncated_svd
from onnxlr.decompose.tucker import tucker2

__all__ = [
    "AUTO",
    "Cp",
    "Evbmf",
    "RankRule",
    "Spectrum",
    "compose",
    "cp",
    "evbmf",
    "exact_rank",
    "parse_rank",
    "spectrum",
    "tail_error",
    "truncated_svd",
    "tucker2",
]
