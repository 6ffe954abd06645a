"""Workers of loky that are forked by the fork server, where there is one."""

import io
import os
from multiprocessing import util
from multiprocessing.connection import wait
from multiprocessing.context import set_spawning_popen
from typing import Any

from joblib.externals.loky.backend import popen_loky_posix, reduction, spawn
from joblib.externals.loky.backend.context import LokyContext
from joblib.externals.loky.backend.process import LokyProcess

from onnxlr.system.children import initialize_worker
from onnxlr.system.fork_server import FORK_SERVER
from onnxlr.system.process import is_command_process


class _Popen(popen_loky_posix.Popen):  # type: ignore[misc]  # joblib has no types
    """A worker that the fork server has forked; one that loky starts where it can't."""

    returncode: int | None
    _fds: list[int]

    def _launch(self, process: Any) -> None:
        self._forked = True
        try:
            self._fork(process)
        except OSError:
            self._forked, self._fds = False, []
            super()._launch(process)

    def _fork(self, process: Any) -> None:
        """As loky launches a process, except that it isn't a new interpreter."""
        told = io.BytesIO()
        set_spawning_popen(self)
        try:
            preparation = spawn.get_preparation_data(process.name, init_main_module=False)
            for part in ({**os.environ, **process.env}, preparation, process):
                reduction.dump(part, told)
        finally:
            set_spawning_popen(None)
        trackers = (preparation["tracker_fd"], preparation["mp_tracker_fd"])
        ended, alive = os.pipe()  # its end shows that of the worker
        reading, writing = os.pipe()
        try:
            numbers = dict.fromkeys((reading, alive, *self._fds, *trackers))
            self.pid = FORK_SERVER.fork(list(numbers))
        except OSError:
            os.close(ended)
            os.close(writing)
            raise
        finally:
            os.close(reading)
            os.close(alive)
        self.sentinel = ended
        self.finalizer = util.Finalize(self, os.close, (ended,))
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(told.getbuffer())

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """The exit code, which only the fork server could know: 255 once the worker has ended."""
        if not self._forked:
            code: int | None = super().poll(flag)
            return code
        if self.returncode is None and wait([self.sentinel], 0 if flag == os.WNOHANG else None):
            self.returncode = 255
        return self.returncode


class WarmProcess(LokyProcess):  # type: ignore[misc]
    """A process of loky that the fork server forks."""

    @staticmethod
    def _Popen(process: Any) -> _Popen:  # noqa: N802 - what multiprocessing calls
        return _Popen(process)


class _Context(LokyContext):  # type: ignore[misc]
    Process = WarmProcess


_CONTEXT = _Context()


def worker_options() -> dict[str, Any]:
    """The options of a pool of loky that say how its workers begin."""
    server = FORK_SERVER.pid
    parents = (os.getpid(),) if server is None else (os.getpid(), server)
    return {
        "context": None if server is None else _CONTEXT,  # None is loky's own
        "initializer": initialize_worker,
        "initargs": (parents, is_command_process()),
    }
