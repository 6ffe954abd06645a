"""The workers of a dask cluster: the same bytes, workers that are killed, what is said of them."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxlr
from onnxlr.errors import ClusterError
from onnxlr.progress import Silent
from onnxlr.system import cluster as module
from onnxlr.system.cluster import Cluster
from onnxlr.system.pool import Pool
from tests.support.limits import short_runs
from tests.support.networks import images, network

pytest.importorskip("distributed")

ROOT = Path(__file__).parent.parent.parent
METHODS = ("channel-svd", "svd", "tucker2")  # by SVD and by iterations, for each operator


class Farm:
    """A scheduler and its workers, each a process on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / "scheduler.json"
        loopback = ["--host", "127.0.0.1", "--no-dashboard"]
        self.scheduler = self._start("scheduler", *loopback, "--port", "0")
        self.workers = [self.worker() for _ in range(2)]
        self.address = ""

    def worker(self) -> "subprocess.Popen[bytes]":
        """One more worker."""
        return self._start("worker", "--host", "127.0.0.1", "--nthreads", "1", "--no-nanny")

    def _start(self, kind: str, *options: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [
                *(sys.executable, "-m", f"distributed.cli.dask_{kind}"),
                *("--scheduler-file", str(self._file), *options),
            ],
            cwd=self._folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "passes")))},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def wait(self, workers: int) -> None:
        """Wait until exactly this many workers are connected."""
        from distributed import Client

        ends = time.monotonic() + 60
        while not self._file.exists() and time.monotonic() < ends:
            time.sleep(0.1)
        with Client(scheduler_file=str(self._file), set_as_default=False) as client:
            while len(client.scheduler_info(n_workers=-1)["workers"]) != workers:  # nor dead ones
                assert time.monotonic() < ends
                time.sleep(0.1)
            self.address = client.scheduler.address

    def stop(self) -> None:
        """End them all."""
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def shared_farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    farm = Farm(tmp_path_factory.mktemp("farm"))
    try:
        yield farm
    finally:
        farm.stop()


@pytest.fixture
def farm(shared_farm: Farm) -> Farm:
    """A scheduler with two living workers, whatever an earlier test did to them."""
    living = [w for w in shared_farm.workers if w.poll() is None]
    shared_farm.workers = living + [shared_farm.worker() for _ in range(2 - len(living))]
    shared_farm.wait(2)
    return shared_farm


class Watched(Silent):
    """Progress that calls a function once, when a stage begins or after its first step."""

    def __init__(self, name: str, then: Callable[[], object], *, after: int) -> None:
        self._name, self._then, self._left = name, then, after
        self.called = False

    @contextmanager
    def stage(
        self,
        description: str,
        total: int | None,  # noqa: ARG002
    ) -> Iterator[Callable[[str], None]]:
        def step(_: str) -> None:
            self._left -= 1
            if self._left < 0 and not self.called:
                self.called = True
                self._then()

        if description == self._name:
            step("the beginning")
            yield step
        else:
            yield lambda _: None


def lay_out(folder: Path, seed: int = 0) -> Path:
    """Write the network and its samples."""
    onnx.save(network(seed), folder / "net.onnx")
    np.savez(folder / "d.npz", x=images(96, 0))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the network and its samples, which no test changes."""
    return lay_out(tmp_path_factory.mktemp("network"))


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXLR_CACHE", "off")
    monkeypatch.setattr("onnxlr.system.pool.POLL_SECONDS", 0.2)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.2)


def optimized(folder: Path, out: Path, **more: Any) -> tuple[bytes, onnxlr.Result]:
    """The file and the result of a run without a cache."""
    result = onnxlr.optimize(
        folder / "net.onnx",
        out,
        data=folder / "d.npz",
        metric="rel-error",
        target="macs=0.6",
        max_drop=1,
        method=METHODS,
        **more,
    )
    return out.read_bytes(), result


@pytest.fixture(scope="module")
def local(folder: Path) -> tuple[bytes, onnxlr.Result]:
    """The file and the result of the same run without any workers."""
    with short_runs(folder / "cache") as patch:
        patch.setenv("ONNXLR_CACHE", "off")
        return optimized(folder, folder / "here.onnx", jobs=1)


def test_the_same_bytes_by_workers_as_here(
    farm: Farm, folder: Path, local: tuple[bytes, onnxlr.Result], tmp_path: Path
) -> None:
    here, first = local
    there, second = optimized(folder, tmp_path / "there.onnx", dask=farm.address)
    assert first.plan == second.plan
    assert here == there
    (note,) = [n for n in second.report.notes if "workers" in n]
    assert farm.address in note
    assert "sent" in note
    assert second.report.circumstances is not None
    assert f"--dask {farm.address}" in second.report.circumstances.command


def test_a_metric_is_needed_here_alone(
    farm: Farm, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers measure what layers do to the outputs, and have none of the user's modules."""
    (tmp_path / "metric_of_mine.py").write_text(
        "def f(session):\n    return float(len(session.get_inputs()))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    result = onnxlr.optimize(
        folder / "net.onnx",
        metric="metric_of_mine:f",
        target="macs=0.6",
        max_drop=1,
        method=METHODS,
        dask=farm.address,
    )
    assert result.plan.replaced


def test_a_worker_that_is_killed_loses_nothing(
    farm: Farm, folder: Path, local: tuple[bytes, onnxlr.Result], tmp_path: Path
) -> None:
    here, _ = local
    dead = farm.workers[0]
    progress = Watched("weigh candidates", dead.kill, after=1)
    there, _ = optimized(folder, tmp_path / "there.onnx", dask=farm.address, progress=progress)
    assert progress.called
    assert dead.wait(10) == -signal.SIGKILL
    assert here == there


