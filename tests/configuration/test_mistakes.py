"""Mistakes in a configuration are told in people's words, with the key as the user wrote it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from emolab.configuration import parse, read_yaml, validate
from emolab.names import UserError
from emolab.sessions.preparation import PrepareSettings
from emolab.studies.comparison_settings import CompareSettings
from emolab.studies.dataset import dataset
from emolab.studies.robustness import RobustnessSettings
from emolab.training.recipe import TrainSettings
from emolab.tuning.settings import TuneSettings
from emolab.tuning.space import SearchSpace

THEIR_WORDS = ("Input should", "Value error", "NoneType", "Errno", "valid tuple", "valid dictionary", "[type=")


@pytest.mark.parametrize(
    ("settings", "override", "line"),
    [
        (TuneSettings, "training.epochs=many", "training.epochs: must be a whole number, got 'many'"),
        (TuneSettings, "training.epochs=1.5", "training.epochs: must be a whole number, got 1.5"),
        (
            TuneSettings,
            "training.epochs=",
            "training.epochs: must be a whole number, got null (give a value, or leave the key out)",
        ),
        (TuneSettings, "tuning.storage=sqlite://", "tuning.storage: names no file, and a search resumes from one"),
        (TuneSettings, "tuning.storage='sqlite:///:memory:'", "tuning.storage: names no file"),
        (TuneSettings, "tuning.storage=sqlite:///file:a?mode=memory&uri=true", "tuning.storage: names no file"),
        (TuneSettings, "training.epochs=0", "training.epochs: must be greater than or equal to 1, got 0"),
        (TuneSettings, "training.learning_rate=fast", "training.learning_rate: must be a number, got 'fast'"),
        (TuneSettings, "training.learning_rate=.inf", "training.learning_rate: must be a finite number, got inf"),
        (TuneSettings, "training.modality_dropout=2", "training.modality_dropout: must be less than or equal to 1.0"),
        (TuneSettings, "tracking.enabled=perhaps", "tracking.enabled: must be true or false, got 'perhaps'"),
        (TuneSettings, "name=2024", "name: must be text, got 2024 (in quotes it is text)"),
        (
            TuneSettings,
            "training.decay_epochs=5",
            "training.decay_epochs: must be a list, got 5 (a list is written [a, b])",
        ),
        (TuneSettings, "training.decay_epochs=[1, a]", "training.decay_epochs.1: must be a whole number, got 'a'"),
        (
            TuneSettings,
            "training.selection=bets",
            "training.selection: must be one of best, last, got 'bets', did you mean 'best'?",
        ),
        (
            TuneSettings,
            "training=3",
            "training: must be a section of keys, got 3 (its keys are set one by one, as section.key=value)",
        ),
        (TuneSettings, "model.d_model=big", "model: d_model: must be a whole number, got 'big'"),
        (TuneSettings, "model.name=5", "model: name must be text"),
        (TuneSettings, "model={1: 2}", "model: unknown key 1"),
        (TuneSettings, "model.name=[a]", "model: name must be text"),
        (CompareSettings, "models=[]", "models: must have at least 1 value(s), got []"),
        (CompareSettings, "seeds=a", "seeds: must be a whole number, got 'a'"),
        (TrainSettings, "model.layers=true", "model: layers: must be a whole number, got 'true'"),
        (TrainSettings, "model.dropout=false", "model: dropout: must be a number, got 'false'"),
        (RobustnessSettings, "model=3", "model: must be text or a list, got 3"),
        (RobustnessSettings, "model=", "model: must be text or a list, got null"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_in_peoples_words(settings: Any, override: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        parse(settings, [override], description="")
    assert str(error.value).startswith(line), str(error.value)
    assert "\n" not in str(error.value)
    assert not any(words in str(error.value) for words in THEIR_WORDS)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"sessions": -5}, "options.sessions=-5: must be 50 or more"),
        ({"sessions": "x"}, "options.sessions: must be a whole number, got 'x'"),
        ({"sessions": True}, "options.sessions: must be a whole number, got 'true'"),
        ({"sessions": None}, "options.sessions: must be a whole number, got null"),
        ({"sessions": [1]}, "options.sessions: must be a whole number, got [1]"),
        ({"step_seconds": "long"}, "options.step_seconds: must be a number, got 'long'"),
    ],
)
def test_an_option_of_a_corpus_is_named_as_it_was_given(options: Any, line: str) -> None:
    plan = PrepareSettings.model_validate({"corpus": "edusim", "output": "nowhere", "options": options})
    with pytest.raises(UserError) as error:
        plan.build()
    assert str(error.value).startswith(line), str(error.value)
    with pytest.raises(UserError) as error:  # a study prepares its data by a section of its own
        dataset("nowhere", plan, report=lambda _: None, dry_run=True)
    assert str(error.value).startswith(f"prepare.{line}"), str(error.value)
    assert not any(words in str(error.value) for words in THEIR_WORDS)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"text": {"extractr": "none"}},
            "unknown key 'options.text.extractr', did you mean 'extractor'? (valid here: ",
        ),
        ({"corruption": {"sound": {}}}, "unknown key 'options.corruption.sound' (valid here: audio, frames, "),
        ({"text": {"extractor": "bertt"}}, "options.text.extractor: must be one of bert, none, got 'bertt', did you "),
        ({"text": 3}, "options.text: must be a section of keys, got 3 (its keys are set one by one, as "),
        ({"max_hours": 0}, "options.step_seconds=1, max_hours=0: "),
        ({"class_nams": []}, "options.class_nams: unknown option of media, did you mean 'class_names'? (options: "),
    ],
)
def test_an_option_of_a_section_of_a_corpus_is_named_as_it_was_given(options: Any, line: str) -> None:
    plan = PrepareSettings.model_validate({"corpus": "media", "manifest": "nowhere.csv", "options": options})
    for ask in (plan.build, plan.complete):
        with pytest.raises(UserError) as error:
            ask()
        assert str(error.value).startswith(line), str(error.value)


def test_a_default_that_depends_on_a_wrong_value_is_no_second_mistake() -> None:
    with pytest.raises(UserError) as error:
        validate(PrepareSettings, {"corpus": 3})
    assert str(error.value) == "corpus: must be text, got 3 (in quotes it is text)"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "is a folder, a YAML file is needed"),
        (b"", "is empty, expected a mapping of keys to values"),
        (b"[1, 2]", "expected a mapping of keys to values, got [1, 2]"),
        (b"\xff\xfe\x00", "is not text in UTF-8, a YAML file is needed"),
    ],
)
def test_what_is_no_yaml_file_of_keys_is_said_to_be_what_it_is(
    content: bytes | None, line: str, tmp_path: Path, one_line: Callable[..., None]
) -> None:
    path = tmp_path / "mine.yaml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_yaml(path)
    one_line(error, f"{path}: {line}")
    assert not any(words in str(error.value) for words in THEIR_WORDS)


@pytest.mark.parametrize(
    ("settings", "override", "hint"),
    [
        (TrainSettings, "epochs=3", "'epochs', did you mean 'training.epochs'? (valid here: data, "),
        (TrainSettings, "learning_rat=3", "'learning_rat', did you mean 'training.learning_rate'? (valid here: data, "),
        (TuneSettings, "seed=3", "'seed', did you mean 'training.seed' or 'tuning.seed' or 'prepare.seed'? (valid"),
        (TuneSettings, "tuning.top=3", "'tuning.top', did you mean 'tuning.final.top'? (valid here: space, "),
        (TuneSettings, "training.epocs=3", "'training.epocs', did you mean 'epochs'? (valid here: epochs, "),
        (TuneSettings, "tuning.latency_ms=3", "'tuning.latency_ms', did you mean 'tuning.constraints.latency_ms'? ("),
        (TrainSettings, "zzz=3", "'zzz' (valid here: data, "),
    ],
)
def test_a_key_that_stands_in_a_section_is_found_there(settings: Any, override: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        parse(settings, [override], description="")
    assert str(error.value).startswith(f"unknown key {hint}"), str(error.value)


def test_an_unknown_key_of_one_of_several_kinds_of_sections_is_named_with_those_that_are_valid() -> None:
    space = {"parameters": {"training.kl_weight": {"distribution": "float", "low": 0.1, "hihg": 1}}}
    with pytest.raises(UserError) as error:
        validate(SearchSpace, space, where="mine.yaml: ")
    expected = "mine.yaml: unknown key 'parameters.training.kl_weight.hihg', did you mean 'high'? (valid here: "
    assert str(error.value).startswith(expected), str(error.value)


def test_a_long_value_is_cut_off_and_a_mistake_counts_once_whatever_was_tried() -> None:
    with pytest.raises(UserError) as error:
        validate(RobustnessSettings, {"model": {"a": "x" * 500}})
    assert len(str(error.value)) < 200
    assert "more)" not in str(error.value)
    with pytest.raises(UserError, match=r"\(and 1 more\)"):
        validate(TuneSettings, yaml.safe_load(json.dumps({"training": {"epochs": 0, "batch_size": 0}})))
