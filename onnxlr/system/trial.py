"""A model that is opened and run in the sandbox before ONNX Runtime opens it in this process."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from onnxlr.errors import CrashError, ModelError
from onnxlr.system.deadline import TRIAL_VARIABLE, Deadline, trial_seconds
from onnxlr.system.memory import address_space_used, available_memory
from onnxlr.system.sandbox import SandboxCrashError, run_in_sandbox
from onnxlr.system.session import Feed, Machine, Session

# Bytes of address space for a model besides its own: a large model may hold a multiple of its
# weights, a small one need not.
_LEAST_MEMORY, _USUAL_MEMORY = 2 << 30, 4 << 30
_TIMES_ITS_SIZE = 100
_numbers = itertools.count()


class Trial:
    """A model that is opened and run in the sandbox, where it can do no harm.

    A broken or hostile model may crash ONNX Runtime, run for ever or ask for all memory there is.
    With ``off`` in the environment's ``ONNXLR_TRIAL`` nothing is tried;
    ``ONNXLR_TRIAL=600`` gives 600 seconds to all that is tried.

    Parameters
    ----------
    model : path or bytes
    machine : Machine
    label : str
        What messages call the model.
    nbytes : int
        Size of the model; its time and memory depend on it.

    Raises
    ------
    UsageError
        If ``ONNXLR_TRIAL`` is neither ``off`` nor a number of seconds.
    """

    def __init__(self, model: Path | bytes, machine: Machine, label: str, nbytes: int) -> None:
        self._number = next(_numbers)
        # The sandbox's process may have been started in another folder.
        content = model if isinstance(model, bytes) else str(model.absolute())
        memory = _memory_limit(nbytes) if machine.provider == "cpu" else None  # GPUs map more
        self._session_args = content, machine, label, memory
        self._label = label
        seconds = trial_seconds(nbytes, compiles=machine.compiles)
        self._deadline = None if seconds is None else Deadline(seconds)
        self._timeout: CrashError | None = None

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, *_: object) -> None:
        """Close the session in the sandbox, which frees its memory."""
        if self._timeout is None and self._deadline is not None:
            with contextlib.suppress(CrashError):  # a process that went down holds no memory
                run_in_sandbox(_close_session, task=f"closing {self._label}")

    def open(self) -> None:
        """Open the model in the sandbox.

        Raises
        ------
        CrashError
            If the runtime goes down or takes too long.
        ModelError
            If the runtime refuses it.
        """
        self._try(f"opening {self._label}", None)

    def run(self, feed: Feed) -> None:
        """Run the model in the sandbox, opening it first if it isn't open.

        Raises
        ------
        CrashError
            If the runtime goes down or takes too long; after the latter, every further call raises
            it at once.
        ModelError
            If the runtime refuses the model or the feed.
        """
        self._try(f"running {self._label}", dict(feed))

    def _try(self, task: str, feed: Feed | None) -> None:
        if self._deadline is None:
            return
        if self._timeout is not None:
            raise self._timeout
        try:
            run_in_sandbox(
                _run_session,
                self._number,
                self._session_args,
                feed,
                deadline=self._deadline,
                task=task,
            )
        except SandboxCrashError:
            raise
        except CrashError:  # it is late: noticed here, or by the session in the sandbox
            self._timeout = CrashError(
                f"{task} in ONNX Runtime takes more than {self._deadline.seconds:.0f} s: give "
                "smaller sizes with --shape, or more seconds with the environment's "
                f"{TRIAL_VARIABLE}=600; --verify none runs nothing"
            )
            raise self._timeout from None
        except ModelError as refusal:
            out_of_memory = any(word in str(refusal).lower() for word in ("alloc", "memory"))
            memory = self._session_args[3]
            if not out_of_memory or memory is None:
                raise
            raise ModelError(
                f"{refusal}; it had {memory / 1e9:.1f} GB of memory; {TRIAL_VARIABLE}=off in the "
                "environment tries and limits nothing"
            ) from None
        finally:
            self._deadline.left = max(1.0, self._deadline.left)


def _memory_limit(nbytes: int) -> int:
    """Bytes of address space that a model of this size may take."""
    for_runs = min(available_memory() // 4 * 3, _USUAL_MEMORY + _TIMES_ITS_SIZE * nbytes)
    return max(_LEAST_MEMORY, for_runs) + 3 * nbytes  # files that are mapped count as well


_SESSIONS: dict[int, Session] = {}  # in the sandbox: the session of the current trial


def _run_session(
    number: int, session_args: tuple[str | bytes, Machine, str, int | None], feed: Feed | None
) -> None:
    model, machine, label, memory = session_args
    with _memory_limited(memory):
        if number not in _SESSIONS:
            _SESSIONS.clear()
            _SESSIONS[number] = Session(model, machine, label)
        if feed is not None:
            _SESSIONS[number].run(feed)


def _close_session() -> None:
    _SESSIONS.clear()


@contextlib.contextmanager
def _memory_limited(memory: int | None) -> Iterator[None]:
    """Limit the address space to what is used now and ``memory`` bytes more.

    A model that asks for more then fails to get it, before the system kills processes.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        memory = None
    used = address_space_used()
    if memory is None or used is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = min(x for x in (used + memory, soft, hard) if x != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
