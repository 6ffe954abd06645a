"""How much effort a run makes: seconds, samples, trials and ranks, as one value."""

from dataclasses import dataclass, replace

# Of layers whose inputs have too many elements for a covariance: rows that are kept of each, and
# bytes that those of all layers take together, at most. Fitting takes as much again for what is in
# between. They aren't in Limits, since a plan that is replayed has to find the same rows.
SAMPLED_ROWS = 2048
SAMPLED_BYTES = 256 << 20


@dataclass(frozen=True)
class Limits:
    """Bounds on what a run measures and tries; the defaults are what the command uses.

    Attributes
    ----------
    timing_seconds, timing_seconds_least : float
        Length of one comparison of whole models: at most, and at least, however soon it is decided:
        a neighbour on the same core may stay for as long.
    layer_seconds : float
        Length of one comparison of a layer with its replacement, at most.
    in_place_rounds, in_place_seconds : int and float
        How often layers are timed within the model and chosen anew, and the time for one of those.
    timing_rows : int
        Rows of four rounds (of slow models: rounds) that an undecided comparison makes however
        long they take.
    ranks : int
        Candidates of each method for a layer.
    trials_least, trials, trials_most : int
        Sets of replacements that a search builds, saves and judges: whatever the time limit,
        without one, and as far as there is time.
    trial_seconds : float
        That time, by the work in it.
    rungs, rungs_joined : int
        Models of the ladder that is tested, up to what the search came to: whatever the time, and
        as far as there is time for testing them.
    testing_seconds : float
        That time, by the work in it.
    corrected_rungs : int
        Of those below that, how many are corrected in sequence too: the boldest.
    ladder_seconds : float
        Time for correcting other models of the ladder, by the work in it; the next milder one is
        corrected in any case.
    bolder_levels : int
        Further levels of loss that are tried with sequential correction.
    fit_samples, fit_samples_always : int
        Samples that factors are fitted to: at most, and however long each takes.
    fit_seconds : float
        Time for looking at what the layers are given, by the work in it.
    sequence_samples, sequence_samples_least : int
        Samples of sequential correction: at most, and below which it isn't tried.
    sequence_rows, sequence_samples_enough : int
        Inputs of a layer, for each element of one, that are enough for its correction; and samples
        below which that isn't asked, since the inputs of one sample are alike.
    sequence_seconds : float
        Time for running the samples of sequential correction, by the work in it.
    building_seconds : float
        Time for putting the models of sequential correction together; where it takes longer,
        nothing is corrected.
    width_samples_least, width_graded_least : int
        Samples that choose, below which widths aren't narrowed unasked: with few of them a model
        looks good that isn't, and channels that are gone can't be put back one by one. Fewer do
        where each has an error of its own, or may be right in part, and not only right or wrong.
    probe_samples, probe_samples_least : int
        Samples that sensitivities are measured on.
    probe_seconds : float
        Time for one of those measurements, by the work in it.
    narrow_trials : int
        Models with fewer channels that a search builds, saves and judges.
    narrow_corrections : int
        Of those that come next, how many are corrected in sequence: each bolder than the last.
    budget_corrections : int
        Choices within a budget that are tightened because the written file misses it.
    refined_sets, refined_sets_least : int
        Sets of equal cost that are judged as a whole: at most, and below which none is.
    refined_samples : int
        Samples that each of those is corrected on in sequence.
    refining_seconds : float
        Time for all of them.
    """

    timing_seconds: float = 9.0
    timing_seconds_least: float = 0.3
    layer_seconds: float = 0.6
    in_place_rounds: int = 2
    in_place_seconds: float = 12.0
    timing_rows: int = 18
    ranks: int = 8
    trials_least: int = 4
    trials: int = 8
    trials_most: int = 20
    trial_seconds: float = 20.0
    rungs: int = 7
    rungs_joined: int = 14
    testing_seconds: float = 20.0
    corrected_rungs: int = 6
    ladder_seconds: float = 50.0
    bolder_levels: int = 2
    fit_samples: int = 8192
    fit_samples_always: int = 1024
    fit_seconds: float = 60.0
    sequence_samples: int = 8192
    sequence_samples_least: int = 8
    sequence_rows: int = 64
    sequence_samples_enough: int = 256
    sequence_seconds: float = 120.0
    building_seconds: float = 600.0
    width_samples_least: int = 64
    width_graded_least: int = 8
    probe_samples: int = 64
    probe_samples_least: int = 12
    probe_seconds: float = 0.5
    narrow_trials: int = 6
    narrow_corrections: int = 3
    budget_corrections: int = 5
    refined_sets: int = 24
    refined_sets_least: int = 8
    refined_samples: int = 2048
    refining_seconds: float = 160.0

    def within(self, seconds: float) -> "Limits":
        """The same effort, as far as its parts have their share of a time limit."""
        return replace(
            self,
            timing_seconds=min(self.timing_seconds, seconds / 10),
            in_place_seconds=min(self.in_place_seconds, seconds / 20),
            fit_seconds=min(self.fit_seconds, seconds / 10),
            sequence_seconds=min(self.sequence_seconds, seconds / 10),
            building_seconds=min(self.building_seconds, seconds / 2),
            refining_seconds=min(self.refining_seconds, seconds / 4),
        )


USUAL = Limits()
