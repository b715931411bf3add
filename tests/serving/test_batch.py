"""Batch prediction: what the model says, shard by shard, resumable to the byte, and never of the test split."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from tests.serving.parts import MODEL, World, keep_model

from emolab.configuration import parse
from emolab.names import UserError
from emolab.registry.lookup import kept_model
from emolab.serving import batch
from emolab.serving.batch import Predictor, PredictSettings, Unit, predict, predictions
from emolab.serving.models import load
from emolab.sessions.loading import SessionStore
from emolab.sessions.manifest import write_manifest
from emolab.sessions.schema import arrow_schema
from emolab.sessions.selection import load_selection_split
from emolab.sessions.shards import write_rows

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def predicted(world: World, ray_cluster: None) -> Path:
    lines: list[str] = []
    folder = predict(settings(world), dry_run=False, report=lines.append)
    assert "3 shards, 0 done" in lines[0] and [line.split()[0] for line in lines[1:]] == ["shard"] * 3 + ["tables"]
    return folder


def settings(world: World, **options: object) -> PredictSettings:
    given = {"model": world.uri, "data": str(world.data), "output": str(world.runs), "actors": 1} | options
    return PredictSettings.model_validate(given)


@pytest.fixture
def without_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predicts in this process: what `predicted` and the damaged shard show of Ray need not be shown again."""

    def run(units: Sequence[Unit], model: Path, actors: int | None) -> Iterator[dict[str, Any]]:
        predictor = Predictor(model)
        for unit in units:
            row = {"shard": unit.shard, "digest": unit.digest, "file": unit.file, "model": unit.model}
            said = predictor({name: np.array([str(value)]) for name, value in row.items()})
            yield {name: values[0] for name, values in said.items()}

    monkeypatch.setattr(batch, "_run", run)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def test_every_step_of_every_session_is_predicted(world: World, predicted: Path) -> None:
    assert list(contents(predicted)) == [f"validation-part-0000{n}.parquet" for n in range(3)]
    table = pa.concat_tables(pq.read_table(path) for path in sorted(predicted.glob("*.parquet")))
    model = load(kept_model(world.model)).model
    store = load_selection_split(world.data, world.manifest, "validation")
    for index, session in enumerate(world.sessions["validation"]):
        rows = table.filter(pc.equal(table["session_id"], session.session_id)).to_pandas()
        with torch.no_grad():
            said = model(store.batch([index]))
        np.testing.assert_array_equal(rows["step"], np.arange(session.num_steps))
        probabilities = rows[[f"probability.{name}" for name in world.manifest.classes]]
        np.testing.assert_allclose(probabilities, said.log_probabilities[0].exp(), atol=1e-6)
        assert list(rows["class"]) == [world.manifest.classes[k] for k in said.log_probabilities[0].argmax(-1)]
        for place, name in enumerate(("audio", "visual", "text")):
            np.testing.assert_allclose(rows[f"confidence.{name}"], said.confidence[0, :, place], atol=1e-6)
            np.testing.assert_array_equal(rows[f"present.{name}"], session.present[name])


def test_the_first_line_says_which_splits_are_predicted_and_why_no_other(world: World) -> None:
    lines: list[str] = []
    predict(settings(world), dry_run=True, report=lines.append)
    predict(settings(world, splits=("train", "validation")), dry_run=True, report=lines.append)
    why = "(the test split is opened once, by jobs/compare.py, which records it), into "
    assert f"of the validation split of {world.data} {why}" in lines[0]
    assert f"of the train and validation splits of {world.data} {why}" in lines[1]


def test_running_again_computes_what_is_missing_or_damaged_to_the_same_bytes(
    world: World, predicted: Path, without_actors: None
) -> None:
    before = contents(predicted)
    lines: list[str] = []
    predict(settings(world), dry_run=False, report=lines.append)
    assert "3 done" in lines[0] and len(lines) == 1
    assert predict(settings(world, name=predicted.name), dry_run=True, report=lambda _: None) == predicted
    gone, torn, foreign = sorted(predicted.glob("*.parquet"))
    gone.unlink()
    torn.write_bytes(torn.read_bytes()[:-40])
    shutil.copy2(gone.with_name(torn.name), predicted / ".killed.partial")  # what a killed process leaves behind
    table = pq.read_table(foreign)
    pq.write_table(table.replace_schema_metadata({b"emolab.model": b"another", b"emolab.shard": b"x"}), foreign)
    predict(settings(world, actors=1), dry_run=False, report=lines.append)
    assert "0 done" in lines[1]
    assert contents(predicted) == before


def test_other_shards_or_weights_are_another_plan(
    world: World, predicted: Path, tmp_path: Path, one_line: Callable[..., None]
) -> None:
    both = predict(settings(world, splits=("train", "validation")), dry_run=True, report=lambda _: None)
    other = str(keep_model(tmp_path / "other", world.manifest, MODEL, run_id="other"))
    assert both != predicted
    for options in ({"splits": ("train", "validation")}, {"model": other}):
        with pytest.raises(UserError) as error:
            predict(settings(world, name=predicted.name, **options), dry_run=True, report=lambda _: None)
        one_line(error, str(predicted), "another model", "other shards", "--name")
    assert predict(settings(world, model=other), dry_run=True, report=lambda _: None).name != predicted.name
    assert not both.exists()


