"""What a study was made with: one experiment for ever, and the methods that drew its trials, in turn."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import optuna

from emolab.names import UserError

MADE_WITH = "made_with"
"""Study attribute: what all its trials share."""
METHODS = "methods"
"""Study attribute: the methods that drew and stopped its trials, each with the number that had finished before it."""
AFTER = "after"
_RUNGS = ("scheduler", "grace_epochs", "reduction_factor")
"""Methods that decide where trials are compared, and how many of them go on."""


def claim(study: optuna.Study, made_with: Mapping[str, Any]) -> None:
    """Say what the trials of this study share; a study belongs to one experiment for ever.

    Args:
        made_with: flat, of plain values.

    Raises:
        UserError: it was begun with something else.
    """
    check_claim(study, made_with)
    if MADE_WITH not in study.user_attrs:
        study.set_user_attr(MADE_WITH, dict(made_with))


def check_claim(study: optuna.Study, made_with: Mapping[str, Any], *, unknown: Collection[str] = ()) -> None:
    """As ``claim``, where the study is only looked at.

    Args:
        unknown: what cannot be said yet.
    """
    known = study.user_attrs.get(MADE_WITH, made_with)
    differing = _differences({key: value for key, value in known.items() if key not in unknown}, made_with)
    if differing:
        more = f" (and {len(differing) - 1} more differ)" if len(differing) > 1 else ""
        raise UserError(f"the study {study.study_name} was made {differing[0]}{more}: choose another name")


def draw_with(study: optuna.Study, methods: Mapping[str, Any], *, finished: int, full: bool) -> str:
    """Say what draws and stops the trials of this study from here on. A study may go on by another method.

    Args:
        methods: flat, of plain values.
        finished: trials that the study holds.
        full: whether it holds all that it shall.

    Returns:
        A sentence where the methods are others than before, else nothing.

    Raises:
        UserError: they are others, and no trial is left for them: the result would be taken for theirs. Or they are
            those of a halving, and trials are there that it did not stop: they would have taken its places.
    """
    known, differing = check_methods(study, methods, finished=finished, full=full)
    kept = known if known and not differing else [*known, {**methods, AFTER: finished}]
    if kept != study.user_attrs.get(METHODS, []):
        study.set_user_attr(METHODS, kept)
    return f"so far its trials were made {', '.join(differing)}" if differing and finished else ""


def check_methods(
    study: optuna.Study, methods: Mapping[str, Any], *, finished: int, full: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """As ``draw_with``, where the study is only looked at: the methods that drew its trials, and how the given ones
    differ from the last of them."""
    stored = study.user_attrs.get(METHODS, [])
    known = [entry for entry in stored if entry[AFTER] < finished]  # one after which no trial finished drew none
    last = {key: value for key, value in known[-1].items() if key != AFTER} if known else None
    differing = _differences(last, methods) if last is not None else []
    if differing and full:
        raise UserError(
            f"the study {study.study_name} holds all its {finished} trials, made {', '.join(differing)}: choose "
            "another name, or let it have more trials or epochs to go on this way"
        )
    if methods.get("scheduler") == "halving":
        _check_rungs(study.study_name, methods, known)
    return known, differing


def _check_rungs(name: str, methods: Mapping[str, Any], known: Sequence[Mapping[str, Any]]) -> None:
    mine = {key: methods[key] for key in _RUNGS}
    for entry in reversed(known):
        differing = _differences({key: entry[key] for key in _RUNGS if key in entry}, mine)
        if differing:
            raise UserError(
                f"the study {name} holds trials made {', '.join(differing)}, and halving lets the best of all trials "
                "of a study go on: choose another name, or another scheduler"
            )


def _differences(known: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """How what is known differs from what is given, values first."""
    other = sorted(key for key in known.keys() & given.keys() if known[key] != given[key])
    stray = sorted(known.keys() ^ given.keys())
    return [f"with {key} {known[key]}, not {given[key]}" for key in other] + [
        f"{'with' if key in known else 'without'} {key}" for key in stray
    ]
