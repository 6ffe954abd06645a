"""An interpreter that has imported what the command needs, and forks a process for each command.

Run as a script it is that interpreter. Tests that aren't about how the command starts take
``start`` and ``run`` of ``tests.support.commands`` in place of ``subprocess``.
"""

import atexit
import contextlib
import os
import pickle
import signal
import socket
import sys
from importlib import import_module
from typing import Any, NoReturn

MODULES = (
    *("onnxlr.__main__", "onnxlr.cli.commands", "onnxlr.jobs.pipeline", "onnxlr_passes.svd"),
    *("joblib.externals.loky", "onnxruntime", "scipy.optimize"),
)


def serve(requests: socket.socket) -> None:
    """Fork a process for every request until whoever asks is gone."""
    for name in MODULES:
        import_module(name)
    assert "matplotlib" not in sys.modules  # it reads what is around as it is imported
    while True:
        content, descriptors, *_ = socket.recv_fds(requests, 1 << 20, 4)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, 0 if not content else os.WNOHANG)[0]:
                pass  # one that waited for a command has ended
        if not content:
            return
        if os.fork() == 0:
            requests.close()
            _run(pickle.loads(content), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _run(request: dict[str, Any], out: int, err: int, answers: int) -> NoReturn:
    """Say which process runs the command, wait for it, and say how it ended."""
    child = os.fork()
    if child == 0:
        os.close(answers)
        _become(request, out, err)
    os.close(out)
    os.close(err)
    os.write(answers, b"%d" % child)
    status = os.waitpid(child, 0)[1]
    os.write(answers, b"%d" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _become(request: dict[str, Any], out: int, err: int) -> NoReturn:
    """Make of this process what a new one would be, run the command, and end."""
    if request["session"]:
        os.setsid()
    for descriptor, number in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.dont_write_bytecode = True
    sys.argv[:] = ["onnxlr", *request["arguments"]]
    sys.path[0] = request["folder"]
    from onnxlr.system.signals import END_SIGNALS

    for number in END_SIGNALS:  # tests that a shell began in the background ignore some
        default = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if default else signal.SIG_DFL)
    for name, value in request["patches"].items():
        module, _, attribute = name.rpartition(".")
        setattr(import_module(module), attribute, value)
    if request["before"] is not None:
        request["before"]()
    module, name = request["entry"].split(":")
    code: Any = 1
    try:
        getattr(import_module(module), name)()
    except SystemExit as end:
        code = end.code or 0
    finally:  # without what libraries do at the end of a process: they wait for lost threads
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as _requests:
        serve(_requests)
