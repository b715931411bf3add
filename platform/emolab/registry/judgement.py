"""The gates themselves: from what was gathered and measured to one result each. Nothing here reads or writes."""

from __future__ import annotations

import numpy as np

from emolab.names import UserError
from emolab.registry.evidence import Evidence, Tested
from emolab.registry.gates import Gates, Provenance
from emolab.registry.measurement import Served
from emolab.registry.sweep_evidence import Curve, no_sweep
from emolab.registry.verdict import (
    GateResult,
    Missing,
    bounded,
    decided,
    missing,
    moment,
    not_applicable,
    not_asked,
    times,
)
from emolab.scores import class_recall, macro_f1
from emolab.studies.bootstrap import DifferenceInterval, metric_difference

ROLLED_BACK = "emolab.rolled_back"
"""Tag of a version: when it was taken back, and why."""
NEED_THE_TEST = ("test_split_opened_once", "macro_f1", "class_recall", "not_worse_than_champion")
"""Gates whose evidence is the result on the test split; an opening brings none for the others."""
COMPARED = {"macro_f1": "macro-F1", "accuracy": "accuracy"}


def judge(
    gates: Gates, challenger: Evidence, champion: Evidence | None, served: Served | Missing, *, promotion: str
) -> tuple[GateResult, ...]:
    """Every gate, in the order in which people read them; gates that are not asked for say so.

    Args:
        served: the measurement of the challenger.
        promotion: run id under which the measurement is recorded.
    """
    return (
        *_provenance(gates.provenance, challenger, champion),
        _loads(served, promotion),
        *_floors(gates, challenger),
        _against_champion(gates, challenger, champion),
        _calibration(gates, challenger),
        *_missing_modalities(gates, challenger, champion),
        *_serving(gates, challenger, served, promotion),
    )


def difference(gates: Gates, challenger: Evidence, champion: Evidence) -> DifferenceInterval | Missing:
    """Challenger minus champion on the test sessions of both, with its session-clustered interval."""
    if champion.dataset != challenger.dataset:
        return Missing(
            reason=f"the champion, version {champion.version.version}, was trained and tested on another data set "
            f"({champion.dataset[:8]}, not {challenger.dataset[:8]}): train it again on this one"
        )
    for evidence in (challenger, champion):
        if isinstance(evidence.tested, Missing):
            return evidence.tested
    assert isinstance(challenger.tested, Tested)
    assert isinstance(champion.tested, Tested)
    ours, theirs = challenger.tested.sessions, champion.tested.sessions
    if ours.session_ids != theirs.session_ids:
        return Missing(reason="challenger and champion were tested on different sessions")
    asked = gates.against_champion
    try:
        return metric_difference(ours.confusion, theirs.confusion, metric=asked.metric, level=asked.level)
    except UserError as error:
        return Missing(reason=str(error))


def _provenance(asked: Provenance, challenger: Evidence, champion: Evidence | None) -> list[GateResult]:
    return [
        _one_data_set(challenger, champion),
        _clean_commit(asked, challenger),
        _opened_once(asked, challenger),
        _not_rolled_back(asked, challenger),
    ]


def _one_data_set(challenger: Evidence, champion: Evidence | None) -> GateResult:
    known = {challenger.dataset, challenger.tags.get("emolab.dataset"), challenger.training.tags.get("emolab.dataset")}
    runs = (challenger.version.run_id, *([champion.version.run_id] if champion else []))
    short = challenger.dataset[:16]
    if None in known:
        return missing("data_set", Missing(reason="the version or its training run does not name its data set"), runs)
    if len(known) > 1:
        return decided("data_set", False, "The version, its weights and its run name different data sets.", runs)
    if champion is not None and champion.dataset != challenger.dataset:
        sentence = f"The champion stands on data set {champion.dataset[:16]}, the challenger on {short}."
        return decided("data_set", False, sentence, runs)
    return decided("data_set", True, f"All evidence is about one data set, {short}.", runs)


