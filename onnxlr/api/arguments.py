"""The arguments of the public functions: refused where they make no sense, else as values."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from onnxlr.behind.step import Behind, Given, parse_behind
from onnxlr.errors import UsageError
from onnxlr.model.load import Model, Source
from onnxlr.options import Ingredient, Target, Verify
from onnxlr.plan.plan import Plan
from onnxlr.system.in_memory import Data
from onnxlr.system.process import can_start_threads
from onnxlr.system.providers import CPU, parse_libraries, parse_options, parse_providers
from onnxlr.system.session import Machine

FileName = str | os.PathLike[str]


def as_tuple(names: str | Sequence[str]) -> tuple[str, ...]:
    """One name, or several, as a tuple."""
    return (names,) if isinstance(names, str) else tuple(names)


def path_of(model: Model) -> FileName | None:
    """The path that a model was named by; None for one in memory."""
    if isinstance(model, Source):
        return model.path
    return model if isinstance(model, (str, os.PathLike)) else None


def parse_target(text: str | None) -> tuple[Target | None, float | None]:
    """What is to be saved, and the fraction of the original's that it is to come down to.

    Raises
    ------
    UsageError
        If the target is unknown, or its fraction isn't a number between 0 and 1.

    Examples
    --------
    >>> parse_target("macs=0.5"), parse_target("latency"), parse_target(None)
    (('macs', 0.5), ('latency', None), (None, None))
    """
    if text is None:
        return None, None
    name, equals, share = text.partition("=")
    try:
        fraction = float(share) if equals else None
    except ValueError:
        fraction = math.nan
    if name not in get_args(Target) or (fraction is not None and not 0 < fraction < 1):
        raise UsageError(
            f"--target {text!r} is unknown: latency, macs, params or bytes, or one of them with a "
            "fraction between 0 and 1 (macs=0.5)"
        )
    return name, fraction  # type: ignore[return-value]


def parse_verify(text: str) -> Verify:
    """How much is verified.

    Raises
    ------
    UsageError
        If it is none of ``full``, ``layers`` and ``none``.
    """
    if text not in get_args(Verify):
        raise UsageError(f"--verify {text!r} is unknown: full, layers or none")
    return text  # type: ignore[return-value]


def parse_max_drop(loss: float | None) -> float | None:
    """The largest loss of the metric that is allowed; 1 is infinity, None stays None.

    The metrics are shares and relative errors: 1 is promised to be no limit at all.

    Raises
    ------
    UsageError
        If it is negative, not a number, or above 1, which is most likely meant in percent.
    """
    if loss is None:
        return None
    if not loss >= 0:
        raise UsageError(f"--max-drop {loss} is not a loss: give 0 or more, 1 = no limit")
    if 1 < loss < float("inf"):
        raise UsageError(
            f"--max-drop {loss:g} is more than everything, since losses are parts of 1: for "
            f"{loss:g} points write {loss / 100:g}, for no limit 1"
        )
    return float("inf") if loss >= 1 else float(loss)


def check_slowdown(share: float | None) -> None:
    """Refuse a slow-down that is none.

    Raises
    ------
    UsageError
        If it is negative, or not a number.
    """
    if share is not None and not share >= 0:
        raise UsageError(f"--max-slowdown {share} isn't a share of the time: give 0 or more")


def check_confidence(confidence: float | None, data: object, metric: str | None) -> None:
    """Refuse a confidence that is none, or that nothing could be shown with.

    Raises
    ------
    UsageError
        If it isn't between 0 and 1, or there are neither samples nor a metric of the user's.
    """
    if confidence is None:
        return
    if not 0 < confidence < 1:
        raise UsageError(
            f"--confidence {confidence} is out of range: give a number between 0 and 1"
        )
    if data is None and (metric is None or ":" not in metric):
        raise UsageError(
            f"--confidence {confidence:g} needs samples to test on: name them with --data"
        )


def parse_ingredients(names: str | Sequence[str]) -> tuple[Ingredient, ...]:
    """The ingredients that are left out.

    Raises
    ------
    UsageError
        For one that doesn't exist.
    """
    ingredients = as_tuple(names)
    choices = get_args(Ingredient)
    for name in ingredients:
        if name not in choices:
            raise UsageError(f"--without {name!r} is unknown: choose from {', '.join(choices)}")
    return ingredients  # type: ignore[return-value]


def parse_machine(
    provider: str | Sequence[str] = CPU,
    threads: int = 1,
    batch: int = 1,
    seed: int = 0,
    *,
    options: str | Sequence[str] = (),
    libraries: str | Sequence[str] = (),
) -> Machine:
    """The machine to run on, once the batch and the seed are in their ranges too.

    Parameters
    ----------
    provider : str or sequence of str
        Execution providers in order, also several in one string with commas between them.
    threads, batch, seed : int
    options, libraries : str or sequence of str
        As ``--provider-option`` and ``--provider-library`` take them.

    Raises
    ------
    UsageError
        If a provider is unknown, an option or a library has another form, a number is out of its
        range, or this user may not have so many threads.
    RuntimeMissingError
        If a library can't be used.
    """
    found = parse_libraries(as_tuple(libraries))
    names = parse_providers(as_tuple(provider), found)
    given = parse_options(as_tuple(options), names)
    for flag, number, least, most in (
        ("--threads", threads, 1, 1024),
        ("--batch", batch, 1, 1 << 20),
        ("--seed", seed, 0, 2**63),
    ):
        if not least <= number <= most:
            raise UsageError(f"{flag} {number} must be at least {least} and at most {most}")
    # Here, and in the process beside this one; ONNX Runtime waits for ever for those it can't have.
    if threads > 1 and not can_start_threads(2 * threads):
        raise UsageError(
            f"--threads {threads}: this user may not have so many more threads (ulimit -u, or the "
            "container's limit of pids): name fewer, or raise the limit"
        )
    return Machine(",".join(names), int(threads), given, found)


def check_jobs(jobs: int | None) -> None:
    """Refuse a number of processes that is none.

    Raises
    ------
    UsageError
        If it isn't between 1 and 1024.
    """
    if jobs is not None and not 1 <= jobs <= 1024:
        raise UsageError(f"--jobs {jobs} must be at least 1 and at most 1024")


def parse_time_limit(seconds: float | None) -> float:
    """How long a run should take at most; infinity for no limit.

    Raises
    ------
    UsageError
        If it isn't more than 0.
    """
    if seconds is None:
        return math.inf
    if not seconds > 0:
        raise UsageError(f"--time-limit {seconds} is out of range: give more than 0 seconds")
    return float(seconds)


def check_seconds(seconds: float) -> None:
    """Refuse a length of a benchmark that is none.

    Raises
    ------
    UsageError
        If it isn't more than 0 and at most a day.
    """
    if not 0 < seconds <= 86_400:
        raise UsageError(f"--seconds {seconds} is out of range: give more than 0, up to a day")


def check_rank(rank: str | int, target: str | None, fraction: float | None) -> None:
    """Refuse to name a rank beside a fraction, which chooses the ranks.

    Raises
    ------
    UsageError
        If there is a fraction, and the rank isn't ``auto``.
    """
    if fraction is not None and str(rank) != "auto":
        raise UsageError(
            f"--target {target} chooses the ranks, --rank {rank} names them: leave one out"
        )


def check_runs_whole(
    verify: Verify,
    target: Target | None,
    fraction: float | None,
    labels: str | None,
    metric: str | None,
    confidence: float | None,
    data: Data | None,
    validation: Data | None,
    latency_table: str | Path | None,
    behind: object,
) -> None:
    """Refuse what needs the whole model to be run, or anything, where ``verify`` runs less.

    Raises
    ------
    UsageError
        For the first of these arguments that has a value and needs such a run.
    """
    if verify == "full":
        return
    nothing_runs = verify == "none"
    for flag, value in {
        "--data": data if nothing_runs else None,
        "--validation": validation if nothing_runs else None,
        "--labels": labels,
        "--metric": metric,
        "--confidence": confidence,
        "--behind": behind,
        "--target latency": target if target == "latency" and nothing_runs else None,
        "--target with a fraction": fraction,
        "--latency-table": latency_table if nothing_runs else None,
    }.items():
        if value is not None:
            raise UsageError(
                f"--verify {verify} judges no whole model, {flag} needs a run: leave one out"
            )


def parse_step(behind: Given | None, out: FileName | None, data: object) -> Behind | None:
    """The step of ``--behind``.

    Raises
    ------
    UsageError
        If there is no such step, it needs samples that aren't there, or its file is asked for
        without a step.
    """
    step = parse_behind(behind)
    if step is None and out is not None:
        raise UsageError(f"--behind-out {out} needs a step that makes it: name one with --behind")
    if step is not None and step.calibrates and data is None:
        raise UsageError(f"--behind {step} needs samples to calibrate on: name them with --data")
    return step


def check_remeasure(remeasure: bool, measure: bool, verify: Verify) -> None:
    """Refuse to measure anew where nothing is measured.

    Raises
    ------
    UsageError
        If nothing is measured, or run.
    """
    if remeasure and not (measure and verify != "none"):
        other = f"--verify {verify}" if measure else "--no-measure"
        raise UsageError(f"--remeasure times anew, {other} times nothing: leave one out")


def read_plan(plan: FileName) -> Plan:
    """A plan from the file that ``--plan-out`` wrote.

    Raises
    ------
    UsageError
        If it can't be read, or isn't a plan.
    """
    try:
        if Path(plan).exists() and not Path(plan).is_file():
            raise UsageError(f"the plan {plan} is not a regular file: name one of --plan-out")
        text = Path(plan).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # not UTF-8, or no name at all
        raise UsageError(f"can't read the plan {plan}: {error}") from None
    return Plan.from_json(text, str(plan))
