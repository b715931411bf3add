"""Search spaces: whatever could fail in a trial is refused before the first one starts."""

import json
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import optuna
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from tests.conftest import REPOSITORY

from edu_emotionnet import zoo
from emolab.configuration import read_preset, validate
from emolab.names import UserError
from emolab.training.recipe import TrainSettings
from emolab.tuning.combinations import MOST, combinations
from emolab.tuning.schema import space_schema
from emolab.tuning.space import SearchSpace, configured, read_space

BASE = validate(TrainSettings, read_preset("small", TrainSettings))
FILES = sorted((REPOSITORY / "search_spaces").glob("*.yaml"))


LAYERS = {"distribution": "int", "low": 1, "high": 2}
DROPOUT = {"distribution": "float", "low": 0.0, "high": 0.5}
CONDITIONAL = {"model.name": {"distribution": "categorical", "choices": ["late_fusion", "mult"]}}


def read(parameters: Any, folder: Path) -> None:
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({"parameters": parameters}, sort_keys=False))
    read_space(path, BASE)


@pytest.mark.parametrize(
    ("parameters", "parts"),
    [
        ({"training.learning_rate": {"distribution": "float", "low": 1.0, "high": 0.1}}, ["low must not exceed high"]),
        ({"training.learning_rate": {"distribution": "floot", "low": 0, "high": 1}}, ["floot", "did you mean 'float'"]),
        ({"training.learning_rate": {"distribution": "float", "low": 0, "high": 1, "log": True}}, ["above 0"]),
        (
            {"training.learning_rate": {"distribution": "float", "low": 0, "high": 1, "step": 1e-12}},
            ["more than 1000000 steps of 1e-12", "leave step out"],
        ),
        ({"training.learning_rate": {"distribution": "float", "low": 1e-4}}, ["learning_rate", "high"]),
        ({"training.learning_rate": {"distribution": "float", "low": 1, "hihg": 2}}, ["learning_rate"]),
        (
            {"training.learing_rate": {"distribution": "float", "low": 0.1, "high": 1}},
            ["learing_rate", "learning_rate"],
        ),
        (
            {
                "training.weight_decay": {"distribution": "float", "low": 0.0, "high": 0.1},
                "training.lerning_rate": {"distribution": "float", "low": 0.1, "high": 1},
            },
            ["unknown key 'training.lerning_rate', did you mean 'learning_rate'"],
        ),
        (
            {"model.dropout": DROPOUT, "model.heds": {"distribution": "int", "low": 1, "high": 2}},
            ["unknown key 'heds', did you mean 'heads'"],
        ),
        ({"model.d_model": {"distribution": "int", "low": 4, "high": 10**20}}, ["model.d_model", "must be less than"]),
        ({"model.depth": {"distribution": "int", "low": 1, "high": 2}}, ["depth"]),
        ({"model.dropout": {"distribution": "float", "low": 0.0, "high": 1.5}}, ["dropout", "1.5"]),
        ({"training.epochs": {"distribution": "int", "low": 0, "high": 3}}, ["epochs"]),
        ({"training.epochs": LAYERS}, ["training.epochs cannot be searched"]),
        ({"model.layers": {"distribution": "float", "low": 1, "high": 3}}, ["layers", "must be a whole number"]),
        ({"model.layers": {"distribution": "float", "low": 1, "high": 3, "step": 0.5}}, ["layers", "whole number"]),
        (
            {"training.batch_size": {"distribution": "float", "low": 4, "high": 64, "log": True}},
            ["batch_size", "whole"],
        ),
        ({"data": {"distribution": "categorical", "choices": ["a"]}}, ["data", "only keys of model and training"]),
        ({"model.heads": {"distribution": "categorical", "choices": []}}, ["choices"]),
        ({"model.d_model": {"distribution": "categorical", "choices": [32, 16, 32]}}, ["choices: 32 is there twice"]),
        (
            {"training.decay_epochs": {"distribution": "categorical", "choices": [[8, 10], [5]]}},
            [
                "training.decay_epochs",
                "choices: a choice is one plain value, got [8, 10]",
                "lists",
                "cannot be searched",
            ],
        ),
        ({"model.dropout": {"distribution": "float", "low": 0.1, "high": 1.5, "step": 0.3}}, ["dropout", "got 1.3"]),
        (CONDITIONAL | {"model.layers": LAYERS | {"when": {"model.name": ["mullt"]}}}, ["model.layers", "mullt"]),
        (CONDITIONAL | {"model.layers": LAYERS | {"when": {"model.nam": ["mult"]}}}, ["did you mean 'model.name'"]),
        (CONDITIONAL | {"model.layers": LAYERS | {"when": {"model.name": []}}}, ["model.layers", "model.name"]),
        ({"model.layers": LAYERS | {"when": {"model.name": ["mult"]}}} | CONDITIONAL, ["no earlier parameter"]),
        (
            {"model.layers": LAYERS, "model.dropout": DROPOUT | {"when": {"model.layers": [1]}}},
            ["model.dropout", "not categorical"],
        ),
        (CONDITIONAL | {"model.cmaa": {"distribution": "categorical", "choices": [True]}}, ["cmaa", "late_fusion"]),
        ({}, ["parameters"]),
        ("nonsense", ["parameters"]),
    ],
)
def test_a_wrong_space_is_refused_with_file_and_key(parameters: Any, parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(parameters, tmp_path)
    assert "\n" not in str(error.value)
    for part in ["space.yaml", *parts]:
        assert part in str(error.value), str(error.value)


def test_a_step_beyond_the_range_leads_to_no_value_outside_of_it(tmp_path: Path) -> None:
    read({"model.dropout": {"distribution": "float", "low": 0.0, "high": 0.5, "step": 2.0}}, tmp_path)


@pytest.mark.parametrize(
    ("key", "parameter", "values"),
    [
        ("model.dropout", {"distribution": "float", "low": 0.0, "high": 1.0, "step": 0.3}, [0.0, 0.3, 0.6, 0.9]),
        (
            "model.dropout",
            {"distribution": "float", "low": 0.1, "high": 0.7, "step": 0.1},
            [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
        ),
        ("model.dropout", {"distribution": "float", "low": 0.25, "high": 0.5, "step": 2.0}, [0.25]),
        ("training.patience", {"distribution": "int", "low": 1, "high": 10, "step": 4}, [1, 5, 9]),
    ],
)
def test_a_range_ends_with_the_last_step_within_it_and_nobody_is_warned(
    key: str, parameter: Any, values: list[float], tmp_path: Path
) -> None:
    read({key: parameter}, tmp_path)  # 1.0 would be refused
    space = SearchSpace.model_validate({"parameters": {key: parameter}})
    assert list(space.grid()[key]) == values
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        drawn = {space.draw(study.ask())[key] for _ in range(60)}
    assert sorted(drawn) == pytest.approx(values)


WIDTHS = {"distribution": "int", "low": 8, "high": 24}
HEADS = {"distribution": "categorical", "choices": [2, 4]}


@pytest.mark.parametrize(
    ("parameters", "parts"),
    [
        ({"model.d_model": WIDTHS, "model.heads": HEADS}, ["model.d_model=9 with model.heads=2", "multiple of heads"]),
        ({"model.heads": HEADS, "model.dropout": DROPOUT, "model.d_model": WIDTHS}, ["model.heads=2 with model.d_mod"]),
        ({"model.d_model": WIDTHS | {"step": 2}, "model.heads": HEADS}, ["model.d_model=10 with model.heads=4"]),
        ({"model.heads": {"distribution": "int", "low": 1, "high": 4}}, ["model.heads=3", "got 32 and 3"]),
        ({"model.heads": {"distribution": "categorical", "choices": [2, 3]}}, ["model.heads=3", "got 32 and 3"]),
        (
            {
                "model.name": {"distribution": "categorical", "choices": ["late_fusion", "cfn_esa"]},
                "model.heads": {"distribution": "categorical", "choices": [1]},
                "model.d_model": WIDTHS | {"when": {"model.name": ["cfn_esa"]}},
            },
            ["model.d_model=9", "cannot be built", "must be even"],
        ),
    ],
)
def test_a_space_with_combinations_that_no_model_can_be_built_from_is_refused_with_an_example(
    parameters: Any, parts: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        read(parameters, tmp_path)
    assert "\n" not in str(error.value)
    for part in ["space.yaml: ", *parts]:
        assert part in str(error.value), str(error.value)


def test_a_space_whose_every_combination_can_be_built_is_accepted_also_where_the_base_does_not_fit(
    tmp_path: Path,
) -> None:
    read(
        {
            "model.d_model": {"distribution": "int", "low": 9, "high": 27, "step": 9},
            "model.heads": HEADS | {"choices": [3, 9]},
        },
        tmp_path,
    )


def test_of_too_many_combinations_a_part_is_tried_and_it_is_the_same_part_every_time() -> None:
    parameters = {
        f"model.{name}": {"distribution": "int", "low": 1, "high": 50} for name in ("d_model", "layers", "heads")
    }
    space = validate(SearchSpace, {"parameters": parameters})
    tried = list(combinations(space))
    assert 0.9 * MOST < len(tried) <= MOST
    assert tried == list(combinations(space))


class Drawing(optuna.trial.FixedTrial):
    """A trial whose values hypothesis chooses, among all that a distribution can give."""

    def __init__(self, data: st.DataObject) -> None:
        super().__init__({})
        self.data = data

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        if isinstance(distribution, CategoricalDistribution):
            return self.data.draw(st.sampled_from(distribution.choices))
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        low, high, step = distribution.low, distribution.high, distribution.step
        if step is None:
            return self.data.draw(st.floats(low, high))
        return low + step * self.data.draw(st.integers(0, round((high - low) / step)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_configuration_a_shipped_space_can_draw_builds_a_model(path: Path, data: st.DataObject) -> None:
    space = read_space(path, BASE)
    parameters = space.draw(Drawing(data))  # pyright: ignore[reportArgumentType]
    chosen = configured(BASE, parameters)
    for key, value in parameters.items():
        section, name = key.split(".")
        assert chosen.model_dump(mode="json")[section][name] == value
    with torch.device("meta"):  # of the right shape, without the numbers
        model = zoo.build(
            chosen.model.name, chosen.model.options, dimensions={"audio": 3, "visual": 2, "text": 2}, classes=2
        )
    assert any(parameter.is_meta for parameter in model.parameters())


def test_a_conditional_parameter_is_drawn_exactly_where_its_condition_holds() -> None:
    space = read_space(REPOSITORY / "search_spaces" / "baselines.yaml", BASE)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(40):
        drawn = space.draw(study.ask())
        assert ("model.attention_dropout" in drawn) == (drawn["model.name"] == "mult")
        assert ("model.similarity_weight" in drawn) == (drawn["model.name"] == "misa")
        seen.add(drawn["model.name"])
    assert len(seen) == 6


def test_another_model_takes_over_the_options_it_has_and_keeps_its_own_defaults() -> None:
    chosen = configured(BASE, {"model.name": "mult"}).model.model_dump()
    assert (chosen["d_model"], chosen["heads"], chosen["layers"]) == (32, 2, 1)
    assert (chosen["attention_dropout"], chosen["embedding_dropout"]) == (0.1, 0.25)


def test_the_schema_for_editors_is_up_to_date_and_every_shipped_space_obeys_it() -> None:
    schema = (REPOSITORY / "search_spaces" / "schema.json").read_text()
    assert schema == space_schema(), "python -m emolab.tuning.schema > search_spaces/schema.json"
    for path in FILES:
        assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n# ")
        jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(schema))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"parameters": {"data": {"distribution": "int", "low": 1, "high": 2}}}, json.loads(schema))
