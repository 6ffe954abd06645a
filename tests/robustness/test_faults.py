"""What goes wrong around a run: runtimes that crash, processes that are killed, memory, disks."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest

import onnxlr
from onnxlr.errors import CrashError, ModelError
from onnxlr.model.load import load
from onnxlr.prepare import opening, shapes
from onnxlr.prepare.prepared import prepare
from onnxlr.system import memory, pool, sandbox
from onnxlr.system.deadline import Deadline
from onnxlr.system.files import workspace
from onnxlr.system.pool import Pool
from onnxlr.system.sandbox import run_in_sandbox
from onnxlr.system.session import ONE_CPU_THREAD
from onnxlr.system.trial import Trial
from onnxlr.verify import layer_latency, layers_alone
from tests.support import commands
from tests.support.builders import linear, make_model, node
from tests.support.networks import images, network, noisy


def crash(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(*_: object) -> None:
    time.sleep(60)


def same(value: int) -> int:
    return value


def test_a_crash_costs_the_child_only() -> None:
    with pytest.raises(CrashError, match=r"trying it crashes ONNX Runtime"):
        run_in_sandbox(crash, task="trying it")
    assert run_in_sandbox(same, 3, task="going on") == 3


def test_what_does_not_end_is_stopped() -> None:
    started = time.perf_counter()
    with pytest.raises(CrashError, match=r"waiting takes more than 1 s"):
        run_in_sandbox(sleep, deadline=Deadline(1.0), task="waiting")
    assert time.perf_counter() - started < 30
    assert run_in_sandbox(same, 3, task="going on") == 3


def test_who_was_halted_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-Z, docker pause and a closed lid halt a process, and take none of its time."""
    now = [0.0]
    monkeypatch.setattr("onnxlr.system.deadline.time.perf_counter", lambda: now[0])
    looks: list[float] = []

    def look(seconds: float) -> bool:
        looks.append(seconds)
        now[0] += 1000 if len(looks) == 2 else seconds
        return len(looks) == 4

    waiting = Deadline(5.0)
    assert waiting.wait(look)
    assert waiting.left == pytest.approx(1.0)
    looks.clear()
    assert not Deadline(2.5).wait(look)
    assert looks == [1.0, 1.0, 0.5]


_OWN_TIMED, _OWN_OUTPUTS = layer_latency._timed, layers_alone._outputs


def timed_or_crashed(models: Sequence[bytes], *rest: Any) -> Any:
    """Timing that crashes on what replaces a layer of 40 inputs, and on nothing else."""
    if any(b"Gemm" in m or b"MatMul" in m for m in models) and _width(models[1]) == 40:
        crash()
    return _OWN_TIMED(models, *rest)


def outputs_or_crashed(model: bytes, *rest: Any) -> Any:
    """Running that crashes on what replaces a layer of 40 inputs."""
    proto = onnx.load_from_string(model)
    if _width(model) == 40 and len(proto.graph.node) > 1:
        crash()
    return _OWN_OUTPUTS(model, *rest)


def _width(model: bytes) -> int:
    shape = onnx.load_from_string(model).graph.input[0].type.tensor_type.shape
    return int(shape.dim[-1].dim_value)


def two_layers() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    first, second = (
        (rng.standard_normal((a, 4)) @ rng.standard_normal((4, b))).astype(np.float32)
        for a, b in ((48, 40), (40, 40))
    )
    return make_model(
        [node("MatMul", ["x", "a"], "h", "fine"), node("MatMul", ["h", "b"], "y", "bad")],
        {"x": (256, 48)},
        ["y"],
        {"a": first, "b": second},
    )


def test_a_candidate_that_crashes_the_runtime_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_latency, "_timed", timed_or_crashed)
    result = onnxlr.optimize(two_layers(), max_drop=1)
    rows = {d.name: d for d in result.plan.decisions}
    assert rows["bad"].decision == "keep"
    assert "crashed the runtime" in rows["bad"].reason
    assert all(a.after_ms is None for a in rows["bad"].alternatives)
    assert any(a.after_ms is not None for a in rows["fine"].alternatives)


