"""A language model of any size with random weights, and the memory that onnxlr needs for it.

``python -m models.benchmarks.large --folder FOLDER`` makes a model of 3 GB (float16, the shapes of
a GPT: about 1.5 billion parameters), and runs ``inspect``, ``optimize --verify layers`` and
``apply`` on it, each in a separate process whose memory is watched. Weights fall off as trained
ones do: low rank plus noise.
"""

import argparse
import resource
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper

NAME, DATA = "large.onnx", "large.onnx.data"
_RANK = 48  # of what stands out of the noise
_NOISE = 0.05
_REFUSED = "optimize --verify full, with 6 GB"


@dataclass(frozen=True)
class Size:
    """The size of a decoder: width, blocks and vocabulary."""

    width: int = 1024
    blocks: int = 115
    words: int = 50257

    @classmethod
    def of(cls, gigabytes: float, width: int) -> "Size":
        """Return the size with as many blocks as make up a number of gigabytes in float16."""
        words = 50257 if gigabytes > 1 else 2048
        block = 12 * width * width
        blocks = (gigabytes * 1e9 / 2 - words * width) / block
        return cls(width, max(1, round(blocks)), words)


class _Writer:
    """Writes weights one after the other into one file, and remembers where they are."""

    def __init__(self, path: Path, seed: int) -> None:
        self._file = path.open("wb")
        self._rng = np.random.default_rng(seed)
        self.tensors: list[TensorProto] = []

    def weight(self, name: str, rows: int, columns: int) -> str:
        """Add a matrix of low rank and some noise, scaled so that activations keep their size."""
        rng = self._rng
        left = rng.standard_normal((rows, _RANK), dtype=np.float32)
        right = rng.standard_normal((_RANK, columns), dtype=np.float32)
        whole = left @ right / np.float32(np.sqrt(_RANK * rows))
        whole += rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(
            _NOISE / np.sqrt(rows)
        )
        return self.add(name, whole.astype(np.float16))

    def add(self, name: str, array: np.ndarray) -> str:
        """Add any array."""
        tensor = TensorProto(
            name=name,
            dims=array.shape,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (
            ("location", DATA),
            ("offset", self._file.tell()),
            ("length", array.nbytes),
        ):
            tensor.external_data.add(key=key, value=str(value))
        array.tofile(self._file)
        self.tensors.append(tensor)
        return name

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


def write_model(folder: Path, size: Size, seed: int = 0) -> Path:
    """Write the model and its external data, with one weight in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(folder / DATA, seed)
    width, nodes = size.width, []

    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def product(x: str, name: str, rows: int, columns: int) -> str:
        return node("MatMul", [x, writer.weight(f"{name}.weight", rows, columns)], name)

    def normed(x: str, name: str) -> str:
        scale = writer.add(f"{name}.weight", np.ones(width, np.float16))
        return node("LayerNormalization", [x, scale], name, axis=-1)

    table = writer.weight("embedding.weight", size.words, width)
    x = node("Gather", [table, "tokens"], "embedding", axis=0)
    for i in range(size.blocks):
        h = normed(x, f"block{i}.norm1")
        q, k, v = (
            product(h, f"block{i}.{part}", width, width) for part in ("query", "key", "value")
        )
        turned = node("Transpose", [k], f"block{i}.turned", perm=[0, 2, 1])
        scores = node("MatMul", [q, turned], f"block{i}.scores")
        shares = node("Softmax", [scores], f"block{i}.shares", axis=-1)
        mixed = node("MatMul", [shares, v], f"block{i}.mixed")
        x = node("Add", [x, product(mixed, f"block{i}.out", width, width)], f"block{i}.attended")
        h = normed(x, f"block{i}.norm2")
        wide = node("Relu", [product(h, f"block{i}.up", width, 4 * width)], f"block{i}.relu")
        x = node("Add", [x, product(wide, f"block{i}.down", 4 * width, width)], f"block{i}.output")
    writer.close()
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, [1, 16])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT16, [1, 16, width])],
        writer.tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, folder / NAME)
    return folder / NAME


@dataclass(frozen=True)
class Run:
    """The exit code of a command, its seconds, and the peak memory of its processes."""

    code: int
    seconds: float
    peak: int
    text: str


def watched(command: list[str], limit: int | None = None) -> Run:
    """Run a command; its memory is that of all its processes, what they share counted once.

    ``limit`` is of its address space.
    """

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    started = time.perf_counter()
    process = subprocess.Popen(  # noqa: S603 - the command of this project
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=limited,
    )
    peak, done = 0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not done.wait(0.2):
            peak = max(peak, _held(process.pid))

    watcher = threading.Thread(target=look)
    watcher.start()
    text, _ = process.communicate()
    done.set()
    watcher.join()
    return Run(process.returncode, time.perf_counter() - started, peak, text)


def _held(pid: int) -> int:
    """Return the resident bytes of a process and its children, with the files that are mapped."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            total += int(process.memory_full_info().pss)
    except psutil.Error:  # gone meanwhile
        pass
    return total


def main() -> None:
    """Make the model, and run the commands on it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the models go")
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rank", default="64", help="of optimize")
    parser.add_argument("--jobs", default="2")
    parser.add_argument("--only-make", action="store_true")
    options = parser.parse_args()
    source = options.folder / NAME
    if not source.exists():
        write_model(options.folder, Size.of(options.gigabytes, options.width))
    total = sum(p.stat().st_size for p in (source, options.folder / DATA))
    layers = sum(
        len(t.dims) == 2 for t in onnx.load(source, load_external_data=False).graph.initializer
    )
    print(f"{source.name}: {total / 1e9:.2f} GB, {layers} weights")
    if options.only_make:
        return
    small, plan, again = (
        str(options.folder / n) for n in ("small.onnx", "plan.json", "again.onnx")
    )
    tool = [sys.executable, "-m", "onnxlr"]
    print("| command | exit code | seconds | peak memory, GB |\n| --- | --- | --- | --- |")
    for name, command in (
        ("inspect", ["inspect", str(source), "--json", str(options.folder / "inspect.json")]),
        (
            "optimize --verify layers",
            [
                *("optimize", str(source), small, "--verify", "layers", "--rank", options.rank),
                *("--max-drop", "1", "--plan-out", plan, "--jobs", options.jobs),
            ],
        ),
        ("apply", ["apply", plan, str(source), again]),
        (_REFUSED, ["optimize", str(source), again, "--verify", "full"]),
    ):
        run = watched([*tool, *command], 6 << 30 if name == _REFUSED else None)
        print(f"| {name} | {run.code} | {run.seconds:.0f} | {run.peak / 1e9:.2f} |", flush=True)
        if run.code:
            print(run.text.strip().splitlines()[-1] if run.text.strip() else "")
    same = Path(small).read_bytes() == Path(again).read_bytes()
    print(f"apply gave {'the same' if same else 'OTHER'} bytes")


if __name__ == "__main__":
    main()
