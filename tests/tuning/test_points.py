"""Known configurations come first, and the search says what it found beside the one it began from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tests.tuning.test_search import HARMLESS, tune_settings

from emolab.configuration import parse, read_preset, validate
from emolab.names import UserError
from emolab.tracking.tracker import NoTracker
from emolab.training.recipe import TrainSettings
from emolab.tuning.methods import make_sampler
from emolab.tuning.points import POINT, beside_base, enqueue_points, points
from emolab.tuning.search import search
from emolab.tuning.settings import SearchSettings, TuneSettings
from emolab.tuning.space import FloatParameter, IntParameter, SearchSpace
from emolab.tuning.study import Study
from emolab.tuning.trials import TrialRecord

BASE = validate(TrainSettings, read_preset("small", TrainSettings))
SPACE = SearchSpace.model_validate(
    {
        "parameters": {
            "model.name": {"distribution": "categorical", "choices": ["edu_emotionnet", "late_fusion"]},
            "training.learning_rate": {"distribution": "float", "low": 1e-4, "high": 1e-2, "log": True},
            "model.dropout": {"distribution": "float", "low": 0.0, "high": 0.5, "step": 0.05},
            "model.layers": {
                "distribution": "int",
                "low": 1,
                "high": 3,
                "when": {"model.name": ["edu_emotionnet"]},
            },
        }
    }
)


def tuning(given: Any, **others: Any) -> SearchSettings:
    return SearchSettings.model_validate({"points_to_evaluate": given, "trials": 5} | others)


def test_base_is_the_configuration_at_the_keys_of_the_space() -> None:
    assert points(tuning(["base"]), SPACE, BASE) == [
        {"model.name": "edu_emotionnet", "training.learning_rate": 0.002, "model.dropout": 0.1, "model.layers": 1}
    ]


@pytest.mark.parametrize(
    ("point", "others", "parts"),
    [
        ({"training.learning_rate": 0.1}, {}, ["training.learning_rate=0.1", "not in the space"]),
        ({"model.dropout": 0.12}, {}, ["model.dropout=0.12", "not in the space"]),
        ({"model.layers": True}, {}, ["model.layers=true", "not in the space"]),
        ({"training.lerning_rate": 0.001}, {}, ["training.lerning_rate", "did you mean 'training.learning_rate'"]),
        ({"model.name": "late_fusion", "model.layers": 2}, {}, ["model.layers", "condition does not hold"]),
        ({}, {"sampler": "grid"}, ["a grid tries its own points"]),
        ({}, {"trials": 1, "points_to_evaluate": [{}, {}]}, ["2 points for tuning.trials=1"]),
    ],
)
def test_a_point_that_cannot_be_tried_is_refused(point: Any, others: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        points(tuning([point], **others), SPACE, BASE)
    assert all(part in str(caught.value) for part in ["tuning.points_to_evaluate", *parts])


def test_a_base_outside_the_space_is_refused_by_its_key() -> None:
    fast = BASE.model_copy(update={"training": BASE.training.model_copy(update={"learning_rate": 0.5})})
    with pytest.raises(UserError, match=r"base: the configuration's training\.learning_rate=0\.5 is not in the space"):
        points(tuning(["base"]), SPACE, fast)


def test_points_are_read_from_the_command_line() -> None:
    given = ["--preset", "small", "tuning.points_to_evaluate=[base, {training.learning_rate: 0.001}]"]
    read, _ = parse(TuneSettings, given, description="")
    assert read.tuning.points_to_evaluate == ("base", {"training.learning_rate": 0.001})


@hypothesis_settings(deadline=None, max_examples=60)
@given(
    low=st.floats(0.0, 1.0),
    step=st.floats(0.01, 0.3),
    steps=st.integers(0, 12),
    off=st.floats(0.05, 0.95),
)
def test_a_stepped_range_contains_its_own_values_and_nothing_between(
    low: float, step: float, steps: int, off: float
) -> None:
    parameter = FloatParameter(distribution="float", low=low, high=low + step * 12, step=step)
    assert all(parameter.contains(value) for value in parameter.values() or [])
    assert not parameter.contains(low + (steps + off) * step)
    whole = IntParameter(distribution="int", low=2, high=11, step=3)
    assert [value for value in range(20) if whole.contains(value)] == [2, 5, 8, 11]
    assert not whole.contains(2.5)


def test_points_come_first_and_once_however_often_a_search_begins(tmp_path: Path) -> None:
    chosen = tuning(["base", {"training.learning_rate": 0.001}])

    def opened() -> Study:
        study = Study(tmp_path / "study.db", "s", space=SPACE, sampler=make_sampler("random", seed=0, space=SPACE))
        study.requeue_interrupted()
        enqueue_points(chosen, SPACE, BASE, study)
        return study

    study = opened()
    first = study.ask()
    assert first.parameters == points(chosen, SPACE, BASE)[0]
    study.tell(first.number, "COMPLETE", [0.5], epochs=1)
    second = study.ask()  # and the search dies with it
    assert second.parameters["training.learning_rate"] == 0.001
    study.flush()

    study = opened()
    assert study.waiting() == 1
    again = study.ask()
    assert again.parameters == second.parameters
    study.tell(again.number, "COMPLETE", [0.6], epochs=1)
    assert [record.labels[POINT] for record in reversed(study.records())] == ["base", {"training.learning_rate": 0.001}]
    assert opened().waiting() == 0


def test_a_point_whose_trial_died_while_it_was_drawn_keeps_its_values(tmp_path: Path) -> None:
    study = Study(tmp_path / "study.db", "s", space=SPACE, sampler=make_sampler("random", seed=0, space=SPACE))
    enqueue_points(tuning([{"training.learning_rate": 0.001}]), SPACE, BASE, study)
    study._study.ask()  # pyright: ignore[reportPrivateUsage]  # killed before a parameter is suggested
    study.flush()
    study = Study(tmp_path / "study.db", "s", space=SPACE, sampler=make_sampler("random", seed=0, space=SPACE))
    assert study.requeue_interrupted() == 1
    assert study.ask().parameters["training.learning_rate"] == 0.001


def record(number: int, value: float, state: str = "COMPLETE", **labels: Any) -> TrialRecord:
    return TrialRecord(
        number=number, state=state, value=value, robustness=None, epochs=2, parameters={}, reason="", labels=labels
    )


def test_what_the_search_found_is_said_beside_the_configurations_own_values() -> None:
    best, other = record(1, 0.65), record(0, 0.60, point="base")
    assert beside_base([best, other], best) == [
        "The configuration's own values (trial 0) had 0.6000; the chosen trial +0.0500, part of which is luck of the "
        "best among 2."
    ]
    stopped = record(0, 0.40, "PRUNED", point="base")
    whole = replace(best, curve={1: 0.3, 2: 0.45, 12: 0.65})
    assert beside_base([whole, stopped], whole) == [
        "The configuration's own values (trial 0) had 0.4000 when they were stopped after 2 epochs; the chosen trial "
        "had 0.4500 there."
    ]
    assert beside_base([best, stopped], best)[0].endswith("when they were stopped after 2 epochs.")
    assert beside_base([other, record(1, 0.5)], other) == [
        "The configuration's own values (trial 0) had 0.6000: no trial was better."
    ]
    assert beside_base([best], best) == []


@pytest.mark.slow
@pytest.mark.ray
def test_a_search_begins_with_its_points(ray_cluster: None, toy_data: Path, tmp_path: Path) -> None:
    settings = tune_settings(toy_data, tmp_path, trials=2, points_to_evaluate=[{"training.kl_weight": 0.25}])
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(HARMLESS))
    for _ in range(2):
        result = search(settings, NoTracker())
        assert {r.number: r.labels for r in result.records} == {0: {POINT: {"training.kl_weight": 0.25}}, 1: {}}
        assert next(r for r in result.records if r.number == 0).parameters == {"training.kl_weight": 0.25}
