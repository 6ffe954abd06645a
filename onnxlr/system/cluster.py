"""The workers of a dask cluster, for ``--dask ADDRESS``."""

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

# Bytes that are sent in one piece at most; models and their weights are never sent.
MOST_SENT = 1 << 30
_ADDRESS = re.compile(r"([a-z]+://)?(\[[0-9a-fA-F:.]+\]|[^\s/:\[\]]+):[0-9]+")
_CONNECT = 15.0  # seconds for the scheduler to answer
_PATIENCE = 30.0  # seconds without any worker, after which the work goes on here
_BYTES_A_SECOND = 5e6  # that a slow network takes
_SILENT = 300.0  # seconds that a worker may say nothing
_RETRIES = 3  # of a piece whose worker went away


class Cluster:
    """A connection to a scheduler, with what it has sent and received counted.

    The model is read by each worker from the path it has here, and held against its digest. What
    crosses the wire are the samples and what is known of layers, once, then a name, a rank and at
    most a layer's covariance for each piece of work, and factors and figures back.

    Parameters
    ----------
    address : str
        Of the scheduler: ``tcp://host:8786``.

    Raises
    ------
    UsageError
        If the address is none.
    RuntimeMissingError
        If dask isn't installed.
    ClusterError
        If there is no scheduler, no worker, or workers with other versions, whose sums differ.
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
        self._hushed = contextlib.ExitStack()
        self._hushed.enter_context(_quiet())
        try:
            kind = _within(_CONNECT, lambda: asyncio.run(_kind(address)))
            if kind != "Scheduler":
                raise ConnectionError(f"what is there is a {kind}")
            self._client = Client(address, timeout=_CONNECT, set_as_default=False)
        except Exception as error:  # what an address and a network may do is the library's secret
            self._hushed.close()
            raise ClusterError(
                f"no dask scheduler answers at {address}: {one_line(error)}; start one with "
                "`dask scheduler`, and workers with `dask worker ADDRESS`"
            ) from None
        self._empty_since: float | None = None
        self._heard: dict[str, tuple[Any, float]] = {}  # what each said last, and when that came
        try:
            self.count = self._greeted()
        except BaseException:
            self.close()
            raise
        self.executor: Executor = self._client.get_executor(pure=False, retries=_RETRIES)

    def _greeted(self) -> int:
        """The number of workers; all must be able to do what is done here."""
        try:
            workers = list(self._workers())
            asked = [
                self._client.submit(_versions, workers=[w], allow_other_workers=False, pure=False)
                for w in workers
            ]
            found = dict(zip(workers, self._answers(asked), strict=True))
        except ClusterError:
            raise
        except Exception as error:
            raise ClusterError(
                f"the workers at {self.address} can't run onnxlr ({one_line(error)}): install the "
                "same versions there as here"
            ) from None
        if not found:
            raise ClusterError(
                f"the scheduler at {self.address} has no workers: start some with "
                f"`dask worker {self.address}`"
            )
        own = _versions()
        for worker, versions in sorted(found.items()):
            other = {k: v for k, v in versions.items() if own[k] != v}
            if other:
                raise ClusterError(
                    f"the worker {worker} has {_listed(other)}, here it is "
                    f"{_listed({k: own[k] for k in other})}: sums would differ, install the same"
                )
        return len(found)

    def _answers(self, asked: list[Any]) -> list[dict[str, str]]:
        ends = time.monotonic() + _PATIENCE
        try:
            return [future.result(max(0.1, ends - time.monotonic())) for future in asked]
        except TimeoutError:
            silent = sum(not future.done() for future in asked)
            raise ClusterError(
                f"{silent} of {len(asked)} workers at {self.address} don't answer within "
                f"{_PATIENCE:.0f} s: end them, or wait until they are free"
            ) from None

    def share(self, blob: bytes) -> Any:
        """Hand over what all pieces have in common: once to each worker that needs it."""
        self.count_sent(len(blob))
        ends = time.monotonic() + 2 * _PATIENCE + len(blob) / _BYTES_A_SECOND
        handed = _begun(lambda: self._client.scatter(blob, hash=False))
        while not handed.done():
            wait([handed], POLL_SECONDS)
            if not handed.done() and (self.lost(None) or time.monotonic() > ends):
                raise TimeoutError
        return handed.result()

    def count_sent(self, nbytes: int) -> None:
        """Count what is sent.

        Raises
        ------
        ClusterError
            If it is more than ``MOST_SENT``.
        """
        if nbytes > MOST_SENT:
            raise ClusterError(
                f"{format_bytes(nbytes)} would have to be sent to the workers in one piece, more "
                f"than {format_bytes(MOST_SENT)}: give fewer samples, or leave out --dask"
            )
        self.sent += nbytes

    def count_received(self, nbytes: int) -> None:
        """Count what came back."""
        self.received += nbytes

    def lost(self, error: BaseException | None) -> bool:
        """Whether an error comes from a cluster that fell apart; without one, whether it did."""
        from distributed import KilledWorker
        from distributed.comm.core import CommClosedError

        if error is not None:
            gone = (CancelledError, CommClosedError, KilledWorker, TimeoutError)
            named = type(error).__name__ in ("FutureCancelledError", "LostWorkerError")
            silent = isinstance(error, OSError) and "trying to connect" in str(error)
            return isinstance(error, gone) or named or silent
        if self._client.status not in ("running", "connecting"):
            return True
        now = time.monotonic()
        try:
            alive = self._alive(now)
        except Exception:  # the scheduler doesn't answer now; it may in a moment
            alive = False
        if alive:
            self._empty_since = None
            return False
        self._empty_since = self._empty_since or now
        return now - self._empty_since > _PATIENCE

    def _workers(self) -> Mapping[str, Mapping[str, Any]]:
        found: Mapping[str, Mapping[str, Any]] = _within(
            _CONNECT, lambda: self._client.scheduler_info(n_workers=-1)["workers"]
        )
        return found

    def _alive(self, now: float) -> bool:
        """Whether a worker is there that works.

        One that says nothing may be frozen, or its linear algebra lets nothing else have a turn:
        only after as long as dask itself waits is it taken for the former. One that dask has
        paused, for want of memory, takes nothing on.
        """
        found = self._workers()
        heard = {address: worker.get("last_seen") for address, worker in found.items()}
        self._heard = {
            address: self._heard[address]
            if address in self._heard and self._heard[address][0] == said
            else (said, now)
            for address, said in heard.items()
        }
        return any(
            worker.get("status", "running") == "running" and now - self._heard[address][1] < _SILENT
            for address, worker in found.items()
        )

    def close(self) -> None:
        """Give the workers free; they and the scheduler stay."""
        with self._hushed, contextlib.suppress(Exception):  # what was wanted of it is here
            self._client.close(timeout=5)

    def summary(self) -> str:
        """What crossed the wire."""
        return (
            f"computed by {self.count} workers at {self.address}: {format_bytes(self.sent)} sent, "
            f"{format_bytes(self.received)} received, the model read by each from its own path"
        )


async def _kind(address: str) -> str:
    """What listens at an address. A client would wait for its answer for ever."""
    from distributed import Security
    from distributed.core import rpc

    given = Security().get_connection_args("client")
    async with rpc(address, connection_args=given) as found:
        return str((await found.identity())["type"])


def _within(seconds: float, function: Callable[[], T]) -> T:
    """What a function gives that may wait for ever for somebody else.

    Raises
    ------
    TimeoutError
        If it takes longer.
    """
    try:
        return _begun(function).result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None


def _begun(function: Callable[[], T]) -> "Future[T]":
    """What a function will give, called in a thread that keeps nobody."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(function())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the libraries of the cluster have to say comes back as errors, and is told once."""
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
    """What sums depend on."""
    import scipy

    return {
        "onnxlr": __version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
