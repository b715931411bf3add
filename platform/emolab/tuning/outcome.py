"""What to tell of how trials ended, of a search of which none completed, and of a final's scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from emolab.tuning.finals import Finalist
from emolab.tuning.study import Study
from emolab.tuning.trials import OVER, SPENT, TrialRecord


def stopped_by(record: TrialRecord) -> str:
    """What ended a trial before its time, in a word or two; empty where it completed or failed."""
    if record.state != "PRUNED":
        return ""
    if record.reason.startswith(OVER):
        return f"limit on {' and '.join(_limits_of(record.reason))}"
    return "epoch budget" if record.reason.startswith(SPENT) else "scheduler"


def mean_over_seeds(finalist: Finalist) -> str:
    """A finalist's score, with the interval where several trainings give one."""
    count = len(finalist.values)
    if not count:
        return "no training completed"
    if count == 1:
        return f"{finalist.mean:.4f} with one seed"
    return f"{finalist.mean:.4f} ± {finalist.half_width:.4f} (95 % interval over {count} seeds)"


def read_with_care(finalists: Sequence[Finalist]) -> str:
    """What the score of a final's winner, and its interval, leave out."""
    rivals = len(finalists)
    if len(finalists[0].values) < 2:
        chosen = f", and the best of {rivals} is likely too high" if rivals > 1 else ""
        return f"A single training shows neither the luck of its seed nor that of the sessions{chosen}."
    chosen = (
        f" It is that of the best of {rivals}, chosen by these same trainings, and so too narrow and too high for the "
        "winner."
    )
    return "The interval holds the luck of the seeds, not that of the sessions." + chosen * (rivals > 1)


def left_of(study: Study, *, trials: int, epochs: int | None) -> str:
    """What a search is that has ended without all of its trials, as its time or its epochs were over; else empty.

    Args:
        trials: of the whole search.
        epochs: that it may take in all.
    """
    ended = study.finished()
    if ended >= trials:
        return ""
    if epochs is not None and study.epochs() >= epochs:
        return f"over with {ended} of {trials} trials, which took all of its {epochs} epochs"
    return f"not over: {ended} of {trials} trials have ended, and the next call goes on"


def none_completed(study: Study, limits: Mapping[str, float]) -> str:
    """Why no trial of a study completed, counted by reason, and what to do.

    Args:
        limits: of an acceptable model, by name.
    """
    records, excess = study.records(), study.excess()
    pruned = [record.reason for record in records if record.state == "PRUNED"]
    reasons, advice = [], []
    for name, limit in limits.items():
        over = sum(name in _limits_of(reason) for reason in pruned)
        if over:
            beyond = [value for value in excess.get(name, []) if value > 0]
            smallest = limit + min(beyond) if beyond else None
            seen = "" if smallest is None else f", the smallest had {smallest:.6g}"
            reasons.append(f"{over} pruned over the limit tuning.constraints.{name}={limit:.6g}{seen}")
            advice.append(f"raise tuning.constraints.{name} or search smaller models")
    spent = sum(reason.startswith(SPENT) for reason in pruned)
    if spent:
        reasons.append(f"{spent} pruned when {SPENT}")
        advice.append("raise tuning.epoch_budget")
    stopped = sum(not reason.startswith((OVER, SPENT)) for reason in pruned)
    if stopped:
        reasons.append(f"{stopped} pruned by the scheduler")
    reasons += _failures(records)
    if not records:
        advice.append("raise tuning.time_budget_s")  # nothing else ends a search before its first trial
    what = f": {', '.join(advice)}" if advice else ""
    return f"none of the {len(records)} trials completed ({'; '.join(reasons) or 'none was begun'}){what}"


def _limits_of(reason: str) -> list[str]:
    return reason.removeprefix(f"{OVER}: ").split(", ") if reason.startswith(OVER) else []


def _failures(records: Sequence[TrialRecord]) -> list[str]:
    failed = [record.reason for record in records if record.state == "FAIL"]
    different = sorted(set(failed))
    more = f" and {len(different) - 3} other reasons" if len(different) > 3 else ""
    return [f"{len(failed)} failed: {'; '.join(different[:3])}{more}"] if failed else []
