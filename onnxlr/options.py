"""The options of a run as one value, and the command line that asks for the same."""

import math
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from onnxlr.behind.step import Behind
from onnxlr.decompose import AUTO, RankRule
from onnxlr.limits import USUAL, Limits
from onnxlr.system.in_memory import Data
from onnxlr.system.session import ONE_CPU_THREAD, Machine

Target = Literal["latency", "macs", "params", "bytes"]
Verify = Literal["full", "layers", "none"]
Ingredient = Literal["data", "sensitivity", "sequential", "widths"]


@dataclass(frozen=True)
class Options:
    """The options of one run of ``optimize``; ``onnxlr.optimize`` explains each.

    Attributes
    ----------
    methods : tuple of str
    rank : RankRule
    target : str or None
        None if the user named none: latency then, except that named ranks are written as named
        and latency vetoes nothing.
    fraction : float or None
        The share of the original's that the target is to come down to.
    metric : str or None
    max_drop : float or None
        Infinity for no limit; None for the usual one of the metric.
    confidence : float or None
        With which the limit is shown to hold; None for 95%, or the highest that the samples allow.
    include, exclude : str or None
    machine : Machine
    batch : int
    shapes : tuple of str
    data, validation, labels : str or path, or None
    verify : str
    expand_at_load : bool
    behind : Behind or None
        A step that will follow: files are judged and timed after it.
    behind_out : str, Path or None
        Where the file after that step goes.
    measure : bool
        Whether anything is timed; latencies are estimated otherwise.
    remeasure : bool
        Whether what is timed is timed anew, whatever earlier runs had found.
    latency_table : str or Path or None
        A file of latencies to use in place of this machine's.
    without : tuple of str
        Ingredients that are left out, to see what they bring.
    seed : int
    jobs : int or None
        Number of processes; None for as many as there are cores.
    dask : str or None
        Address of a scheduler whose workers do what can be done side by side.
    report : str, Path or None
        Where the HTML report goes.
    command : str
        The command line that asks for the same, for the report.
    time_limit : float
        Seconds that the run should not exceed; infinity for no limit.
    limits : Limits
        How much effort the run makes.
    """

    methods: tuple[str, ...] = ("auto",)
    rank: RankRule = AUTO
    target: Target | None = None
    fraction: float | None = None
    metric: str | None = None
    max_drop: float | None = None
    confidence: float | None = None
    include: str | None = None
    exclude: str | None = None
    machine: Machine = ONE_CPU_THREAD
    batch: int = 1
    shapes: tuple[str, ...] = ()
    data: Data | None = None
    validation: Data | None = None
    labels: str | None = None
    verify: Verify = "full"
    expand_at_load: bool = False
    behind: Behind | None = None
    behind_out: str | Path | None = None
    measure: bool = True
    remeasure: bool = False
    latency_table: str | Path | None = None
    without: tuple[Ingredient, ...] = ()
    seed: int = 0
    jobs: int | None = None
    dask: str | None = None
    report: str | Path | None = None
    command: str = ""
    time_limit: float = math.inf
    limits: Limits = USUAL

    @property
    def goal(self) -> Target:
        """The target; latency if the user named none."""
        return self.target or "latency"

    @property
    def latency_vetoes(self) -> bool:
        """Whether a replacement that isn't faster than its layer is put back."""
        if self.verify == "none" or self.fraction is not None:
            return False
        return self.target == "latency" or (self.target is None and self.rank.kind == "auto")


# Flags with other names than their fields.
_FLAGS = {"methods": "--method", "shapes": "--shape"}


def command_of(options: Options, model: object, out: object) -> str:
    """The command line that asks for these options, by the flags that aren't at their defaults.

    Parameters
    ----------
    options : Options
    model, out : path or any object
        What isn't a path is called ``<model>``.

    Examples
    --------
    >>> command_of(Options(max_drop=0.02, measure=False), "in.onnx", "out.onnx")
    'onnxlr optimize in.onnx out.onnx --max-drop 0.02 --no-measure'
    """
    words = [str(x) if isinstance(x, (str, Path)) else "<model>" for x in (model, out)]
    words = ["onnxlr", "optimize", *words]
    defaults = Options()
    for item in fields(options):
        value = getattr(options, item.name)
        if value == getattr(defaults, item.name) or item.name in ("fraction", "command", "limits"):
            continue
        words += _flag(options, item.name, value)
    return shlex.join(words)


def _flag(options: Options, name: str, value: object) -> list[str]:
    """The words that set a field to a value."""
    flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
    if name == "machine":
        return _machine_flags(options.machine)
    if name == "target" and options.fraction is not None:
        return [flag, f"{value}={options.fraction:g}"]
    if name == "measure":
        return ["--no-measure"]
    if name == "max_drop" and value == float("inf"):
        return [flag, "1"]
    if value is True:
        return [flag]
    if isinstance(value, tuple):
        return [word for part in value for word in (flag, str(part))]
    return [flag, str(value)]


def _machine_flags(machine: Machine) -> list[str]:
    """The words for a machine."""
    words = ["--provider", machine.provider] if machine.provider != ONE_CPU_THREAD.provider else []
    for name, pairs in machine.options:
        owner = "" if name == machine.providers[0] else f"{name}:"
        words += [w for k, v in pairs for w in ("--provider-option", f"{owner}{k}={v}")]
    for name, path in machine.libraries:
        words += ["--provider-library", f"{name}={path}"]
    return [*words, *(["--threads", str(machine.threads)] if machine.threads != 1 else [])]
