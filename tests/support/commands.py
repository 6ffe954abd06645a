"""The command in new processes, forked from an interpreter that is warm."""

import atexit
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, Self

from tests.support.limits import SHORT

COMMAND = "onnxlr.__main__:main"  # as ``python -m onnxlr`` runs it, with a process that watches
UNWATCHED = "onnxlr.cli.commands:main"  # in this very process


@cache
def _requests() -> socket.socket:
    """The way to the warm interpreter, which ends when this process does."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    root = Path(__file__).parent.parent.parent
    paths = [str(root), str(root / "passes"), os.environ.get("PYTHONPATH", "")]
    with there:
        interpreter = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm.py")), str(there.fileno())],
            pass_fds=[there.fileno()],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            cwd=root,
            start_new_session=True,
        )
    atexit.register(interpreter.wait, 20)
    atexit.register(here.close)  # before that: the interpreter ends for it
    return here


class Child:
    """A command under way, with the face of a ``subprocess.Popen``."""

    def __init__(self, answers: socket.socket, out: IO[str], err: IO[str]) -> None:
        self._answers, self._out, self._err = answers, out, err
        self.pid = self._answer(60)
        self.returncode: int | None = None

    def _answer(self, timeout: float) -> int:
        self._answers.settimeout(timeout)
        return int(self._answers.recv(100))

    def wait(self, timeout: float) -> int:
        """The exit code, or minus the signal that ended it; TimeoutError if it goes on."""
        if self.returncode is None:
            self.returncode = self._answer(timeout)
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end; what it has printed to standard output and error."""
        self.wait(timeout)
        texts = []
        for stream in (self._out, self._err):
            stream.seek(0)
            texts.append(stream.read())
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None and self.returncode is None:
                os.kill(self.pid, signal.SIGKILL)
            self.wait(60)
        finally:
            for stream in (self._answers, self._out, self._err):
                stream.close()


def start(
    *arguments: str,
    before: Callable[[], object] | None = None,
    session: bool = False,
    patches: Mapping[str, object] | None = None,
    entry: str = COMMAND,
    prints_to: int | None = None,
) -> Child:
    """Start the command in the working folder.

    Parameters
    ----------
    *arguments : str
        After the command's name.
    before : callable, optional
        It is called in the new process first.
    session : bool
        Whether it leads a new session, and so a new process group.
    patches : mapping of str to object, optional
        Values by the dotted names of what they replace, beside short limits and a single core.
    entry : str
        Module and function: ``COMMAND`` or ``UNWATCHED``.
    prints_to : int, optional
        The descriptor of an open file for its standard output, which isn't read then.
    """
    request: dict[str, Any] = {
        "arguments": arguments,
        "before": before,
        "session": session,
        "patches": {
            "onnxlr.api.functions.LIMITS": SHORT,
            "onnxlr.system.pool.usable_cores": partial(int, 1),  # no process helps, unless asked
            **(patches or {}),
        },
        "entry": entry,
        "folder": str(Path.cwd()),
        "environment": dict(os.environ),
    }
    out, err = (tempfile.TemporaryFile("w+", encoding="utf-8") for _ in range(2))  # noqa: SIM115
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with there:
        printed = out.fileno() if prints_to is None else prints_to
        descriptors = [printed, err.fileno(), there.fileno()]
        socket.send_fds(_requests(), [pickle.dumps(request)], descriptors)
    return Child(here, out, err)


def run(*arguments: str, timeout: float = 60, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run the command to its end; the options are those of ``start``."""
    with start(*arguments, **options) as child:
        out, err = child.communicate(timeout)
        assert child.returncode is not None
        return subprocess.CompletedProcess(arguments, child.returncode, out, err)
