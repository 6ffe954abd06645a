"""Judging a saved model beside the original: the user's metric, and numerical fidelity."""

import time
import uuid
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxlr.errors import DataError, ModelError, UsageError
from onnxlr.prepare.samples import Samples
from onnxlr.system.session import Feed, Machine, Session
from onnxlr.verify.batches import Batch, batches_of, workable_batch
from onnxlr.verify.confidence import Kind
from onnxlr.verify.defaults import MetricChoice, choose_default, named_metric
from onnxlr.verify.draws import Draws, differ
from onnxlr.verify.endings import Ending
from onnxlr.verify.fidelity import (
    Classes,
    Fidelity,
    Outputs,
    Quality,
    Spread,
    Totals,
    outputs_of_numbers,
)
from onnxlr.verify.metrics import METRICS, Tally, changes
from onnxlr.verify.profile import Profile
from onnxlr.verify.user_metric import UserMetric

_ORIGINAL = "original"  # the model of this name, to a user's metric
_REFERENCE_BUDGET = 256 << 20  # bytes of the original's outputs kept between judgements


class Judge:
    """Runs candidates on fixed samples and compares them with the original.

    Parameters
    ----------
    original : Session
    samples : Samples or sequence of feeds
        The user's validation samples, or synthetic feeds.
    metric : str, UserMetric or None
        One of ``METRICS``, the user's (also as ``module:function``), or None for what fits the
        original's outputs on these samples (``choose_default``).
    scale : float or None
        What a sample may lose at most by such a metric; by default what the original's values
        span, and 1 where they lie between 0 and 1.
    seen : float
        The largest difference of a sample by it that models showed, as ``Losses`` takes it.
    ends : mapping of str to Ending, optional
        How each output is made, which counts without a metric.

    Attributes
    ----------
    original : Session
    choice : MetricChoice
        The metric with its usual limit, and why it was chosen.
    user : UserMetric or None
        The metric, where it is the user's.

    Raises
    ------
    UsageError
        If the metric is none of these or its function can't be imported.
    DataError
        If it needs labels or class scores that aren't there.
    """

    def __init__(
        self,
        original: Session,
        samples: Samples | Sequence[Feed],
        metric: str | UserMetric | None,
        *,
        scale: float | None = None,
        seen: float = 0.0,
        ends: Mapping[str, Ending] | None = None,
    ) -> None:
        self._token = uuid.uuid4().hex
        self.original = original
        self._samples = samples
        self._batch = workable_batch(original, samples)
        self._draws: Draws | None = None
        self._references: list[Outputs] | None = []
        self._spreads: dict[str, Spread] = {}
        self.labels = samples.labels if isinstance(samples, Samples) else None
        self._classes = Classes(())
        wanted = metric is None or self.labels is not None
        self._profiles: dict[str, Profile] | None = {} if wanted else None
        started = time.perf_counter()
        self._measure_original()
        self._seconds = time.perf_counter() - started
        self.user = UserMetric(metric) if isinstance(metric, str) and ":" in metric else None
        if isinstance(metric, UserMetric):
            self.user, metric = metric, metric.name
        self.choice = self._default_metric(ends or {}) if metric is None else named_metric(metric)
        self.metric = self.choice.name
        if self.user is None:
            self._check(self.metric)
        self._baseline: NDArray[np.float64] | None = None
        self._scale = scale
        self._seen = seen

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process as what it was made of; made there once."""
        # Fidelity is what is asked of it there, where the user's module need not be.
        metric = "rel-error" if self.user is not None else self.metric
        return _judge, (self._token, self.original, self._samples, metric)

    @property
    def sample_seconds(self) -> float:
        """Seconds that the original took for a sample."""
        return self._seconds / max(self._count, 1)

    @property
    def machine(self) -> Machine:
        """Where the original runs, and a candidate has to."""
        return self.original.machine

    @property
    def has_class_vector(self) -> bool:
        """Whether an output is one vector of class scores a sample."""
        return self._classes.one_vector

    @property
    def may_reshape(self) -> bool:
        """Whether outputs of other shapes than the original's can be judged: by labels, or by what
        the user's metric makes of them.
        """
        return self.user is not None or (self.metric == "agreement" and bool(self._classes.labels))

    @property
    def random_line(self) -> str:
        """That two runs of the original differ, and how it is judged; empty where they don't."""
        return "" if self._draws is None else self._draws.line

    @property
    def doubt(self) -> str | None:
        """Why labels and class scores seem not to belong together; None if they do."""
        if self.metric != "top1" or not self._profiles or self._classes.output is None:
            return None
        return self._profiles[self._classes.output].doubt

    @property
    def sees_nothing(self) -> bool:
        """Whether the original's outputs are all NaN or infinite, as a ruined model's are."""
        spreads = self._spreads.values()
        return (
            self.user is None
            and any(spread.size for spread in spreads)
            and not any(spread.finite for spread in spreads)
        )

    @property
    def kind(self) -> Kind | None:
        """What a sample loses by the metric; None where samples can't be told apart by it."""
        if self.user is not None:
            values = self._values_before(self.user)
            if values.ndim == 0:
                return None
            whole = bool(np.isin(values, (0.0, 1.0)).all())
            graded = not whole or self.user.is_graded(self._begun(self.original))
            return "differences" if graded else "pairs"
        if self.metric == "top1":
            return "pairs"
        if self.metric == "agreement" and self._classes.one_answer:
            return "shares"
        return "errors" if self._apart else None

    @property
    def rest(self) -> int:
        """Of a user's metric that gives a number for each sample, how many aren't judged here."""
        return 0 if self.user is None else self.user.rest

    @property
    def scale(self) -> float | None:
        """What a sample may lose at most by a user's metric; None before anything was judged."""
        return self._scale

    def judge(self, candidate: Session, model: Hashable = None) -> Quality:
        """Run a candidate on every sample.

        Parameters
        ----------
        candidate : Session
        model : hashable, optional
            What tells its model from others: a user's metric is measured once for each.
        """
        totals = {name: Totals() for name in self._spreads}
        classes = self._classes
        tally = Tally(self.metric, classes, self.labels, self._spreads, self._count)
        agree = count = 0
        divergence = 0.0
        running = self._begun(candidate)
        beside = self._begun(self.original) if self._references is None else self.original
        for i, batch in enumerate(batches_of(self._samples, self._batch)):
            before = self._reference(i, batch, beside)
            after = batch.run(running)
            for name, total in totals.items():
                total.add(before[name], after.get(name))
            if classes.answered:
                changed = classes.changed(before, after)
                count += sum(c.size for c in changed)
                agree += sum(int(np.count_nonzero(~c)) for c in changed)
            if classes.output is not None and classes.one_vector:
                divergence += classes.divergence(before[classes.output], after[classes.output])
            if self.user is None:
                tally.add(before, after, batch.samples, batch.index)
        shown = classes.one_answer or self.metric == "agreement"
        fidelity = Fidelity(
            max(t.rel_error(self._spreads[n].norm2()) for n, t in totals.items()),
            min(t.cosine() for t in totals.values()),
            agree / count if count and shown else None,
            divergence / count if count and classes.one_vector else None,
            all(t.same_shape for t in totals.values()),
        )
        if self.user is not None:
            return self._by_user(self.user, candidate, model, fidelity)
        # Synthetic inputs are no samples of anything: what is lost on each says nothing of others.
        losses = tally.losses() if isinstance(self._samples, Samples) else ()
        return Quality(self.metric, *tally.values(fidelity), fidelity, losses)

    def _by_user(
        self, metric: UserMetric, candidate: Session, model: Hashable, fidelity: Fidelity
    ) -> Quality:
        """The quality by a user's metric."""
        if candidate is self.original:
            model = _ORIGINAL
        before, after = self._values_before(metric), metric(self._begun(candidate), model)
        if before.shape != after.shape:
            raise DataError(
                f"the metric {metric.name} gave {before.size} numbers for the original and "
                f"{after.size} for the optimized model: it must give one for each of its samples"
            )
        values = float(before.mean()), float(after.mean())
        if before.ndim == 0:
            return Quality(self.metric, *values, fidelity)
        if self._scale is None:
            within = before.min() >= 0 and before.max() <= 1
            self._scale = 1.0 if within else float(np.ptp(before)) or 1.0
        losses = changes(before, after, self._scale, self._seen)
        return Quality(self.metric, *values, fidelity, (losses,))

    def _values_before(self, metric: UserMetric) -> NDArray[np.float64]:
        """What a user's metric gives for the original."""
        if self._baseline is None:
            self._baseline = metric(self._begun(self.original), _ORIGINAL)
        return self._baseline

    def _default_metric(self, ends: Mapping[str, Ending]) -> MetricChoice:
        assert self._profiles is not None
        synthetic = not isinstance(self._samples, Samples)
        labels = self.labels is not None
        return choose_default(self._profiles, ends, labels=labels, synthetic=synthetic)

    def _check(self, metric: str) -> None:
        if metric not in METRICS:
            raise UsageError(
                f"--metric {metric!r} is unknown: choose from {', '.join(METRICS)} or "
                "module:function"
            )
        if metric == "top1" and self.labels is None:
            raise DataError("the metric top1 needs labels: name their array with --labels")
        if metric == "top1" and not self._classes.one_answer:
            raise DataError(
                "the metric top1 needs an output of shape (batch, classes), or one of one label a "
                "sample"
            )
        if (
            metric == "top1"
            and self._classes.one_vector
            and self.labels is not None
            and isinstance(self._samples, Samples)
        ):
            used = self.labels[self._samples.index]
            if used.min() < 0 or used.max() >= self._classes.fewest:
                raise DataError(
                    f"the labels of {self._samples.label} run from {used.min()} to {used.max()}, "
                    f"the output {self._classes.output!r} has the classes 0 to "
                    f"{self._classes.fewest - 1}: shift the labels, or leave those samples out"
                )
        if metric == "agreement" and not self._classes.answered:
            raise DataError(
                "the metric agreement needs an output with a last axis of classes, or of labels"
            )

    def _measure_original(self) -> None:
        held = self._count = 0
        self._apart = True  # as long as every output has its samples along the first axis
        running = self.original
        for batch in batches_of(self._samples, self._batch):
            self._count += batch.samples
            outputs = batch.run(running)
            if not self._spreads:
                if differ(outputs, batch.run(running)):
                    self._draws = Draws(self.original, batch.feed)
                    running = self._begun(self.original)
                    outputs = batch.run(running)
                names = outputs_of_numbers(outputs)
                if not names:
                    raise ModelError(
                        f"{self.original.label} has no output that is a tensor of numbers, and so "
                        "nothing to judge: use --verify none"
                    )
                self._spreads = {name: Spread() for name in names}
                self._classes = Classes(names)
                if self._profiles is not None:
                    self._profiles.update({name: Profile(self.labels) for name in names})
            self._classes.add(outputs, batch.samples, batch.index)
            for name, spread in self._spreads.items():
                spread.add(outputs[name], batch.samples)
                self._apart &= batch.samples == 1 or outputs[name].shape[:1] == (batch.samples,)
            for name, profile in (self._profiles or {}).items():
                profile.add(outputs[name], batch.samples, batch.index, tuple(batch.feed.values()))
            if self._references is not None:
                held += sum(y.nbytes for y in outputs.values())
                self._references.append(outputs)
                if held > _REFERENCE_BUDGET:
                    self._references = None  # from now on the original runs beside each candidate

    def _begun(self, session: Session) -> Session:
        """The session, or one that draws the same numbers as all others, from the first on."""
        return session if self._draws is None else self._draws.begin(session)

    def _reference(self, i: int, batch: Batch, beside: Session) -> Outputs:
        return batch.run(beside) if self._references is None else self._references[i]


_LATEST: dict[str, Judge] = {}  # the last that arrived in this process


def _judge(
    token: str, original: Session, samples: Samples | Sequence[Feed], metric: str | None
) -> Judge:
    if token not in _LATEST:
        _LATEST.clear()
        _LATEST[token] = Judge(original, samples, metric)
    return _LATEST[token]
