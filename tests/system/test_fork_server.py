"""The fork server: workers that are warm, do as those of a new interpreter, and end with it."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from onnxlr.errors import ModelError
from onnxlr.system import pool
from onnxlr.system.children import import_loky
from onnxlr.system.fork_server import FORK_SERVER
from onnxlr.system.pool import Pool
from onnxlr.system.process import CAN_FORK
from onnxlr.system.sandbox import SandboxCrashError, run_in_sandbox

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="the system can't fork")


def in_a_new_process(check: Callable[..., Any], *args: Any) -> Any:
    """What a check returns in an interpreter of its own, which a fork server needs."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, check, *args))
    process.start()
    there.close()
    assert here.poll(120)
    answer = here.recv()
    process.join(60)
    assert process.exitcode == 0
    return answer


def _answer(answers: Any, check: Callable[..., Any], *args: Any) -> None:
    import_loky()
    FORK_SERVER.start()
    answer = check(*args)
    answers.send(answer)


def surroundings() -> dict[str, Any]:
    sys.stdout.write("nobody reads this")
    print("nor this", file=sys.stderr, flush=True)
    sys.stdin.read()
    files = Path("/proc/self/fd")
    return {
        "parent": os.getppid(),
        "process": os.getpid(),
        "folder": str(Path.cwd()),
        "variable": os.environ.get("OF_THE_PARENT"),
        "safe": os.environ.get("PYTHONSAFEPATH"),
        "warm": "onnxlr.system.pool" in sys.modules,
        "files": [str(file.readlink()) for file in files.iterdir() if file.is_symlink()],
        "streams": [str((files / str(number)).readlink()) for number in range(3)],
        "signals": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
    }


def crash(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(*_: object) -> None:
    raise ModelError("refused")


def here(folder: Path) -> list[dict[str, Any]]:
    os.chdir(folder)
    os.environ["OF_THE_PARENT"] = "also after the server began"
    with (folder / "open").open("w"):
        told = run_in_sandbox(surroundings, task="asking")
    again = run_in_sandbox(surroundings, task="asking")
    return [told, again, {"server": FORK_SERVER.pid}]


def test_a_worker_is_warm_and_has_what_the_parent_has(tmp_path: Path) -> None:
    told, again, server = in_a_new_process(here, tmp_path)
    assert told["parent"] == server["server"]
    assert told["process"] == again["process"]
    assert told["folder"] == str(tmp_path)
    assert told["variable"] == "also after the server began"
    assert told["safe"] == "1"
    assert told["warm"]
    assert told["signals"]
    assert told["streams"] == [os.devnull] * 3
    assert not [name for name in told["files"] if name.startswith(str(tmp_path))]


def crashes() -> list[Any]:
    seen: list[Any] = [run_in_sandbox(os.getppid, task="asking") == FORK_SERVER.pid]
    for function, error in ((crash, SandboxCrashError), (refuse, ModelError)):
        with pytest.raises(error, match=r"the asking crashes|refused"):
            run_in_sandbox(function, task="the asking")
    seen.append(run_in_sandbox(os.getppid, task="asking") == FORK_SERVER.pid)
    server = psutil.Process(FORK_SERVER.pid)
    seen.append(len(server.children()))  # none is left as a zombie
    return seen


def test_a_worker_that_crashes_is_replaced() -> None:
    assert in_a_new_process(crashes) == [True, True, 1]


def orphaned() -> list[Any]:
    server = FORK_SERVER.pid
    assert server is not None
    worker = run_in_sandbox(os.getpid, task="asking")
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
    psutil.wait_procs([psutil.Process(worker)] if psutil.pid_exists(worker) else [], 30)
    with contextlib.suppress(SandboxCrashError):  # it may not have been noticed yet
        run_in_sandbox(os.getpid, task="asking")
    seen = [run_in_sandbox(os.getppid, task="asking") == os.getpid()]
    seen.append(list(pool.Pool(2).map(abs, [(-i,) for i in range(9)])) == list(range(9)))
    return [*seen, FORK_SERVER.pid]


def test_without_the_server_workers_are_new_interpreters() -> None:
    assert in_a_new_process(orphaned) == [True, True, None]


def stays(folder: Path) -> None:
    worker = run_in_sandbox(os.getpid, task="asking")
    (folder / "draft").write_text(f"{FORK_SERVER.pid} {worker}")
    (folder / "draft").rename(folder / "pids")
    time.sleep(60)


def test_nothing_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_answer, args=(None, stays, tmp_path))
    process.start()
    limit = time.monotonic() + 60
    while not (tmp_path / "pids").exists():
        assert time.monotonic() < limit
        time.sleep(0.02)
    children = [psutil.Process(int(pid)) for pid in (tmp_path / "pids").read_text().split()]
    process.kill()
    process.join(30)
    _, alive = psutil.wait_procs(children, 30)
    assert not alive


def product(size: int, seed: int) -> tuple[bytes, int]:
    a = np.random.default_rng(seed).standard_normal((size, size))
    return (a @ a.T).tobytes(), os.getpid()


def products() -> list[Any]:
    pool._START_SECONDS = 0.0
    made = list(Pool(2).map(product, [(seed,) for seed in range(6)], 300))
    import_loky().reusable_executor._executor.shutdown(kill_workers=True)
    return [[bits for bits, _ in made], len({process for _, process in made[1:]}), os.getpid()]


def test_a_pool_of_forked_workers_computes_the_same_to_the_bit() -> None:
    bits, processes, parent = in_a_new_process(products)
    assert 1 <= processes <= 2
    assert parent != os.getpid()
    assert bits == [product(300, seed)[0] for seed in range(6)]


@pytest.mark.parametrize(
    ("seconds", "left", "count", "server", "pays"),
    [
        (1.0, 6, 2, None, True),  # 3 seconds saved
        (1.0, 4, 2, None, False),  # 2 seconds
        (1.0, 3, 8, None, False),
        (1.0, 4, 8, None, True),  # 4 processes at most save 3
        (100.0, 9, 1, None, False),
        (100.0, 1, 2, None, False),
        (0.2, 3, 2, 7, True),  # 0.3 seconds
        (0.1, 4, 2, 7, False),
    ],
)
def test_processes_are_started_where_they_save_more_than_their_start(
    seconds: float,
    left: int,
    count: int,
    server: int | None,
    pays: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FORK_SERVER, "pid", server)
    assert pool._processes_pay(seconds, left, count) == pays
