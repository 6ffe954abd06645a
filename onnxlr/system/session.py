"""ONNX Runtime sessions: the one place that opens and runs them, and explains their failures."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxlr.errors import CrashError, ModelError, RuntimeMissingError
from onnxlr.system.aside import call_aside
from onnxlr.system.deadline import TRIAL_VARIABLE, Deadline, trial_seconds
from onnxlr.system.engines import engine_options
from onnxlr.system.native_log import logged_error, native_stderr
from onnxlr.system.placement import can_record, check_placement, record_placement
from onnxlr.system.providers import (
    CPU,
    Libraries,
    Options,
    check_offered,
    give_providers,
    thread_options,
)
from onnxlr.system.runtime import LOG_FATAL, import_runtime, runtime_reason, runtime_version

Feed = Mapping[str, NDArray[Any]]
_ON_CUDA = ("cuda", "tensorrt", "nvtensorrtrtx")  # providers whose inputs can be there already
_FOLDER = "session.model_external_initializers_file_folder_path"
_MOST_INPUTS = 8  # that a message names
# What the runtime says of operators that it doesn't know, or not for these types.
NO_KERNEL = ("Could not find an implementation", "not a registered function/op", "No Op registered")
_STOP_SECONDS = 10.0  # for a run to notice that it is to end


@dataclass(frozen=True)
class Machine:
    """Where inference runs.

    Attributes
    ----------
    provider : str
        Short names of the execution providers, in order, with commas between them.
    threads : int
        Within one operator.
    options : tuple
        What providers are given besides, by their short names.
    libraries : tuple
        Names and paths of the libraries that bring providers.
    """

    provider: str = CPU
    threads: int = 1
    options: Options = ()
    libraries: Libraries = ()

    def __repr__(self) -> str:  # it is part of keys in the cache, which plain machines keep
        more = "".join(
            f", {name}={value!r}"
            for name, value in (("options", self.options), ("libraries", self.libraries))
            if value
        )
        return f"Machine(provider={self.provider!r}, threads={self.threads}{more})"

    @property
    def providers(self) -> tuple[str, ...]:
        """The short names of the providers."""
        return tuple(self.provider.split(","))

    @property
    def compiles(self) -> bool:
        """Whether a model may be compiled as a whole, in which nodes no longer run one by one."""
        return self.providers[0] not in (CPU, "cuda")


ONE_CPU_THREAD = Machine()


class Session:
    """A model opened in ONNX Runtime.

    Parameters
    ----------
    model : bytes or path
    machine : Machine
    label : str
        What messages call the model.
    folder : str, optional
        The folder of the external data, if the model is given as bytes.
    optimized : bool
        Whether the runtime may rewrite the graph.

    Attributes
    ----------
    raw : onnxruntime.InferenceSession
    content, folder : bytes or str, and str or None
        The model or the path of its file, and the folder of its external data.
    opening_seconds : float
        What opening took; a provider may compile the model then.
    output_names : tuple of str
        Names of the outputs that are tensors; sequences and maps can be run, not compared.

    Raises
    ------
    ModelError
        If the runtime refuses the model, or nodes fall back to the CPU, which isn't named.
    RuntimeMissingError
        If no runtime is installed or a provider isn't there. A session that fell back from one as
        a whole is an error, not a result.
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
        chosen = check_offered(machine.providers, machine.libraries)
        runtime = import_runtime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = machine.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = LOG_FATAL
        # Idle spinning of one session's threads would slow the session it is compared with.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if folder is not None:
            options.add_session_config_entry(_FOLDER, folder)
        if not optimized:
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.label = label or (str(model) if not isinstance(model, bytes) else "the model")
        self.machine = machine
        content = model if isinstance(model, bytes) else str(Path(model).absolute())
        self.content, self.folder, self._optimized = content, folder, optimized
        self._time_limit = trial_seconds(_nbytes(content), compiles=machine.compiles)
        started = time.perf_counter()
        self.raw = self._open(options, chosen)
        self.opening_seconds = time.perf_counter() - started
        self._absent = {
            i.name: None for i in self.raw.get_inputs() if i.type.startswith("optional(")
        }
        outputs = self.raw.get_outputs()
        self._tensors = {i: o.name for i, o in enumerate(outputs) if o.type.startswith("tensor(")}
        self._all_tensors = len(self._tensors) == len(outputs)
        self.output_names = tuple(self._tensors.values())

    def _open(self, settings: Any, chosen: Sequence[str]) -> Any:
        """Open the model on these providers, given by ONNX Runtime's names, and on no others."""
        machine, named = self.machine, dict(self.machine.options)
        given = {
            name: thread_options(name, machine.threads)
            | engine_options(name, self.content, repr(machine))
            | dict(named.get(name, ()))
            for name in machine.providers
        }
        watched = CPU not in machine.providers
        if watched:
            record_placement(settings)
        reads_log = watched and not can_record()
        try:
            # Another provider isn't what the user asked for, and the runtime would print about it.
            more = give_providers(settings, chosen, given) | {"enable_fallback": 0}
            open_it = partial(import_runtime().InferenceSession, self.content, settings, **more)
            with native_stderr() if reads_log else contextlib.nullcontext(lambda: "") as log:
                raw = open_it()
                text = log()
        except Exception as error:
            raise ModelError(
                f"ONNX Runtime {runtime_version()} can't open {self.label}: {runtime_reason(error)}"
            ) from None
        if absent := [name for name in chosen if name not in raw.get_providers()]:
            reason = logged_error(open_it)
            raise RuntimeMissingError(
                f"ONNX Runtime fell back from {absent[0]} to {raw.get_providers()[0]}"
                f"{f' ({reason})' if reason else ''}: check the options of the provider and the "
                "libraries that it needs, or use --provider cpu"
            )
        if watched:
            check_placement(raw, text, self.content, self.label, machine.providers)
        return raw

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments: the session is opened again in the process that unpickles it."""
        open_again = partial(Session, optimized=self._optimized)
        return open_again, (self.content, self.machine, self.label, self.folder)

    def declared_shape(self, name: str) -> list[int | str | None]:
        """What the model declares of an output's axes: sizes, symbols or nothing."""
        return next(list(o.shape) for o in self.raw.get_outputs() if o.name == name)

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run the model on named inputs; returns all tensor outputs by name.

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
        outputs: list[list[Any]] = []
        self._run_in_time(
            lambda options: outputs.append(self.raw.run(None, self._absent | dict(feed), options))
        )
        return outputs[0]

    def _run_in_time(self, run: Callable[[Any], None]) -> None:
        """Call ``run`` in a thread: Ctrl-C is answered meanwhile, and a run without end stopped."""
        options = import_runtime().RunOptions()
        deadline = Deadline(self._time_limit or math.inf)
        stop = partial(setattr, options, "terminate", True)
        if not call_aside(partial(run, options), deadline, stop, _STOP_SECONDS):
            raise self._late_error()

    def _late_error(self) -> CrashError:
        return CrashError(
            f"{self.label} ran for {self._time_limit:.0f} s on these inputs: it may have no end; "
            f"give it more seconds with the environment's {TRIAL_VARIABLE}=600"
        )

    def bind(self, feed: Feed) -> Callable[[], None]:
        """Bind a feed on the device; returns a function that runs the model on it, to be timed.

        The model is run here with a time limit, which shows whether it comes to an end on this
        feed. The function itself has none: run options add 20 µs to each bound run.

        Raises
        ------
        CrashError
            If the run has no end.
        ModelError
            If the model fails on this feed.
        """
        if not self._all_tensors or self._absent or any(a.dtype == object for a in feed.values()):
            self.run(feed)
            return self._plain_run(feed)
        binding = self._binding(feed)

        def run(options: Any = None) -> None:
            self.raw.run_with_iobinding(binding, options)
            binding.synchronize_outputs()

        try:
            self._run_in_time(run)
            if not self._as_declared(binding.get_outputs()):
                # What this run gave is where the next one writes: it fails for outputs of another
                # shape than the model declares, of which the runtime only warns otherwise.
                self._run_in_time(run)
        except RuntimeError:
            self.run(feed)
            return self._plain_run(feed)
        return run

    def _plain_run(self, feed: Feed) -> Callable[[], None]:
        inputs = self._absent | dict(feed)
        return lambda: self.raw.run(None, inputs)

    def _as_declared(self, outputs: Sequence[Any]) -> bool:
        """Whether outputs have the numbers of axes that the model declares, and its fixed sizes."""
        declared = {d.name: d.shape for d in self.raw.get_outputs()}  # what is listed twice, once
        pairs = [(o.shape(), d) for o, d in zip(outputs, declared.values(), strict=True)]
        return all(
            len(shape) == len(sizes)
            and all(d == n for n, d in zip(shape, sizes, strict=True) if isinstance(d, int))
            for shape, sizes in pairs
        )

    def _binding(self, feed: Feed) -> Any:
        """A feed on the device, and outputs that stay there."""
        runtime = import_runtime()
        device = "cuda" if self.machine.providers[0] in _ON_CUDA else "cpu"
        binding = self.raw.io_binding()
        for name, array in feed.items():
            binding.bind_ortvalue_input(name, runtime.OrtValue.ortvalue_from_numpy(array, device))
        for name in self.output_names:
            binding.bind_output(name, device)
        return binding


