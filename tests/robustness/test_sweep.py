"""A sweep on real actors: what one process would compute, whatever the number of actors and whoever was killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorUnavailableError
from tests.conftest import REPOSITORY
from tests.training.test_loop import settings_for
from torch import nn

import edu_emotionnet
import emolab
from edu_emotionnet.batch import Predictions, SessionBatch
from emolab.names import UserError
from emolab.robustness import sweep, sweep_plan
from emolab.robustness.cells import Cell
from emolab.robustness.evaluator import Evaluator, agreement, surroundings_of
from emolab.robustness.records import read_agreement, read_tally, write_agreement, write_tally
from emolab.robustness.suites import expand, parse_suite
from emolab.robustness.sweep import read_agreements, read_sweep, run_sweep
from emolab.robustness.sweep_plan import SweepPlan, plan_sweep
from emolab.robustness.tally import Tally, evaluate_sessions
from emolab.sessions.loading import Block, SessionStore, load_split
from emolab.sessions.manifest import Manifest, read_manifest, write_manifest
from emolab.sessions.schema import Session, arrow_schema, to_row
from emolab.sessions.selection import SplitLoader
from emolab.training.train import load_model, train

SUITE = {
    "name": "small",
    "seeds": [0, 1],
    "sweeps": [
        {"corruption": "frame_missing", "levels": [0.3, 0.9]},
        {"corruption": "step_missing", "levels": [0.5]},
        {"corruption": "gaussian", "levels": [2], "modalities": "each"},
        {"corruption": "session_swap", "levels": [3], "modalities": [["audio", "text"]]},
    ],
    "grids": [
        {"instances": [{"corruption": "burst_missing", "levels": [0.5]}, {"corruption": "frozen_steps", "levels": [4]}]}
    ],
}
SIZES = {"sessions_per_unit": 5, "cells_per_unit": 30}
pytestmark = pytest.mark.ray


def no_report(line: str) -> None:
    del line


def opened() -> SplitLoader:
    """Stands in for studies/test_split.py, which records an opening and gives the same."""
    return load_split


@pytest.fixture(scope="module")
def models(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A factorised model and one that is not, a few epochs old."""
    output = tmp_path_factory.mktemp("models")
    folders = []
    for name in ("edu_emotionnet", "late_fusion"):
        options = settings_for(toy_data, output, model={"name": name}, epochs=10)
        options = options.model_copy(update={"tracking": options.tracking.model_copy(update={"enabled": False})})
        folders.append(train(options).folder / "model")
    return folders


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return expand(parse_suite(SUITE), ("audio", "visual", "text"))


@pytest.fixture(scope="module")
def plan(models: list[Path], toy_data: Path, cells: list[Cell]) -> SweepPlan:
    return plan_sweep(models, toy_data, "test", cells, **SIZES)


