"""The model card of a version: what it is, what it was measured to do, and what it must not be used for.

Every number is read from the version's weights or from tracked runs; the shape follows Mitchell et al., "Model
Cards for Model Reporting" (FAT*, 2019).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edu_emotionnet import zoo
from emolab.registry.evidence import Tested
from emolab.registry.judged import Judged
from emolab.registry.measurement import Served
from emolab.registry.sweep_evidence import Curve, SingleLosses
from emolab.registry.verdict import Missing
from emolab.reports.comparison_text import class_prior
from emolab.reports.markdown import to_markdown
from emolab.reports.page import Section, Styled, TableData, page
from emolab.reports.promotion_figures import curves, recalls, single_losses
from emolab.scores import accuracy, class_precision, class_recall, macro_f1
from emolab.studies.bootstrap import METRICS, Interval, Metric, class_f1_intervals, metric_interval
from emolab.studies.resampling import FEWEST_CLUSTERS
from emolab.training.made_for import normalisation
from emolab.training.train import flatten

SIMULATED = (
    "Trained and tested on EduSim, a simulator: nothing here says anything about real learners, and none of it may be "
    "set beside scores on recordings of people."
)


def card_files(judged: Judged) -> dict[str, bytes]:
    """The card as Markdown and as a self-contained page."""
    title, lines, sections = _title(judged), _lines(judged), _sections(judged)
    return {
        "model_card.md": to_markdown(title, lines, sections),
        "model_card.html": page(title, lines, sections),
    }


def card_summary(judged: Judged) -> str:
    """A few lines for the registry's description of the version."""
    files = f"Model card: model_card.md and model_card.html beside the model, and in run {judged.verdict.run_id}."
    return "\n\n".join([*_lines(judged), judged.verdict.summary + ".", files])


def _title(judged: Judged) -> str:
    return f"Model card: {judged.verdict.model} version {judged.verdict.version}"


def _lines(judged: Judged) -> list[str]:
    """What a reader in a hurry must know."""
    held = judged.challenger.registered
    manifest, name = held.manifest, held.state["model"]["name"]
    lines = [
        f"{name} ({held.parameters:,} parameters) reads a learning session step by step, one step every "
        f"{manifest.step_seconds:g} s, from {_listed(held.modalities)}, and gives at every step a probability for "
        f"each of {_listed(manifest.classes)}. Any modality may be missing at any step."
    ]
    if not zoo.entry(name).causal:
        lines.append("It looks ahead in the session, so it cannot be used live.")
    if manifest.corpus == "edusim":
        lines.append(SIMULATED)
    elif "caveat" in manifest.provenance:
        lines.append(f"Caveat of the data: {manifest.provenance['caveat']}.")
    tested = judged.challenger.tested
    if isinstance(tested, Tested):
        scores = {metric: _interval(tested, metric) for metric in METRICS}
        lines.append(
            f"On the test split: accuracy {_shown(scores['accuracy'])}, macro-F1 {_shown(scores['macro_f1'])}."
        )
    return lines


def _sections(judged: Judged) -> list[Section]:
    return [
        Section(title="Intended use", text=_USE),
        Section(title="Limits", text=_limits(judged)),
        *_scores(judged),
        *_robustness(judged),
        Section(title="Cost of an answer", text=_cost(judged)),
        *_data(judged),
        *_training(judged),
        Section(title="Where the numbers come from", table=_runs(judged)),
    ]


_USE = (
    "Research on learners' affect, and feedback to people who asked for it: what a group or a person went through, "
    "shown beside its uncertainty, with a human who can disagree.\n\n"
    "Not for grading, admission, discipline, surveillance, diagnosis, advertising, or any decision about a person; "
    "not without the informed consent of those recorded (of their guardians, for minors). The labels are what "
    "annotators or a simulator call a state, not what a person feels. In the European Union inferring emotions of "
    "people in education is prohibited except for medical or safety reasons (Regulation (EU) 2024/1689, Article "
    "5(1)(f)); other places have rules of their own."
)


