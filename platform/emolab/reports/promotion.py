"""The page of a promotion: what was asked of the challenger, what was found, and what decided."""

from __future__ import annotations

from typing import Any

from emolab.registry.evidence import Evidence
from emolab.registry.judged import Judged
from emolab.registry.verdict import GateResult, Verdict, moment, times
from emolab.reports.page import Section, Styled, TableData, page
from emolab.reports.promotion_figures import against_champion, curves, recalls, single_losses
from emolab.training.train import flatten

_STYLES: dict[str, Any] = {"passed": "good", "failed": "bad", "missing evidence": "open", "not applicable": "idle"}
TITLES = {
    "data_set": "one data set",
    "clean_commit": "committed code",
    "test_split_opened_once": "test split opened once",
    "not_rolled_back": "never rolled back",
    "loads_anywhere": "loads anywhere",
    "macro_f1": "macro-F1",
    "class_recall": "recall of every class",
    "not_worse_than_champion": "not worse than the champion",
    "calibration": "calibration",
    "missing_rate_area": "area under the missing-rate curve",
    "missing_rate_area_against_champion": "that area against the champion",
    "worst_single_modality_loss": "worst single-modality loss",
    "latency": "latency, ms",
    "size": "size, MB",
}
"""Name of a gate -> the same for people."""


def promotion_page(judged: Judged) -> bytes:
    """One self-contained HTML file."""
    verdict = judged.verdict
    outcome = "passes every gate" if verdict.passed else "refused"
    sections = [_obstacles(verdict)] if verdict.obstacles else []
    sections.append(Section(title="Gates", text=_GATES_TEXT, table=_gates(verdict)))
    sections += _figures(judged)
    sections += [
        Section(title="Evidence", table=_evidence(judged)),
        Section(title="Gates file", table=_asked(judged)),
    ]
    return page(f"{verdict.model} version {verdict.version}: {outcome}", _lines(judged), sections)


def _lines(judged: Judged) -> list[str]:
    verdict, manifest = judged.verdict, judged.challenger.registered.manifest
    against = f"held against the champion, version {verdict.champion}" if verdict.champion else "there is no champion"
    counts = {name: sum(g.outcome == name for g in verdict.gates) for name in _STYLES}
    lines = [
        f"{judged.challenger.registered.state['model']['name']} trained on {manifest.corpus}, {against}. "
        + ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        + ". "
        + ("The alias champion may move." if verdict.passed else "The alias champion stays where it is."),
        f"Judged on {moment(verdict.judged)} in run {verdict.run_id}, by the test split of data set "
        f"{verdict.dataset[:16]}. This tracker has seen that split opened {times(verdict.openings['models'])} for "
        f"models and {times(verdict.openings['sweeps'])} for sweeps: the more often, the less a narrow pass means.",
    ]
    caveat = manifest.provenance.get("caveat")
    if manifest.corpus == "edusim":
        lines.append("The sessions are simulated: passing says nothing about real learners.")
    elif caveat:
        lines.append(f"Caveat of the data: {caveat}.")
    return lines


def _obstacles(verdict: Verdict) -> Section:
    rows = [[TITLES[gate.name], _outcome(gate), Styled(gate.sentence)] for gate in verdict.obstacles]
    return Section(title="What stands in the way", table=TableData(columns=["gate", "outcome", "why"], rows=rows))


_GATES_TEXT = (
    "Nothing is promoted on missing evidence. Values come from the runs named beside them; time and size were "
    "measured for this verdict."
)


def _gates(verdict: Verdict) -> TableData:
    rows = [
        [TITLES[gate.name], _outcome(gate), gate.value, gate.threshold, Styled(gate.sentence), _runs(gate)]
        for gate in verdict.gates
    ]
    return TableData(columns=["gate", "outcome", "found", "asked", "in words", "runs"], rows=rows)


def _outcome(gate: GateResult) -> Styled:
    return Styled(gate.outcome, _STYLES[gate.outcome])


def _runs(gate: GateResult) -> Styled:
    return Styled(" ".join(run_id[:8] for run_id in gate.runs), "ids")


def _figures(judged: Judged) -> list[Section]:
    made = [
        ("Difference from the champion", against_champion(judged)),
        ("When modalities fail", curves(judged)),
        ("One modality absent throughout", single_losses(judged)),
        ("Recall of every class", recalls(judged)),
    ]
    return [Section(title=title, figure=figure) for title, figure in made if figure is not None]


def _evidence(judged: Judged) -> TableData:
    rows: list[list[Any]] = [
        ["promotion", f"version {judged.verdict.version}", Styled(judged.verdict.run_id, "ids"), None, None]
    ]
    for role, evidence in (("challenger", judged.challenger), ("champion", judged.champion)):
        if evidence is not None:
            rows += [[f"{role}: {what}", *rest] for what, *rest in _evidence_rows(evidence)]
    return TableData(columns=["what", "of", "run", "code committed", "details"], rows=rows)


def _evidence_rows(evidence: Evidence) -> list[list[Any]]:
    version, opened = evidence.version, getattr(evidence.tested, "opened", None)
    of, clean = f"version {version.version}", evidence.commits.get(version.run_id)
    weights = f"weights {evidence.registered.digest[:8]}"
    details = f"{weights}, tested on {moment(opened)}" if opened else weights
    rows: list[list[Any]] = [["training and test", of, Styled(version.run_id, "ids"), clean, Styled(details)]]
    swept = dict.fromkeys(sweep.run_id for sweep in evidence.sweeps)
    for run_id in swept:
        committed = evidence.commits.get(run_id)
        rows.append(["robustness sweep", of, Styled(run_id, "ids"), committed, Styled(weights)])
    return rows


def _asked(judged: Judged) -> TableData:
    asked = flatten(judged.gates.model_dump(mode="json"))
    return TableData(columns=["key", "value"], rows=[[key, Styled(str(value))] for key, value in asked.items()])
