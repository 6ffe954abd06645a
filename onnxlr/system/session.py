"""ONNX Runtime sessions: one place that opens them, and says clearly why one can't be opened."""

import contextlib
import importlib.util
import math
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxlr.errors import (
    CrashError,
    ModelError,
    RuntimeMissingError,
    one_line,
)
from onnxlr.system.deadline import TRIAL_VARIABLE, Deadline, trial_seconds

Provider = Literal["cpu", "cuda"]
Feed = Mapping[str, NDArray[Any]]
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_FOLDER = "session.model_external_initializers_file_folder_path"
# A file and line of its source, and the signature of the function there.
_PLACE = re.compile(r"/\S+\.(?:cc|cpp|h):\d+ .*?\)\S* (?:\[with .*?\] )?")
_LISTED = 8  # inputs that a message names
_STOPPING = 10.0  # seconds for a run to notice that it is to end
_SILENT = 4  # fatal only: failures come back as exceptions, and are told once


@dataclass(frozen=True)
class Machine:
    """Where inference runs: execution provider and intra-op threads."""

    provider: Provider = "cpu"
    threads: int = 1


ONE_CPU_THREAD = Machine()


class Session:
    """A model opened in ONNX Runtime, run by name.

    Parameters
    ----------
    model : bytes or path
    machine : Machine
    label : str
        What messages call it.
    folder : str, optional
        Where the external data of a model in bytes lies.
    optimized : bool
        Whether the runtime may rewrite the graph.

    Raises
    ------
    ModelError
        If the runtime refuses the model.
    RuntimeMissingError
        If no runtime is installed or the provider isn't there. A CUDA session that fell back to
        the CPU is an error, not a result.
    """

    def __init__(
        self,
        model: bytes | str | os.PathLike[str],
        machine: Machine,
        label: str = "",
        folder: str | None = None,
        *,
        optimized: bool = True,
    ) -> None:
        wanted = check_runtime(machine)
        runtime = _onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = machine.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _SILENT
        # Idle spinning of one session's threads would slow the session it is compared with.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if folder is not None:
            options.add_session_config_entry(_FOLDER, folder)
        if not optimized:
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.label = label or (str(model) if not isinstance(model, bytes) else "the model")
        self.machine = machine
        whole = model if isinstance(model, bytes) else str(Path(model).absolute())
        self._model, self._folder, self._optimized = whole, folder, optimized
        self._longest = trial_seconds(_size(whole))
        try:
            # Falling back would be told on the standard output, and is none of what was asked for.
            self.raw = runtime.InferenceSession(
                whole, options, providers=[wanted], enable_fallback=0
            )
        except Exception as error:
            raise ModelError(
                f"ONNX Runtime {runtime.__version__} can't open {self.label}: "
                f"{runtime_reason(error)}"
            ) from None
        if self.raw.get_providers()[0] != wanted:
            raise RuntimeMissingError(
                f"ONNX Runtime fell back from {wanted} to {self.raw.get_providers()[0]}: "
                "check the CUDA and cuDNN libraries, or use --provider cpu"
            )
        outputs = self.raw.get_outputs()
        # Sequences and maps can be run and timed, not compared.
        self._tensors = {i: o.name for i, o in enumerate(outputs) if o.type.startswith("tensor(")}
        self._all_tensors = len(self._tensors) == len(outputs)
        self.output_names = tuple(self._tensors.values())

    def __reduce__(self) -> tuple[Any, ...]:
        """Opened again where it arrives."""
        again = partial(Session, optimized=self._optimized)
        return again, (self._model, self.machine, self.label, self._folder)

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """All tensor outputs by name.

        Raises
        ------
        ModelError
            If the model fails on this feed.
        """
        try:
            values = self._run(feed)
        except CrashError:
            raise
        except Exception as error:
            raise run_error(self.label, feed, runtime_reason(error)) from None
        return {name: np.asarray(values[i]) for i, name in self._tensors.items()}

    def _run(self, feed: Feed) -> list[Any]:
        found: list[list[Any]] = []
        self._in_time(lambda options: found.append(self.raw.run(None, dict(feed), options)))
        return found[0]

    def _in_time(self, run: Callable[[Any], None]) -> None:
        """Run in a thread, so that Ctrl-C is heard, and what has no end is stopped."""
        options = _onnxruntime().RunOptions()
        failed: list[BaseException] = []

        def work() -> None:
            try:
                run(options)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=work, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # this user may have no more threads
            run(options)
            return

        def ended(seconds: float) -> bool:
            thread.join(seconds)
            return not thread.is_alive()

        try:
            if not Deadline(self._longest or math.inf).wait(ended):
                raise self._endless()
        except BaseException:
            options.terminate = True
            thread.join(_STOPPING)
            raise
        if failed:
            raise failed[0]

    def _endless(self) -> CrashError:
        return CrashError(
            f"{self.label} ran for {self._longest:.0f} s on these inputs: it may have no end; "
            f"give it more seconds with the environment's {TRIAL_VARIABLE}=600"
        )

    def bind(self, feed: Feed) -> Callable[[], None]:
        """A function that runs the model on this feed with everything bound on the device.

        That is what is timed. It is run once before, watched: what has no end on this feed is told
        here. Watching each run would add to its time: a bound one takes 20 µs more with options.

        Raises
        ------
        CrashError
            If the run has no end.
        ModelError
            If the model fails on this feed.
        """
        run = self._runner(feed)

        def once(options: Any = None) -> None:
            try:
                run(options)
            except RuntimeError as error:  # where a bound output has another shape than declared
                raise run_error(self.label, feed, runtime_reason(error)) from None

        self._in_time(once)
        return once

    def _runner(self, feed: Feed) -> Callable[[Any], None]:
        runtime = _onnxruntime()
        if not self._all_tensors:
            fed = dict(feed)
            return lambda options: self.raw.run(None, fed, options)
        device = "cuda" if self.machine.provider == "cuda" else "cpu"
        binding = self.raw.io_binding()
        for name, array in feed.items():
            binding.bind_ortvalue_input(name, runtime.OrtValue.ortvalue_from_numpy(array, device))
        for name in self.output_names:
            binding.bind_output(name, device)

        def run(options: Any) -> None:
            self.raw.run_with_iobinding(binding, options)
            binding.synchronize_outputs()

        return run


