"""Factors and nodes that sibling layers share in one model."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.methods.writer import AttributeValue
from onnxlr.model.graph import ArrayFile


class Common:
    """Factors that are stored once, and nodes that are written once."""

    def __init__(self) -> None:
        self._factors: list[tuple[NDArray[np.generic], ir.Value]] = []
        self._nodes: dict[tuple[object, ...], ir.Value] = {}

    def factor(
        self, array: NDArray[np.generic] | ArrayFile, store: Callable[[], ir.Value]
    ) -> ir.Value:
        """The value of a factor; stored where no other of the same numbers is."""
        numbers = array.array() if isinstance(array, ArrayFile) else array
        for known, value in self._factors:
            if known.dtype == numbers.dtype and np.array_equal(known, numbers):
                return value
        self._factors.append((numbers, store()))
        return self._factors[-1][1]

    def node(
        self,
        graph: ir.Graph,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, AttributeValue],
        write: Callable[[], ir.Value],
    ) -> ir.Value:
        """The output of a node; written where no equal one is."""
        key = (graph, op_type, *inputs, repr(sorted(attributes.items())))
        if key not in self._nodes:
            self._nodes[key] = write()
        return self._nodes[key]
