"""What a live session answers, without any network: every malformed message is refused and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serving.parts import LATE_FUSION, World, keep_model

from emolab.features.audio import AudioSettings
from emolab.names import UserError
from emolab.registry.lookup import kept_model
from emolab.serving.live import Limits, LiveSession
from emolab.serving.models import LoadedModel, find_model, load
from emolab.serving.recordings import recordings
from emolab.sessions.selection import load_selection_split
from emolab.training.made_for import looking_ahead
from emolab.training.recipe import TrackingSettings

LIMITS = Limits(message_bytes=2000, steps=50, mistakes=5)


@pytest.fixture(scope="module")
def loaded(world: World) -> LoadedModel:
    return load(find_model(world.uri, output=world.runs, tracking=TrackingSettings()))


@pytest.fixture(scope="module")
def begin(loaded: LoadedModel) -> Callable[..., LiveSession]:
    """Begins a session, with other limits where some are given."""
    live = loaded.live(None)
    return lambda **limits: LiveSession(loaded, live, replace(LIMITS, **limits))


def message(step: int, **features: Any) -> str:
    return json.dumps({"step": step, "features": features})


def test_the_answers_are_those_of_the_model_on_the_whole_session(
    world: World, loaded: LoadedModel, begin: Callable[..., LiveSession]
) -> None:
    recorded = recordings(str(world.data), loaded)[0]
    session, steps = begin(), len(recorded["labels"])
    said = [
        session.answer(message(t, **{name: rows[t] for name, rows in recorded["features"].items()})).content
        for t in range(steps)
    ]
    batch = load_selection_split(world.data, world.manifest, "validation").batch([0])
    with torch.no_grad():
        expected = loaded.model(batch)
    for t, answer in enumerate(said):
        assert (answer["type"], answer["step"], answer["classes"]) == ("prediction", t, ["low", "middle", "high"])
        torch.testing.assert_close(
            torch.tensor(answer["probabilities"]), expected.log_probabilities[0, t].exp(), rtol=0.0, atol=1e-6
        )
        weights = [answer["confidence"][name] for name in ("audio", "visual", "text")]
        torch.testing.assert_close(torch.tensor(weights), expected.confidence[0, t], rtol=0.0, atol=1e-6)
        assert answer["present"] == {name: bool(batch.present[name][0, t]) for name in batch.modalities}


@pytest.mark.parametrize(
    ("text", "code", "part"),
    [
        (b"\x00\x01", "not_text", "JSON"),
        (None, "not_text", "JSON"),
        ("{", "not_json", "not JSON"),
        ("[" * 1500, "not_json", "not JSON"),
        ("[]", "bad_message", '"step"'),
        ('{"step": 0}', "bad_message", '"features"'),
        ('{"step": 0, "features": {}, "more": 1}', "bad_message", '"step"'),
        ('{"step": true, "features": {}}', "bad_message", "whole number"),
        ('{"step": -1, "features": {}}', "bad_message", "whole number"),
        ('{"step": 0.0, "features": {}}', "bad_message", "whole number"),
        ('{"step": 0, "features": []}', "bad_message", "object"),
        ('{"step": 3, "features": {}}', "out_of_order", "the next is 0"),
        ('{"step": 0, "features": {"video": null}}', "unknown_modality", "audio, visual, text"),
        ('{"step": 0, "features": {"text": [1, 2]}}', "bad_features", "3 numbers, got 2"),
        ('{"step": 0, "features": {"text": "abc"}}', "bad_features", "got str"),
        ('{"step": 0, "features": {"text": [1, "2", 3]}}', "bad_features", "numbers alone"),
        ('{"step": 0, "features": {"text": [1, null, 3]}}', "bad_features", "numbers alone"),
        ('{"step": 0, "features": {"text": [true, 2, 3]}}', "bad_features", "numbers alone"),
        ('{"step": 0, "features": {"text": [NaN, 2, 3]}}', "bad_features", "NaN"),
        ('{"step": 0, "features": {"text": [-Infinity, 2, 3]}}', "bad_features", "Infinity"),
        ('{"step": 0, "features": {"text": [1e39, 2, 3]}}', "bad_features", "too large"),
        ('{"step": 0, "features": {"text": [1e999, 2, 3]}}', "bad_features", "too large"),
        ('{"step": 0, "features": {"text": [%s, 2, 3]}}' % ("9" * 400), "bad_features", "too large"),
        (message(0, text=[0.0] * 900), "too_large", "at most 2000 bytes"),
        ("é" * 1500, "too_large", "at most 2000 bytes"),
    ],
)
def test_a_bad_message_is_refused_and_changes_nothing(
    begin: Callable[..., LiveSession], text: str | bytes | None, code: str, part: str
) -> None:
    session, clean = begin(), begin()
    for step in range(3):
        if step == 0 or code != "out_of_order":
            reply = session.answer(text)
            assert (reply.content["type"], reply.content["code"], reply.close) == ("error", code, None)
            assert part in reply.content["message"]
            assert len(reply.text()) < 400 and reply.content["next_step"] == step
        good = message(step, text=[0.1, 0.2, 0.3 + step])
        assert session.answer(good).content == clean.answer(good).content


def test_features_that_the_model_has_no_answer_to_are_refused_and_change_nothing(
    begin: Callable[..., LiveSession],
) -> None:
    session, clean = begin(), begin()
    for step in range(3):
        reply = session.answer(message(step, text=[1e38, 2.0, 3.0]))
        assert (reply.content["code"], reply.content["next_step"], reply.close) == ("bad_features", step, None)
        assert "too large" in reply.content["message"]
        good = message(step, text=[0.1, 0.2, 0.3 + step])
        assert session.answer(good).content == clean.answer(good).content


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["step", "features", "audio", "text"]), inner),
).map(json.dumps)))  # fmt: skip
def test_any_text_gets_an_answer(begin: Callable[..., LiveSession], text: str) -> None:
    reply = begin().answer(text)
    assert reply.content["type"] in ("error", "prediction")
    json.loads(reply.text())


def test_steps_are_answered_once_and_in_order(begin: Callable[..., LiveSession]) -> None:
    session = begin()
    for step in range(3):
        assert session.answer(message(step)).content["type"] == "prediction"
    again = session.answer(message(1)).content
    assert again["code"] == "out_of_order" and "step 1 was answered already: the next is 3" in again["message"]
    assert "comes too early" in session.answer(message(9)).content["message"]
    assert session.answer(message(3)).content["step"] == 3


def test_a_session_ends_politely_at_its_limits(begin: Callable[..., LiveSession]) -> None:
    session = begin(steps=2)
    for step in range(2):
        assert session.answer(message(step)).close is None
    last = session.answer(message(2))
    assert (last.content["code"], last.close) == ("too_many_steps", 1008)
    clumsy = begin(mistakes=3)
    closes = [clumsy.answer("x").close for _ in range(2)]
    clumsy.answer(message(0))  # a good message: the count begins anew
    assert closes + [clumsy.answer("x").close for _ in range(3)] == [None, None, None, None, 1008]


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"dimensions": {"audio": 6}}, ["'visual': 4", "{'audio': 6}"]),
        ({"classes": ["low", "high"]}, ["low, middle, high", "low, high"]),
        ({"step_seconds": 0.5}, ["steps of 1 s", "steps of 0.5 s"]),
        ({"protocol": {"normalise": "session"}}, ["protocol.normalise=none", "protocol.normalise=session"]),
    ],
)
def test_data_of_another_kind_are_refused(
    world: World, loaded: LoadedModel, changed: dict[str, Any], parts: list[str], one_line: Callable[..., None]
) -> None:
    with pytest.raises(UserError) as error:
        loaded.check_fit(world.manifest.model_copy(update=changed), Path("elsewhere"))
    one_line(error, "elsewhere", *parts)
    fitting = {"step_seconds": 1.0 + 5e-7, "protocol": {"split": "speakers"}, "seed": 9}
    loaded.check_fit(world.manifest.model_copy(update=fitting), Path("elsewhere"))


def test_a_model_of_standardised_sessions_cannot_follow_one_that_is_not_over(
    loaded: LoadedModel, one_line: Callable[..., None]
) -> None:
    scaled = replace(loaded, dataset={**loaded.dataset, "protocol": {"normalise": "session"}})
    with pytest.raises(UserError) as error:
        scaled.live(None)
    one_line(error, "edu_emotionnet", "protocol.normalise=session", "jobs/predict.py")


RECORDED = {
    "audio": {"extractor": "mfcc", "normalised": "per session"},
    "visual": {"extractor": "resnet", "depth": 18},
    "text": {"extractor": "bert", "tokens": 128},
}
"""Options of a data set made from recordings, as its manifest has them."""


def test_features_that_a_session_under_way_does_not_have_yet_are_named(loaded: LoadedModel) -> None:
    recorded = replace(loaded, dataset={**loaded.dataset, "options": RECORDED})
    (line,) = recorded.warnings()
    assert line.startswith("warning: edu_emotionnet was trained on features that a session under way does not have yet")
    assert "audio: mfcc is standardised over the whole session; text: bert reads 128 tokens at once" in line
    assert "visual" not in line
    heard = AudioSettings(extractor="mfcc").identity()  # what a manifest says is what the extractor says of itself
    assert looking_ahead({"options": {"audio": heard}}) == {"audio": "mfcc is standardised over the whole session"}
    assert not [*loaded.warnings()]
    assert not [*replace(loaded, dataset={**loaded.dataset, "options": {"audio": {"extractor": "none"}}}).warnings()]


def test_models_that_cannot_stream_are_named(world: World, tmp_path: Path) -> None:
    cfn_esa: dict[str, object] = {"name": "cfn_esa", "d_model": 16, "heads": 2}
    ahead = keep_model(tmp_path / "ahead", world.manifest, cfn_esa, run_id="ahead")
    with pytest.raises(UserError, match=r"cfn_esa.*looks ahead"):
        load(kept_model(ahead)).live(None)
    model = load(kept_model(keep_model(tmp_path / "late", world.manifest, LATE_FUSION, run_id="late")))
    with pytest.raises(UserError, match=r"late_fusion.*no window"):
        model.live(4)
    greeting = LiveSession(model, model.live(None), LIMITS).greeting()
    assert greeting["recomputes"] is True
    answer = LiveSession(model, model.live(None), LIMITS).answer(message(0, text=[1.0, 2.0, 3.0])).content
    assert answer["confidence"] is None and answer["type"] == "prediction"


def test_recordings_are_of_the_validation_split(world: World, loaded: LoadedModel) -> None:
    shown = recordings(str(world.data), loaded)
    assert [r["session_id"] for r in shown] == [s.session_id for s in world.sessions["validation"]]
    json.dumps(shown, allow_nan=False)
