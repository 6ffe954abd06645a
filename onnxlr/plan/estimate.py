"""How long the long stages of a run will take, about, before they begin."""

from onnxlr.candidates.fits import Fits
from onnxlr.plan.evaluate import Evaluator
from onnxlr.prepare.samples import Samples
from onnxlr.verify.latency_table import LatencyTable

_TOLD_FROM = 15.0  # seconds
_LAYER_TIMINGS = 6  # of a layer's candidates, usually
_TIMING_SECONDS = 0.25  # of one of them, as most are soon decided, with its two sessions
_BUILDING_SECONDS = 0.3  # of a file that is judged


def estimate(evaluator: Evaluator, fits: Fits, table: LatencyTable | None) -> str | None:
    """A line that says how long the rest takes, and what of it; None where that isn't long.

    It counts what is looked at, by the time that the original took for a sample.
    """
    feeding, judge, limits = evaluator.feeding, evaluator.judge, evaluator.limits
    if feeding is None or judge is None or not isinstance(feeding.choose, Samples):
        return None
    layers, sample = len(fits.by_layer), judge.sample_seconds
    timed = table is not None and table.measures and evaluator.options.goal == "latency"
    samples = evaluator.correction_samples
    # The ladder's other models are mostly of fewer layers, and so many as there is time for.
    others = limits.corrected_rungs + limits.bolder_levels
    whole = evaluator.correction_seconds(samples)
    tested = 0 if feeding.test is None else len(feeding.test)
    stages = {
        "timing candidates": layers * _LAYER_TIMINGS * _TIMING_SECONDS if timed else 0.0,
        "measuring sensitivities": layers * (_BUILDING_SECONDS + 2 * limits.probe_samples * sample),
        "choosing": (limits.trials + limits.rungs)
        * (_BUILDING_SECONDS + len(feeding.choose) * sample),
        "correcting in sequence": whole + min(others * whole / 2, limits.ladder_seconds)
        if samples
        else 0.0,
        "testing": limits.rungs * (_BUILDING_SECONDS + tested * sample),
    }
    total = sum(stages.values())
    if total < _TOLD_FROM:
        return None
    largest = sorted(stages, key=lambda name: -stages[name])[:2]
    parts = " and ".join(f"{name} {_duration(stages[name])}" for name in largest)
    return (
        f"this takes about {_duration(total)}, of which {parts}; less if earlier runs left results "
        "in the cache; --time-limit shortens it"
    )


def _duration(seconds: float) -> str:
    """A rough length of time in words.

    Examples
    --------
    >>> _duration(42.3), _duration(1234.0)
    ('40 s', '21 min')
    """
    if seconds < 100:
        return f"{max(round(seconds, -1), 10):.0f} s" if seconds >= 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"
