"""A trial in the tables of Optuna's relational storage, written as one: its own class makes a transaction of every
parameter, value and attribute."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from optuna.distributions import distribution_to_json
from optuna.storages._rdb import models  # the schema, which the exact version in constraints.txt holds still
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Table, insert, update

_TRIALS: Table = models.TrialModel.__table__
_PARAMETERS: Table = models.TrialParamModel.__table__
_REPORTS: Table = models.TrialIntermediateValueModel.__table__
_USER_ATTRIBUTES: Table = models.TrialUserAttributeModel.__table__
_SYSTEM_ATTRIBUTES: Table = models.TrialSystemAttributeModel.__table__
_VALUES: Table = models.TrialValueModel.__table__
_KEYS = {
    _PARAMETERS: "param_name",
    _REPORTS: "step",
    _USER_ATTRIBUTES: "key",
    _SYSTEM_ATTRIBUTES: "key",
    _VALUES: "objective",
}
"""Column that tells the rows of one trial apart."""
_PICKLED = ("cma:",)
"""System attributes in which a sampler keeps a pickle of its state. They stay in memory: a database may come from
anywhere, and nothing that was read from a file is unpickled."""

Rows = dict[Table, dict[Any, dict[str, Any]]]
"""Table -> key -> row."""


@dataclass(frozen=True)
class StoredTrial:
    """What a database holds of a trial."""

    identity: int
    """In the database."""
    state: TrialState
    rows: Rows


def stored(trial: FrozenTrial) -> StoredTrial:
    """A trial as it was read from a database."""
    identity = trial._trial_id  # pyright: ignore[reportPrivateUsage]  # a storage is told its own ids
    return StoredTrial(identity, trial.state, _rows(trial))


def bring(connection: Connection, study: int, trial: FrozenTrial, before: StoredTrial | None) -> StoredTrial:
    """Bring a trial of a database to what it is now, within the connection's transaction; returns what is there then.

    Args:
        study: its id in the database.
        before: what the database holds of the trial; None where it is not there.
    """
    state = {
        "state": trial.state,
        "datetime_start": _as_utc(trial.datetime_start),
        "datetime_complete": _as_utc(trial.datetime_complete),
    }
    if before is None:
        added = connection.execute(insert(_TRIALS), state | {"study_id": study, "number": trial.number})
        assert added.inserted_primary_key is not None  # every database that Optuna knows gives it
        before = StoredTrial(cast("int", added.inserted_primary_key[0]), trial.state, {})
    elif trial.state != before.state:
        connection.execute(update(_TRIALS).where(_TRIALS.c.trial_id == before.identity), state)
    rows = _rows(trial)
    for table, mine in rows.items():
        theirs = before.rows.get(table, {})
        new = [{"trial_id": before.identity} | row for key, row in mine.items() if key not in theirs]
        if new:
            connection.execute(insert(table), new)
        for key, row in mine.items():
            if key in theirs and row != theirs[key]:
                place = (table.c.trial_id == before.identity) & (table.c[_KEYS[table]] == key)
                connection.execute(update(table).where(place), row)
    return StoredTrial(before.identity, trial.state, rows)


def _rows(trial: FrozenTrial) -> Rows:
    """All that the database holds of a trial beside its state."""
    intermediate = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr
    final = models.TrialValueModel.value_to_stored_repr
    rows: list[tuple[Table, list[dict[str, Any]]]] = [
        (
            _PARAMETERS,
            [
                {
                    "param_name": name,
                    "param_value": distribution.to_internal_repr(trial.params[name]),
                    "distribution_json": distribution_to_json(distribution),
                }
                for name, distribution in trial.distributions.items()
            ],
        ),
        (
            _REPORTS,
            [
                {"step": step, "intermediate_value": stored, "intermediate_value_type": kind}
                for step, value in trial.intermediate_values.items()
                for stored, kind in [intermediate(value)]
            ],
        ),
        (_USER_ATTRIBUTES, _attributes(trial.user_attrs)),
        (_SYSTEM_ATTRIBUTES, _attributes(storable(trial).system_attrs)),
        (
            _VALUES,
            [
                {"objective": objective, "value": stored, "value_type": kind}
                for objective, value in enumerate(trial.values or ())
                for stored, kind in [final(value)]
            ],
        ),
    ]
    return {table: {row[_KEYS[table]]: row for row in found} for table, found in rows}


def _attributes(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value_json": json.dumps(value)} for key, value in values.items()]


def _as_utc(moment: datetime | None) -> datetime | None:
    """A moment of this machine's clock as Optuna's tables hold it."""
    return moment.astimezone(UTC).replace(tzinfo=None) if moment is not None else None


def storable(trial: FrozenTrial) -> FrozenTrial:
    """A trial without what must not be stored."""
    if not any(key.startswith(_PICKLED) for key in trial.system_attrs):
        return trial
    kept = copy.copy(trial)
    kept.system_attrs = {key: value for key, value in trial.system_attrs.items() if not key.startswith(_PICKLED)}
    return kept
