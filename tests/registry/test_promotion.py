"""A model goes to learners only if it is better and holds up when modalities fail: every way this can go."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from tests.conftest import REPOSITORY
from tests.registry.promotion_lab import NAME, Lab, build, committed, enter, gates_file, sweep
from tests.training.test_loop import settings_for

from emolab import sealed
from emolab.configuration import parse
from emolab.names import UserError
from emolab.registry import aliases, promotion
from emolab.registry.aliases import Mark, Move, move, promoting, recover, standing
from emolab.registry.evidence import Evidence, RegisteredWeights, gather
from emolab.registry.gates import load_gates
from emolab.registry.lookup import ModelVersion
from emolab.registry.measurement import Served, measure
from emolab.registry.promotion import PromoteSettings, promote, roll_back
from emolab.registry.records import PROMOTED, REPLACED, VERDICT
from emolab.registry.verdict import Missing, Verdict
from emolab.robustness.cells import cell_id
from emolab.sessions.manifest import read_manifest
from emolab.studies.robustness import RobustnessSettings
from emolab.studies.test_split import OPENED_BY, OPENINGS, openings
from emolab.tracking.runs import MLflowTracker, open_tracker
from emolab.training.train import train

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def built(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return build(tmp_path_factory.mktemp("promotion"))


@pytest.fixture(scope="module")
def measured() -> Callable[..., Served | Missing]:
    """The real measurement, taken once: it starts a process and loads PyTorch there, and toys are equally fast."""
    known: list[Served | Missing] = []

    def remembered(folder: Path, *, steps: int) -> Served | Missing:
        if not known:
            known.append(measure(folder, steps=steps, repetitions=3))
        return known[0]

    return remembered


@pytest.fixture
def lab(built: Lab, measured: Callable[..., Served | Missing], monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.setattr(promotion, "measure", measured)
    clean = {"emolab.git_clean": "true", "emolab.git_commit": "f" * 40}  # a developer's tree has changes
    monkeypatch.setattr(promotion, "code_version", lambda: clean)
    built.forget()
    yield built
    built.forget()


def attempt(lab: Lab, role: str, gates: Path, *, dry_run: bool = False, **values: Any) -> tuple[Verdict, list[str]]:
    lines: list[str] = []
    return promote(lab.settings(role, gates, **values), dry_run=dry_run, report=lines.append), lines


HARMLESS = {"most_single_loss": 1.0, "area_margin": 1.0, "least_area": 0.0}
"""Gates that even a fragile model passes, where a test is about something else."""


NO_SWEEP = {
    "calibration": {"most_error": None},
    "missing_modalities": {"least_area": None, "area_margin": None, "most_single_loss": None},
}
"""Gates that ask for no sweep."""


def outcomes(verdict: Verdict) -> dict[str, str]:
    return {gate.name: gate.outcome for gate in verdict.gates}


def obstacles(verdict: Verdict) -> set[str]:
    return {gate.name for gate in verdict.obstacles}


def test_a_first_model_is_judged_by_the_absolute_gates_alone(lab: Lab, tmp_path: Path) -> None:
    verdict, lines = attempt(lab, "first", gates_file(tmp_path))
    assert verdict.passed, verdict.summary
    assert verdict.champion is None
    found = outcomes(verdict)
    against = {"not_worse_than_champion", "missing_rate_area_against_champion"}
    assert {name for name, outcome in found.items() if outcome == "not applicable"} == against
    assert lab.aliases() == ("first", None)
    assert any(line.startswith("promoted: ") for line in lines)
    tags = lab.tags("first")
    assert tags[VERDICT] == "passed"
    assert tags[PROMOTED]
    assert tags[REPLACED] == ""
    assert {tags[f"emolab.gate.{name}"] == outcome for name, outcome in found.items()} == {True}


def test_a_better_model_takes_over_and_the_old_champion_is_kept(lab: Lab, tmp_path: Path) -> None:
    lab.crown("first")
    verdict, lines = attempt(lab, "better", gates_file(tmp_path))
    assert verdict.passed, verdict.summary
    assert set(outcomes(verdict).values()) == {"passed"}
    assert lab.aliases() == ("better", "first")
    assert any("kept as previous_champion" in line for line in lines)
    compared = next(gate for gate in verdict.gates if gate.name == "not_worse_than_champion")
    assert compared.value is not None
    assert compared.value >= -0.02
    assert set(compared.runs) == {lab.versions["better"].run_id, lab.versions["first"].run_id}


def test_a_worse_model_is_refused_and_nothing_moves(lab: Lab, tmp_path: Path) -> None:
    lab.crown("first")
    verdict, lines = attempt(lab, "worse", gates_file(tmp_path))
    assert not verdict.passed
    assert {"macro_f1", "not_worse_than_champion"} <= obstacles(verdict)
    assert lab.aliases() == ("first", None)
    assert any(line.startswith("refused: ") and "macro_f1" in line for line in lines)
    assert lab.tags("worse")[VERDICT] == "refused"
    assert PROMOTED not in lab.tags("worse")


def test_a_better_model_that_breaks_when_a_modality_fails_is_refused(lab: Lab, tmp_path: Path) -> None:
    lab.crown("first")
    verdict, _ = attempt(lab, "fragile", gates_file(tmp_path))
    compared = next(gate for gate in verdict.gates if gate.name == "not_worse_than_champion")
    assert compared.outcome == "passed"
    assert compared.value is not None
    assert compared.value > 0  # better beyond chance on clean sessions
    assert "worst_single_modality_loss" in obstacles(verdict)
    assert obstacles(verdict) <= {
        "worst_single_modality_loss", "missing_rate_area", "missing_rate_area_against_champion", "calibration",
    }  # fmt: skip
    assert "Without audio" in next(g for g in verdict.gates if g.name == "worst_single_modality_loss").sentence
    assert lab.aliases() == ("first", None)


def fresh(lab: Lab, data: Path, seed: int) -> ModelVersion:
    """A version that nobody has tested or swept."""
    model = {"name": "early_fusion", "d_model": 8}
    settings = settings_for(data, lab.output, model=model, epochs=1, seed=seed)
    return enter(committed(train(settings, tracker=lab.tracker), lab.tracker), lab.tracker)


def settings_of(lab: Lab, version: ModelVersion, gates: Path, **values: Any) -> PromoteSettings:
    return PromoteSettings.model_validate(
        {"model": version.uri, "gates": str(gates), "output": str(lab.output)} | values
    )


def test_nothing_is_promoted_on_missing_evidence_and_the_test_split_is_opened_once(
    lab: Lab, tmp_path: Path, one_line: Callable[..., None]
) -> None:
    lax = {"missing_modalities": HARMLESS, "calibration": {"most_error": 1.0}}
    version, gates = fresh(lab, lab.data, seed=77), gates_file(tmp_path, floors={"macro_f1": 1.0}, **lax)
    verdict = promote(settings_of(lab, version, gates), dry_run=False, report=lambda _: None)
    absent = {name for name, outcome in outcomes(verdict).items() if outcome == "missing evidence"}
    assert absent == {
        "test_split_opened_once", "macro_f1", "class_recall", "calibration", "missing_rate_area",
        "worst_single_modality_loss",
    }  # fmt: skip
    assert all(str(g.sentence).count("--") for g in verdict.gates if g.name in ("macro_f1", "calibration"))
    untested = next(g.sentence for g in verdict.gates if g.name == "macro_f1")
    assert untested.startswith(f"{version.uri} has no test evaluation on record: add --evaluate")  # not capitalised
    card = lab.tracker.artifact(verdict.run_id, "model_card.md").decode()
    assert "Measured on" not in card
    assert card.count("Not known:") == 4  # what three gates miss alike is said once
    assert lab.aliases() == (None, None)

    evaluated = settings_of(lab, version, gates, evaluate=str(lab.data))
    lines: list[str] = []
    promote(evaluated, dry_run=True, report=lines.append)
    assert OPENINGS not in lab.tracker.read(version.run_id).tags
    sweep(version.run_id, lab.data, lab.output, lab.tracker)
    for _ in range(2):
        verdict = promote(evaluated, dry_run=False, report=lines.append)
    tags = lab.tracker.read(version.run_id).tags
    assert tags[OPENINGS] == "1"
    assert lab.tracker.read(tags[OPENED_BY]).tags["emolab.kind"] == "promotion"
    assert sum("opened for" in line for line in lines) == 1
    assert outcomes(verdict)["test_split_opened_once"] == "passed"
    assert outcomes(verdict)["clean_commit"] == "passed"
    assert "missing evidence" not in outcomes(verdict).values()
    assert "macro_f1" in obstacles(verdict)
    assert lab.aliases() == (None, None)

    lab.tracker.resume(version.run_id).set_tags({OPENINGS: "2"})  # as an interrupted opening leaves it
    verdict = promote(settings_of(lab, version, gates), dry_run=True, report=lambda _: None)
    assert outcomes(verdict)["test_split_opened_once"] == "failed"


def test_the_test_split_stays_closed_while_evidence_is_missing_that_it_would_not_bring(
    lab: Lab, tmp_path: Path
) -> None:
    version, gates = fresh(lab, lab.data, seed=79), gates_file(tmp_path)
    before = openings(lab.tracker, read_manifest(lab.data).digest)
    lines: list[str] = []
    settings = settings_of(lab, version, gates, evaluate=str(lab.data))
    verdict = promote(settings, dry_run=False, report=lines.append)
    lacking = "calibration, missing_rate_area, worst_single_modality_loss"
    assert f"test split stays closed, since it would not bring what is missing for: {lacking}" in lines
    assert OPENINGS not in lab.tracker.read(version.run_id).tags
    assert openings(lab.tracker, read_manifest(lab.data).digest) == before
    untested = next(g.sentence for g in verdict.gates if g.name == "macro_f1")
    assert untested.endswith(f"stays closed while it lacks other evidence: {lacking}.")


def test_what_to_do_next_can_be_pasted_as_it_stands(lab: Lab, tmp_path: Path) -> None:
    version = fresh(lab, lab.data, seed=80)
    gates = gates_file(tmp_path, missing_modalities={"rates": [0.0, 0.3, 0.6]})
    lines: list[str] = []
    promote(settings_of(lab, version, gates), dry_run=True, report=lines.append)
    told = commands(lines)
    assert [Path(words[1]).name for words in told] == ["robustness.py", "promote.py"]
    swept, _ = parse(RobustnessSettings, told[0][2:], description="")
    assert (swept.models, swept.suite) == ((version.uri,), "promotion")
    assert (swept.data, swept.output) == (str(lab.data), str(lab.output))  # the data are known from the training
    settings, _ = parse(PromoteSettings, told[1][2:], description="")
    assert settings == settings_of(lab, version, gates, evaluate=str(lab.data))
    sweep(version.run_id, lab.data, lab.output, lab.tracker)  # as the first of them, by a smaller suite
    lines.clear()
    lab.tracker.resume(version.run_id).set_tags({"emolab.git_clean": "unknown"})
    promote(settings, dry_run=False, report=lines.append)
    assert any(line.startswith("test split stays closed, since it would not bring what is missing") for line in lines)
    unknown = f"clean_commit: No commit is known of the code in {version.run_id[:8]}."
    assert [line for line in lines if line.startswith("next ")] == [
        f"next    before the test split is opened: {unknown}"
    ]
    lines.clear()
    lab.tracker.resume(version.run_id).set_tags({"emolab.git_clean": "true"})
    promote(settings, dry_run=False, report=lines.append)
    assert lab.tracker.read(version.run_id).tags[OPENINGS] == "1"
    assert not [line for line in lines if line.startswith("next ")]


def test_a_command_that_was_refused_is_not_what_to_do_next(lab: Lab, tmp_path: Path) -> None:
    version, gates = fresh(lab, lab.data, seed=81), gates_file(tmp_path, missing_modalities={"least_area": 0.99})
    sweep(version.run_id, lab.data, lab.output, lab.tracker)
    settings, lines = settings_of(lab, version, gates, evaluate=str(lab.data)), list[str]()
    verdict = promote(settings, dry_run=False, report=lines.append)
    assert any(line.startswith("test split stays closed: missing_rate_area") for line in lines)
    told = [line.removeprefix("next    ") for line in lines if line.startswith("next ")]
    assert not any("promote.py" in line for line in told)
    area = next(gate for gate in verdict.gates if gate.name == "missing_rate_area")
    assert f"before the test split is opened: missing_rate_area: {area.sentence}" in told
    assert f"{area.value:.3f}; at least 0.99 is asked for" in area.sentence
    untested = next(gate.sentence for gate in verdict.gates if gate.name == "macro_f1")
    assert untested.startswith(
        f"{version.uri} has no test evaluation on record, though a sweep has opened the split: the split stays closed "
        "while it fails anyway: missing_rate_area"
    )


def sweeps(lab: Lab) -> list[str]:
    return list(lab.tracker.find("emolab.kind", "robustness"))


@pytest.fixture
def without_sweeps(lab: Lab) -> Iterator[str]:
    """As if nothing had been swept yet; gives the sweep of all roles, to be copied."""
    known = sweeps(lab)
    for run_id in known:
        lab.tracker.client.delete_run(run_id)
    yield known[-1]
    for run_id in sweeps(lab):
        lab.tracker.client.delete_run(run_id)
    for run_id in known:
        lab.tracker.client.restore_run(run_id)


def copy_of(lab: Lab, sweep: str, folder: Path, *roles: str, seed: int = 0, engine: str = "plain") -> str:
    """A sweep that is newer, of some of the models, with another corruption seed or engine."""
    mine = {lab.versions[role].run_id for role in roles}
    rows = []
    for row in sealed.from_parquet(lab.tracker.artifact(sweep, "cells.parquet")).to_pylist():
        if row["run_id"] in mine:
            if row["corruption"] == "frame_missing":
                modalities = row["modalities"].split("-")
                row |= {"seed": seed, "cell": cell_id(row["corruption"], row["level"], modalities, seed)}
            rows.append(row | {"engine": engine})
    tags = {key: tag for key, tag in lab.tracker.read(sweep).tags.items() if not key.startswith("mlflow.")}
    run = lab.tracker.start("copied", tags=tags)
    run.log_text(lab.tracker.artifact(sweep, "models.json").decode(), "models.json")
    (folder / "cells.parquet").write_bytes(sealed.to_parquet(pa.Table.from_pylist(rows)))
    run.log_file(folder / "cells.parquet")
    run.finish()
    return run.run_id


def commands(lines: list[str]) -> list[list[str]]:
    return [shlex.split(line.removeprefix("next    ")) for line in lines if line.startswith("next ")]


def test_curves_are_compared_over_the_newest_sweeps_under_the_same_conditions(
    lab: Lab, without_sweeps: str, tmp_path: Path
) -> None:
    lab.crown("first")
    gates = gates_file(tmp_path, missing_modalities=HARMLESS)
    common = copy_of(lab, without_sweeps, tmp_path, "better", "first")
    newer = copy_of(lab, without_sweeps, tmp_path, "better", seed=1)
    verdict, _ = attempt(lab, "better", gates, dry_run=True)
    runs = {gate.name: gate.runs for gate in verdict.gates}
    assert verdict.passed, verdict.summary
    assert set(runs["missing_rate_area_against_champion"]) == set(runs["missing_rate_area"]) == {common}
    assert runs["worst_single_modality_loss"] == (newer,)

    lab.tracker.client.delete_run(common)
    copy_of(lab, without_sweeps, tmp_path, "first")
    verdict, lines = attempt(lab, "better", gates, dry_run=True)
    against = next(gate for gate in verdict.gates if gate.name == "missing_rate_area_against_champion")
    assert against.outcome == "missing evidence" and "different conditions" in against.sentence
    [(_, job, *words)] = commands(lines)  # which makes a pair, where an opening of the test split would not
    assert Path(job).name == "robustness.py"
    settings, _ = parse(RobustnessSettings, words, description="")
    assert settings.models == (lab.versions["better"].uri, lab.versions["first"].uri)


def test_a_sweep_in_half_the_precision_is_no_evidence(lab: Lab, without_sweeps: str, tmp_path: Path) -> None:
    copy_of(lab, without_sweeps, tmp_path, "better", engine="factorised-bfloat16")
    verdict, _ = attempt(lab, "better", gates_file(tmp_path), dry_run=True)
    assert obstacles(verdict) == {"calibration", "missing_rate_area", "worst_single_modality_loss"}
    assert {outcomes(verdict)[name] for name in obstacles(verdict)} == {"missing evidence"}


@pytest.mark.parametrize(
    ("margin", "same_data", "named"),
    [(0.05, True, ["better", "first"]), (None, True, ["better"]), (0.05, False, ["better"])],
)
def test_the_champion_is_to_be_swept_only_where_a_gate_compares_the_two(
    lab: Lab,
    without_sweeps: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    margin: float | None,
    same_data: bool,
    named: list[str],
) -> None:
    def gathered(tracker: Any, registered: RegisteredWeights, rates: Any) -> Evidence:
        if registered.version == lab.versions["first"] and not same_data:
            registered = replace(registered, state={**registered.state, "dataset_digest": "f" * 64})
        return gather(tracker, registered, rates)

    monkeypatch.setattr(promotion, "gather", gathered)
    lab.crown("first")
    gates = gates_file(tmp_path, missing_modalities={"area_margin": margin, "rates": [0.0, 0.3, 0.6]})
    _, lines = attempt(lab, "better", gates, dry_run=True)
    settings, _ = parse(RobustnessSettings, commands(lines)[0][2:], description="")
    assert settings.models == tuple(lab.versions[role].uri for role in named)


def test_evidence_counts_whatever_experiment_it_was_recorded_in(lab: Lab, tmp_path: Path) -> None:
    digest = read_manifest(lab.data).digest
    other = open_tracker(enabled=True, uri=None, experiment="other", output=lab.output)
    assert isinstance(other, MLflowTracker)
    assert openings(other, digest) == openings(lab.tracker, digest)
    assert openings(other, digest)["models"] >= 4
    verdict, _ = attempt(lab, "better", gates_file(tmp_path), dry_run=True, tracking={"experiment": "other"})
    assert verdict.passed, verdict.summary


def test_rates_that_the_suite_does_not_have_need_a_suite_of_ones_own(lab: Lab, tmp_path: Path) -> None:
    rare = gates_file(tmp_path, missing_modalities={"rates": [0.0, 0.55]})
    _, lines = attempt(lab, "first", rare, dry_run=True)
    (told,) = [line for line in lines if line.startswith("next ")]
    assert f"sweep {lab.versions['first'].uri} over a suite of yours with the missing rates 0, 0.55" in told


def test_evidence_for_another_data_set_is_no_evidence(
    lab: Lab, make_dataset: Callable[..., Any], tmp_path: Path, one_line: Callable[..., None]
) -> None:
    other, _ = make_dataset(seed=3)
    version, gates = fresh(lab, other, seed=5), gates_file(tmp_path, **NO_SWEEP)
    with pytest.raises(UserError) as error:
        promote(settings_of(lab, version, gates, evaluate=str(lab.data)), dry_run=False, report=lambda _: None)
    one_line(error, "trained on another data set", str(lab.data))
    own = settings_of(lab, version, gates, evaluate=str(other))
    lab.crown("first")
    lines: list[str] = []
    verdict = promote(own, dry_run=False, report=lines.append)
    assert outcomes(verdict)["data_set"] == "failed"
    assert outcomes(verdict)["not_worse_than_champion"] == "missing evidence"
    assert "test split stays closed: data_set" in lines  # it could not win: the one look is not spent
    untested = next(g.sentence for g in verdict.gates if g.name == "macro_f1")
    assert untested.endswith("stays closed while it fails anyway: data_set.")  # not: add --evaluate, which was given
    assert OPENINGS not in lab.tracker.read(version.run_id).tags
    assert lab.aliases() == ("first", None)
    lab.forget()
    assert outcomes(promote(own, dry_run=False, report=lines.append))["macro_f1"] in ("passed", "failed")
    lab.crown("first")
    verdict = promote(own, dry_run=False, report=lines.append)
    assert "another data set" in next(g for g in verdict.gates if g.name == "not_worse_than_champion").sentence
    assert lab.aliases() == ("first", None)


def test_code_that_is_not_committed_does_not_open_the_test_split(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, gates = fresh(lab, lab.data, seed=78), gates_file(tmp_path)
    monkeypatch.setattr(promotion, "code_version", lambda: {"emolab.git_clean": "false"})
    lines: list[str] = []
    promote(settings_of(lab, version, gates, evaluate=str(lab.data)), dry_run=False, report=lines.append)
    assert any(line.startswith("test split stays closed: clean_commit") for line in lines)
    assert OPENINGS not in lab.tracker.read(version.run_id).tags


def test_a_result_of_other_weights_or_other_code_does_not_count(lab: Lab, tmp_path: Path) -> None:
    run = lab.tracker.resume(lab.versions["better"].run_id)
    before, gates = lab.tracker.read(run.run_id).tags, gates_file(tmp_path)
    try:
        run.set_tags({"emolab.test_checkpoint": "0" * 64})
        verdict, _ = attempt(lab, "better", gates, dry_run=True)
        assert outcomes(verdict)["macro_f1"] == "missing evidence"
        run.set_tags({"emolab.test_checkpoint": before["emolab.test_checkpoint"], "emolab.git_clean": "false"})
        verdict, _ = attempt(lab, "better", gates, dry_run=True)
        assert obstacles(verdict) == {"clean_commit"}
        run.set_tags({"emolab.git_clean": "unknown"})
        verdict, _ = attempt(lab, "better", gates, dry_run=True)
        assert outcomes(verdict)["clean_commit"] == "missing evidence"
    finally:
        run.set_tags({key: before[key] for key in ("emolab.test_checkpoint", "emolab.git_clean")})


def test_a_sweep_of_other_weights_is_no_evidence(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = lab.tracker.__class__.artifact

    def swapped(self: Any, run_id: str, name: str) -> bytes:
        content = read(self, run_id, name)
        return json.dumps(dict.fromkeys(json.loads(content), "0" * 64)).encode() if name == "models.json" else content

    monkeypatch.setattr(lab.tracker.__class__, "artifact", swapped)
    verdict, _ = attempt(lab, "better", gates_file(tmp_path), dry_run=True)
    assert obstacles(verdict) == {"calibration", "missing_rate_area", "worst_single_modality_loss"}
    assert {outcomes(verdict)[name] for name in obstacles(verdict)} == {"missing evidence"}


def state(lab: Lab) -> tuple[Any, ...]:
    """Everything that a dry run must leave alone."""
    model = lab.tracker.client.get_registered_model(NAME)
    runs = lab.tracker.client.search_runs([lab.tracker.client.get_run(lab.trained["first"].run_id).info.experiment_id])
    tagged = {run.info.run_id: (dict(run.data.tags), dict(run.data.metrics), run.info.end_time) for run in runs}
    files = sorted(str(p) for p in lab.output.rglob("*") if "mlflow.db-" not in p.name)
    versions = {role: (lab.tags(role), lab.tracker.client.get_model_version(NAME, v.version).description)
                for role, v in lab.versions.items()}  # fmt: skip
    return dict(model.aliases), dict(model.tags), tagged, files, versions


def test_a_dry_run_says_what_would_happen_and_changes_nothing(lab: Lab, tmp_path: Path) -> None:
    lab.crown("first")
    before = state(lab)
    gates = gates_file(tmp_path)
    for role, passes in (("better", True), ("worse", False)):
        verdict, lines = attempt(lab, role, gates, dry_run=True, evaluate=str(lab.data))
        assert verdict.passed is passes
        assert lines[-1].startswith("dry run, nothing was changed: ")
    assert state(lab) == before


def test_rolling_back_restores_the_champion_before_and_the_one_before_that(
    lab: Lab, tmp_path: Path, one_line: Callable[..., None]
) -> None:
    gates = gates_file(tmp_path, missing_modalities=HARMLESS, against_champion={"margin": 1.0})
    for role in ("first", "better", "fragile"):
        assert attempt(lab, role, gates)[0].passed
    assert lab.aliases() == ("fragile", "better")
    back = partial(roll_back, report=lambda _: None)
    settings = PromoteSettings(
        model=f"models:/{NAME}", rollback=True, reason="mute microphones", output=str(lab.output)
    )
    before = state(lab)
    assert back(settings, dry_run=True) == lab.versions["better"]
    assert state(lab) == before
    assert back(settings, dry_run=False) == lab.versions["better"]
    assert lab.aliases() == ("better", "first")
    assert "mute microphones" in lab.tags("fragile")["emolab.rolled_back"]
    run, *_ = lab.tracker.find("emolab.kind", "rollback")
    recorded = lab.tracker.read(run)
    assert recorded.tags["emolab.rolled_back_from"] == lab.versions["fragile"].version
    assert recorded.tags["emolab.reason"] == "mute microphones"
    verdict, _ = attempt(lab, "fragile", gates)  # a nightly job must not bring it back
    assert obstacles(verdict) == {"not_rolled_back"}
    assert lab.aliases() == ("better", "first")
    back(settings, dry_run=False)
    assert lab.aliases() == ("first", None)
    with pytest.raises(UserError) as error:
        back(settings, dry_run=False)
    one_line(error, NAME, "no previous champion")
    assert lab.aliases() == ("first", None)


def test_a_champion_that_changes_meanwhile_ends_the_promotion(
    lab: Lab, tmp_path: Path, one_line: Callable[..., None]
) -> None:
    """As another machine would do it, which no file lock reaches."""
    lab.crown("first")

    def meanwhile(line: str) -> None:
        if "latency" in line:
            lab.crown("fragile")

    with pytest.raises(UserError) as error:
        promote(lab.settings("better", gates_file(tmp_path)), dry_run=False, report=meanwhile)
    one_line(error, f"version {lab.versions['fragile'].version}", "another promotion was faster", "run it again")
    assert lab.aliases() == ("fragile", None)
    assert lab.tracker.client.get_run(lab.promotions()[0]).info.status == "FAILED"
    assert PROMOTED not in lab.tags("better")


TWO = """
import sys, time
from pathlib import Path
from emolab.names import UserError
from emolab.registry import promotion
model, gates, output, ready, go = sys.argv[1:]
promotion.code_version = lambda: {"emolab.git_clean": "true"}
settings = promotion.PromoteSettings(model=model, gates=gates, output=output)
Path(ready).touch()
while not Path(go).exists():
    time.sleep(0.005)
