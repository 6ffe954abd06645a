"""Work side by side: the order of the items, what they raise, and the same sums to the bit."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxlr
from onnxlr.errors import ModelError
from onnxlr.system import pool
from onnxlr.system.pool import Pool
from tests.support.networks import images, network, products


def slow(i: int) -> tuple[int, int]:
    return i * i, os.getpid()


def refuse(i: int) -> int:
    if i == 3:
        raise ModelError("the third")
    return i


def threads() -> list[int]:
    from threadpoolctl import threadpool_info

    np.ones((2, 2)) @ np.ones((2, 2))
    return [int(pool["num_threads"]) for pool in threadpool_info()]


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send all but the first item to other processes."""
    monkeypatch.setattr(pool, "_START_SECONDS", 0.0)


@pytest.mark.usefixtures("apart")
def test_results_come_in_order_from_other_processes() -> None:
    results = list(Pool(2).map(slow, [(i,) for i in range(6)]))
    assert [square for square, _ in results] == [0, 1, 4, 9, 16, 25]
    assert results[0][1] == os.getpid()
    assert os.getpid() not in {process for _, process in results[1:]}


def test_one_job_stays_here() -> None:
    results = list(Pool(1).map(slow, [(i,) for i in range(3)]))
    assert {process for _, process in results} == {os.getpid()}


@pytest.mark.usefixtures("apart")
def test_what_a_process_raises_arrives() -> None:
    with pytest.raises(ModelError, match="the third"):
        list(Pool(2).map(refuse, [(i,) for i in range(5)]))


@pytest.mark.usefixtures("apart")
def test_each_process_has_one_thread_of_linear_algebra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    results = list(Pool(2).map(threads, [()] * 3))[1:]
    assert results[0]
    assert all(count == 1 for counts in results for count in counts)


def test_cores_are_shared_with_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "usable_cores", lambda: 8)
    assert Pool(None).count == 8
    assert Pool(None, threads=4).count == 2
    assert Pool(None, threads=16).count == 1
    assert Pool(3, threads=4).count == 3


@pytest.mark.usefixtures("apart")
def test_the_same_bytes_however_many_processes(tmp_path: Path) -> None:
    source, data = tmp_path / "net.onnx", tmp_path / "d.npz"
    onnx.save(network(), source)
    np.savez(data, x=images(96, 0))
    written: list[bytes] = []
    plans: list[str] = []
    for count in (1, 2):
        out = tmp_path / f"{count}.onnx"
        result = onnxlr.optimize(
            source,
            out,
            data=data,
            metric="rel-error",
            target="macs=0.6",
            max_drop=1,
            method=("channel-svd", "svd", "tucker2"),  # by SVD and by iterations
            jobs=count,
        )
        written.append(out.read_bytes())
        plans.append(result.plan.to_json())
        for entry in (Path(os.environ["ONNXLR_CACHE"])).iterdir():
            entry.unlink()  # the second run is to compute all of it itself
    assert plans[0] == plans[1]
    assert written[0] == written[1]


@pytest.mark.usefixtures("apart")
def test_a_model_from_memory_goes_along(tmp_path: Path) -> None:
    data = tmp_path / "d.npz"
    x = np.random.default_rng(0).standard_normal((96, 48))
    np.savez(data, x=x.astype(np.float32))
    result = onnxlr.optimize(
        products(), data=data, metric="rel-error", target="params=0.6", max_drop=1, jobs=2
    )
    assert result.report.output.params <= 0.6 * result.report.input.params
