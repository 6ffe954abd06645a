"""A dask cluster whose workers compute for a pool, for ``--dask ADDRESS``."""

import asyncio
import contextlib
import logging
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Executor, Future, wait
from typing import Any, TypeVar

import numpy as np

from onnxlr.errors import ClusterError, RuntimeMissingError, UsageError, one_line
from onnxlr.system.memory import format_bytes
from onnxlr.system.pool import POLL_SECONDS
from onnxlr.version import __version__

T = TypeVar("T")

# The most bytes that are sent in one piece; models and their weights are never sent.
MOST_SENT = 1 << 30
_ADDRESS = re.compile(r"([a-z]+://)?(\[[0-9a-fA-F:.]+\]|[^\s/:\[\]]+):[0-9]+")
_CONNECT_SECONDS = 15.0  # for the scheduler to answer
_WORKER_SECONDS = 30.0  # without any worker, after which the work goes on in this process
_BYTES_A_SECOND = 5e6  # speed of a slow network
_SILENT_SECONDS = 300.0  # without a message, after which a worker counts as frozen
_RETRIES = 3  # of a task whose worker went away


class Cluster:
    """A connection to a dask scheduler, which counts what it sends and receives.

    Each worker reads the model from the path it has here and checks its digest. Samples and
    statistics of layers are sent once. A task then is a name, a rank and at most a layer's
    covariance, and its result factors and figures.

    Parameters
    ----------
    address : str
        Address of the scheduler: ``tcp://host:8786``.

    Attributes
    ----------
    executor : Executor
        It takes tasks.
    count : int
        Number of workers.
    sent, received : int
        Bytes so far.

    Raises
    ------
    UsageError
        If that is no address.
    RuntimeMissingError
        If dask isn't installed.
    ClusterError
        If there is no scheduler or no worker, or if a worker has other versions of what sums depend
        on.
    """

    def __init__(self, address: str) -> None:
        try:
            from distributed import Client
        except ImportError:
            raise RuntimeMissingError(
                "--dask needs dask: pip install 'onnxlr[dask]', here and for the workers"
            ) from None
        if not _ADDRESS.fullmatch(address):
            raise UsageError(
                f"--dask {address!r} is no address: name a scheduler as tcp://host:8786"
            )
        self.address = address
        self.sent = self.received = 0
        self._silence = contextlib.ExitStack()
        self._silence.enter_context(_silent_loggers())
        try:
            kind = _call_within(_CONNECT_SECONDS, lambda: asyncio.run(_kind_at(address)))
            if kind != "Scheduler":
                raise ConnectionError(f"what is there is a {kind}")
            self._client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
        except Exception as error:  # dask lists no errors for a bad address or network
            self._silence.close()
            raise ClusterError(
                f"no dask scheduler answers at {address}: {one_line(error)}; start one with "
                "`dask scheduler`, and workers with `dask worker ADDRESS`"
            ) from None
        self._empty_since: float | None = None
        # By worker: dask's time of its latest message, and the time here when that changed.
        self._last_seen: dict[str, tuple[Any, float]] = {}
        try:
            self.count = self._check_workers()
        except BaseException:
            self.close()
            raise
        self.executor: Executor = self._client.get_executor(pure=False, retries=_RETRIES)

    def _check_workers(self) -> int:
        """Count the workers; each must have the same versions as this process.

        Raises
        ------
        ClusterError
            If one has others or doesn't answer, or if there are none.
        """
        try:
            addresses = list(self._workers())
            futures = [
                self._client.submit(_versions, workers=[a], allow_other_workers=False, pure=False)
                for a in addresses
            ]
            answers = dict(zip(addresses, self._results(futures), strict=True))
        except ClusterError:
            raise
        except Exception as error:
            raise ClusterError(
                f"the workers at {self.address} can't run onnxlr ({one_line(error)}): install the "
                "same versions there as here"
            ) from None
        if not answers:
            raise ClusterError(
                f"the scheduler at {self.address} has no workers: start some with "
                f"`dask worker {self.address}`"
            )
        here = _versions()
        for worker, versions in sorted(answers.items()):
            other = {k: v for k, v in versions.items() if here[k] != v}
            if other:
                raise ClusterError(
                    f"the worker {worker} has {_listed(other)}, here it is "
                    f"{_listed({k: here[k] for k in other})}: sums would differ, install the same"
                )
        return len(answers)

    def _results(self, futures: list[Any]) -> list[dict[str, str]]:
        end = time.monotonic() + _WORKER_SECONDS
        try:
            return [future.result(max(0.1, end - time.monotonic())) for future in futures]
        except TimeoutError:
            silent = sum(not future.done() for future in futures)
            raise ClusterError(
                f"{silent} of {len(futures)} workers at {self.address} don't answer within "
                f"{_WORKER_SECONDS:.0f} s: end them, or wait until they are free"
            ) from None

    def share(self, blob: bytes) -> Any:
        """Send bytes that all tasks have in common, once to each worker that needs them.

        Returns
        -------
        A future, which workers get as the bytes.

        Raises
        ------
        TimeoutError
            If the cluster doesn't take them in time, or is lost.
        """
        self.count_sent(len(blob))
        end = time.monotonic() + 2 * _WORKER_SECONDS + len(blob) / _BYTES_A_SECOND
        scattered = _start(lambda: self._client.scatter(blob, hash=False))
        while not scattered.done():
            wait([scattered], POLL_SECONDS)
            if not scattered.done() and (self.lost(None) or time.monotonic() > end):
                raise TimeoutError
        return scattered.result()

    def count_sent(self, nbytes: int) -> None:
        """Add to the bytes sent.

        Raises
        ------
        ClusterError
            If these are more than ``MOST_SENT``.
        """
        if nbytes > MOST_SENT:
            raise ClusterError(
                f"{format_bytes(nbytes)} would have to be sent to the workers in one piece, more "
                f"than {format_bytes(MOST_SENT)}: give fewer samples, or leave out --dask"
            )
        self.sent += nbytes

    def count_received(self, nbytes: int) -> None:
        """Add to the bytes received."""
        self.received += nbytes

    def lost(self, error: BaseException | None) -> bool:
        """Whether an error means that the cluster is lost; for None, whether it is lost now."""
        from distributed import KilledWorker
        from distributed.comm.core import CommClosedError

        if error is not None:
            kinds = (CancelledError, CommClosedError, KilledWorker, TimeoutError)
            if isinstance(error, kinds):
                return True
            if type(error).__name__ in ("FutureCancelledError", "LostWorkerError"):
                return True
            return isinstance(error, OSError) and "trying to connect" in str(error)
        if self._client.status not in ("running", "connecting"):
            return True
        now = time.monotonic()
        try:
            alive = self._has_live_worker(now)
        except Exception:  # the scheduler doesn't answer now; it may in a moment
            alive = False
        if alive:
            self._empty_since = None
            return False
        self._empty_since = self._empty_since or now
        return now - self._empty_since > _WORKER_SECONDS

    def _workers(self) -> Mapping[str, Mapping[str, Any]]:
        """What the scheduler says of each worker, by address."""
        workers: Mapping[str, Mapping[str, Any]] = _call_within(
            _CONNECT_SECONDS, lambda: self._client.scheduler_info(n_workers=-1)["workers"]
        )
        return workers

    def _has_live_worker(self, now: float) -> bool:
        """Whether a worker is there that works.

        One that sends no messages may be frozen, or its linear algebra lets no other thread run:
        it counts as frozen only after as long as dask itself waits. One that dask has paused, for
        want of memory, takes no tasks.
        """
        workers = self._workers()
        last_seen = {address: worker.get("last_seen") for address, worker in workers.items()}
        self._last_seen = {
            address: self._last_seen[address]
            if address in self._last_seen and self._last_seen[address][0] == seen
            else (seen, now)
            for address, seen in last_seen.items()
        }
        return any(
            worker.get("status", "running") == "running"
            and now - self._last_seen[address][1] < _SILENT_SECONDS
            for address, worker in workers.items()
        )

    def close(self) -> None:
        """Disconnect; the scheduler and its workers go on running."""
        with self._silence, contextlib.suppress(Exception):  # all results have arrived
            self._client.close(timeout=5)

    def summary(self) -> str:
        """A line for the report: the number of workers, and the bytes sent and received."""
        return (
            f"computed by {self.count} workers at {self.address}: {format_bytes(self.sent)} sent, "
            f"{format_bytes(self.received)} received, the model read by each from its own path"
        )


async def _kind_at(address: str) -> str:
    """What listens at an address, such as "Scheduler". A dask client would wait for ever."""
    from distributed import Security
    from distributed.core import rpc

    args = Security().get_connection_args("client")
    async with rpc(address, connection_args=args) as peer:
        return str((await peer.identity())["type"])


def _call_within(seconds: float, function: Callable[[], T]) -> T:
    """Call a function that may wait for ever, and return its result.

    Raises
    ------
    TimeoutError
        If it takes longer.
    """
    try:
        return _start(function).result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None


def _start(function: Callable[[], T]) -> "Future[T]":
    """Call a function in a thread that doesn't keep the process alive; returns its future."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@contextlib.contextmanager
def _silent_loggers() -> Iterator[None]:
    """Silence the loggers of dask: what they report arrives as errors, and is printed once."""
    levels = {
        name: logging.getLogger(name).level
        for name in list(logging.root.manager.loggerDict)
        if name.partition(".")[0] in ("distributed", "tornado")
    }
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _versions() -> dict[str, str]:
    """Versions of all that sums depend on."""
    import scipy

    return {
        "onnxlr": __version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
