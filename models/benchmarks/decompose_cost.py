"""Time, peak memory and error of each decomposition beside tensorly's and SciPy's, in one run.

``python -m models.benchmarks.decompose_cost`` runs every library on the same kernels, each in a
separate process (so that peak memory can be told apart), in turn, several rounds. Kernels are noise
whose channels decay as those of trained networks do. Errors are relative; a CP that degenerates is
marked.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from numpy.typing import NDArray

from onnxlr.decompose import compose, cp, join_tiles, tiled_svd, truncated_svd, tucker2

Array = NDArray[np.float64]

CASES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "SVD 1024×1024, r 64": ("svd", (1024, 1024), (64,)),
    "SVD 512×4608, r 64": ("svd", (512, 4608), (64,)),
    "SVD 3072×768, r 128": ("svd", (3072, 768), (128,)),
    "SVD 30522×384, r 64": ("svd", (30522, 384), (64,)),
    "tiles 32×32 of 1024×1024, r 4": ("tiles", (1024, 1024), (4, 32)),
    "Tucker-2 128×128×9, r 32,32": ("tucker2", (128, 128, 9), (32, 32)),
    "Tucker-2 256×256×9, r 64,64": ("tucker2", (256, 256, 9), (64, 64)),
    "Tucker-2 512×512×9, r 128,128": ("tucker2", (512, 512, 9), (128, 128)),
    "CP 32×32×9, R 16": ("cp", (32, 32, 9), (16,)),
    "CP 64×64×9, R 32": ("cp", (64, 64, 9), (32,)),
    "CP 128×64×9, R 64": ("cp", (128, 64, 9), (64,)),
}
LIBRARIES = {
    "svd": ("onnxlr", "scipy svd", "scipy svds", "tensorly", "tensorly randomized"),
    "tiles": ("onnxlr", "scipy svd"),
    "tucker2": ("onnxlr", "tensorly"),
    "cp": ("onnxlr", "tensorly"),
}


def make_kernel(shape: tuple[int, ...]) -> Array:
    """Return seeded noise whose two leading axes decay like 1/√i, in a random basis."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal(shape)
    for axis in (0, 1):
        scales = (1 + np.arange(shape[axis])) ** -0.5
        kernel = np.moveaxis(np.moveaxis(kernel, axis, -1) * scales, -1, axis)
        if shape[axis] <= 1024:
            basis = np.linalg.qr(rng.standard_normal((shape[axis], shape[axis])))[0]
            kernel = np.moveaxis(np.moveaxis(kernel, axis, -1) @ basis, -1, axis)
    return np.ascontiguousarray(kernel)


