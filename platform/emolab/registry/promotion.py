"""jobs/promote.py as a whole: a challenger held against the champion, a verdict, and the alias moved or not.

Everything is decided from recorded runs; what is measured here (time, size, whether the version loads at all) is
recorded with the verdict. The verdict is stored before any alias moves.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from mlflow.exceptions import MlflowException

from emolab.configuration import to_yaml
from emolab.names import UserError, checked_name
from emolab.registry.aliases import Mark, Move, cut_short, move, promoting, standing
from emolab.registry.evaluation import evaluate_once
from emolab.registry.evidence import Evidence, RegisteredWeights, Tested, fetch, gather, paired, untested
from emolab.registry.gates import Gates, load_gates
from emolab.registry.judged import Judged
from emolab.registry.judgement import NEED_THE_TEST, ROLLED_BACK, judge
from emolab.registry.lookup import ModelVersion, find_version
from emolab.registry.measurement import machine, measure
from emolab.registry.next_steps import next_steps
from emolab.registry.records import REPLACED, promoted_marks, record_verdict
from emolab.registry.settings import PromoteSettings
from emolab.registry.verdict import GateResult, Missing, Verdict
from emolab.sessions.manifest import read_manifest
from emolab.studies.test_split import openings
from emolab.tracking.beginning import CONFIGURATION
from emolab.tracking.provenance import code_version
from emolab.tracking.reasons import reason_of
from emolab.tracking.runs import MLflowTracker, existing_tracker
from emolab.tracking.tracker import NoTracker, Run

KIND = "promotion"


def promote(settings: PromoteSettings, *, dry_run: bool, report: Callable[[str], None]) -> Verdict:
    """Judge the challenger and, if every gate passed, make it the champion.

    A dry run judges by what is recorded and writes nothing anywhere.

    Raises:
        UserError: no such version, tracker or gates file; another promotion at work or faster. No alias has moved.
    """
    gates = load_gates(settings.gates)
    tracker = _tracker(settings)
    challenger = find_version(settings.model, tracker)
    checked_name(challenger.name, what="registered model name")
    output = Path(settings.output)
    with _registry_errors(), nullcontext() if dry_run else promoting(tracker, challenger.name, output):
        now = standing(tracker.client, challenger.name)
        if now.champion == challenger.version:
            raise UserError(f"{challenger.uri} is the champion already: there is nothing to decide")
        with _run(settings, gates, challenger, tracker, dry_run=dry_run) as run:
            judged = _judge(settings, gates, challenger, now.champion, tracker, run, report, dry_run=dry_run)
            _tell(judged.verdict, report)
            if not dry_run:
                record_verdict(judged, tracker, run, output, report)
                if judged.verdict.passed:
                    _move(judged.verdict, tracker, run)
    _conclude(settings, judged, tracker, report, dry_run=dry_run)
    return judged.verdict


def roll_back(settings: PromoteSettings, *, dry_run: bool, report: Callable[[str], None]) -> ModelVersion:
    """Make the previous champion the champion again, and record why; one that was cut short is finished instead.

    Raises:
        UserError: there is no previous champion, or another promotion is at work.
    """
    tracker = _tracker(settings)
    name = settings.model.removeprefix("models:/").partition("@")[0].partition("/")[0]
    checked_name(name, what="registered model name")
    with (
        _registry_errors(),
        nullcontext(cut_short(tracker, name)) if dry_run else promoting(tracker, name, Path(settings.output)) as begun,
    ):
        for change in begun:
            if any(mark.key == ROLLED_BACK for mark in change.marks):  # not: once more back from where it went
                if not dry_run:
                    tracker.resume(change.run_id).finish()
                done = "would be finished" if dry_run else "is finished now"
                report(f"{_went_back(change)}: that rollback, which was cut short, {done}")
                return find_version(f"models:/{name}/{change.champion}", tracker)
        now = standing(tracker.client, name)
        previous = begun[-1].previous if begun else now.previous
        if now.champion is None or previous is None:
            raise UserError(f"{name} has no previous champion to go back to")
        restored = find_version(f"models:/{name}/{previous}", tracker)
        if dry_run:
            report(f"the champion of {name} would go back from version {now.champion} to version {previous}")
        else:
            _restore(settings, name, now.champion, previous, tracker, report)
    return restored


def _went_back(change: Move) -> str:
    return f"the champion of {change.name} went back from version {change.expected} to version {change.champion}"


def _tracker(settings: PromoteSettings) -> MLflowTracker:
    return existing_tracker(**settings.tracking.model_dump(), output=Path(settings.output))


@contextmanager
def _registry_errors() -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        raise UserError(f"the registry failed: {reason_of(error)}") from None


@contextmanager
def _run(
    settings: PromoteSettings, gates: Gates, version: ModelVersion, tracker: MLflowTracker, *, dry_run: bool
) -> Iterator[Run]:
    """The promotion's own run; one that ends in an error is marked as such."""
    name = f"promote-{version.name}-{version.version}"[:120]
    tags = code_version() | {"emolab.kind": KIND, "emolab.model_version": version.uri}
    run = (NoTracker() if dry_run else tracker).start(name, tags=tags)
    run.log_text(to_yaml(settings), CONFIGURATION)
    run.log_text(to_yaml(gates), "gates.yaml")
    try:
        yield run
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish()


