"""The metric that judges where the user names none, and the limit where none is named."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from onnxlr.verify.endings import Ending
from onnxlr.verify.profile import Profile

# What a user would call the same result. A point of accuracy, or of agreement, is what such limits
# usually are. With a mean cosine of 0.98 an embedding finds and sorts texts within about a point
# (models/EXPERIMENTS.md). An error of 5% of the outputs' spread is 38 dB below the peak of an
# image, costs a regression 0.25 points of the variance that it explains, and is less than any task
# of the zoo needs to lose a point (7 to 35%).
LIMITS = {"top1": 0.01, "agreement": 0.01, "cosine": 0.02, "rel-error": 0.05}
_USERS_LIMIT = 0.01  # of a metric that is the user's function
_LAYER_LIMIT = 0.01  # of the relative error of a layer alone: behind it are others, with theirs

_FEW = 16  # numbers; embeddings have as many or more
_PEAKED, _FLAT = 0.3, 0.05  # how sure the softmax of scores is, between chance (0) and certain (1)
_APART = 10  # times the limit of cosine that outputs are from their mean direction

Kind = Literal["classes", "labels", "embedding", "numbers"]


@dataclass(frozen=True)
class MetricChoice:
    """A metric with its limit, and why it was chosen.

    Attributes
    ----------
    name : str
    max_drop : float
        The largest loss that is allowed; infinity for no limit.
    because : str
        What was seen, in words that follow a colon.
    named, limit_named : bool
        Whether the user named the metric, and the limit.
    """

    name: str
    max_drop: float
    because: str
    named: bool = False
    limit_named: bool = False

    def limited(self, max_drop: float | None) -> "MetricChoice":
        """The same with the limit that the user named, if there is one."""
        return self if max_drop is None else replace(self, max_drop=max_drop, limit_named=True)

    @property
    def line(self) -> str:
        """What was chosen, why, and how to name another."""
        others = "--metric names another"
        if not self.limit_named:
            others = "--metric and --max-drop name others"
        limit = f"limit {self.max_drop:g}" if self.max_drop < float("inf") else "no limit"
        return f"metric: {self.name}, {limit}: {self.because}; {others}"

    @property
    def line_without_limit(self) -> str:
        """The same where two models are only compared."""
        return f"metric: {self.name}: {self.because}; --metric names another"


def named_metric(name: str) -> MetricChoice:
    """A metric that the user named, with its usual limit."""
    return MetricChoice(name, default_limit(name), "named with --metric", named=True)


def with_labels_elsewhere(choice: MetricChoice, *, one_vector: bool) -> MetricChoice:
    """The default where only the test samples have labels, from the one without any.

    Parameters
    ----------
    choice : MetricChoice
    one_vector : bool
        Whether the output is one vector a sample.
    """
    if choice.name == "agreement" and one_vector:
        return _default("top1", f"there are labels to test with, and {choice.because}")
    return replace(choice, because=f"{choice.because}; the labels aren't used")


def default_limit(metric: str) -> float:
    """The largest loss of a metric that is allowed where the user names no limit."""
    return LIMITS.get(metric, _USERS_LIMIT)


def layer_limit(max_drop: float | None) -> float:
    """The largest relative error of a layer alone, where the model as a whole isn't judged."""
    return _LAYER_LIMIT if max_drop is None else max_drop


def choose_default(
    profiles: Mapping[str, Profile],
    ends: Mapping[str, Ending],
    *,
    labels: bool,
    synthetic: bool,
) -> MetricChoice:
    """The metric for a model whose user names none.

    Class scores are judged by their labels, else by the arg-max that the original has; outputs that
    are labels themselves as well;
    embeddings by cosine; all else, and what these say little about, by relative error.

    Parameters
    ----------
    profiles : mapping of str to Profile
        Of each output of real numbers; of integers where there are no others.
    ends : mapping of str to Ending
        How each output is made; those that aren't there are judged by the profiles alone.
    labels : bool
        Whether there are labels.
    synthetic : bool
        Whether the samples are made up.
    """
    kinds = {
        name: _kind(profile, ends.get(name, Ending("other")), synthetic)
        for name, profile in profiles.items()
    }
    # Where arg-max is taken: of the first output that has vectors.
    scores = next(
        (
            n
            for n, p in profiles.items()
            if (p.axes or 0) > 1 and p.columns != 1 and kinds[n][0] != "labels"
        ),
        None,
    )
    unused = ""
    if labels:
        why_not = _why_not_labels(profiles, kinds, scores)
        if why_not is None:
            what = "the output is one" if scores is None else f"{profiles[scores].columns} classes"
            return _default("top1", f"there are labels, and {what}")
        unused = f"; the labels aren't used: {why_not}"
    name, because = _without_labels(profiles, kinds, synthetic)
    return _default(name, because + unused)


def _default(name: str, because: str) -> MetricChoice:
    return MetricChoice(name, LIMITS[name], because)