def open_exposed(model: bytes, machine: Machine, label: str, folder: str | None) -> Session:
    """Open a session of a model whose inner values were made outputs.

    Some fusions of ONNX Runtime drop a value although it is an output (a Transpose before a Gemm).
    Where the runtime refuses the model for that, it is opened without graph optimization.

    Raises
    ------
    ModelError
        If the runtime refuses it either way.
    """
    try:
        return Session(model, machine, label, folder)
    except ModelError:
        return Session(model, machine, label, folder, optimized=False)


def _nbytes(model: bytes | str) -> int:
    """Size of a model in bytes, with the data files beside it if it is a path."""
    if isinstance(model, bytes):
        return len(model)
    path = Path(model)
    with contextlib.suppress(OSError):
        return sum(p.stat().st_size for p in (path, *path.parent.glob("*.data")))
    return 0


def run_error(label: str, feed: Feed, reason: str) -> ModelError:
    """The error for a run that failed: it names the shapes of the inputs and the reason."""
    shapes = [f"{name} {a.dtype}{list(a.shape)}" for name, a in feed.items()]
    if len(shapes) > _MOST_INPUTS:
        shapes[_MOST_INPUTS:] = [f"and {len(shapes) - _MOST_INPUTS} more"]
    return ModelError(f"{label} fails on inputs {', '.join(shapes)}: {reason}")
