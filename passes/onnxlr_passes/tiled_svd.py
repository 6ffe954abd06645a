"""tiled-svd: a weight is cut into tiles, each of low rank, and multiplied block by block."""

from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxlr.methods import (
    ALLOWZERO,
    Array,
    ChainPass,
    Form,
    Grid,
    Kernel,
    Layer,
    Rank,
    Shape,
    TiledPass,
    Use,
    Writer,
    bias_of,
    float_attr,
    int_attr,
    kernel_of,
    pointwise,
    reshaped,
    sizes_of,
    slide,
    swap_groups,
    tiled_svd,
)

_GRIDS = ((2, 2), (1, 2), (2, 1), (4, 4), (1, 4), (4, 1), (3, 3), (1, 3), (3, 1), (8, 8))


class TiledSvd(TiledPass, ChainPass):
    """W_ij ≈ P_ij·Q_ij for every tile: all Q in one batched product, all P in another.

    For a convolution the columns of a tile are whole input channels, so that both products are
    grouped convs; tiles across kernel positions have no chain. Before opset 14 no axis of the input
    but the first may be empty.
    """

    name: ClassVar[str] = "tiled-svd"
    summary: ClassVar[str] = "p×q tiles of rank r as two batched MatMuls, or two grouped convs"
    ops: ClassVar[tuple[str, ...]] = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather")
    paper: ClassVar[str] = "Lee et al. 2019, arXiv 1905.10145"

    def refuse(self, layer: Layer) -> str | None:
        """Matrices, convolutions and tables whose sides can be cut."""
        if layer.kind == "matrix":
            if len(layer.shape) != 2:
                return f"tiled-svd needs one matrix, the weight has shape {layer.shape}"
            if any(use.slot == 0 and (use.x_axes or 0) < 2 for use in layer.uses):
                return "tiled-svd can't tell whether the constant on the left multiplies a vector"
        elif layer.kind == "gather":
            if len(layer.shape) != 2 or any(layer.lookup_axis(u) or u.swapped for u in layer.uses):
                return "tiled-svd needs lookups of whole rows of a table, along axis 0"
        elif layer.kind not in ("conv", "conv-transpose"):
            return f"tiled-svd replaces {', '.join(self.ops)}, not {layer.op}"
        if not self.grids(layer):
            _, m, n = self._blocks(layer)
            return f"tiled-svd: neither {m} nor {n} can be cut into 2, 3, 4 or 8 equal parts"
        return None

    def grids(self, layer: Layer) -> tuple[Grid, ...]:
        """Grids of up to 8 × 8 that cut both sides evenly."""
        return tuple(g for g in _GRIDS if self.grid_misfit(layer, g) is None)

    def grid_misfit(self, layer: Layer, grid: Grid) -> str | None:
        """Tiles hold whole channels of a convolution, and whole columns of a table."""
        p, q = grid
        _, m, n = self._blocks(layer)
        if layer.kind == "gather" and p > 1:
            return "a lookup needs its rows in one piece (p = 1)"
        if p < 1 or q < 1 or m % p or n % q:
            channels = "channels" if layer.convolves else "weight"
            return f"{p}×{q} tiles don't divide the {m}×{n} {channels}"
        return None

    def sides(self, layer: Layer) -> tuple[int, int, int]:
        """(group, outputs, inputs · positions), or (1, rows, columns)."""
        group, m, n = self._blocks(layer)
        return group, m, n * (kernel_of(layer).positions if layer.convolves else 1)

    def matrices(self, layer: Layer) -> NDArray[np.generic]:
        """The lowered kernel of every group, or the weight itself."""
        array = layer.array()
        if layer.convolves:
            array = kernel_of(layer).load(array)
        return array.reshape(self.sides(layer))

    def factor_shapes(self, layer: Layer, rank: Rank) -> tuple[Shape, ...]:
        """All Q, then all P, as the operators want them."""
        r, p, q = rank
        _, m, n = self._blocks(layer)
        if layer.convolves:
            return tuple(kernel.stored_shape for kernel in _kernels(layer, rank))
        if layer.kind == "gather":
            return (q, r, n // q), (m, q * r)
        inner, outer = (p * r, n // q), (m // p, q * r)
        if _flip(layer.uses[0]):
            inner, outer = inner[::-1], outer[::-1]
        return (q, *inner) if q > 1 else inner, (p, *outer) if p > 1 else outer

    def factorize(self, layer: Layer, rank: Rank) -> tuple[Array, ...]:
        """Truncated SVD of every tile."""
        u, v = tiled_svd(self.matrices(layer), *rank)
        if layer.kind == "gather":
            shapes = self.factor_shapes(layer, rank)
            return v[0, 0].reshape(shapes[0]), u[0, 0].transpose(1, 0, 2).reshape(shapes[1])
        u = u.transpose(0, 1, 3, 2, 4)
        if layer.convolves:  # (g, i, j, r, n) → (g, j, i, r, n)
            v = v.transpose(0, 2, 1, 3, 4)
        return self.pack(layer, rank, [list(pair) for pair in zip(v, u, strict=True)])

    def compose(self, layer: Layer, rank: Rank, factors: tuple[Array, ...]) -> Array:
        """The product of every tile, and the tiles side by side."""
        form = self.form(layer)
        if form is None:
            r, _, q = rank
            rows = factors[1].reshape(-1, q, 1, r)
            return np.asarray((rows @ factors[0]).reshape(layer.shape))
        whole = np.stack([form.compose(group) for group in self.unpack(layer, rank, factors)])
        if layer.convolves:
            return kernel_of(layer).store(whole)
        return np.asarray(whole[0] if layer.uses[0].contracts_last else whole[0].T)

    def form(self, layer: Layer) -> Form | None:
        """Every tile is a product by itself; a table has no inputs to look at."""
        if layer.convolves:
            return Form("jirsp,itjr->itjsp", outputs=2)
        if layer.kind != "matrix":
            return None
        last = layer.uses[0].contracts_last
        return Form("ijrn,imjr->imjn" if last else "ijrn,imjr->jnim", outputs=2)

    def unpack(self, layer: Layer, rank: Rank, factors: tuple[Array, ...]) -> list[list[Array]]:
        """All Q and all P, with an axis for each of their letters."""
        (r, p, q), (inner, outer) = rank, factors
        group, m, n = self._blocks(layer)
        if layer.convolves:
            first, last = _kernels(layer, rank)
            v = first.load(inner).reshape(group, q, p, r, n // q, -1)
            u = last.load(outer).reshape(group, p, m // p, q, r)
            return [list(pair) for pair in zip(v, u, strict=True)]
        if _flip(layer.uses[0]):
            inner, outer = inner.swapaxes(-1, -2), outer.swapaxes(-1, -2)
        v = inner.reshape(q, p, r, n // q).transpose(1, 0, 2, 3)
        return [[v, outer.reshape(p, m // p, q, r)]]

    def pack(self, layer: Layer, rank: Rank, groups: list[list[Array]]) -> tuple[Array, ...]:
        """As the operators store them."""
        v, u = (np.stack(factors) for factors in zip(*groups, strict=True))
        if layer.convolves:
            first, last = _kernels(layer, rank)
            return first.store(v), last.store(u)
        inner = v[0].transpose(1, 0, 2, 3).reshape(rank[2], -1, v.shape[4])
        outer = u[0].reshape(rank[1], u.shape[2], -1)
        if _flip(layer.uses[0]):
            inner, outer = inner.swapaxes(1, 2), outer.swapaxes(1, 2)
        shapes = self.factor_shapes(layer, rank)
        return inner.reshape(shapes[0]), outer.reshape(shapes[1])

    def write(
        self, layer: Layer, use: Use, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
    ) -> ir.Value:
        """The inner product of every block, its results put in order of the outer, that product."""
        if layer.convolves:
            return _write_convs(layer, use, rank, factors, writer)
        if layer.kind == "gather":
            return _write_lookup(layer, use, rank, factors, writer)
        if _flip(use) != _flip(layer.uses[0]):
            factors = tuple(_swap_last(writer, f) for f in factors)
        inner_factor, outer_factor = factors if use.contracts_last else factors[::-1]
        blocks = _Blocks(writer, inner_factor, outer_factor, (use.x_axes or 0) - 2)
        m, n = layer.shape if use.contracts_last else layer.shape[::-1]
        r, p, q = rank
        outer, inner = (p, q) if use.contracts_last else (q, p)
        product = blocks.left if use.slot == 0 else blocks.right
        x = use.x
        if use.node.op_type == "Gemm" and int_attr(use.node, _other_flag(use), 0):
            x = writer.op("Transpose", [x], {"perm": (1, 0)})
        y = product(x, r, outer, inner, m, n)
        return _scale_and_shift(use, y, writer) if use.node.op_type == "Gemm" else y

    def _blocks(self, layer: Layer) -> tuple[int, int, int]:
        """Groups, and what is cut into p and into q: channels, or rows and columns."""
        if layer.convolves:
            kernel = kernel_of(layer)
            return kernel.group, kernel.outputs, kernel.inputs
        return 1, layer.shape[0], layer.shape[1]


class _Blocks:
    """The two batched products of one use, with the data on either side.

    ``inner`` meets the data: (q, p·r, n/q) if it stands on the left, its last axes exchanged if it
    stands on the right; ``outer`` likewise (p, m/p, q·r). The axis of blocks is missing where there
    is only one.
    """

    def __init__(self, writer: Writer, inner: ir.Value, outer: ir.Value, lead: int) -> None:
        self._writer, self._inner, self._outer = writer, inner, outer
        self._lead = lead  # axes before the last two of the data, where those stand right

    def left(self, x: ir.Value, r: int, p: int, q: int, m: int, n: int) -> ir.Value:
        """W·x for x of shape (…, n, c)."""
        writer, op = self._writer, self._writer.op
        lead, columns = sizes_of(writer, x, None, -2), sizes_of(writer, x, -1, None)
        k = self._lead
        h = reshaped(writer, x, lead, (q, n // q), columns)
        h = op("MatMul", [self._inner, h], {})
        h = reshaped(writer, h, lead, (q, p, r), columns)
        h = op("Transpose", [h], {"perm": (*range(k), k + 1, k, k + 2, k + 3)})
        h = reshaped(writer, h, lead, (p, q * r), columns)
        return reshaped(writer, op("MatMul", [self._outer, h], {}), lead, (m,), columns)

    def right(self, x: ir.Value, r: int, p: int, q: int, m: int, n: int) -> ir.Value:
        """x·Wᵀ for x of shape (…, n).

        Blocks are moved past rows behind an axis of one: without it ONNX Runtime makes a
        FusedMatMul of it, which divides by zero where there are no rows.
        """
        writer, op, swap = self._writer, self._writer.op, {"perm": (0, 2, 1, 3)}
        h = x
        if q > 1:
            h = op("Transpose", [reshaped(writer, h, (1, -1, q, n // q))], swap)
        else:
            h = reshaped(writer, h, (-1, n))
        h = op("MatMul", [h, self._inner], {})  # (1, q, rows, p·r)
        if q > 1 and p > 1:
            h = op("Transpose", [reshaped(writer, h, (q, -1, p, r))], {"perm": (2, 1, 0, 3)})
            h = reshaped(writer, h, (1, p, -1, q * r))
        elif q > 1:
            h = reshaped(writer, op("Transpose", [h], swap), (-1, q * r))
        elif p > 1:
            h = op("Transpose", [reshaped(writer, h, (1, -1, p, r))], swap)
        h = op("MatMul", [h, self._outer], {})  # (1, p, rows, m/p)
        if p > 1:
            h = _rows_first(writer, op("Transpose", [h], swap), m)
        return reshaped(writer, h, sizes_of(writer, x, None, -1), (m,))


def _write_convs(
    layer: Layer, use: Use, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
) -> ir.Value:
    first, last = _kernels(layer, rank)
    r, p, q = rank
    hidden = slide(writer, use, use.x, factors[0], first)
    if p > 1 and q > 1:
        hidden = swap_groups(writer, hidden, (layer.group, q, p, r))
    return pointwise(writer, hidden, factors[1], last, bias_of(use))


def _write_lookup(
    layer: Layer, use: Use, rank: Rank, factors: tuple[ir.Value, ...], writer: Writer
) -> ir.Value:
    r, _, q = rank
    swap = {"perm": (0, 2, 1, 3)}
    rows = writer.op("Gather", [factors[1], use.x], {"axis": 0})
    rows = writer.op("Transpose", [reshaped(writer, rows, (1, -1, q, r))], swap)
    rows = writer.op("MatMul", [rows, factors[0]], {})  # (1, q, rows, columns/q)
    rows = _rows_first(writer, writer.op("Transpose", [rows], swap), layer.shape[1])
    return reshaped(writer, rows, sizes_of(writer, use.x, None, None), (layer.shape[1],))


def _rows_first(writer: Writer, x: ir.Value, columns: int) -> ir.Value:
    """Before opset 14 a size of zero is that of the same axis of what is reshaped."""
    return x if writer.opset >= ALLOWZERO else reshaped(writer, x, (-1, columns))


def _scale_and_shift(use: Use, y: ir.Value, writer: Writer) -> ir.Value:
    """Gemm's α·Y + β·C."""

    def scaled(value: ir.Value, name: str) -> ir.Value:
        factor = float_attr(use.node, name, 1.0)
        if factor == 1.0:
            return value
        return writer.op("Mul", [value, writer.constant(np.array(factor), use.dtype)], {})

    y = scaled(y, "alpha")
    bias = use.node.inputs[2] if len(use.node.inputs) > 2 else None
    if float_attr(use.node, "beta", 1.0) == 0.0:
        bias = None  # whatever it holds, infinities too
    return y if bias is None else writer.op("Add", [y, scaled(bias, "beta")], {})


def _flip(use: Use) -> bool:
    """Whether a use needs both factors with their last axes exchanged."""
    return use.swapped != use.weight_transposed


def _other_flag(use: Use) -> str:
    return "transB" if use.slot == 0 else "transA"


def _swap_last(writer: Writer, value: ir.Value) -> ir.Value:
    assert value.shape is not None
    axes = tuple(range(len(value.shape)))
    return writer.op("Transpose", [value], {"perm": (*axes[:-2], axes[-1], axes[-2])})


def _kernels(layer: Layer, rank: Rank) -> tuple[Kernel, Kernel]:
    kernel, (r, p, q) = kernel_of(layer), rank
    ones = (1,) * len(kernel.spatial)
    return (
        Kernel(kernel.group * q, p * r, kernel.inputs // q, kernel.spatial, kernel.transposed),
        Kernel(kernel.group * p, kernel.outputs // p, q * r, ones),
    )