def _clean_commit(asked: Provenance, challenger: Evidence) -> GateResult:
    runs = tuple(challenger.commits)
    if not asked.clean_commit:
        return not_asked("clean_commit")
    changed = [run_id[:8] for run_id, clean in challenger.commits.items() if clean == "false"]
    unknown = [run_id[:8] for run_id, clean in challenger.commits.items() if clean not in ("true", "false")]
    if changed:
        sentence = (
            f"Code that was not committed ran in {', '.join(changed)}: commit it and run that again under another name."
        )
        return decided("clean_commit", False, sentence, runs)
    if unknown:
        return missing("clean_commit", Missing(reason=f"no commit is known of the code in {', '.join(unknown)}"), runs)
    commits = challenger.training.tags.get("emolab.git_commit", "unknown").split()
    named = ", ".join(commit[:10] for commit in commits)
    return decided("clean_commit", True, f"All evidence came from committed code, training from {named}.", runs)


def _opened_once(asked: Provenance, challenger: Evidence) -> GateResult:
    runs = (challenger.version.run_id,)
    if isinstance(challenger.tested, Missing):
        return missing("test_split_opened_once", challenger.tested, runs, limit=asked.most_openings)
    count = challenger.tested.openings
    return GateResult(
        name="test_split_opened_once",
        outcome="passed" if 1 <= count <= asked.most_openings else "failed",
        value=count,
        threshold=asked.most_openings,
        sentence=f"The test split was opened {times(count)} for this model, at most {times(asked.most_openings)} is "
        f"allowed; last on {moment(challenger.tested.opened)}.",
        runs=runs,
    )


def _not_rolled_back(asked: Provenance, challenger: Evidence) -> GateResult:
    if asked.allow_rolled_back:
        return not_asked("not_rolled_back")
    taken_back = challenger.tags.get(ROLLED_BACK)
    if taken_back:
        sentence = f"This version was rolled back before ({taken_back}); register a better one."
        return decided("not_rolled_back", False, sentence, ())
    return decided("not_rolled_back", True, "This version was never rolled back.", ())


def _loads(served: Served | Missing, promotion: str) -> GateResult:
    runs = (promotion,)
    if isinstance(served, Missing):
        return decided("loads_anywhere", False, f"The version is no use: {served.reason}.", runs)
    sentence = "The version loads without this platform and without pickle, and answers its own example."
    return decided("loads_anywhere", True, sentence, runs)


def _floors(gates: Gates, challenger: Evidence) -> list[GateResult]:
    runs = (challenger.version.run_id,)

    def score(tested: Tested) -> tuple[float, str]:
        value = float(macro_f1(tested.counts))
        return value, f"Macro-F1 on the test split is {value:.3f}"

    def recall(tested: Tested) -> tuple[float, str]:
        recalls = class_recall(tested.counts)
        worst = int(np.argmin(recalls))  # the first NaN, where a class has no labelled step
        return float(recalls[worst]), f"The class recognised least, {tested.sessions.classes[worst]}, has recall " + (
            f"{recalls[worst]:.3f}" if np.isfinite(recalls[worst]) else "unknown: no test step carries it"
        )

    asked = gates.floors
    return [
        bounded("macro_f1", challenger.tested, score, least=asked.macro_f1, runs=runs),
        bounded("class_recall", challenger.tested, recall, least=asked.class_recall, runs=runs),
    ]


def _against_champion(gates: Gates, challenger: Evidence, champion: Evidence | None) -> GateResult:
    name, asked = "not_worse_than_champion", gates.against_champion
    if asked.margin is None:
        return not_asked(name)
    if champion is None:
        return _first(name)
    found, runs = difference(gates, challenger, champion), (challenger.version.run_id, champion.version.run_id)
    if isinstance(found, Missing):
        return missing(name, found, runs, limit=-asked.margin)
    better = "; it is better beyond chance" if found.low > 0 else ""
    return GateResult(
        name=name,
        outcome="passed" if found.low >= -asked.margin else "failed",
        value=found.low,
        threshold=-asked.margin,
        sentence=f"The difference from the champion in {COMPARED[asked.metric]} is {found.value:+.3f}, "
        f"{asked.level:.0%} interval [{found.low:+.3f}, {found.high:+.3f}] over {found.clusters} sessions; its lower "
        f"end must not lie below {-asked.margin:+.3f}{better}.",
        runs=runs,
    )


