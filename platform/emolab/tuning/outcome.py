"""What to tell of a search of which no trial completed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from emolab.tuning.study import Study
from emolab.tuning.trials import OVER, SPENT, TrialRecord


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
    what = f": {', '.join(advice)}" if advice else ""
    return f"none of the {len(records)} trials completed ({'; '.join(reasons) or 'none was begun'}){what}"


def _limits_of(reason: str) -> list[str]:
    return reason.removeprefix(f"{OVER}: ").split(", ") if reason.startswith(OVER) else []


def _failures(records: Sequence[TrialRecord]) -> list[str]:
    failed = [record.reason for record in records if record.state == "FAIL"]
    different = sorted(set(failed))
    more = f" and {len(different) - 3} other reasons" if len(different) > 3 else ""
    return [f"{len(failed)} failed: {'; '.join(different[:3])}{more}"] if failed else []