def _limits(judged: Judged) -> str:
    """What the measurements themselves warn of."""
    evidence = judged.challenger
    held, found = evidence.registered, []
    test = held.manifest.splits["test"]
    if isinstance(evidence.tested, Tested) or evidence.sweeps:
        found.append(
            f"Measured on {test.sessions} sessions of {len(test.speakers)} speakers who were not in training, from one "
            f"corpus ({held.manifest.corpus}); other people, languages, rooms and devices were not tried."
        )
    else:
        found.append("Nothing was measured on people who were not in training.")
    if isinstance(evidence.tested, Tested):
        recalls_found = class_recall(evidence.tested.counts)
        worst = int(np.nanargmin(recalls_found))
        confused = evidence.tested.counts[worst].copy()
        confused[worst] = 0
        classes = evidence.tested.sessions.classes
        found.append(
            f"It recognises {classes[worst]} least: {recalls_found[worst]:.0%} of its steps, most of the others taken "
            f"for {classes[int(confused.argmax())]}."
        )
    if isinstance(evidence.single_losses, SingleLosses):
        name, loss = evidence.single_losses.worst
        found.append(f"It leans most on {name}: without it throughout, {loss:.3f} of macro-F1 is lost.")
    if isinstance(evidence.curve, Curve):
        curve = evidence.curve
        found.append(
            f"With {curve.rates[-1]:.0%} of all steps missing in every modality, macro-F1 falls from "
            f"{curve.scores[0]:.3f} to {curve.scores[-1]:.3f} and the calibration error goes from "
            f"{curve.calibration[0]:.3f} to {curve.calibration[-1]:.3f}."
        )
    absent = [gate.sentence for gate in judged.verdict.gates if gate.outcome == "missing evidence"]
    found += [f"Not known: {sentence}" for sentence in dict.fromkeys(absent)]
    found += [f"Gate failed: {gate.sentence}" for gate in judged.verdict.gates if gate.outcome == "failed"]
    return "\n\n".join(found)


def _scores(judged: Judged) -> list[Section]:
    tested = judged.challenger.tested
    if isinstance(tested, Missing):
        return [Section(title="Scores", text=f"None: {tested.reason}.")]
    known = judged.challenger.registered.manifest.splits["test"].reference_scores
    rows: list[list[Any]] = []
    for metric, name in (("accuracy", "accuracy"), ("macro_f1", "macro-F1")):
        by_session, by_speaker = _interval(tested, metric), _interval(tested, metric, speakers=True)
        ceiling = [known[f"ceiling_{metric}"]] if f"ceiling_{metric}" in known else []
        rows.append([name, _shown(by_session), _shown(by_speaker), *ceiling])
    columns = ["score", "95 % by session", "95 % by speaker", "exact filter (ceiling)"]
    overall = TableData(columns=columns[: len(rows[0])], rows=rows)
    text = "Clustered bootstrap: whole sessions, or whole speakers, are drawn again. " + _prior(judged)
    return [
        Section(title="Scores on the test split", text=text, table=overall),
        Section(title="By class", table=_by_class(tested), figure=recalls(judged)),
    ]


def _prior(judged: Judged) -> str:
    prior = class_prior(judged.challenger.registered.manifest)
    return f"Always answering training's most frequent class: accuracy {prior[0]:.3f}, macro-F1 {prior[1]:.3f}."


def _by_class(tested: Tested) -> TableData:
    counts = tested.counts
    f1 = class_f1_intervals(tested.sessions.confusion) if len(tested.sessions.steps) >= FEWEST_CLUSTERS else None
    rows = [
        [name, int(counts[i].sum()), float(class_recall(counts)[i]), float(class_precision(counts)[i]),
         _shown(f1[i]) if f1 else None]
        for i, name in enumerate(tested.sessions.classes)
    ]  # fmt: skip
    return TableData(columns=["class", "test steps", "recall", "precision", "F1, 95 %"], rows=rows)


def _interval(tested: Tested, metric: Metric | str, *, speakers: bool = False) -> Interval | float:
    chosen: Metric = "accuracy" if metric == "accuracy" else "macro_f1"
    who = tested.sessions.speaker_ids
    if len(set(who) if speakers else who) < FEWEST_CLUSTERS:
        return float((accuracy if chosen == "accuracy" else macro_f1)(tested.counts))
    return metric_interval(tested.sessions.confusion, metric=chosen, speakers=who if speakers else None)