def _judge(
    settings: PromoteSettings,
    gates: Gates,
    challenger: ModelVersion,
    champion: str | None,
    tracker: MLflowTracker,
    run: Run,
    report: Callable[[str], None],
    *,
    dry_run: bool,
) -> Judged:
    versions = [challenger, *([find_version(f"models:/{challenger.name}/{champion}", tracker)] if champion else [])]
    rates = gates.missing_modalities.rates
    with tempfile.TemporaryDirectory() as temporary:
        fetched = [fetch(tracker, version, Path(temporary) / version.version) for version in versions]
        if settings.evaluate:
            _check_data(fetched[0], Path(settings.evaluate))
        served = measure(fetched[0].folder, steps=gates.serving.session_steps)
        mine, other = _gathered(tracker, fetched, rates)
        results = judge(gates, mine, other, served, promotion=run.run_id)
        if settings.evaluate and not dry_run:
            closed = _why_closed(gates, results)
            if closed:
                for why, names in closed.items():
                    report(f"test split stays closed{_CLOSED[why]}: {', '.join(names)}")
                mine = _kept_from_the_test(mine, closed)
            else:
                _evaluate(fetched, Path(settings.evaluate), tracker, run, report)
                mine, other = _gathered(tracker, fetched, rates)
            results = judge(gates, mine, other, served, promotion=run.run_id)
    verdict = Verdict(
        model=challenger.name,
        version=challenger.version,
        champion=champion,
        dataset=mine.dataset,
        gates=results,
        run_id=run.run_id,
        judged=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
        openings=openings(tracker, mine.dataset),
    )
    return Judged(verdict=verdict, gates=gates, challenger=mine, champion=other, served=served)


def _gathered(
    tracker: MLflowTracker, fetched: Sequence[RegisteredWeights], rates: Sequence[float]
) -> tuple[Evidence, Evidence | None]:
    """What is recorded about the challenger and, where there is one, about the champion."""
    mine, *others = [gather(tracker, registered, rates) for registered in fetched]
    return paired(mine, others[0]) if others else (mine, None)


_CLOSED = {"fails anyway": "", "lacks other evidence": ", since it would not bring what is missing for"}
"""Why a model does not meet the test split -> how the gates that it is kept from are introduced."""


def _why_closed(gates: Gates, results: Sequence[GateResult]) -> dict[str, list[str]]:
    """A model meets the test split once: not while it fails anyway or lacks what the test would not bring, nor by
    code that would spoil the evidence.

    Returns:
        A key of _CLOSED -> gates; empty where the split may be opened.
    """
    failed = [result.name for result in results if result.outcome == "failed"]
    if gates.provenance.clean_commit and code_version().get("emolab.git_clean") != "true":
        failed.append("clean_commit, because this code is not committed")
    lacking = [r.name for r in results if r.outcome == "missing evidence" and r.name not in NEED_THE_TEST]
    found = {"fails anyway": failed, "lacks other evidence": lacking}
    return {why: names for why, names in found.items() if names}


