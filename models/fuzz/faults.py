"""Faults injected into real runs: what is left of IN and OUT, and whether the next run goes on.

``python -m models.fuzz.faults --folder FOLDER`` kills runs at random moments, fills disks, spoils
the cache, limits memory and lets two runs write the same OUT. After each fault IN has to be what it
was, OUT whole or as before, nothing else left behind after the next run, and that run's file the
same as without the fault. A full disk is a small file system in memory where it may be mounted,
else a limit on the size of files.
"""

import argparse
import contextlib
import hashlib
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil

from models.benchmarks.random_graphs import random_graph

TOOL = [sys.executable, "-m", "onnxlr"]
LONGEST = 60.0  # seconds until a run counts as hanging
_CODES = (0, 1)


class FaultError(Exception):
    """Something that must not happen has happened."""


@dataclass
class Bench:
    """A model, its samples, and the folders of a run that faults are injected into.

    Attributes
    ----------
    folder : Path
        Holds ``net.onnx`` with its external data, ``d.npz``, and ``out.onnx`` as it was before.
    cache : Path
    truth : bytes
        OUT of a run that nothing disturbed.
    """

    folder: Path
    cache: Path
    truth: bytes = b""
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, out: str = "out.onnx") -> list[str]:
        """Return the command of a run that calibrates, measures sensitivities and times nothing."""
        return [
            *(*TOOL, "optimize", str(self.folder / "net.onnx"), str(self.folder / out)),
            *("--data", str(self.folder / "d.npz"), "--metric", "rel-error", "--max-drop", "1"),
            *("--target", "macs=0.6", "--quiet"),
        ]

    def start(self, out: str = "out.onnx", **options: object) -> "subprocess.Popen[str]":
        """Begin a run."""
        return subprocess.Popen(  # type: ignore[call-overload,no-any-return]  # noqa: S603
            self.command(out),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"ONNXLR_CACHE": str(self.cache)} | self.environment,
            **options,
        )

    def digest(self) -> str:
        """Return the digest of the files that a run must not touch."""
        names = ("net.onnx", "net.onnx.data", "d.npz")
        content = b"".join((self.folder / n).read_bytes() for n in names)
        return hashlib.sha256(content).hexdigest()

    def out_bytes(self) -> bytes:
        """Return the bytes of OUT and its external data."""
        data = sorted(self.folder.glob("weights-*.data"))
        return b"".join(p.read_bytes() for p in (self.folder / "out.onnx", *data))

    def names(self) -> list[str]:
        """Return the names of the files in the folder."""
        return sorted(p.name for p in self.folder.iterdir())


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Wait for a run and return its exit code and its error, which is one line at most."""
    try:
        _, errors = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        process.kill()
        raise FaultError(f"it hung for {LONGEST:.0f} s") from None
    if "Traceback" in errors or "internal error" in errors:
        raise FaultError(f"it printed a defect: {errors.strip()[-400:]}")
    if process.returncode not in _CODES:
        raise FaultError(f"it ended with {process.returncode}: {errors.strip()[-200:]}")
    if process.returncode and len(errors.strip().splitlines()) != 1:
        raise FaultError(f"it said {errors.strip()!r}")
    return process.returncode, errors.strip()


def sound(bench: Bench, untouched: str, before: bytes) -> None:
    """Check that IN is as it was, and OUT as before or whole."""
    if bench.digest() != untouched:
        raise FaultError("IN has changed")
    if bench.out_bytes() not in (before, bench.truth):
        raise FaultError("OUT is neither what it was nor what it should become")


def goes_on(bench: Bench) -> None:
    """Check that the next run gives what it should, and leaves nothing behind."""
    code, errors = finish(bench.start())
    if code:
        raise FaultError(f"the next run failed: {errors}")
    if bench.out_bytes() != bench.truth:
        raise FaultError("the next run gave other bytes")
    left = [n for n in bench.names() if n.startswith(".onnxlr")]
    if left:
        raise FaultError(f"left behind: {left}")
    children = psutil.Process().children(recursive=True)
    if children:
        raise FaultError(f"processes left behind: {children}")


def fresh(bench: Bench) -> None:
    """Remove the cache, and put an earlier OUT in place."""
    shutil.rmtree(bench.cache, ignore_errors=True)
    bench.environment = {}
    for path in bench.folder.glob("weights-*.data"):
        path.unlink()
    (bench.folder / "out.onnx").write_bytes(b"of before")


def killed(bench: Bench, rng: random.Random, whole: float) -> str:
    """Kill a run at a random moment."""
    process = bench.start()
    time.sleep(rng.uniform(0.05, 1.05) * whole)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while psutil.Process().children(recursive=True) and time.monotonic() < deadline:
        time.sleep(0.1)  # workers see that nobody is there any more
    return "ended before" if process.returncode == 0 else "killed"


@contextlib.contextmanager
def small_disk(at: Path, size: str) -> Iterator[bool]:
    """Mount a file system of this size, and yield whether that worked."""
    at.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)]
    mounted = (
        shutil.which("mount")
        and subprocess.run(  # noqa: S603
            mount, capture_output=True, check=False
        ).returncode
        == 0
    )
    try:
        yield bool(mounted)
    finally:
        if mounted:
            subprocess.run(["umount", str(at)], check=False)  # noqa: S603, S607


def limited(kind: int, limit: int) -> Callable[[], None]:
    """Return a function that sets a limit in a process before it begins."""

    def limit_it() -> None:
        resource.setrlimit(kind, (limit, resource.RLIM_INFINITY))

    return limit_it


def full_disk(bench: Bench, rng: random.Random, _: float) -> str:
    """Leave no room for OUT, from the first byte or from somewhere on the way."""
    limit = rng.choice([0, 1_000, len(bench.truth) // 4, len(bench.truth) // 2])
    code, errors = finish(bench.start(preexec_fn=limited(resource.RLIMIT_FSIZE, limit)))
    if code == 0 and bench.out_bytes() != bench.truth:
        raise FaultError("it claims to have written what isn't there")
    return errors[:60] or "written"


def full_temporary(bench: Bench, rng: random.Random, _: float) -> str:
    """Fill the folder for temporary files."""
    place = bench.folder.parent / "tmp"
    with small_disk(place, "64k"):
        with contextlib.suppress(OSError):
            (place / "filler").write_bytes(bytes(rng.choice([65536, 60_000])))
        bench.environment = {"TMPDIR": str(place)}
        _, errors = finish(bench.start())
    bench.environment = {}
    return errors[:60] or "written"


def no_cache(bench: Bench, rng: random.Random, _: float) -> str:
    """Put a file or a device in the place of the cache folder."""
    place = rng.choice(["/dev/null/cache", "/proc/cache", str(bench.folder / "d.npz")])
    bench.environment = {"ONNXLR_CACHE": place}
    code, errors = finish(bench.start())
    bench.environment = {}
    if code:
        raise FaultError(f"it failed without a cache: {errors}")
    return "written"


def spoilt_cache(bench: Bench, rng: random.Random, _: float) -> str:
    """Cut cache entries short, or flip bits in them."""
    finish(bench.start())
    (bench.folder / "out.onnx").write_bytes(b"of before")
    for path in bench.cache.iterdir():
        content = bytearray(path.read_bytes())
        match rng.choice(["cut", "flip", "empty", "noise", "other"]):
            case "cut":
                content = content[: rng.randrange(len(content))]
            case "flip":
                for _i in range(rng.randint(1, 20)):
                    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            case "empty":
                content = bytearray()
            case "noise":
                content = bytearray(rng.randbytes(len(content)))
            case _:
                content = bytearray(b'{"rows": {"a": [1, {"b": null}]}, "times": [], "machine": 3}')
        path.write_bytes(content)
    code, errors = finish(bench.start())
    if code:
        raise FaultError(f"it failed over a spoilt cache: {errors}")
    return "written"


def two_at_once(bench: Bench, rng: random.Random, whole: float) -> str:
    """Let two runs with one cache write one OUT."""
    first = bench.start()
    time.sleep(rng.uniform(0, 0.3) * whole)
    second = bench.start()
    codes = [finish(process)[0] for process in (first, second)]
    if codes != [0, 0]:
        raise FaultError(f"they ended with {codes}")
    return "both written"


def little_memory(bench: Bench, rng: random.Random, _: float) -> str:
    """Limit the memory of a run."""
    limit = rng.choice([400, 700, 1000, 1300, 1600, 2000]) << 20
    _, errors = finish(bench.start(preexec_fn=limited(resource.RLIMIT_AS, limit)))
    return errors[:60] or f"written within {limit >> 20} MB"


FAULTS: Sequence[tuple[str, Callable[[Bench, random.Random, float], str]]] = (
    ("killed (-9) at a random moment", killed),
    ("disk full", full_disk),
    ("temporary folder full", full_temporary),
    ("cache can't be written", no_cache),
    ("cache spoilt", spoilt_cache),
    ("two runs at once, same cache and OUT", two_at_once),
    ("too little memory", little_memory),
)


def prepare_bench(folder: Path, seed: int) -> Bench:
    """Return a network with external data, samples, and what an undisturbed run makes of it."""
    place = folder / "bench"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    model = random_graph(seed)
    onnx.save(
        model,
        place / "net.onnx",
        save_as_external_data=True,
        location="net.onnx.data",
        size_threshold=256,
    )
    rng = np.random.default_rng(seed)
    samples: dict[str, Any] = {}
    for value in model.graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        samples[value.name] = rng.standard_normal((64, *shape)).astype(np.float32)
    np.savez(place / "d.npz", **samples)
    bench = Bench(place, folder / "cache")
    fresh(bench)
    code, errors = finish(bench.start())
    if code:
        raise FaultError(f"the calm run failed: {errors}")
    bench.truth = bench.out_bytes()
    return bench


def main() -> None:
    """Inject faults, and print what came of each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where it all happens")
    parser.add_argument("--times", type=int, default=10, help="of each fault (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)  # noqa: S311
    bench = prepare_bench(options.folder, options.seed)
    fresh(bench)
    started = time.monotonic()
    finish(bench.start())
    whole = time.monotonic() - started
    print("| fault | injected | as promised | how it ended |\n| --- | --- | --- | --- |")
    failed = 0
    for name, inject in FAULTS:
        ends: dict[str, int] = {}
        good = 0
        for _ in range(options.times):
            fresh(bench)
            untouched, before = bench.digest(), bench.out_bytes()
            try:
                end = inject(bench, rng, whole)
                sound(bench, untouched, before)
                goes_on(bench)
            except FaultError as fault:
                print(f"{name}: {fault}", file=sys.stderr, flush=True)
                end, failed = "NOT AS PROMISED", failed + 1
            else:
                good += 1
            end = end.replace(str(bench.folder), "…").strip()
            ends[end] = ends.get(end, 0) + 1
        words = "; ".join(f"{count}× {end}" for end, count in sorted(ends.items()))
        print(f"| {name} | {options.times} | {good} | {words} |", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