def _shown(found: Interval | float) -> str:
    if not isinstance(found, Interval):
        return f"{found:.3f} (too few for an interval)"
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _robustness(judged: Judged) -> list[Section]:
    evidence, sections = judged.challenger, []
    if isinstance(evidence.curve, Curve):
        curve = evidence.curve
        rows = [list(row) for row in zip(curve.rates, curve.scores, curve.calibration, strict=True)]
        sections.append(
            Section(
                title="When steps go missing",
                text=f"Every modality loses each step with the same probability. Mean macro-F1 over the rates: "
                f"{curve.area:.3f}. The first row, rate 0, is the calibration on clean sessions.",
                table=TableData(columns=["missing rate", "macro-F1", "calibration error"], rows=rows),
                figure=curves(judged),
            )
        )
    if isinstance(evidence.single_losses, SingleLosses):
        losses = evidence.single_losses
        rows = [[f"without {name}", left, losses.clean - left] for name, left in losses.without.items()]
        table = TableData(columns=["condition", "macro-F1", "lost"], rows=[["all present", losses.clean, 0.0], *rows])
        sections.append(Section(title="When a modality is absent", table=table, figure=single_losses(judged)))
    return sections or [Section(title="When modalities fail", text="No tracked robustness sweep: not known.")]


def _cost(judged: Judged) -> str:
    held, machine = judged.challenger.registered, judged.verdict.machine
    size = f"The weights take {held.megabytes:.1f} MB."
    if not isinstance(judged.served, Served):
        return f"{size} It could not be timed: {judged.served.reason}."
    served = judged.served
    return (
        f"{size} A whole session of {served.steps} steps is answered in {served.milliseconds:.0f} ms (median; "
        f"{served.per_step:.2f} ms a step) by one thread of {machine['processor']}, whose load was {machine['load']}."
    )


def _data(judged: Judged) -> list[Section]:
    manifest = judged.challenger.registered.manifest
    splits = list(manifest.splits.values())
    rows = [["sessions", *(s.sessions for s in splits)], ["steps", *(s.steps for s in splits)]]
    rows.append(["speakers", *(len(s.speakers) for s in splits)])
    for i, name in enumerate(manifest.classes):
        shares = (s.label_counts[i] / max(1, sum(s.label_counts)) for s in splits)
        rows.append([f"labelled {name}", *(f"{share:.0%}" for share in shares)])
    rows += [[f"with {name}", *(f"{s.present.get(name, 0.0):.0%}" for s in splits)] for name in manifest.dimensions]
    alone = normalisation(manifest.model_dump(include={"protocol"})) == "session"
    first = "scaled within each session to mean 0 and deviation 1 over its observed steps, then " if alone else ""
    text = (
        f"Corpus {manifest.corpus}, data set {manifest.digest}. No speaker is in two splits. Features per step: "
        + ", ".join(f"{name} {width}" for name, width in manifest.dimensions.items())
        + f". They are {first}standardised with the training split's mean and deviation, which are part of the weights."
    )
    provenance = [[key, Styled(str(value))] for key, value in flatten(dict(manifest.provenance)).items()]
    return [
        Section(title="Data", text=text, table=TableData(columns=["", *manifest.splits], rows=rows)),
        Section(
            title="Where the features come from",
            text="Features made in another way give answers that mean nothing.",
            table=TableData(columns=["what", "value"], rows=provenance),
        ),
    ]


def _training(judged: Judged) -> list[Section]:
    evidence = judged.challenger
    state, tags = evidence.registered.state, evidence.training.tags
    settings = flatten({"model": state["model"], "training": state["training"]})
    facts = {
        "kept epoch": state["best_epoch"],
        "code": f"{tags.get('emolab.git_commit', 'unknown')} (clean: {tags.get('emolab.git_clean', 'unknown')})",
        "versions": tags.get("emolab.versions", "unknown"),
        "command": tags.get("emolab.command", "unknown"),
    }
    rows = [[key, Styled(str(value))] for key, value in (settings | facts).items()]
    return [Section(title="Training", table=TableData(columns=["setting", "value"], rows=rows))]


def _runs(judged: Judged) -> TableData:
    evidence = judged.challenger
    rows = [
        ["training, test split", evidence.version.run_id],
        *(["robustness sweep", run_id] for run_id in dict.fromkeys(sweep.run_id for sweep in evidence.sweeps)),
        ["time, size, verdict", judged.verdict.run_id],
        ["weights (SHA-256 of their manifest)", evidence.registered.digest],
    ]
    return TableData(columns=["numbers", "run"], rows=rows)


def _listed(names: Any) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else str(last)
