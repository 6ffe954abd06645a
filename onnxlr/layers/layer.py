"""A layer: a constant weight, and every node that uses it."""

import math
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.errors import ModelError
from onnxlr.layers.operators import PROJECTING, RECURRENT, Kind
from onnxlr.model.attributes import int_attr
from onnxlr.model.constants import constant, values_of
from onnxlr.types import Shape

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, eq=False)
class Use:
    """One node that reads a layer's weight.

    Attributes
    ----------
    node : onnx_ir.Node
    slot : int
        Which of the node's inputs the weight is.
    swapped : bool
        Whether the node sees the last two axes of the layer's array exchanged.
    dtype : onnx_ir.DataType
        Type the node computes in, after any Cast.
    x_shape, y_shape : tuple of int or None
        Static shapes of the other operand and of the output; None where they are unclear.
    x_axes, y_axes : int or None
        Their numbers of axes, where every feed gives them the same number.
    inner : bool
        Whether the other operand is a value in the body of an If, Loop or Scan.
    """

    node: ir.Node
    slot: int
    swapped: bool
    dtype: ir.DataType
    x_shape: Shape | None
    y_shape: Shape | None
    x_axes: int | None
    y_axes: int | None
    inner: bool = False

    @property
    def x(self) -> ir.Value:
        """The operand that isn't the weight; the weight itself where there is none."""
        values = [v for i, v in enumerate(self.node.inputs) if i != self.slot and v is not None]
        value = values[0] if values else self.node.inputs[self.slot]
        assert value is not None
        return value

    @property
    def sized(self) -> bool:
        """Whether the shapes are known that its work follows from."""
        inside = self.node.op_type in PROJECTING  # where the input's shape tells all
        return self.x_shape is not None and (inside or self.y_shape is not None)

    @property
    def weight_transposed(self) -> bool:
        """Gemm's transA or transB, whichever belongs to the weight."""
        if self.node.op_type != "Gemm":
            return False
        return bool(int_attr(self.node, "transA" if self.slot == 0 else "transB", 0))

    @property
    def contracts_last(self) -> bool:
        """Whether the sum runs over the last axis of the layer's array (else the last but one)."""
        if self.node.op_type in RECURRENT:
            return True
        return (self.slot == 0) != (self.swapped != self.weight_transposed)


@dataclass(frozen=True, eq=False)
class Layer:
    """A constant weight and every node that uses it.

    Attributes
    ----------
    name : str
        The first user's name, or the weight's (``onnxlr.layers.names``).
    op : str
        Operator of the first user.
    kind : str
        The kind of operator, by which methods choose their layers.
    weight : onnx_ir.Value
        The stored constant. A weight shared by several nodes is one layer.
    shape : tuple of int
        Shape of the weight as the first user sees it.
    dtype : onnx_ir.DataType
        Type of the weight as it is stored.
    uses : tuple of Use
    refusal : str or None
        Why no chain can replace the layer, whatever the method.
    weight_refusal : str or None
        Why the stored weight can't be replaced either; it implies a refusal.
    siblings : tuple of Layer
        All layers that read the same input in the same way, this one among them, in graph order;
        empty if no other does.
    """

    name: str
    op: str
    kind: Kind
    weight: ir.Value
    shape: Shape
    dtype: ir.DataType
    uses: tuple[Use, ...]
    refusal: str | None = None
    weight_refusal: str | None = None
    _perm: Shape | None = field(default=None, repr=False)
    siblings: "tuple[Layer, ...]" = field(default=(), repr=False)

    @property
    def params(self) -> int:
        """Number of weight elements, counted once however many nodes share them."""
        return math.prod(self.shape)

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of all users in one run; None if a shape is unknown."""
        counts = [_use_macs(use, self.shape) for use in self.uses]
        return None if None in counts else sum(c for c in counts if c is not None)

    @property
    def in_sight(self) -> "Layer":
        """The same with those users alone whose shapes are known: no body's are."""
        sized = tuple(use for use in self.uses if use.sized)
        return self if len(sized) == len(self.uses) else replace(self, uses=sized)

    @property
    def group(self) -> int:
        """Groups of a convolution; 1 for everything else."""
        return int_attr(self.uses[0].node, "group", 1) if self.convolves else 1

    @property
    def convolves(self) -> bool:
        """Whether its users are convolutions, transposed or not."""
        return self.kind in ("conv", "conv-transpose")

    @property
    def stored_shape(self) -> Shape:
        """Shape of the weight as it is stored."""
        if self._perm is None:
            return self.shape
        return tuple(self.shape[self._perm.index(i)] for i in range(len(self._perm)))

    def lookup_axis(self, use: Use) -> int:
        """The axis of ``shape`` along which a Gather looks up."""
        count = len(self.shape)
        axis = int_attr(use.node, "axis", 0) % count
        return 2 * count - 3 - axis if use.swapped and axis >= count - 2 else axis

    def to_stored(self, array: NDArray[T]) -> NDArray[T]:
        """An array in the layout that the first user sees turned to the stored layout."""
        return array if self._perm is None else array.transpose(np.argsort(self._perm))

    def array(self) -> NDArray[np.generic]:
        """The weight as the first user sees it, in its stored type.

        Raises
        ------
        ModelError
            If it holds NaN or infinity.
        """
        return self.from_stored(self.stored_array())

    def from_stored(self, stored: NDArray[T]) -> NDArray[T]:
        """An array in the stored layout turned to the layout that the first user sees."""
        return stored if self._perm is None else stored.transpose(self._perm)

    def stored_array(self) -> NDArray[np.generic]:
        """The weight as it is stored.

        Raises
        ------
        ModelError
            If it holds NaN or infinity.
        """
        array = self._values()
        if bad := _count_not_finite(array):
            raise ModelError(
                f"the weight {self.weight.name!r} of {self.op} {self.name!r} holds {bad} NaN or "
                f"infinite values out of {array.size}: repair or re-export the model"
            )
        return array

    def is_finite(self) -> bool:
        """Whether the weight holds numbers throughout."""
        return not _count_not_finite(self._values())

    def _values(self) -> NDArray[np.generic]:
        tensor = constant(self.weight)
        assert tensor is not None
        return values_of(tensor)


def _count_not_finite(array: NDArray[np.generic]) -> int:
    with np.errstate(invalid="ignore"):  # a signaling NaN counts, and warns of nothing
        return int(array.size - np.count_nonzero(np.isfinite(array)))


def _use_macs(use: Use, shape: Shape) -> int | None:
    """Multiply-accumulates of one user of a weight of this shape; None if they are unclear."""
    if use.node.op_type in PROJECTING:
        known = use.slot == 1 and use.x_shape is not None
        return math.prod((use.x_shape or ())[:-1]) * math.prod(shape) if known else None
    if use.y_shape is None:
        return None
    outputs = math.prod(use.y_shape)
    match use.node.op_type:
        case "MatMul" | "Gemm":
            return outputs * (shape[-1] if use.contracts_last or len(shape) < 2 else shape[-2])
        case "Conv":
            return outputs * math.prod(shape[1:])
        case "ConvTranspose":
            inputs = use.x_shape
            return None if inputs is None else math.prod(inputs) * math.prod(shape[1:])
        case "Gather":
            return 0
    return None