def test_a_layer_that_crashes_the_runtime_alone_is_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layers_alone, "_outputs", outputs_or_crashed)
    result = onnxlr.optimize(two_layers(), verify="layers", rank=4, max_drop=1)
    rows = {d.name: d for d in result.plan.decisions}
    assert rows["fine"].decision == "svd"
    assert rows["bad"].decision == "keep"
    assert "put back: running 'bad' alone crashes ONNX Runtime" in rows["bad"].reason


def test_a_whole_model_that_crashes_the_runtime_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unpatched = Trial.run

    def run(trial: Trial, feed: Any) -> None:
        if trial._label == "the optimized model":
            raise CrashError("running the optimized model crashes ONNX Runtime")
        unpatched(trial, feed)

    monkeypatch.setattr(Trial, "run", run)
    result = onnxlr.optimize(two_layers(), rank=4, max_drop=1)
    assert not result.plan.replaced
    assert all("crashes ONNX Runtime" in d.reason for d in result.plan.decisions)


def test_a_layer_that_a_provider_cannot_compile_alone_has_no_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed = layer_latency.timed_apart

    def apart(*arguments: Any) -> Any:
        if "'bad'" in arguments[-1]:
            raise ModelError("the provider can't compile it")
        return timed(*arguments)

    monkeypatch.setattr(layer_latency, "timed_apart", apart)
    result = onnxlr.optimize(two_layers(), max_drop=1)
    rows = {d.name: d for d in result.plan.decisions}
    assert all(a.after_ms is None for a in rows["bad"].alternatives)
    assert any(a.after_ms is not None for a in rows["fine"].alternatives)


def test_a_replacement_that_a_provider_cannot_compile_costs_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unpatched = Trial.run

    def run(trial: Trial, feed: Any) -> None:
        content = trial._session_args[0]
        if trial._label == "the optimized model":
            assert isinstance(content, str)
            if "b" not in {t.name for t in onnx.load(content).graph.initializer}:
                raise ModelError("the provider can't compile it")
        unpatched(trial, feed)

    monkeypatch.setattr(Trial, "run", run)
    result = onnxlr.optimize(two_layers(), rank=4, max_drop=1)
    rows = {d.name: d for d in result.plan.decisions}
    assert (rows["fine"].decision, rows["bad"].decision) == ("svd", "keep")
    assert rows["bad"].reason == "put back: the provider can't compile it"


# Processes that decompose.


def die_once(marker: str, i: int) -> int:
    if i == 2 and not Path(marker).exists():
        Path(marker).touch()
        crash()
    return i * i


def die(i: int) -> int:
    if i == 2:
        crash()
    return i * i


def hunger(limit: int, i: int) -> int:
    """Raises MemoryError where more than ``limit`` processes work at once."""
    running = Path(os.environ["ONNXLR_CACHE"]) / "running"
    running.mkdir(parents=True, exist_ok=True)
    mark = running / str(os.getpid())
    mark.touch()
    time.sleep(0.2)
    try:
        if sum(psutil.pid_exists(int(p.name)) for p in running.iterdir()) > limit:
            raise MemoryError("too many")
    finally:
        mark.unlink(missing_ok=True)
    return i


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_START_SECONDS", 0.0)


@pytest.mark.usefixtures("apart")
def test_a_process_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    items = [(i,) for i in range(6)]
    squares = list(Pool(2).map(die_once, items, str(tmp_path / "died")))
    assert squares == [0, 1, 4, 9, 16, 25]


@pytest.mark.usefixtures("apart")
def test_one_that_dies_again_and_again_ends_the_run() -> None:
    squares: list[int] = []
    with pytest.raises(MemoryError, match=r"ended before its time"):
        squares.extend(Pool(2).map(die, [(i,) for i in range(6)]))
    assert squares == [0, 1]


@pytest.mark.usefixtures("apart")
def test_where_memory_runs_out_fewer_work() -> None:
    assert list(Pool(2).map(hunger, [(i,) for i in range(5)], 1)) == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("apart")
def test_no_more_processes_than_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "available_memory", lambda: 3 << 30)
    widths = []
    unpatched = pool._open_executor

    def counted(width: int) -> Any:
        widths.append(width)
        return unpatched(width)

    monkeypatch.setattr(pool, "_open_executor", counted)
    items = [(i,) for i in range(8)]
    assert list(Pool(4).map(same, items, needs=1 << 30)) == list(range(8))
    assert widths == [2]