def _calibration(gates: Gates, challenger: Evidence) -> GateResult:
    def error(evidence: Evidence) -> tuple[float, str]:
        value = float(evidence.sweeps[0].clean["calibration_error"])
        return value, f"The expected calibration error on clean test sessions is {value:.3f}"

    known: Evidence | Missing = challenger if challenger.sweeps else Missing(reason=no_sweep(challenger.version.uri))
    runs = (challenger.sweeps[0].run_id,) if challenger.sweeps else ()
    return bounded("calibration", known, error, most=gates.calibration.most_error, runs=runs)


def _missing_modalities(gates: Gates, challenger: Evidence, champion: Evidence | None) -> list[GateResult]:
    asked, curve, losses = gates.missing_modalities, challenger.curve, challenger.single_losses

    def area(found: Curve) -> tuple[float, str]:
        return found.area, f"Mean macro-F1 over missing rates 0 to {found.rates[-1]:g} is {found.area:.3f}"

    area_gate = bounded("missing_rate_area", curve, area, least=asked.least_area, runs=_run_of(curve))
    against = _area_against_champion(gates, challenger, champion)
    name = "worst_single_modality_loss"
    if len(challenger.registered.modalities) < 2:
        return [area_gate, against, not_applicable(name, "The data set has a single modality.")]

    def loss(found: object) -> tuple[float, str]:
        assert not isinstance(losses, Missing)
        modality, value = losses.worst
        return value, f"Without {modality} throughout, {value:.3f} macro-F1 is lost, more than without any other"

    return [
        area_gate,
        against,
        bounded(name, losses, loss, most=asked.most_single_loss, runs=_run_of(losses)),
    ]


def _area_against_champion(gates: Gates, challenger: Evidence, champion: Evidence | None) -> GateResult:
    name, margin = "missing_rate_area_against_champion", gates.missing_modalities.area_margin
    if margin is None:
        return not_asked(name)
    if champion is None:
        return _first(name)
    ours, theirs = challenger.curve, champion.curve
    runs = (*_run_of(ours), *_run_of(theirs))
    for who, curve in (("challenger", ours), ("champion", theirs)):
        if isinstance(curve, Missing):
            return missing(name, Missing(reason=f"{who}: {curve.reason}"), runs, limit=-margin)
    assert isinstance(ours, Curve)
    assert isinstance(theirs, Curve)
    if champion.dataset != challenger.dataset or ours.cells != theirs.cells:
        reason = "the two curves were measured under different conditions (data set, rates or corruption seeds)"
        return missing(name, Missing(reason=reason), runs, limit=-margin)
    found = ours.area - theirs.area
    return GateResult(
        name=name,
        outcome="passed" if found >= -margin else "failed",
        value=found,
        threshold=-margin,
        sentence=f"Mean macro-F1 over the missing rates is {ours.area:.3f}, the champion's {theirs.area:.3f}: a "
        f"difference of {found:+.3f}, which must not lie below {-margin:+.3f}.",
        runs=runs,
    )


def _serving(gates: Gates, challenger: Evidence, served: Served | Missing, promotion: str) -> list[GateResult]:
    def latency(found: Served) -> tuple[float, str]:
        return found.milliseconds, (
            f"A session of {found.steps} steps is answered in {found.milliseconds:.0f} ms (median; "
            f"{found.per_step:.2f} ms a step)"
        )

    def size(found: Evidence) -> tuple[float, str]:
        held = found.registered
        return held.megabytes, f"The weights take {held.megabytes:.2f} MB ({held.parameters:,} parameters)"

    asked = gates.serving
    return [
        bounded("latency", served, latency, most=asked.most_milliseconds, runs=(promotion,), unit="ms"),
        bounded("size", challenger, size, most=asked.most_megabytes, runs=(challenger.version.run_id,), unit="MB"),
    ]


def _first(name: str) -> GateResult:
    return not_applicable(name, "There is no champion yet: the other gates decide.")


def _run_of(found: object) -> tuple[str, ...]:
    run_id = getattr(found, "run_id", None)
    return (run_id,) if run_id else ()