try:
    print("PASSED" if promotion.promote(settings, dry_run=False, report=lambda _: None).passed else "REFUSED")
except UserError as error:
    print(f"TOLD {error}")
"""


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY / 'platform'}:{REPOSITORY / 'model'}:{REPOSITORY}"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.fault
def test_of_two_promotions_at_once_one_wins_and_the_other_is_told(lab: Lab, tmp_path: Path) -> None:
    lab.crown("first")
    gates = gates_file(tmp_path, missing_modalities=HARMLESS, against_champion={"margin": 1.0})
    go, roles = tmp_path / "go", ("better", "fragile")
    started = [
        child(TWO, lab.versions[role].uri, str(gates), str(lab.output), str(tmp_path / role), str(go)) for role in roles
    ]
    deadline = time.monotonic() + 120
    while not all((tmp_path / role).exists() for role in roles) and time.monotonic() < deadline:
        time.sleep(0.05)
    go.touch()
    said = {role: process.communicate(timeout=200) for role, process in zip(roles, started, strict=True)}
    answers = {role: out.strip().splitlines()[-1] if out.strip() else err for role, (out, err) in said.items()}
    (winner,) = [role for role, answer in answers.items() if answer == "PASSED"]
    (told,) = [answer for answer in answers.values() if answer != "PASSED"]
    assert told.startswith("TOLD the promotion of toy-model"), answers
    assert "in use by another process" in told
    assert lab.aliases() == (winner, "first")


@pytest.mark.fault
def test_moves_at_once_without_any_lock_never_have_two_winners(lab: Lab) -> None:
    client, won = lab.tracker.client, []
    for attempt_number in range(6):
        lab.crown("first")
        wins: list[str] = []

        def go(role: str, start: threading.Barrier, number: int, wins: list[str] = wins) -> None:
            version, expected = lab.versions[role].version, lab.versions["first"].version
            change = Move(name=NAME, run_id=f"{role}{number}", expected=expected, champion=version, previous=expected)
            start.wait()
            try:
                move(client, change)
                wins.append(role)
            except UserError:
                pass

        barrier = threading.Barrier(2)
        threads = [threading.Thread(target=go, args=(role, barrier, attempt_number)) for role in ("better", "fragile")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wins) <= 1
        assert lab.aliases()[0] == (wins[0] if wins else "first")
        assert not standing(client, NAME).claims
        won += wins
    lab.crown("first")
    change = Move(name=NAME, run_id="alone", expected=lab.versions["first"].version,
                  champion=lab.versions["better"].version, previous=None)  # fmt: skip
    move(client, change)  # alone it always wins
    assert lab.aliases() == ("better", None)


KILLED = """
import os, signal, sys
from mlflow import MlflowClient
from emolab.registry.aliases import Move, move
uri, name, expected, champion, deadly = sys.argv[1:]
real = MlflowClient.set_registered_model_alias
def dying(self, model, alias, version):
    if alias == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, model, alias, version)