def open_exposed(model: bytes, machine: Machine, label: str, folder: str | None) -> Session:
    """A session of a model that gives out values besides its outputs.

    Some fusions of ONNX Runtime drop a value although it is an output (a Transpose before a Gemm):
    where it refuses the model for that, nothing is fused.

    Raises
    ------
    ModelError
        If the runtime refuses it either way.
    """
    try:
        return Session(model, machine, label, folder)
    except ModelError:
        return Session(model, machine, label, folder, optimized=False)


def _size(model: bytes | str) -> int:
    """Bytes of a model; the external data of one in a file lie beside it."""
    if isinstance(model, bytes):
        return len(model)
    path = Path(model)
    with contextlib.suppress(OSError):
        return sum(p.stat().st_size for p in (path, *path.parent.glob("*.data")))
    return 0


def check_runtime(machine: Machine) -> str:
    """The runtime's own name of the provider asked for.

    Raises
    ------
    RuntimeMissingError
        If no runtime is installed or the provider isn't there.
    """
    runtime = _onnxruntime()
    wanted = _PROVIDERS[machine.provider]
    if wanted not in runtime.get_available_providers():
        raise RuntimeMissingError(
            f"this ONNX Runtime ({runtime.__version__}) has no {wanted}: "
            "pip install 'onnxlr[cuda]' in place of 'onnxlr[cpu]'"
        )
    return wanted


def run_error(label: str, feed: Feed, why: str) -> ModelError:
    """The error for a run that failed on a feed."""
    shapes = [f"{name} {a.dtype}{list(a.shape)}" for name, a in feed.items()]
    if len(shapes) > _LISTED:
        shapes[_LISTED:] = [f"and {len(shapes) - _LISTED} more"]
    return ModelError(f"{label} fails on inputs {', '.join(shapes)}: {why}")


def runtime_version() -> str:
    """ONNX Runtime's version.

    Raises
    ------
    RuntimeMissingError
        If none is installed.
    """
    return str(_onnxruntime().__version__)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        if importlib.util.find_spec("onnxruntime") is not None:
            raise RuntimeMissingError(
                f"ONNX Runtime is installed but can't be imported: {one_line(error)}"
            ) from None
        raise RuntimeMissingError(
            "ONNX Runtime isn't installed: pip install 'onnxlr[cpu]', or 'onnxlr[cuda]' for a GPU"
        ) from None
    onnxruntime.set_default_logger_severity(_SILENT)
    return onnxruntime


def runtime_reason(error: object) -> str:
    """ONNX Runtime's message without its error class and code, and where in its source that was."""
    text = one_line(_PLACE.sub("", str(error)))
    parts = text.split(" : ", 3)
    return parts[3] if text.startswith("[ONNXRuntimeError]") and len(parts) == 4 else text
