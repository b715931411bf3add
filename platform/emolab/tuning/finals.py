"""The final: the best trials of a search trained with several seeds each; the best mean on validation wins.

The best of many trials owes part of its score to luck, since the same validation sessions ranked them all. Seeds that
the search did not use measure how much of it stays. The test split takes no part.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

from emolab.names import UserError
from emolab.training.recipe import fingerprint
from emolab.tuning.grouping import shape
from emolab.tuning.settings import TuneSettings
from emolab.tuning.space import IntParameter, SearchSpace
from emolab.tuning.study import Study
from emolab.tuning.trials import TrialRecord

CANDIDATE = "candidate"
SEED = "final_seed"
_SEED_KEY = "training.seed"


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A configuration of the search, trained again with other seeds."""

    record: TrialRecord
    """Its trial in the search."""
    values: tuple[float, ...]
    """Objective of each training, by seed; with several objectives their mean."""
    failures: int = 0

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values) if self.values else -math.inf

    @property
    def half_width(self) -> float:
        """Of the 95 % interval of the mean over seeds (Student's t); NaN for a single training."""
        count = len(self.values)
        if count < 2:
            return math.nan
        return float(student.ppf(0.975, count - 1)) * statistics.stdev(self.values) / math.sqrt(count)


def final_space(space: SearchSpace) -> SearchSpace:
    """What a final varies: the search's parameters, as they were drawn, and the seed."""
    seed = IntParameter(distribution="int", low=0, high=2**31 - 1)
    return space.model_copy(update={"parameters": {**space.parameters, _SEED_KEY: seed}})


def enqueue_finalists(settings: TuneSettings, search: Study, final: Study) -> list[TrialRecord]:
    """Queue what is missing of the final; returns the search's best trials, which take part.

    Of trials with the same parameters, as a space of few points has them, the best takes part alone. Where fewer
    completed than take part, those follow that the scheduler let go furthest: a final trains them whole. Trainings
    that failed stay failed as long as there is a winner without them.
    """
    candidates = _different([*search.ranking(), *_furthest(search)])[: settings.tuning.final.top]
    _enqueue(settings, candidates, final)
    if not final.waiting() and all(finalist.failures for finalist in finalists(candidates, final, settings)):
        _enqueue(settings, candidates, final, again=True)
    return candidates


def _enqueue(settings: TuneSettings, candidates: Sequence[TrialRecord], final: Study, *, again: bool = False) -> None:
    """Seed by seed, and of each seed the equal shapes together: neighbours in the queue may share a step."""
    shapes = [shape(record.parameters) for record in candidates]
    together = sorted(candidates, key=lambda record: shapes.index(shape(record.parameters)))
    for seed in final_seeds(settings):
        for record in together:
            labels = {CANDIDATE: record.number, SEED: seed}
            final.enqueue(record.parameters | {_SEED_KEY: seed}, labels, again=again)


def _different(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The first of each configuration."""
    found: dict[str, TrialRecord] = {}
    for record in records:
        found.setdefault(fingerprint(record.parameters), record)
    return list(found.values())


def _furthest(search: Study) -> list[TrialRecord]:
    """Trials that were stopped early, the furthest first, of equally far ones the best."""
    stopped = [r for r in search.records() if r.state == "PRUNED" and r.value is not None]
    return sorted(stopped, key=lambda record: (-record.epochs, -(record.value or 0.0), record.number))


def final_seeds(settings: TuneSettings) -> list[int]:
    """The seeds after the search's own."""
    first = settings.training.seed + 1
    return [seed % 2**31 for seed in range(first, first + settings.tuning.final.seeds)]


def ranked(candidates: Sequence[TrialRecord], final: Study, settings: TuneSettings) -> list[Finalist]:
    """The finalists, best mean first; those of which a training failed come last.

    Raises:
        UserError: every finalist lost a training.
    """
    found = sorted(finalists(candidates, final, settings), key=lambda f: (f.failures > 0, -f.mean, f.record.number))
    if found[0].failures:
        reasons = dict.fromkeys(record.reason for record in final.records() if record.state != "COMPLETE")
        raise UserError(
            f"no finalist completed all of its {len(final_seeds(settings))} trainings ({'; '.join(reasons)[:200]}): "
            "the same command trains again what failed; or set tuning.final to more trials or fewer seeds"
        )
    return found


def finalists(candidates: Sequence[TrialRecord], final: Study, settings: TuneSettings) -> list[Finalist]:
    """What the final holds of each candidate by now."""
    seeds = final_seeds(settings)
    found = []
    for record in candidates:
        mine = [r for r in final.records() if r.labels[CANDIDATE] == record.number and r.labels[SEED] in seeds]
        mine.sort(key=lambda r: r.labels[SEED])
        values = tuple(r.mean_objective for r in mine if r.state == "COMPLETE")
        found.append(Finalist(record=record, values=values, failures=len(seeds) - len(values)))
    return found