def _why_not_labels(
    profiles: Mapping[str, Profile], kinds: Mapping[str, tuple[Kind, str]], scores: str | None
) -> str | None:
    """Why labels can't judge; None if they can."""
    if len(kinds) == 1:
        ((name, (only, _)),) = kinds.items()
        if only == "labels" and profiles[name].single:
            right = profiles[name].right_for_sure
            return None if right else "they have nothing to do with those that the model gives"
    if scores is None:
        return "no output has class scores"
    profile, kind = profiles[scores], kinds[scores][0]
    if profile.axes != 2 or not profile.by_sample or profile.columns is None:
        return "no output has one vector of class scores a sample"
    if kind == "classes":
        if profile.right_by_chance and not profile.has_labels_beyond:  # those are refused
            return "the original gets no more of them right than chance would"
        return None
    return None if profile.right_for_sure else "its arg-max has nothing to do with them"


def _without_labels(
    profiles: Mapping[str, Profile], kinds: Mapping[str, tuple[Kind, str]], synthetic: bool
) -> tuple[str, str]:
    """The metric that compares with the original, and why it was chosen."""
    if len(kinds) > 1:
        if all(kind == "labels" for kind, _ in kinds.values()):
            return "agreement", f"all {len(kinds)} outputs hold labels"
        if all(kind == "embedding" for kind, _ in kinds.values()) and _are_apart(profiles):
            return "cosine", f"all {len(kinds)} outputs are embeddings"
        words = list(dict.fromkeys(_PLURAL[kind] for kind, _ in kinds.values()))
        return "rel-error", f"{len(kinds)} outputs, of {' and of '.join(words)}: the worst counts"
    ((name, (kind, why)),) = kinds.items()
    if kind == "labels":
        return "agreement", why
    if kind == "classes":
        if synthetic:
            return "rel-error", f"{why}, but inputs are synthetic, where its arg-max says little"
        if profiles[name].axes == 2 and profiles[name].of_classes < 2:
            return "rel-error", f"{why}, but all samples are of one class, so arg-max says little"
        return "agreement", why
    if kind == "embedding":
        if _are_apart(profiles):
            return "cosine", why
        return "rel-error", f"{why}, but all point nearly the same way, so cosine says little"
    return "rel-error", why


_PLURAL: dict[Kind, str] = {
    "classes": "class scores",
    "labels": "labels",
    "embedding": "embeddings",
    "numbers": "numbers",
}


def _are_apart(profiles: Mapping[str, Profile]) -> bool:
    return all(p.apart >= _APART * LIMITS["cosine"] for p in profiles.values())


def _kind(profile: Profile, end: Ending, synthetic: bool) -> tuple[Kind, str]:
    """What an output holds, and by what it was told."""
    columns, axes = profile.columns, profile.axes or 0
    each = "a sample" if axes == 2 else "a position"
    if profile.label:
        one = "is a label" if profile.single else "holds labels"
        return "labels", f"the output {one}: integers or truth values"
    if profile.integer:
        return "numbers", "the output is of small integers"
    if profile.single:
        return "numbers", "the output is one number a sample"
    if not profile.by_sample or axes < 2:
        return "numbers", "the output's rows are no samples (but boxes, say)"
    if axes > 3:
        return "numbers", f"the output has {axes} axes, as images and maps have"
    if columns is None:
        return "numbers", "the output's shape varies"
    if columns > 1 and profile.probable:
        return "classes", f"the output is probabilities of {columns} classes {each}"
    if profile.as_input:
        return "numbers", "the output is as large as an input (a reconstruction, say)"
    if columns < _FEW:
        return _few_columns(profile, f"the output is {columns} numbers {each}")
    kind, why = _many_columns(profile, end, synthetic)
    words = {
        "classes": f"the output is scores of {columns} classes {each}",
        "embedding": f"the output is an embedding of {columns} numbers {each}",
        "numbers": f"the output is {columns} numbers {each}",
    }[kind]
    return kind, f"{words} ({why})"


def _few_columns(profile: Profile, words: str) -> tuple[Kind, str]:
    """Too few numbers for an embedding."""
    if profile.positive:
        return "numbers", f"{words}, none negative, so no class scores"
    if profile.axes == 3 and profile.certainty < _PEAKED:
        return "numbers", f"{words}, none of which stands out"
    return "classes", f"{words}, some negative, as class scores are"


def _many_columns(profile: Profile, end: Ending, synthetic: bool) -> tuple[Kind, str]:
    """By the end of the graph, and where that leaves it open by how sure a softmax would be."""
    certainty, one = profile.certainty, profile.axes == 2
    said = f"softmax {certainty:.0%} above chance"
    if profile.same_length:
        return "embedding", "all of the same length"
    if end.kind in ("L2 norm", "layer norm", "residual sum", "activation"):
        return "embedding", f"the {end.kind} at its end"
    if one and end.kind in ("softmax", "sigmoid"):
        return "classes", f"the {end.kind} at its end"
    if certainty >= _PEAKED:
        return "classes", said
    if end.kind == "pooling":
        return "embedding", "the pooling at its end"
    if end.kind == "linear" and end.widens and certainty > _FLAT:
        return "classes", "a linear layer that widens at its end"
    if not one or (certainty <= _FLAT and synthetic):
        return "numbers", said
    if certainty <= _FLAT:
        return "embedding", f"no class stands out: {said}"
    return "classes", f"{said}; if it is an embedding, name cosine"
