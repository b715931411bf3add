"""docs/python.md: every block runs on a real, tiny run and gives what the text beside it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import REPOSITORY
from tests.docs.guides import blocks, guide, notebook, quoted, rows, run_section, sections
from tests.serving.parts import REGISTERED, World, make_world

from edu_emotionnet import zoo
from emolab import sealed
from emolab.registry.lookup import kept_model
from emolab.registry.pyfunc_model import SessionOutput
from emolab.serving.batch import predictions
from emolab.serving.live import Limits, LiveSession
from emolab.serving.models import load
from emolab.serving.settings import ServeSettings
from emolab.sessions.selection import load_selection_split

SECTIONS = sections(guide("python.md"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A data set, a kept model, and its registered version, below a folder in which a reader would start Python."""
    return make_world(tmp_path_factory.mktemp("notebook"))


NAMES = {"data/NAME": "data", "runs/NAME": "runs/live", "edu-emotionnet@": f"{REGISTERED}@"}
"""What the reader of this world writes for the names of the guide."""


def test_every_section_with_python_is_run_by_a_test() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "tests").rglob("test_*.py"))
    for heading, text in SECTIONS.items():
        if any(block.language == "python" for block in blocks(text)):
            assert f'run_section("{heading}"' in tests, heading


def test_a_model_of_the_zoo_answers_a_batch() -> None:
    found = run_section("A model of the zoo", {})
    assert found["probabilities"].shape == (2, 5, 4)
    assert found["weights"].shape == (2, 5, 3)
    torch.testing.assert_close(found["probabilities"].sum(-1), torch.ones(2, 5))
    assert zoo.ZOO["edu_emotionnet"].config is not None


def test_a_trained_run_and_its_registered_version_give_what_the_platform_gives(world: World) -> None:
    with notebook(world.runs.parent, "") as namespace:
        found = run_section("A trained run", namespace | {"torch": torch}, NAMES)
        found = run_section("A registered model", found, NAMES)
    expected = load(kept_model(world.model))
    store = load_selection_split(world.data, world.manifest, "validation")
    table = predictions(expected, store)
    first = [row["class"] for row in table.to_pylist() if row["session_id"] == store.session_ids[0]]
    assert found["first"][: len(first)] == first

    answer = found["answer"]
    assert set(quoted(SECTIONS["A registered model"].rsplit("```", 1)[-1])) == set(SessionOutput.model_fields)
    assert answer.present["audio"] == [True] * len(found["session"]["audio"])
    assert not any(answer.present["text"])
    np.testing.assert_allclose(np.sum([*found["table"].values()], axis=0), 1.0, atol=1e-5)
    assert list(found["table"]) == list(expected.classes)


def test_a_prediction_has_the_columns_that_the_guide_lists(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = predictions(load(kept_model(world.model)), load_selection_split(world.data, world.manifest, "validation"))
    (tmp_path / "runs" / "new").mkdir(parents=True)
    (tmp_path / "runs" / "new" / "validation-part-00000.parquet").write_bytes(sealed.to_parquet(table, {}))
    monkeypatch.chdir(tmp_path)
    found = run_section("What a prediction holds", {"Path": Path}, {"NAME": "new"})
    assert len(found["predicted"]) == table.num_rows
    assert found["shares"].groupby("session_id").sum().to_numpy() == pytest.approx(1.0)
    listed = {
        name.split(".")[0]
        for cell, _ in rows(SECTIONS["What a prediction holds"], "column of a prediction")
        for name in quoted(cell)
    }
    assert listed == {name.split(".")[0] for name in table.column_names}


def test_the_answers_of_a_live_session_have_the_keys_that_the_guide_shows(world: World) -> None:
    loaded = load(kept_model(world.model))
    limits = Limits(message_bytes=1000, steps=10, mistakes=20)
    session = LiveSession(loaded, loaded.live(None), limits)
    said: list[dict[str, Any]] = [
        session.answer(json.dumps({"step": step, "features": {"audio": [0.0] * 6, "visual": None}})).content
        for step in (0, 7)
    ]
    shown = [json.loads(block.text) for block in blocks(SECTIONS["A live session"]) if block.language == "json"]
    assert [set(each) for each in shown] == [set(each) for each in said]
    assert [each["type"] for each in shown] == [each["type"] for each in said]
    assert shown[1]["message"] == said[1]["message"].replace("is 1", "is 3")
    assert shown[0]["present"] == said[0]["present"]


def test_a_live_session_ends_as_the_guide_says(world: World) -> None:
    table, settings = rows(SECTIONS["A live session"], "case"), ServeSettings.model_fields
    for case, *_ in table:
        for name in quoted(case):
            assert f"{settings[name].default:,}" in case.replace("60)", "60.0)"), case
    loaded = load(kept_model(world.model))
    session = LiveSession(loaded, loaded.live(None), Limits(message_bytes=1000, steps=1, mistakes=2))
    closes = {int(close) for _, code, close in table if "sessions" not in code and close != "1012"}
    assert session.answer("{").close is None
    assert {session.answer("{").close} == closes
    assert session.answer('{"step": 0, "features": {}}').close is None
    last = session.answer('{"step": 1, "features": {}}')
    assert (last.content["code"], {last.close}) == ("too_many_steps", closes)
    assert f"`{last.content['code']}`" in [code for _, code, _ in table]
