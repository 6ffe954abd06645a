"""How much effort a run makes: seconds, samples, trials and ranks, as one value."""

from dataclasses import dataclass, replace

# For layers whose inputs have too many elements for a covariance: the rows that are kept of each
# layer, and the bytes of the rows of all layers together, at most. Fitting takes as much memory
# again for its temporary arrays. They aren't in Limits, since replaying a plan needs the same rows.
SAMPLED_ROWS = 2048
SAMPLED_BYTES = 256 << 20


@dataclass(frozen=True)
class Limits:
    """Bounds on what a run measures and tries; the defaults are what the command uses.

    Seconds of timings are measured: ``timing_seconds``, ``timing_seconds_least``, ``layer_seconds``
    and ``in_place_seconds``. All others are estimated from the work, before it is done.

    Attributes
    ----------
    timing_seconds, timing_seconds_least : float
        Longest and shortest time of one comparison of whole models. It isn't shorter even if it is
        decided sooner: another process may disturb the core for as long.
    layer_seconds : float
        Longest time of one comparison of a layer with its replacement.
    in_place_rounds, in_place_seconds : int and float
        How often layers are timed within the model and chosen anew, and the time for each.
    timing_rows : int
        Rows of four rounds (of slow models: rounds) that an undecided comparison makes however
        long they take.
    ranks : int
        Candidates of each method for a layer.
    trials_least, trials, trials_most : int
        Sets of replacements that a search builds, saves and judges: the fewest under a time limit,
        the usual number, and the most, as far as ``trial_seconds`` allow.
    trial_seconds : float
        Time for the trials of one search.
    rungs, rungs_joined : int
        Models of the ladder that are tested: at most, whatever time that takes, and at most as far
        as ``testing_seconds`` allow.
    testing_seconds : float
        Time for testing the models of the ladder.
    corrected_rungs : int
        Models of the ladder that are milder than the result of the search and are corrected in
        sequence too, from the boldest on.
    ladder_seconds : float
        Time for correcting them; the first of them is corrected in any case.
    bolder_levels : int
        Models bolder than the result of the search that are tried, with sequential correction.
    fit_samples, fit_samples_always : int
        Samples that factors are fitted to: at most, and at most however long each takes.
    fit_seconds : float
        Time for collecting the statistics of layers' inputs.
    sequence_samples, sequence_samples_least : int
        Samples of sequential correction: at most, and the number below which it isn't tried.
    sequence_rows, sequence_samples_enough : int
        Input vectors of a layer, for each element of a vector, that are enough for its correction;
        and the number of samples that are taken even if fewer have so many vectors, since those of
        one sample are alike.
    sequence_seconds : float
        Time for running the samples of sequential correction.
    building_seconds : float
        Time for building the models of sequential correction; if it takes longer, nothing is
        corrected.
    width_samples_least, width_graded_least : int
        Number of samples that choose below which widths are narrowed only if that is asked for:
        with few of them a bad model may look good, and removed channels can't be put back one by
        one. The second number is for metrics by which samples have errors, or are right in part.
    probe_samples, probe_samples_least : int
        Samples that sensitivities are measured on: at most, and at least.
    probe_seconds : float
        Time for one of those measurements.
    narrow_trials : int
        Models with fewer channels that a search builds, saves and judges.
    narrow_corrections : int
        Models with fewer channels that are then corrected in sequence, each bolder than the last.
    budget_corrections : int
        How often a choice within a budget is tightened because the written file misses the budget.
    refined_sets, refined_sets_least : int
        Sets of equal cost that are judged as a whole: at most, and the number below which none is.
    refined_samples : int
        Samples on which each of those sets is corrected in sequence.
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
