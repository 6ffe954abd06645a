"""What ``inspect`` costs beside SciPy's economy SVD of the same matrices, in time and memory.

``python -m models.benchmarks.inspect_cost`` makes a 20-million-parameter model (a transformer's and
a CNN's weights), inspects it, decomposes the very unfoldings it looked at with
``scipy.linalg.svd``, in turn and in one run, and measures the peak memory of ``inspect`` in a
separate process.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import psutil
import scipy.linalg

import onnxlr
from onnxlr.methods.registry import choose_passes
from onnxlr.model.load import load
from onnxlr.prepare.prepared import prepare

PRODUCTS = ((768, 3072), (3072, 768), (1024, 4096), (4096, 1024))
KERNELS = ((256, 256, 3, 3), (512, 256, 3, 3), (512, 512, 3, 3), (1024, 256, 1, 1))
DENSE = ((2048, 1200),)
# The kernel's high-water mark of a process that has done nothing else (Linux).
_PEAK = (
    "import re, sys, onnxlr\n"
    "def peak():\n"
    "    with open('/proc/self/status') as file:\n"
    "        return re.search(r'VmHWM:\\s+(\\d+)', file.read())[1]\n"
    "base = peak()\n"
    "onnxlr.inspect(sys.argv[1])\n"
    "print(base, peak())\n"
)


def make_model(path: Path) -> int:
    """Write the model; gives its number of parameters."""
    rng = np.random.default_rng(0)
    nodes, inputs, outputs, weights = [], [], [], []
    shapes = (*PRODUCTS, *DENSE, *KERNELS)
    for i, shape in enumerate(shapes):
        weights.append(
            onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), f"w{i}")
        )
        conv = len(shape) == 4
        x = [1, shape[1], 14, 14] if conv else [16, shape[0]]
        y = [1, shape[0], 14, 14] if conv else [16, shape[1]]
        pads: dict[str, Any] = {"pads": [shape[2] // 2] * 4} if conv else {}
        nodes.append(
            onnx.helper.make_node(
                "Conv" if conv else "MatMul", [f"x{i}", f"w{i}"], [f"y{i}"], f"layer{i}", **pads
            )
        )
        inputs.append(onnx.helper.make_tensor_value_info(f"x{i}", 1, x))
        outputs.append(onnx.helper.make_tensor_value_info(f"y{i}", 1, y))
    graph = onnx.helper.make_graph(nodes, "cost", inputs, outputs, weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, path)
    return sum(int(np.prod(s)) for s in shapes)


def scipy_seconds(path: Path) -> float:
    """Return the seconds that SciPy's economy SVD takes on all unfoldings that inspect looks at."""
    passes = choose_passes(("auto",))  # those that inspect looks at unasked
    total, keys = 0.0, set()
    for layer in prepare(load(path), feed=None).layers:
        for graph_pass in passes:
            if graph_pass.refuse(layer) is None:
                for stack in graph_pass.unfoldings(layer):
                    if (key := (layer.name, stack.shape, float(stack[0, 0].sum()))) in keys:
                        continue  # inspect computes what two methods share once, so does this
                    keys.add(key)
                    for matrix in stack:
                        started = time.perf_counter()
                        scipy.linalg.svd(matrix, full_matrices=False)
                        total += time.perf_counter() - started
    return total


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Times that both are run, in turn.")
def main(rounds: int) -> None:
    """Print the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cost.onnx"
        params = make_model(path)
        ours, theirs = [], []
        for _ in range(rounds):
            started = time.perf_counter()
            onnxlr.inspect(path)
            ours.append(time.perf_counter() - started)
            theirs.append(scipy_seconds(path))
        done = subprocess.run(  # noqa: S603 - this interpreter and this program
            [sys.executable, "-c", _PEAK, str(path)], capture_output=True, text=True, check=True
        )
        base, peak = (int(n) * 1024 for n in done.stdout.split())
        size = path.stat().st_size
    click.echo(f"{params / 1e6:.1f} M parameters, {size / 1e6:.0f} MB, {psutil.cpu_count()} cores")
    click.echo(
        f"inspect {min(ours):.2f} s, SciPy's economy SVD of the same matrices in float32 "
        f"{min(theirs):.2f} s: ratio {min(ours) / min(theirs):.2f}"
    )
    click.echo(
        f"peak memory {peak / size:.2f}× the model, of which {base / size:.2f}× before it is read"
    )


if __name__ == "__main__":
    main()