def _kept_from_the_test(evidence: Evidence, closed: Mapping[str, Sequence[str]]) -> Evidence:
    """The same with the reason why --evaluate opened nothing, instead of the advice to give --evaluate."""
    if isinstance(evidence.tested, Tested):
        return evidence
    absent = untested(evidence.version.uri, swept=bool(evidence.sweeps))
    why, names = next(iter(closed.items()))
    reason = f"{absent}: the split stays closed while it {why}: {', '.join(names)}"
    return replace(evidence, tested=Missing(reason=reason))


def _check_data(registered: RegisteredWeights, data: Path) -> None:
    """Refuse another data set before anything is judged.

    Raises:
        UserError: it is not the one that the model was trained on, or none at all.
    """
    if read_manifest(data).digest != registered.dataset:
        raise UserError(f"{registered.version.uri} was trained on another data set than {data}: give that one")


def _evaluate(
    fetched: Sequence[RegisteredWeights], data: Path, tracker: MLflowTracker, run: Run, report: Callable[[str], None]
) -> None:
    """Let versions that have no test result meet the test split; a champion of other data is left alone."""
    for registered in fetched:
        wanted = registered.dataset == fetched[0].dataset
        if wanted and evaluate_once(registered, data, tracker=tracker, opened_by=run.run_id):
            report(f"test split of {data} opened for {registered.version.uri}")


def _tell(verdict: Verdict, report: Callable[[str], None]) -> None:
    width = max(len(gate.name) for gate in verdict.gates)
    for gate in verdict.gates:
        report(f"{gate.outcome:16}  {gate.name:{width}}  {gate.sentence}")


def _move(verdict: Verdict, tracker: MLflowTracker, run: Run) -> None:
    change = Move(
        name=verdict.model,
        run_id=run.run_id,
        expected=verdict.champion,
        champion=verdict.version,
        previous=verdict.champion,
        marks=promoted_marks(verdict),
    )
    move(tracker.client, change)


def _restore(
    settings: PromoteSettings,
    name: str,
    champion: str,
    previous: str,
    tracker: MLflowTracker,
    report: Callable[[str], None],
) -> None:
    before = _tag(tracker, name, previous, REPLACED)
    tags = {"emolab.kind": "rollback", "emolab.rolled_back_from": champion, "emolab.rolled_back_to": previous}
    run = tracker.start(f"rollback-{name}"[:120], tags=code_version() | tags | {"emolab.reason": settings.reason})
    try:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        told = f"{when}, run {run.run_id}" + (f": {settings.reason}" if settings.reason else "")
        change = Move(
            name=name,
            run_id=run.run_id,
            expected=champion,
            champion=previous,
            previous=before or None,
            marks=[Mark(version=champion, key=ROLLED_BACK, value=told)],
        )
        move(tracker.client, change)
        report(_went_back(change))
    except BaseException:
        run.finish("FAILED")
        raise
    run.finish()


def _tag(tracker: MLflowTracker, name: str, version: str, tag: str) -> str:
    tags: Mapping[str, str] = tracker.client.get_model_version(name, version).tags
    return tags.get(tag, "")


def _conclude(
    settings: PromoteSettings, judged: Judged, tracker: MLflowTracker, report: Callable[[str], None], *, dry_run: bool
) -> None:
    verdict = judged.verdict
    steps = next_steps(settings, judged, tracker, closed=_why_closed(judged.gates, verdict.gates))
    if dry_run:
        for step in steps:
            report(f"next    {step}")
        report(f"dry run, nothing was changed: {verdict.summary}")
        return
    if verdict.passed:
        kept = f"; version {verdict.champion} is kept as previous_champion" if verdict.champion else ""
        report(f"promoted: models:/{verdict.model}@champion is version {verdict.version}{kept}")
    else:
        report(f"refused: {verdict.summary}; the champion stays {verdict.champion or 'unset'}")
    for step in steps:
        report(f"next    {step}")
    report(f"run     {verdict.run_id}\nlook    {tracker.instructions()}")
