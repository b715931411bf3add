"""The paper's corpus protocol (section V.A) as options: which sessions stay, how they are split and scaled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from edu_emotionnet.scaling import standardised
from emolab.configuration import Settings
from emolab.names import UserError
from emolab.sessions.facts import SessionFacts
from emolab.sessions.schema import Session

Rule = Literal["gap", "absent modality", "no label", "balance"]


class Protocol(Settings):
    """What is done to a corpus between reading its sessions and writing shards. The defaults do nothing.

    The paper's: ``max_gap_seconds=2 balance=classes split=speakers``. It scales audio alone per session, which the
    MFCC extractor does; ``normalise=session`` scales every modality and is not the paper's.
    """

    max_gap_seconds: float | None = Field(
        default=None, ge=0.0, description="drop sessions in which a modality is absent for longer at a stretch"
    )
    gap_modalities: tuple[str, ...] | None = Field(
        default=None, description="modalities that max_gap_seconds looks at; null: all"
    )
    absent_modality: Literal["drop", "keep"] = Field(
        default="drop", description="whether max_gap_seconds also drops sessions that lack a modality altogether"
    )
    balance: Literal["none", "classes"] = Field(
        default="none", description="classes: equally many sessions of every dominant class"
    )
    split: Literal["published", "speakers"] = Field(
        default="published", description="the corpus's own split where it has one; speakers: always 70/10/20 % of them"
    )
    normalise: Literal["none", "session"] = Field(
        default="none", description="session: every feature to mean 0, deviation 1 over the session's observed steps"
    )

    def identity(self) -> dict[str, Any]:
        """The options that differ from doing nothing, as JSON values for the manifest."""
        return self.model_dump(mode="json", exclude_defaults=True)


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A sound session that the protocol leaves out."""

    session_id: str
    rule: Rule
    reason: str


def select(
    sessions: Sequence[SessionFacts], protocol: Protocol, classes: Sequence[str], *, seed: int
) -> tuple[list[SessionFacts], list[Dropped]]:
    """Sessions that stay, in the given order, and those that go.

    Raises:
        UserError: an unknown modality, a class that no session could represent, or nothing left.
    """
    _check_modalities(sessions, protocol)
    dropped = [found for facts in sessions if (found := _gap(facts, protocol)) is not None]
    if protocol.balance == "classes":
        gone = {each.session_id for each in dropped}
        dropped += _surplus([facts for facts in sessions if facts.session_id not in gone], classes, seed=seed)
    gone = {each.session_id for each in dropped}
    kept = [facts for facts in sessions if facts.session_id not in gone]
    if not kept:
        first = f", the first for: {dropped[0].reason}" if dropped else ""
        raise UserError(f"the protocol leaves none of {len(sessions)} sessions{first}; relax protocol.*")
    return kept, dropped


def normalised(session: Session) -> Session:
    """The session with every feature at mean 0 and standard deviation 1 over its observed steps."""
    return replace(
        session,
        features={name: standardised(values, session.present[name]) for name, values in session.features.items()},
    )


def _check_modalities(sessions: Sequence[SessionFacts], protocol: Protocol) -> None:
    known = sessions[0].present if sessions else {}
    for name in protocol.gap_modalities or ():
        if known and name not in known:
            raise UserError(f"protocol.gap_modalities: the corpus has no {name!r} (it has {', '.join(known)})")


def _gap(facts: SessionFacts, protocol: Protocol) -> Dropped | None:
    if protocol.max_gap_seconds is None:
        return None
    for name in protocol.gap_modalities or facts.present:
        if facts.present[name] == 0:
            if protocol.absent_modality == "drop":
                return Dropped(session_id=facts.session_id, rule="absent modality", reason=f"no {name} at all")
            continue
        gap = facts.longest_gap[name] * facts.step_seconds
        if gap > protocol.max_gap_seconds:
            reason = f"{name} is absent for {gap:g} s, more than {protocol.max_gap_seconds:g}"
            return Dropped(session_id=facts.session_id, rule="gap", reason=reason)
    return None


def _surplus(sessions: Sequence[SessionFacts], classes: Sequence[str], *, seed: int) -> list[Dropped]:
    """Sessions beyond the number that every dominant class can offer, chosen by a hash of id and seed."""
    by_class: Mapping[int, list[SessionFacts]] = {label: [] for label in range(len(classes))}
    dropped = []
    for facts in sessions:
        if facts.dominant is None:
            dropped.append(Dropped(session_id=facts.session_id, rule="no label", reason="no step is labelled"))
        else:
            by_class[facts.dominant].append(facts)
    fewest = min(by_class, key=lambda label: len(by_class[label]))
    share = len(by_class[fewest])
    if not share:
        raise UserError(f"protocol.balance: {classes[fewest]!r} is the dominant class of no session")
    for label, members in by_class.items():
        for facts in sorted(members, key=lambda each: _draw(each.session_id, seed))[share:]:
            reason = f"surplus of {classes[label]!r}: {share} sessions of every dominant class stay"
            dropped.append(Dropped(session_id=facts.session_id, rule="balance", reason=reason))
    return dropped


def _draw(session_id: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{session_id}/balance/{seed}".encode(), digest_size=16).digest()