def test_what_will_not_fit_is_said_beforehand(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weight = noisy(4, 0.1)
    monkeypatch.setattr(opening, "available_memory", lambda: 3 * weight.nbytes)
    out = tmp_path / "out.onnx"
    with pytest.raises(ModelError, match=r"MB of memory to be run beside.*--verify layers"):
        onnxlr.optimize(linear(weight), out)
    assert not out.exists()
    assert onnxlr.optimize(linear(weight), out, verify="layers", rank=4, max_drop=1).plan.replaced


def test_half_precision_is_widened_on_cpus() -> None:
    weight = noisy(4, 0.1)
    wide, narrow = (linear(weight.astype(t)) for t in (np.float32, np.float16))
    sizes = [opening.runtime_bytes(load(m).model, ONE_CPU_THREAD) for m in (wide, narrow)]
    assert sizes == [2 * 4 * weight.size, 3 * 2 * weight.size]


@pytest.mark.parametrize("error", [FileNotFoundError("/proc/meminfo"), psutil.NoSuchProcess(1)])
def test_where_the_system_tells_nothing_there_is_plenty(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some containers have no /proc, or that of other processes."""

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(psutil, "virtual_memory", refuse)
    monkeypatch.setattr(psutil, "Process", refuse)
    assert memory.available_memory() > 0
    assert memory.address_space_used() is None


def test_memory_is_that_of_the_process_too() -> None:
    code = (
        "import resource\n"
        "from onnxlr.system.memory import available_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.RLIM_INFINITY))\n"
        "print(available_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 8 << 30
    assert memory.available_memory() > 0


# Runs that are killed.


def test_a_killed_run_leaves_out_as_it_was_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data, out = (tmp_path / n for n in ("net.onnx", "d.npz", "out.onnx"))
    onnx.save(network(), source)
    np.savez(data, x=images(96, 0))
    out.write_bytes(b"of before")
    before = source.read_bytes()
    command = [
        *("optimize", str(source), str(out), "--data", str(data), "--quiet"),
        *("--metric", "rel-error", "--max-drop", "1", "--target", "macs=0.6"),
        *("--method", "svd", "--method", "channel-svd", "--method", "tucker2"),
    ]
    cache = Path(os.environ["ONNXLR_CACHE"])
    monkeypatch.chdir(tmp_path.parent)
    with commands.start(*command, "--jobs", "2") as process:
        deadline = time.monotonic() + 60
        while not list(cache.glob("sensitivities-*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    assert source.read_bytes() == before
    assert out.read_bytes() == b"of before"
    assert list(tmp_path.glob(".onnxlr-run-*"))
    kept = {p.name: p.read_bytes() for p in cache.glob("sensitivities-*")}
    assert commands.run(*command, timeout=300).returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.npz", "net.onnx", "out.onnx"]
    onnx.checker.check_model(out)
    assert all((cache / name).exists() for name in kept)
    whole = out.read_bytes()
    shutil.rmtree(cache)
    assert commands.run(*command, timeout=300).returncode == 0
    assert out.read_bytes() == whole


def test_a_living_run_s_folder_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from onnxlr.system.files import workspace\n"
        "with workspace(Path(sys.argv[1])) as folder:\n"
        "    print(folder, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    theirs = Path(process.stdout.readline().strip())
    with workspace(out) as folder:
        assert folder.exists()
        assert theirs.exists()
    process.kill()
    process.wait()
    process.communicate()
    assert theirs.exists()
    with workspace(out):
        assert not theirs.parent.exists()


def big(tmp_path: Path, seed: int = 0) -> Path:
    """A model with its weights in a file beside it."""
    model = network(seed=seed)
    path = tmp_path / "big.onnx"
    onnx.save(model, path, save_as_external_data=True, location="big.data", size_threshold=64)
    return path


def test_external_data_are_named_by_their_content(tmp_path: Path) -> None:
    source, out = big(tmp_path), tmp_path / "out.onnx"
    plans = [
        onnxlr.optimize(source, out, rank=rank, verify="none").plan for rank in ("0.25", "0.5")
    ]
    again = tmp_path / "again.onnx"
    onnxlr.apply(plans[1], source, again)
    assert again.read_bytes() == out.read_bytes()
    onnxlr.optimize(source, out, rank="0.25", verify="none")
    for path in (out, again):
        onnx.checker.check_model(path)
    assert len(list(tmp_path.glob("weights-*.data"))) == 2


def test_a_model_of_other_weights_is_another_model(tmp_path: Path) -> None:
    """Graph, names and sizes are the same; only the numbers in the data file differ."""
    folder = tmp_path / "other"
    folder.mkdir()
    source, other = big(tmp_path), big(folder, seed=1)
    assert source.read_bytes() == other.read_bytes()
    plan = onnxlr.optimize(source, rank=4, verify="none").plan
    with pytest.raises(onnxlr.UsageError, match="the plan is for a model with digest"):
        onnxlr.apply(plan, other)


def test_external_data_that_go_away_meanwhile(tmp_path: Path) -> None:
    source = big(tmp_path)
    loaded = load(source)
    (tmp_path / "big.data").write_bytes(b"")
    prepared = prepare(loaded, feed=None)
    with pytest.raises(ModelError, match="can't read the weight"):
        prepared.layers[0].array()


def test_where_no_process_can_be_started_it_is_done_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Processes can't start where there is no shared memory, or where no file may grow."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pool, "_START_SECONDS", 0.0)
    monkeypatch.setattr("joblib.externals.loky.get_reusable_executor", refused)
    monkeypatch.setattr(sandbox, "_start_executor", refused)
    monkeypatch.setattr(sandbox._SANDBOX, "_executor", None)
    assert list(Pool(2).map(same, [(i,) for i in range(5)])) == [0, 1, 2, 3, 4]
    assert run_in_sandbox(os.getpid, task="asking") == os.getpid()
    assert onnxlr.optimize(two_layers(), rank=4, max_drop=1).plan.replaced


def test_a_child_that_died_meanwhile_is_replaced() -> None:
    first = run_in_sandbox(os.getpid, task="asking")
    os.kill(first, signal.SIGKILL)
    time.sleep(1.0)
    assert run_in_sandbox(os.getpid, task="asking again") not in (first, os.getpid())


FORKED = """
import os
from onnxlr.system import pool
from onnxlr.system.sandbox import run_in_sandbox
pool._START_SECONDS = 0.0
wanted = [abs(i) for i in range(-4, 0)]
def work():
    results = list(pool.Pool(2).map(abs, [(i,) for i in range(-4, 0)]))
    return results == wanted and run_in_sandbox(pow, 2, 3, task="counting") == 8
assert work()
pid = os.fork()
good = work()
if pid == 0:
    os._exit(0 if good else 1)
assert good and os.waitpid(pid, 0)[1] == 0
"""


def test_both_sides_of_a_fork_go_on() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()


def test_inference_that_crashes_leaves_shapes_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONNXLR_TRIAL")
    inferred = shapes.infer_shapes(load(two_layers()).model, {"x": (256, 48)})
    assert inferred["h"] == (256, 40)
    monkeypatch.setattr(shapes, "_infer", crash)
    assert shapes.infer_shapes(load(two_layers()).model, {"x": (256, 48)}) == {"x": (256, 48)}


FORKED_PROCESS = """
import multiprocessing, os
from onnxlr.system.sandbox import run_in_sandbox
def work():
    assert run_in_sandbox(pow, 2, 3, task="counting") == 8
work()
process = multiprocessing.get_context("fork").Process(target=work)
process.start()
process.join(60)
os._exit(0 if process.exitcode == 0 else 1)
"""


def test_a_forked_process_of_the_user_s_comes_to_its_end() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED_PROCESS], capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()


POOLED = """
import multiprocessing
from onnxlr.system import pool
from onnxlr.system.sandbox import run_in_sandbox
def work(count):
    pool._START_SECONDS = 0.0
    assert list(pool.Pool(2).map(abs, [(i,) for i in range(-count, 0)])) == [4, 3, 2, 1]
    return run_in_sandbox(pow, 2, 3, task="counting")
if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map(work, [4]) == [8]
"""


def test_a_pool_of_the_user_s_whose_processes_may_have_none() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", POOLED], capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
