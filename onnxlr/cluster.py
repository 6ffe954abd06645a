"""The workers of a dask cluster, for ``--dask ADDRESS``."""

import platform
import re
import time
from collections.abc import Mapping
from concurrent.futures import CancelledError, Executor
from typing import Any

import numpy as np

from onnxlr.errors import ClusterError, RuntimeMissingError, UsageError, one_line
from onnxlr.memory import words

# Bytes that are sent in one piece at most; models and their weights are never sent.
MOST_SENT = 1 << 30
_ADDRESS = re.compile(r"([a-z]+://)?(\[[0-9a-fA-F:.]+\]|[^\s/:\[\]]+):[0-9]+")
_CONNECT = 15.0  # seconds for the scheduler to answer
_PATIENCE = 30.0  # seconds without any worker, after which the work goes on here
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
        self.sent = self.returned = 0
        try:
            self._client = Client(address, timeout=_CONNECT, set_as_default=False)
        except Exception as error:  # what an address and a network may do is the library's secret
            raise ClusterError(
                f"no dask scheduler answers at {address}: {one_line(error)}; start one with "
                "`dask scheduler`, and workers with `dask worker ADDRESS`"
            ) from None
        self._empty_since: float | None = None
        try:
            self.count = self._greeted()
        except BaseException:
            self.close()
            raise
        self.executor: Executor = self._client.get_executor(pure=False, retries=_RETRIES)

    def _greeted(self) -> int:
        """The number of workers; all must be able to do what is done here."""
        try:
            found: Mapping[str, dict[str, str]] = self._client.run(_versions)
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

    def share(self, blob: bytes) -> Any:
        """Hand over what all pieces have in common: once to each worker that needs it."""
        self.sending(len(blob))
        return self._client.scatter(blob, hash=False)

    def sending(self, nbytes: int) -> None:
        """Count what is sent.

        Raises
        ------
        ClusterError
            If it is more than ``MOST_SENT``.
        """
        if nbytes > MOST_SENT:
            raise ClusterError(
                f"{words(nbytes)} would have to be sent to the workers in one piece, more than "
                f"{words(MOST_SENT)}: give fewer samples, or leave out --dask"
            )
        self.sent += nbytes

    def received(self, nbytes: int) -> None:
        """Count what came back."""
        self.returned += nbytes

    def lost(self, error: BaseException | None) -> bool:
        """Whether an error comes from a cluster that fell apart; without one, whether it did."""
        from distributed import KilledWorker
        from distributed.comm.core import CommClosedError

        if error is not None:
            gone = (CancelledError, CommClosedError, KilledWorker, TimeoutError)
            return isinstance(error, gone) or type(error).__name__ in (
                "FutureCancelledError",
                "LostWorkerError",
            )
        if self._client.status not in ("running", "connecting"):
            return True
        try:
            workers = self._client.scheduler_info(n_workers=-1)["workers"]
        except Exception:  # the scheduler doesn't answer now; it may in a moment
            workers = {}
        if workers:
            self._empty_since = None
            return False
        now = time.monotonic()
        self._empty_since = self._empty_since or now
        return now - self._empty_since > _PATIENCE

    def close(self) -> None:
        """Give the workers free; they and the scheduler stay."""
        self._client.close(timeout=5)

    def words(self) -> str:
        """What crossed the wire."""
        return (
            f"computed by {self.count} workers at {self.address}: {words(self.sent)} sent, "
            f"{words(self.returned)} received, the model read by each from its own path"
        )


def _versions() -> dict[str, str]:
    """What sums depend on."""
    import scipy

    from onnxlr import __version__

    return {
        "onnxlr": __version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