def decompose(kind: str, library: str, kernel: Array, rank: tuple[int, ...]) -> Callable[[], Any]:
    """Return a function that decomposes the kernel and returns what ``rebuild`` takes."""
    if library.startswith("tensorly"):
        import tensorly.decomposition
        from tensorly.tenalg import svd_interface

        if kind == "svd":
            method = "randomized_svd" if "randomized" in library else "truncated_svd"
            return lambda: svd_interface(kernel, method=method, n_eigenvecs=rank[0])
        if kind == "tucker2":
            modes = [rank[1], rank[0]]
            return lambda: tensorly.decomposition.partial_tucker(kernel, rank=modes, modes=[0, 1])
        return lambda: tensorly.decomposition.parafac(kernel, rank[0], random_state=0)
    if library == "scipy svds":
        return lambda: scipy.sparse.linalg.svds(kernel, k=rank[0], random_state=0)
    if library == "scipy svd" and kind == "svd":
        return lambda: scipy.linalg.svd(kernel, full_matrices=False)
    if kind == "tiles":
        side = rank[1]
        grid = (kernel.shape[0] // side, kernel.shape[1] // side)
        if library == "onnxlr":
            return lambda: tiled_svd(kernel[None], rank[0], *grid)
        tiles = kernel.reshape(grid[0], side, grid[1], side).transpose(0, 2, 1, 3)
        return lambda: [
            [scipy.linalg.svd(tile, full_matrices=False) for tile in row] for row in tiles
        ]
    if kind == "svd":
        return lambda: truncated_svd(kernel[None], rank[0])
    if kind == "tucker2":
        return lambda: tucker2(kernel, (rank[0], rank[1]))
    return lambda: cp(kernel, rank[0])


def rebuild(kind: str, library: str, result: Any, rank: tuple[int, ...]) -> tuple[Array, float]:
    """Return the array that a decomposition makes, and the growth of a CP's components (else 0)."""
    r = rank[0]
    if kind == "cp":
        if library == "onnxlr":
            return compose(result.factors), result.growth
        weights, factors = result
        whole = compose((factors[0] * weights, *factors[1:]))
        norms = np.prod([np.sum(f**2, axis=0) for f in factors], axis=0)
        return whole, float(np.sum(weights**2 * norms) / np.sum(whole**2))
    if kind == "tucker2":
        if library == "onnxlr":
            v, core, u = result
        else:
            (core, (u, v)), _ = result
        return np.einsum("abp,ta,sb->tsp", core, u, v, optimize=True), 0.0
    if library == "onnxlr":
        u, v = result
        return (join_tiles(u @ v) if kind == "tiles" else u @ v)[0], 0.0
    if kind == "tiles":
        rows = [[(u[:, :r] * s[:r]) @ v[:r] for u, s, v in row] for row in result]
        return np.block(rows), 0.0
    u, s, v = result
    order = np.argsort(-s)[:r]  # svds gives them in rising order
    return (u[:, order] * s[order]) @ v[order], 0.0


def memory_mb(what: str) -> float:
    """Return this process's memory in MB: now (VmRSS), or the highest (VmHWM). Linux only."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(rf"{what}:\s+(\d+)", status)[0]) / 1024


def measure(case: str, library: str) -> dict[str, float]:
    """Decompose once in this process: return seconds, memory above the kernel's, and error."""
    kind, shape, rank = CASES[case]
    kernel = make_kernel(shape)
    run = decompose(kind, library, kernel, rank)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the highest
    before = memory_mb("VmRSS")
    started = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - started
    memory = memory_mb("VmHWM") - before
    whole, growth = rebuild(kind, library, result, rank)
    error = float(np.linalg.norm(kernel - whole) / np.linalg.norm(kernel))
    return {"seconds": seconds, "mb": memory, "error": error, "growth": growth}


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Times that each is run, in turn.")
@click.option("--only", default="", help="Cases that contain this.")
@click.option("--one", nargs=2, default=None, hidden=True, help="A case and a library.")
def main(rounds: int, only: str, one: tuple[str, str] | None) -> None:
    """Print the table."""
    if one:
        click.echo(json.dumps(measure(*one)))
        return
    click.echo("| decomposition | library | s | times onnxlr's | peak MB | rel. error |")
    click.echo("| --- | --- | --- | --- | --- | --- |")
    for case, (kind, _, _) in CASES.items():
        if only not in case:
            continue
        results: dict[str, list[dict[str, float]]] = {name: [] for name in LIBRARIES[kind]}
        for _ in range(rounds):
            for name in results:
                command = [
                    sys.executable,
                    "-m",
                    "models.benchmarks.decompose_cost",
                    "--one",
                    case,
                    name,
                ]
                done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
                results[name].append(json.loads(done.stdout))
        ours = min(r["seconds"] for r in results["onnxlr"])
        for name, rows in results.items():
            seconds = min(r["seconds"] for r in rows)
            mark = " (degenerate)" if rows[0]["growth"] > 100 else ""
            click.echo(
                f"| {case} | {name} | {seconds:.3f} | {seconds / ours:.2f}× | "
                f"{max(r['mb'] for r in rows):.0f} | {rows[0]['error']:.4f}{mark} |"
            )


if __name__ == "__main__":
    main()