MlflowClient.set_registered_model_alias = dying
move(MlflowClient(uri, uri), Move(name=name, run_id="killed", expected=expected, champion=champion, previous=expected))
"""


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize(
    ("deadly", "after"), [("champion", ("first", None)), ("previous_champion", ("better", "first"))]
)
def test_a_killed_move_is_settled_by_the_next_command(
    lab: Lab, deadly: str, after: tuple[str, str | None], one_line: Callable[..., None]
) -> None:
    lab.crown("first")
    versions = (lab.versions["first"].version, lab.versions["better"].version)
    killed = child(KILLED, lab.tracker.uri, NAME, *versions, deadly)
    assert killed.wait(timeout=120) == -signal.SIGKILL
    assert "killed" in standing(lab.tracker.client, NAME).claims
    with pytest.raises(UserError) as error:  # elsewhere nobody can know that the process is gone, for a while
        recover(lab.tracker.client, NAME, alone=False)
    one_line(error, NAME, "run killed", "try again later")
    with promoting(lab.tracker, NAME, lab.output):
        assert lab.aliases() == after
        assert not standing(lab.tracker.client, NAME).claims


@pytest.mark.fault
@pytest.mark.parametrize("where", ["before the move", "between the aliases", "after the move", "between the marks"])
def test_a_promotion_that_breaks_half_way_leaves_the_aliases_as_they_were(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    lab.crown("first")
    lab.tracker.client.set_registered_model_alias(NAME, "previous_champion", lab.versions["worse"].version)

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    if where == "before the move":
        monkeypatch.setattr(promotion, "record_verdict", broken)
    elif where == "between the aliases":
        real = aliases._point
        monkeypatch.setattr(
            aliases, "_point",
            lambda client, name, alias, version: broken() if version == lab.versions["first"].version
            and alias == "previous_champion" else real(client, name, alias, version),
        )  # fmt: skip
    elif where == "between the marks":
        tag = MlflowClient.set_model_version_tag
        monkeypatch.setattr(
            MlflowClient, "set_model_version_tag",
            lambda self, name, version, key, value: broken() if key == REPLACED
            else tag(self, name, version, key, value),
        )  # fmt: skip
    else:
        real_standing, calls = aliases.standing, []

        def second_fails(client: MlflowClient, name: str) -> Any:
            calls.append(name)
            if len(calls) == 2:
                raise OSError("disk full")
            return real_standing(client, name)

        real_move = promotion.move

        def moving(client: MlflowClient, change: Move) -> None:
            monkeypatch.setattr(aliases, "standing", second_fails)
            try:
                real_move(client, change)
            finally:
                monkeypatch.setattr(aliases, "standing", real_standing)

        monkeypatch.setattr(promotion, "move", moving)
    with pytest.raises(OSError, match="disk full"):
        promote(lab.settings("better", gates_file(tmp_path)), dry_run=False, report=lambda _: None)
    monkeypatch.undo()
    assert lab.aliases() == ("first", "worse")
    assert not standing(lab.tracker.client, NAME).claims
    assert lab.tracker.client.get_run(lab.promotions()[0]).info.status == "FAILED"
    assert not {PROMOTED, REPLACED} & set(lab.tags("better"))


@pytest.mark.fault
@pytest.mark.parametrize("lasting", [False, True], ids=["for a moment", "for good"])
def test_a_rollback_that_broke_off_goes_back_once_when_it_is_repeated(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, one_line: Callable[..., None], lasting: bool
) -> None:
    """The registry fails when it is to mark the version; ``for good``: it does not take the move back either."""
    before = None
    for role in ("first", "better", "fragile"):
        version = lab.versions[role].version
        replaced = Mark(version=version, key=REPLACED, value=before or "")
        move(
            lab.tracker.client,
            Move(name=NAME, run_id=role, expected=before, champion=version, previous=before, marks=[replaced]),
        )
        before = version
    settings = PromoteSettings(model=f"models:/{NAME}", rollback=True, output=str(lab.output))
    with monkeypatch.context() as patch:

        def failing(*_: Any) -> None:
            if lasting:
                patch.setattr(aliases, "_undo", failing)
            raise MlflowException("server answered 503")

        patch.setattr(MlflowClient, "set_model_version_tag", failing)
        with pytest.raises(UserError) as error:
            roll_back(settings, dry_run=False, report=lambda _: None)
    one_line(error, "the registry failed", "503")
    assert lab.aliases() == (("better", "first") if lasting else ("fragile", "better"))
    lines: list[str] = []
    assert roll_back(settings, dry_run=False, report=lines.append) == lab.versions["better"]
    assert lab.aliases() == ("better", "first")
    assert not standing(lab.tracker.client, NAME).claims
    assert [role for role in lab.versions if "emolab.rolled_back" in lab.tags(role)] == ["fragile"]
    gone = f"from version {lab.versions['fragile'].version} to version {lab.versions['better'].version}"
    assert [gone in line for line in lines] == [True]
    assert ("cut short" in lines[0]) == lasting
    assert lab.tracker.client.get_run(lab.tracker.find("emolab.kind", "rollback")[0]).info.status == "FINISHED"


def test_verdict_and_card_are_kept_with_the_run_and_with_the_version(lab: Lab, tmp_path: Path) -> None:
    lab.crown("first")
    verdict, lines = attempt(lab, "better", gates_file(tmp_path))
    record = json.loads(lab.tracker.artifact(verdict.run_id, "verdict.json"))
    assert record["passed"] is True
    assert [gate["name"] for gate in record["gates"]] == [gate.name for gate in verdict.gates]
    for gate in record["gates"]:
        assert set(gate) == {"name", "outcome", "value", "threshold", "sentence", "runs"}
    assert set(record["openings"]) == {"models", "sweeps"}
    page = lab.tracker.artifact(verdict.run_id, "verdict.html").decode()
    card = lab.tracker.artifact(verdict.run_id, "model_card.html").decode()
    for text in (page, card):
        for namespace in (
            "http://www.w3.org",
            "https://matplotlib.org",
            "http://purl.org",
            "http://creativecommons.org",
        ):
            text = text.replace(namespace, "")
        assert "http" not in text
        assert "src=" not in text
    assert page.count("<svg") == 4
    version = lab.tracker.client.get_model_version(NAME, verdict.version)
    assert "macro-F1" in version.description
    assert len(version.description) <= 5000
    location = Path(lab.tracker.client.get_model_version_download_uri(NAME, verdict.version).removeprefix("file://"))
    stored = (location / "model_card.md").read_text()
    assert stored == lab.tracker.artifact(verdict.run_id, "model_card.md").decode()
    for part in ("## Intended use", "## Limits", "## By class", "## When a modality is absent", "## Training",
                 "prohibited", lab.versions["better"].run_id, "early\\_fusion", "| low |"):  # fmt: skip
        assert part in stored, part
    assert f'<td class="ids" data-value="{lab.versions["better"].run_id}">' in page  # it wraps
    (accuracy,) = re.findall(r"\| accuracy \| (.*?) \| (.*?) \|", stored)  # 30 sessions, of two speakers
    assert re.fullmatch(r"0\.\d+ \[0\.\d+, [01]\.\d+\]", accuracy[0].replace("\\", ""))
    assert accuracy[1].endswith("(too few for an interval)")
    assert any("model_card.html" in line for line in lines)
    metrics = lab.tracker.read(verdict.run_id).metrics
    assert metrics["gate.macro_f1"] == next(g.value for g in verdict.gates if g.name == "macro_f1")


def test_gates_that_are_not_asked_for_say_so_and_limits_are_limits(lab: Lab, tmp_path: Path) -> None:
    off = gates_file(
        tmp_path,
        floors={"macro_f1": None, "class_recall": None},
        calibration={"most_error": None},
        missing_modalities={"least_area": None, "area_margin": None, "most_single_loss": None},
        serving={"most_milliseconds": None, "most_megabytes": None},
        against_champion={"margin": None},
    )
    verdict, _ = attempt(lab, "worse", off, dry_run=True)
    assert verdict.passed
    skipped = [gate for gate in verdict.gates if gate.outcome == "not applicable"]
    assert len(skipped) == 9
    assert {gate.sentence for gate in skipped} == {"The gates file does not ask for this."}
    tight = gates_file(tmp_path, serving={"most_milliseconds": 0.001, "most_megabytes": 0.001})
    verdict, _ = attempt(lab, "better", tight, dry_run=True)
    assert obstacles(verdict) == {"latency", "size"}


def test_a_version_that_does_not_load_is_no_use(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(folder: Path, *, steps: int) -> Served | Missing:
        source = folder / "pyfunc_model.py"
        source.write_text(source.read_text().replace("import json\n", "import json\nimport emolab\n"))
        return measure(folder, steps=steps)

    monkeypatch.setattr(promotion, "measure", spoiled)
    verdict, _ = attempt(lab, "better", gates_file(tmp_path), dry_run=True)
    assert obstacles(verdict) == {"loads_anywhere", "latency"}
    assert "without emolab" in next(g for g in verdict.gates if g.name == "loads_anywhere").sentence


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "alias": ({"model": f"models:/{NAME}@chalenger"}, ["chalenger", "aliases: challenger"]),
    "name": ({"model": "models:/nobody@challenger"}, ["nobody"]),
    "form": ({"model": "toy-model"}, ["'toy-model'", "models:/name@alias"]),
    "gates file": ({"gates": "nowhere.yaml"}, ["nowhere.yaml", "default"]),
    "tracker": ({"output": "no-such-runs"}, ["no tracker at no-such-runs/mlflow.db", "--output"]),
    "address": ({"tracking": {"uri": "sqlite:///typo/mlflow.db"}}, ["no tracker at /", "/typo/mlflow.db, nothing"]),
    "tracking": ({"tracking": {"enabled": False}}, ["tracking.enabled=true"]),
    "data": ({"evaluate": "no-such-data"}, ["no-such-data", "jobs/prepare.py"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(
    lab: Lab, tmp_path: Path, one_line: Callable[..., None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values, parts = MISTAKES[name]
    gates, role = values.get("gates", gates_file(tmp_path)), "first"
    values = {key: value for key, value in values.items() if key != "gates"}
    if name == "data":
        lab.tracker.resume(lab.versions[role].run_id).set_tags({"emolab.test_recorded": "false"})
    try:
        with pytest.raises(UserError) as error:
            promote(lab.settings(role, gates, **values), dry_run=False, report=lambda _: None)
    finally:
        lab.tracker.resume(lab.versions[role].run_id).set_tags({"emolab.test_recorded": "true"})
    one_line(error, *parts)
    assert lab.aliases() == (None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["gates.yaml"]


def test_the_champion_cannot_be_its_own_challenger(lab: Lab, tmp_path: Path, one_line: Callable[..., None]) -> None:
    lab.crown("better")
    with pytest.raises(UserError) as error:
        attempt(lab, "better", gates_file(tmp_path))
    one_line(error, lab.versions["better"].uri, "the champion already")


@pytest.mark.parametrize(
    ("section", "keys", "parts"),
    [
        ("floors", {"macro_f2": 0.5}, ["floors.macro_f2", "did you mean 'macro_f1'"]),
        ("calibration", {"most_error": 2.0}, ["calibration.most_error"]),
        ("calibration", {"most_error": True}, ["calibration.most_error"]),
        ("missing_modalities", {"rates": [0.0]}, ["missing_modalities.rates"]),
        ("missing_modalities", {"rates": [0.5, 0.0]}, ["missing_modalities.rates"]),
        ("against_champion", {"metric": "f1"}, ["against_champion.metric"]),
    ],
)
def test_a_gates_file_is_strict(
    tmp_path: Path, one_line: Callable[..., None], section: str, keys: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        load_gates(str(gates_file(tmp_path, **{section: keys})))
    one_line(error, "gates.yaml", *parts)


def test_a_gate_that_is_left_out_is_a_mistake_and_the_shipped_gates_are_whole(
    tmp_path: Path, one_line: Callable[..., None]
) -> None:
    path = gates_file(tmp_path)
    values = yaml.safe_load(path.read_text())
    del values["calibration"]["most_error"]
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError) as error:
        load_gates(str(path))
    one_line(error, "calibration.most_error")
    shipped = load_gates("default")
    assert shipped.provenance.clean_commit
    assert not shipped.provenance.allow_rolled_back