def test_a_damaged_shard_is_named_and_the_others_are_kept(
    world: World, ray_cluster: None, tmp_path: Path, one_line: Callable[..., None]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    victim = data / "validation" / "part-00001.parquet"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    options = {"data": str(data), "output": str(tmp_path), "model": str(world.model), "actors": 1}
    with pytest.raises(UserError) as error:
        predict(settings(world, **options), dry_run=False, report=lambda _: None)
    one_line(error, "part-00001.parquet", "damaged")


def test_shards_from_anywhere_but_a_test_split(
    world: World, ray_cluster: None, without_actors: None, tmp_path: Path
) -> None:
    sessions = world.sessions["train"][:2]
    schema = arrow_schema(world.manifest.dimensions, quality=False)
    write_rows(tmp_path / "new" / "monday.parquet", sessions, schema)
    folder = predict(
        settings(world, data=None, shards=str(tmp_path / "new"), name="monday"), dry_run=False, report=lambda _: None
    )
    assert folder == world.runs / "monday"
    assert pq.read_table(folder / "monday.parquet").num_rows == sum(s.num_steps for s in sessions)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"splits": ("test",)}, ["splits.0: must be one of train, validation, got 'test'"]),
        ({"data": None}, ["--data", "--shards"]),
        ({"data": None, "shards": "{data}/test"}, ["test split", "jobs/compare.py"]),
        ({"data": None, "shards": "{data}/nowhere"}, ["no folder"]),
        ({"data": None, "shards": "{runs}"}, ["no shards"]),
        ({"data": None, "shards": "{strange}"}, ["{'audio': 2}", "'visual': 4"]),
        ({"data": None, "shards": "{empty}"}, ["monday.parquet holds no session with steps"]),
        ({"data": None, "shards": "{slow}"}, ["monday.parquet has steps of 2 s", "trained on steps of 1 s"]),
        ({"data": "{scaled}"}, ["protocol.normalise=session", "trained on data with protocol.normalise=none"]),
        ({"data": None, "shards": "{scaled}/validation"}, ["protocol.normalise=session", "protocol.normalise=none"]),
        ({"data": "{data}/nowhere"}, ["dataset.json", "jobs/prepare.py"]),
        ({"model": "models:/live-tests@champion"}, ["champion"]),
        ({"name": "../evil"}, ["not allowed"]),
        ({"name": "live"}, ["holds no predictions (model)", "--name"]),
    ],
)
def test_mistakes_are_one_line_before_anything_is_computed(
    world: World, tmp_path: Path, options: dict[str, object], parts: list[str], one_line: Callable[..., None]
) -> None:
    strange = arrow_schema({"audio": 2}, quality=False)
    pq.write_table(strange.empty_table(), tmp_path / "strange.parquet")
    slow = [replace(session, step_seconds=2.0) for session in world.sessions["train"][:2]]
    write_rows(tmp_path / "slow" / "monday.parquet", slow, arrow_schema(world.manifest.dimensions, quality=False))
    write_rows(tmp_path / "empty" / "monday.parquet", [], arrow_schema(world.manifest.dimensions, quality=False))
    write_manifest(world.manifest.model_copy(update={"protocol": {"normalise": "session"}}), tmp_path / "scaled")
    (tmp_path / "scaled" / "validation").mkdir()
    places = {"data": world.data, "runs": world.runs, "strange": tmp_path}
    places |= {name: tmp_path / name for name in ("slow", "empty", "scaled")}
    filled = {key: value.format(**places) if isinstance(value, str) else value for key, value in options.items()}
    arguments = [f"{key}={_yaml(value)}" for key, value in ({"data": str(world.data)} | filled).items()]
    before = results(world)
    with pytest.raises(UserError) as error:
        chosen, _ = parse(PredictSettings, [f"model={world.uri}", f"output={world.runs}", *arguments], description="")
        predict(chosen, dry_run=False, report=lambda _: None)
    one_line(error, *parts)
    assert results(world) == before


def results(world: World) -> list[Path]:
    """All files but models that had to be fetched, which are kept for the next call."""
    return sorted(file for file in world.runs.rglob("*") if "fetched-models" not in file.parts)


def _yaml(value: object) -> str:
    return "null" if value is None else f"[{', '.join(value)}]" if isinstance(value, tuple) else str(value)


def test_no_session_of_the_store_is_left_out_or_mixed_up(world: World) -> None:
    loaded = load(kept_model(world.model))
    store = load_selection_split(world.data, world.manifest, "train")
    table = predictions(loaded, store)
    assert table.num_rows == int(store.lengths.sum())
    assert table["session_id"].to_pylist() == list(np.repeat(store.session_ids, store.lengths))


def test_features_that_the_model_has_no_answer_to_are_named(world: World, one_line: Callable[..., None]) -> None:
    store = load_selection_split(world.data, world.manifest, "train")
    block = store.blocks[1]
    audio = block.features["audio"].copy()
    audio[block.starts[2] + 1] = 1e38
    present = {name: np.ones_like(mask) for name, mask in block.present.items()}
    huge = replace(block, features={**block.features, "audio": audio}, present=present)
    with pytest.raises(UserError) as error:
        predictions(load(kept_model(world.model)), SessionStore([store.blocks[0], huge]))
    one_line(error, f"session '{block.session_ids[2]}'", "step 1: audio 1e+38", "too large")
