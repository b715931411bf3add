"""Moving the alias champion so that at most one of several promotions wins and no crash leaves it half-way.

MLflow's aliases are not compare-and-swap, and two of them cannot move together. So a move first writes a claim, a
tag of the registered model under a key of its own, and then reads all claims: of two moves at once at least one
sees the other and steps back. The claim also says where the aliases are to stand and what the versions are to be
marked with, which lets a later command finish what a killed process began. On one machine a file lock is held around
all of this.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from emolab.databases import sqlite_file
from emolab.locks import holding
from emolab.names import UserError, contained
from emolab.registry.versions import CHAMPION, PREVIOUS_CHAMPION
from emolab.tracking.runs import MLflowTracker

CLAIM = "emolab.moving."
"""Tag of a registered model, followed by a run id: that run is moving the champion."""
STALE_SECONDS = 600.0
"""A move takes less than a second; a claim this old was left by a process that is gone."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where the aliases of a registered model stand."""

    champion: str | None
    previous: str | None
    claims: Mapping[str, str]
    """Run id -> what it wrote."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A tag of a version."""

    version: str
    key: str
    value: str


@dataclass(frozen=True, kw_only=True)
class Move:
    """A change of the champion, decided and not yet made."""

    name: str
    run_id: str
    expected: str | None
    """The champion that it was decided against."""
    champion: str
    previous: str | None
    """Where previous_champion shall stand afterwards; None: nowhere."""
    marks: Sequence[Mark] = ()
    """What the versions are to say of it afterwards."""


def standing(client: MlflowClient, name: str) -> Standing:
    """Read all of it at once.

    Raises:
        UserError: there is no such registered model.
    """
    try:
        model = client.get_registered_model(name)
    except MlflowException:
        raise UserError(f"the registry has no model {name!r}: register one (jobs/train.py --register-as)") from None
    aliases = {alias: str(version) for alias, version in model.aliases.items()}
    return Standing(
        champion=aliases.get(CHAMPION),
        previous=aliases.get(PREVIOUS_CHAMPION),
        claims={key.removeprefix(CLAIM): value for key, value in model.tags.items() if key.startswith(CLAIM)},
    )


@contextmanager
def promoting(tracker: MLflowTracker, name: str, output: Path) -> Iterator[Sequence[Move]]:
    """Be the only promotion of a model on this machine, and finish what a killed one left behind.

    Yields:
        The moves that were finished.

    Raises:
        UserError: another promotion of the model is at work; the message says which.
    """
    database = sqlite_file(tracker.uri)
    root = database.parent if database else output
    folder = contained(root, "promotions", name, what="registered model name")
    with holding(folder, what=f"promotion of {name}"):
        yield recover(tracker.client, name, alone=database is not None)


def recover(client: MlflowClient, name: str, *, alone: bool) -> list[Move]:
    """Finish or drop moves whose process is gone, or that could be neither made nor taken back.

    Args:
        alone: nobody else can be moving, so that every claim is a remnant.

    Returns:
        Those that were finished.

    Raises:
        UserError: a move is under way elsewhere.
    """
    finished = []
    for run_id, change in _remnants(client, name, alone=alone):
        if change is not None:
            _point(client, name, PREVIOUS_CHAMPION, change.previous)
            for mark in change.marks:
                client.set_model_version_tag(name, mark.version, mark.key, mark.value)
            finished.append(change)
        client.delete_registered_model_tag(name, CLAIM + run_id)
    return finished


def cut_short(tracker: MLflowTracker, name: str) -> list[Move]:
    """The moves that ``promoting`` would finish; nothing is changed.

    Raises:
        UserError: a move is under way elsewhere.
    """
    found = _remnants(tracker.client, name, alone=sqlite_file(tracker.uri) is not None)
    return [change for _, change in found if change is not None]


def _remnants(client: MlflowClient, name: str, *, alone: bool) -> Iterator[tuple[str, Move | None]]:
    """Run id of every claim, and its move where that was decided, but what comes after was never done."""
    for run_id, content in standing(client, name).claims.items():
        claim = json.loads(content)
        if not alone and time.time() - claim["time"] < STALE_SECONDS:
            raise UserError(f"another promotion of {name} (run {run_id}) is moving its champion: try again later")
        yield run_id, _claimed(claim) if standing(client, name).champion == claim["champion"] else None


def _claimed(claim: Mapping[str, Any]) -> Move:
    values = {key: value for key, value in claim.items() if key not in ("time", "marks")}
    return Move(**values, marks=[Mark(**mark) for mark in claim["marks"]])


def move(client: MlflowClient, change: Move) -> None:
    """Make a change of the champion, or leave the aliases and marks as they were.

    Where the registry fails and goes on failing, the claim stays, and the next command finishes the move.

    Raises:
        UserError: the champion is no longer the one that the change was decided against, or another one is moving.
    """
    name, key = change.name, CLAIM + change.run_id
    client.set_registered_model_tag(name, key, json.dumps(asdict(change) | {"time": time.time()}))
    before, marked = standing(client, name), list[tuple[Mark, str | None]]()
    try:
        _refuse_others(change, before)
        _refuse_unless(change, now=before.champion, wanted=change.expected)
        _point(client, name, CHAMPION, change.champion)
        _point(client, name, PREVIOUS_CHAMPION, change.previous)
        _refuse_unless(change, now=standing(client, name).champion, wanted=change.champion)
        for mark in change.marks:
            marked.append((mark, client.get_model_version(name, mark.version).tags.get(mark.key)))
            client.set_model_version_tag(name, mark.version, mark.key, mark.value)
    except BaseException:
        _undo(client, change, before, marked)
        client.delete_registered_model_tag(name, key)
        raise
    with suppress(MlflowException):  # the move is made: a claim that stays is dropped by the next command
        client.delete_registered_model_tag(name, key)


def _refuse_others(change: Move, now: Standing) -> None:
    others = [run_id for run_id in now.claims if run_id != change.run_id]
    if others:
        raise UserError(
            f"another promotion of {change.name} (run {others[0]}) is moving its champion at this moment: "
            "nothing was changed, try again"
        )


def _refuse_unless(change: Move, *, now: str | None, wanted: str | None) -> None:
    if now != wanted:
        raise UserError(
            f"the champion of {change.name} is now {_named(now)}, not {_named(wanted)} any more: another promotion "
            "was faster; nothing was changed, run it again to be held against the new champion"
        )


def _undo(client: MlflowClient, change: Move, before: Standing, marked: Sequence[tuple[Mark, str | None]]) -> None:
    """Put the marks back, and the aliases, unless someone else has moved the champion since, or it was ours before.

    The champion comes last: while it stands where the claim says, whatever breaks off here is finished later.
    """
    for mark, known in reversed(marked):
        if known is None:
            client.delete_model_version_tag(change.name, mark.version, mark.key)
        else:
            client.set_model_version_tag(change.name, mark.version, mark.key, known)
    if standing(client, change.name).champion == change.champion != before.champion:
        _point(client, change.name, PREVIOUS_CHAMPION, before.previous)
        _point(client, change.name, CHAMPION, before.champion)


def _point(client: MlflowClient, name: str, alias: str, version: str | None) -> None:
    if version is None:
        client.delete_registered_model_alias(name, alias)
    else:
        client.set_registered_model_alias(name, alias, version)


def _named(version: str | None) -> str:
    return "none" if version is None else f"version {version}"
