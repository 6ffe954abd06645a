"""The network that whole runs optimize, its pictures, and weights of a planted rank."""

import numpy as np
import onnx

from onnxlr.decompose import compose
from tests.support.builders import Array, low_rank, make_model, node
from tests.support.pass_cases import CP


def network(seed: int = 0) -> onnx.ModelProto:
    """Three convs and a product whose inputs lie in few directions, and one without a bias."""
    rng = np.random.default_rng(seed)
    sizes = (3, 12, 16, 16)
    nodes, weights = [], {}
    x = "x"
    for i in (1, 2, 3):
        shape = (sizes[i], sizes[i - 1], 3, 3)
        weights[f"w{i}"] = rng.standard_normal(shape) * np.sqrt(2 / (9 * sizes[i - 1]))
        inputs = [x, f"w{i}"]
        if i != 2:
            weights[f"b{i}"] = 0.1 * rng.standard_normal(sizes[i])
            inputs.append(f"b{i}")
        nodes += [
            node("Conv", inputs, f"c{i}", f"conv{i}", pads=[1, 1, 1, 1]),
            node("Relu", [f"c{i}"], f"r{i}"),
        ]
        x = f"r{i}"
    weights["v"] = rng.standard_normal((16 * 64, 24)) / 32
    nodes += [node("Flatten", [x], "f"), node("MatMul", ["f", "v"], "y", "fc")]
    stored = {n: a.astype(np.float32) for n, a in weights.items()}
    return make_model(nodes, {"x": ("n", 3, 8, 8)}, ["y"], stored)


def products() -> onnx.ModelProto:
    """Three products of 48, 64, 48 and 24 features with a Relu between: optimized in a blink."""
    rng = np.random.default_rng(3)
    sizes = {"u": (48, 64), "v": (64, 48), "w": (48, 24)}
    return make_model(
        [
            node("MatMul", ["x", "u"], "a", "first"),
            node("Relu", ["a"], "b"),
            node("MatMul", ["b", "v"], "c", "second"),
            node("Relu", ["c"], "d"),
            node("MatMul", ["d", "w"], "y", "third"),
        ],
        {"x": ("n", 48)},
        ["y"],
        {n: (rng.standard_normal(s) / np.sqrt(s[0])).astype(np.float32) for n, s in sizes.items()},
    )


def images(count: int, seed: int) -> Array:
    """Smooth pictures: mixtures of five patterns."""
    patterns = np.random.default_rng(7).standard_normal((5, 3, 8, 8))
    mix = np.random.default_rng(seed).standard_normal((count, 5))
    return np.asarray(np.einsum("nk,kchw->nchw", mix, patterns), dtype=np.float32) + 0.5


def noisy(rank: int, noise: float, seed: int = 0) -> Array:
    """A 64 × 48 matrix of this rank, plus white noise of this standard deviation."""
    rng = np.random.default_rng(seed)
    return np.asarray(
        low_rank(rng, 64, 48, rank) + noise * rng.standard_normal((64, 48)), dtype=np.float32
    )


def planted(method: str, rng: np.random.Generator) -> Array:
    """A 12 × 10 × 3 × 3 kernel whose rank for a method is 4, or (4, 5)."""
    if method == "channel-svd":
        return low_rank(rng, 12, 10 * 9, 4).reshape(12, 10, 3, 3)
    if method == "input-channel-svd":
        return low_rank(rng, 10, 12 * 9, 4).reshape(10, 12, 3, 3).transpose(1, 0, 2, 3).copy()
    if method == "spatial-svd":
        matrix = low_rank(rng, 10 * 3, 12 * 3, 4).reshape(10, 3, 12, 3)
        return matrix.transpose(2, 0, 1, 3).copy()
    if method in CP:
        modes = (12, 10, 3, 3) if method == "cp" else (12, 10, 9)
        factors = tuple(rng.standard_normal((n, 4)) for n in modes)
        return compose(factors).reshape(12, 10, 3, 3).astype(np.float32)
    if method == "tiled-svd":
        tiles = [[low_rank(rng, 6, 5 * 9, 4) for _ in range(2)] for _ in range(2)]
        return np.block(tiles).reshape(12, 10, 3, 3)
    if method == "slice-svd":
        columns, rows = (rng.standard_normal((12, 10, 3)) for _ in range(2))
        return np.asarray(np.einsum("tsa,tsb->tsab", columns, rows), dtype=np.float32)
    core, u, v = (rng.standard_normal(s) for s in ((5, 4, 3, 3), (12, 5), (10, 4)))
    return np.asarray(np.einsum("abij,ta,sb->tsij", core, u, v), dtype=np.float32)