@pytest.fixture(scope="module")
def unbroken(ray_cluster: None, plan: SweepPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep by one actor that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken") / "units"
    assert run_sweep(plan, folder, report=no_report, actors=1, opening=opened) == len(plan.units)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of the results; a process that was killed may leave a file under a temporary name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def evaluators() -> list[int]:
    """Process ids of the actors of a sweep below this very process."""
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_bytes().startswith(b"ray::Evaluator"):
                found.append(int(folder.name))
    return [process for process in found if os.getpid() in _ancestors(process, parents)]


def _ancestors(process: int, parents: dict[int, int]) -> list[int]:
    return [process, *_ancestors(parents[process], parents)] if process in parents else []


def same(first: Sequence[Tally], second: Sequence[Tally]) -> None:
    for one, two in zip(first, second, strict=True):
        assert (one.cells, one.session_ids, one.engine) == (two.cells, two.session_ids, two.engine)
        np.testing.assert_array_equal(one.confusion, two.confusion)
        np.testing.assert_array_equal(one.squared_error, two.squared_error)


def test_a_sweep_counts_what_one_plain_evaluation_counts(unbroken: Path, plan: SweepPlan, cells: list[Cell]) -> None:
    manifest = read_manifest(plan.data)
    store = load_split(plan.data, manifest, "test")
    sessions = [store.session(index, manifest) for index in range(len(store))]
    surroundings = surroundings_of(store, manifest)
    for tally, folder, engine in zip(read_sweep(plan, unbroken), plan.models, ("factorised", "plain"), strict=True):
        alone = evaluate_sessions(load_model(folder)[0], [sessions], cells, surroundings=surroundings, engine="plain")
        assert tally.engine == engine
        assert tally.cells == tuple(cells)
        assert tally.session_ids == tuple(store.session_ids)
        for cell, ours, theirs in zip(cells, tally.confusion, alone.confusion, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=cell.id)
        np.testing.assert_allclose(tally.squared_error, alone.squared_error, rtol=1e-4)
        # Different cells give different counts, so that equality says something.
        assert len({counts.tobytes() for counts in tally.confusion}) > len(cells) / 2


@pytest.mark.slow
@pytest.mark.fault
def test_an_evaluator_that_cannot_be_reached_for_a_moment_loses_no_unit(
    unbroken: Path, plan: SweepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray says so for seconds about an actor whose node is gone, before it starts it anew elsewhere."""
    asked, get = [], ray.get

    def unreliable(reference: Any) -> Any:
        asked.append(reference)
        if len(asked) in (1, 4, 5):  # at its start, after a unit, and again when it is asked whether it stands
            raise ActorUnavailableError("socket closed", None)
        return get(reference)

    monkeypatch.setattr(sweep.ray, "get", unreliable)
    lines: list[str] = []
    assert run_sweep(plan, tmp_path, report=lines.append, actors=1, opening=opened) == len(plan.units)
    assert len(asked) == len(plan.units) + 1 + 4  # every unit once, one start, three refusals and a unit anew
    assert len(lines) == len(plan.units)
    assert contents(tmp_path) == contents(unbroken)


@pytest.mark.slow
@pytest.mark.fault
def test_two_actors_one_of_which_is_lost_write_the_same_bytes(unbroken: Path, plan: SweepPlan, tmp_path: Path) -> None:
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        if len(lines) == 1:
            os.kill(evaluators()[0], signal.SIGKILL)

    # 64 on two CPUs: not a wait for ever
    assert run_sweep(plan, tmp_path, report=report, actors=64, opening=opened) == len(plan.units)
    assert lines[-1] == f"unit {len(plan.units)} of {len(plan.units)}, about 0 s left"
    assert contents(tmp_path) == contents(unbroken)


DRIVER = """
import os, signal, sys
from pathlib import Path
from emolab.cluster import ClusterSettings, connected
from emolab.robustness.suites import expand, parse_suite
from emolab.robustness.sweep import run_sweep
from emolab.robustness.sweep_plan import plan_sweep
from tests.robustness.test_sweep import SIZES, SUITE, opened

address, data, folder, *models = sys.argv[1:]
cells = expand(parse_suite(SUITE), ("audio", "visual", "text"))
plan = plan_sweep([Path(m) for m in models], Path(data), "test", cells, **SIZES)
lines = []
def report(line):
    lines.append(line)
    if len(lines) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
with connected(ClusterSettings(address=address)):
    run_sweep(plan, Path(folder), report=report, actors=1, opening=opened)
"""


@pytest.mark.slow
@pytest.mark.fault
def test_a_killed_sweep_goes_on_where_it_was_and_damaged_units_are_done_again(
    unbroken: Path, plan: SweepPlan, toy_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "units"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(REPOSITORY / p) for p in ("platform", "model", ""))}
    arguments = [ray.get_runtime_context().gcs_address, str(toy_data), str(folder), *map(str, plan.models)]
    driver = subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments], env=environment, capture_output=True, text=True, timeout=200
    )
    assert driver.returncode == -signal.SIGKILL, driver.stderr[-2000:]
    deadline = time.monotonic() + 60
    while evaluators() and time.monotonic() < deadline:  # Ray ends the actors of a lost driver
        time.sleep(0.1)
    left = contents(folder)
    assert 2 <= len(left) < len(plan.units)
    assert left.items() <= contents(unbroken).items()  # what is there is whole
    damaged, cut = sorted(name for name in left if name.endswith(".parquet"))[:2]
    content = left[damaged]
    half = len(content) // 2
    (folder / damaged).write_bytes(content[:half] + bytes(200) + content[half + 200 :])
    (folder / cut).write_bytes(left[cut][:-30])
    lines: list[str] = []
    assert run_sweep(plan, folder, report=lines.append, actors=1, opening=opened) == len(plan.units) - len(left) + 2
    assert sum("is computed again" in line for line in lines) == 2
    assert any(damaged in line for line in lines)
    assert contents(folder) == contents(unbroken)
    assert run_sweep(plan, folder, report=no_report) == 0
    same(read_sweep(plan, folder), read_sweep(plan, unbroken))
    assert read_agreements(plan, folder) == [{}, {}]  # the toy corpus does not know the quality


def test_the_test_split_is_not_read_without_its_opening(
    ray_cluster: None, models: list[Path], toy_data: Path, cells: list[Cell], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="opened by a robustness study alone"):
        run_sweep(plan_sweep(models[1:], toy_data, "test", cells, **SIZES), tmp_path, report=no_report, actors=1)
    assert not list(tmp_path.iterdir())


def test_data_scaled_otherwise_than_the_models_are_refused(
    models: list[Path], toy_data: Path, cells: list[Cell], tmp_path: Path
) -> None:
    scaled = read_manifest(toy_data).model_copy(update={"protocol": {"normalise": "session"}})
    write_manifest(scaled, tmp_path)
    with pytest.raises(UserError, match=r"protocol.normalise=none, .* has protocol.normalise=session"):
        plan_sweep(models, tmp_path, "test", cells, **SIZES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_sweep_on_gpus_that_are_not_there_is_refused(
    ray_cluster: None, models: list[Path], toy_data: Path, cells: list[Cell], tmp_path: Path
) -> None:
    plan = plan_sweep(models, toy_data, "test", cells, **SIZES, gpus=0.5)
    with pytest.raises(UserError, match=r"a robustness sweep cannot run here: 0\.5 GPU needed, 0 in the cluster"):
        run_sweep(plan, tmp_path / "units", report=no_report, opening=opened)
    assert not (tmp_path / "units").exists()
    # A cluster may say that it has GPUs where PyTorch finds none.
    evaluator = Evaluator(toy_data, "test", tmp_path, load_split, "cuda")
    with pytest.raises(UserError, match="the cluster gave a GPU that PyTorch cannot use there"):
        evaluator.work(plan.units[0], models[0], cells, bfloat16=False)


def test_the_plan_knows_everything_that_decides_a_unit(
    plan: SweepPlan, models: list[Path], toy_data: Path, cells: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len({unit.file for unit in plan.units}) == len(plan.units)
    files = {unit.file for unit in plan.units if unit.cells}
    again = plan_sweep(models, toy_data, "test", cells, **SIZES)
    assert [unit.file for unit in again.units] == [unit.file for unit in plan.units]
    others = [
        plan_sweep(models, toy_data, "validation", cells, **SIZES),
        plan_sweep(models, toy_data, "test", cells[1:], **SIZES),
        plan_sweep(models, toy_data, "test", cells, sessions_per_unit=4, cells_per_unit=30),
        plan_sweep(models, toy_data, "test", [replace(c, seed=c.seed + 1) for c in cells], **SIZES),
        plan_sweep(models, toy_data, "test", cells, **SIZES, bfloat16=True),
        plan_sweep(models, toy_data, "test", cells, **SIZES, gpus=0.5),
    ]
    monkeypatch.setattr(sweep_plan, "code_digest", lambda: "of changed code")
    others.append(plan_sweep(models, toy_data, "test", cells, **SIZES))
    for other in others:
        assert not files & {unit.file for unit in other.units if unit.cells}


@pytest.mark.parametrize("changed", ["edu_emotionnet/feedback.py", "emolab/robustness/corruptions/frame_noise.py"])
def test_changed_code_is_another_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    known = sweep_plan.code_digest()
    for package in (emolab, edu_emotionnet):
        copy = tmp_path / package.__name__
        shutil.copytree(Path(package.__file__ or "").parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(package, "__file__", str(copy / "__init__.py"))
    assert sweep_plan.code_digest.__wrapped__() == known  # wherever it lies
    with (tmp_path / changed).open("a") as source:
        source.write("# changed\n")
    assert sweep_plan.code_digest.__wrapped__() != known


@given(sessions=st.integers(1, 40), some=st.integers(1, 60))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_units_cover_every_session_and_cell_once(
    models: list[Path], toy_data: Path, cells: list[Cell], sessions: int, some: int
) -> None:
    plan = plan_sweep(models[:1], toy_data, "test", cells, sessions_per_unit=sessions, cells_per_unit=some)
    covered = [(s, c) for unit in plan.units for s in unit.sessions for c in unit.cells]
    assert sum(not unit.cells for unit in plan.units) == 1  # the model's confidence
    count = read_manifest(toy_data).splits["test"].sessions
    assert sorted(covered) == [(s, c) for s in range(count) for c in range(len(cells))]


def random_tally(cells: list[Cell], seed: int, *, weight: bool = True) -> Tally:
    generator = np.random.default_rng(seed)
    return Tally(
        cells=tuple(cells),
        session_ids=("a", "b", "c"),
        speaker_ids=("p", "q", "p"),
        confusion=generator.integers(0, 9, (len(cells), 3, 4, 4)),
        calibration=generator.random((len(cells), 3, 15, 3)),
        squared_error=generator.random((len(cells), 3)),
        weight=generator.random((len(cells), 3, 2)) if weight else None,
        engine="plain",
    )


@pytest.mark.parametrize("weight", [True, False])
def test_a_record_reads_as_it_was_written(cells: list[Cell], tmp_path: Path, weight: bool) -> None:
    tally = random_tally(cells, 0, weight=weight)
    write_tally(tmp_path / "t.parquet", tally)
    again = read_tally(tmp_path / "t.parquet", cells, sessions=3)
    for name in ("cells", "session_ids", "speaker_ids", "engine"):
        assert getattr(again, name) == getattr(tally, name)
    for name in ("confusion", "calibration", "squared_error", "weight"):
        np.testing.assert_array_equal(getattr(again, name), getattr(tally, name))
    for wrong in ({"cells": cells[1:], "sessions": 3}, {"cells": cells[::-1], "sessions": 3}, {"sessions": 2}):
        with pytest.raises(UserError, match="no result of this sweep"):
            read_tally(tmp_path / "t.parquet", **({"cells": cells} | wrong))
    with pytest.raises(UserError, match=r"missing\.parquet is no result"):
        read_tally(tmp_path / "missing.parquet", cells, sessions=3)


def test_undefined_agreement_survives_and_a_damaged_record_is_refused(tmp_path: Path) -> None:
    write_agreement(tmp_path / "a.json", {"audio": 0.25, "text": float("nan")})
    found = read_agreement(tmp_path / "a.json")
    assert found["audio"] == 0.25
    assert np.isnan(found["text"])
    (tmp_path / "a.json").write_text("{")
    for name in ("a.json", "missing.json"):
        with pytest.raises(UserError, match=f"{name} is no result of this sweep"):
            read_agreement(tmp_path / name)


class FirstFeatures(nn.Module):
    """Weighs every modality by its first feature."""

    def forward(self, batch: SessionBatch) -> Predictions:
        firsts = [batch.features[name][..., 0] for name in batch.modalities]
        return Predictions(log_probabilities=torch.zeros(*firsts[0].shape, 3), confidence=torch.stack(firsts, dim=-1))


def store_with_quality(manifest: Manifest, *, known: bool) -> SessionStore:
    """Audio shows its quality, visual its opposite, text nothing; where a modality is absent it shows nonsense."""
    rows = []
    for number, steps in enumerate((3, 8, 5)):
        generator = np.random.default_rng(number)
        quality = {name: generator.random(steps).astype(np.float32) for name in manifest.dimensions}
        present = {name: generator.random(steps) > 0.3 for name in manifest.dimensions}
        firsts = {"audio": quality["audio"], "visual": -quality["visual"], "text": np.ones(steps, np.float32)}
        features = {
            name: np.repeat(np.where(present[name], firsts[name], -9.0)[:, None], width, axis=1).astype(np.float32)
            for name, width in manifest.dimensions.items()
        }
        session = Session(
            session_id=f"s{number}",
            speaker_id="p",
            corpus="toy",
            step_seconds=1.0,
            features=features,
            present=present,
            labels=np.zeros(steps, np.int64),
            quality=quality if known else {},
        )
        rows.append(to_row(session))
    table = pa.Table.from_pylist(rows, schema=arrow_schema(manifest.dimensions, quality=known))
    return SessionStore([Block.from_table(table)])


def test_agreement_is_over_observed_steps_and_empty_where_the_quality_is_unknown(toy_data: Path) -> None:
    manifest = read_manifest(toy_data)
    measured = agreement(FirstFeatures(), store_with_quality(manifest, known=True), manifest)
    assert measured["audio"] == pytest.approx(1.0)
    assert measured["visual"] == pytest.approx(-1.0)
    assert np.isnan(measured["text"])
    assert agreement(FirstFeatures(), store_with_quality(manifest, known=False), manifest) == {}