def test_without_any_worker_left_the_rest_is_done_here(
    farm: Farm,
    folder: Path,
    local: tuple[bytes, onnxlr.Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kill() -> None:
        monkeypatch.setattr(module, "_WORKER_SECONDS", 0.5)  # the workers have answered by now
        for worker in farm.workers:
            worker.kill()

    here, _ = local
    progress = Watched("weigh candidates", kill, after=1)
    there, result = optimized(folder, tmp_path / "there.onnx", dask=farm.address, progress=progress)
    assert here == there
    assert any("the workers of the cluster were lost" in note for note in result.report.notes)


@pytest.mark.parametrize("who", ["the workers", "the scheduler"])
def test_machines_that_sleep_keep_nobody(
    farm: Farm,
    folder: Path,
    local: tuple[bytes, onnxlr.Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    who: str,
) -> None:
    """A process that is frozen still has its connections, and its work."""
    frozen = farm.workers if who == "the workers" else [farm.scheduler]

    def freeze() -> None:  # whoever is to answer has answered by now
        for name, seconds in (("_WORKER", 1.0), ("_SILENT", 2.0), ("_CONNECT", 1.0)):
            monkeypatch.setattr(module, f"{name}_SECONDS", seconds)
        for process in frozen:
            process.send_signal(signal.SIGSTOP)

    here, _ = local
    progress = Watched("weigh candidates", freeze, after=1)
    started = time.monotonic()
    try:
        there, result = optimized(
            folder, tmp_path / "there.onnx", dask=farm.address, progress=progress
        )
    finally:
        for process in frozen:
            process.send_signal(signal.SIGCONT)
    assert time.monotonic() - started < 120
    assert here == there
    note = "workers of the cluster were lost"
    assert any(note in n for n in result.report.notes), result.report.notes


def test_workers_that_have_no_turn_are_left_alone(
    farm: Farm,
    folder: Path,
    local: tuple[bytes, onnxlr.Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some linear algebra blocks every thread, even the one that says that the worker is alive."""

    def block() -> None:  # all workers, for longer than a cluster may be without any
        monkeypatch.setattr(module, "_WORKER_SECONDS", 1.0)
        for worker in farm.workers:
            worker.send_signal(signal.SIGSTOP)
            threading.Timer(3.0, worker.send_signal, [signal.SIGCONT]).start()

    here, _ = local
    progress = Watched("weigh candidates", block, after=1)
    there, result = optimized(folder, tmp_path / "there.onnx", dask=farm.address, progress=progress)
    assert here == there
    assert not any("were lost" in note for note in result.report.notes)


def test_a_worker_that_sleeps_from_the_beginning(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WORKER_SECONDS", 3.0)
    farm.workers[0].send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(ClusterError, match=r"1 of 2 workers .* don't answer within 3 s"):
            Cluster(farm.address)
    finally:
        farm.workers[0].send_signal(signal.SIGCONT)


def test_what_listens_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CONNECT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ClusterError, match=r"no dask scheduler answers.*no answer within 1 s"):
            Cluster(f"tcp://127.0.0.1:{port}")


@pytest.mark.parametrize("scheme", ["foo", "inproc"])
def test_addresses_of_another_kind(scheme: str) -> None:
    with pytest.raises(ClusterError, match="no dask scheduler answers"):
        Cluster(f"{scheme}://127.0.0.1:9")


def test_a_worker_is_no_scheduler(farm: Farm) -> None:
    cluster = Cluster(farm.address)
    try:
        (address, _) = cluster._workers()
    finally:
        cluster.close()
    with pytest.raises(ClusterError, match="what is there is a Worker"):
        Cluster(address)


def test_what_is_raised_there_arrives(farm: Farm) -> None:
    cluster = Cluster(farm.address)
    try:
        with pytest.raises(ZeroDivisionError):
            list(Pool(1, workers=cluster).map(divmod, [(1, 1), (1, 0)]))
    finally:
        cluster.close()


def test_what_would_have_to_be_sent_is_bounded(
    farm: Farm, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_SENT", 10_000)
    with pytest.raises(ClusterError, match=r"would have to be sent.*fewer samples"):
        optimized(folder, tmp_path / "out.onnx", dask=farm.address)
    assert not (tmp_path / "out.onnx").exists()


def test_a_model_that_workers_do_not_have(farm: Farm, tmp_path: Path) -> None:
    """A worker reads another model than was read here: no file is made."""
    lay_out(tmp_path, seed=2)  # one that no worker has read
    other = network(seed=1)
    progress = Watched("decompose", lambda: onnx.save(other, tmp_path / "net.onnx"), after=0)
    with pytest.raises(onnxlr.ModelError, match=r"is not the model that this run began with"):
        optimized(tmp_path, tmp_path / "out.onnx", dask=farm.address, progress=progress)
    assert not (tmp_path / "out.onnx").exists()


def test_no_scheduler_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CONNECT_SECONDS", 1.0)
    with pytest.raises(ClusterError, match="no dask scheduler answers at"):
        Cluster("tcp://127.0.0.1:9")


def test_workers_of_other_versions_are_refused(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxlr.system.cluster.__version__", "0.0")
    with pytest.raises(ClusterError, match=r"has onnxlr .*, here it is onnxlr 0\.0"):
        Cluster(farm.address)
