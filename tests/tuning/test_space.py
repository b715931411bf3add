"""Search spaces: whatever could fail in a trial is refused before the first one starts."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from tests.conftest import REPOSITORY

from edu_emotionnet import zoo
from emolab.configuration import read_preset, validate
from emolab.names import UserError
from emolab.training.recipe import TrainSettings
from emolab.tuning.space import configured, read_space

BASE = validate(TrainSettings, read_preset("small", TrainSettings))
FILES = sorted((REPOSITORY / "search_spaces").glob("*.yaml"))


def read(parameters: Any, folder: Path) -> None:
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({"parameters": parameters}))
    read_space(path, BASE)


@pytest.mark.parametrize(
    ("parameters", "parts"),
    [
        ({"training.learning_rate": {"distribution": "float", "low": 1.0, "high": 0.1}}, ["low must not exceed high"]),
        ({"training.learning_rate": {"distribution": "floot", "low": 0, "high": 1}}, ["floot", "did you mean 'float'"]),
        ({"training.learning_rate": {"distribution": "float", "low": 0, "high": 1, "log": True}}, ["above 0"]),
        ({"training.learning_rate": {"distribution": "float", "low": 1e-4}}, ["learning_rate", "high"]),
        ({"training.learning_rate": {"distribution": "float", "low": 1, "hihg": 2}}, ["learning_rate"]),
        (
            {"training.learing_rate": {"distribution": "float", "low": 0.1, "high": 1}},
            ["learing_rate", "learning_rate"],
        ),
        ({"model.depth": {"distribution": "int", "low": 1, "high": 2}}, ["depth"]),
        ({"model.dropout": {"distribution": "float", "low": 0.0, "high": 1.5}}, ["dropout", "1.5"]),
        ({"training.epochs": {"distribution": "int", "low": 0, "high": 3}}, ["epochs"]),
        ({"data": {"distribution": "categorical", "choices": ["a"]}}, ["data", "only keys of model and training"]),
        ({"model.heads": {"distribution": "categorical", "choices": []}}, ["choices"]),
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


def draw(data: st.DataObject, distribution: BaseDistribution) -> Any:
    """Any value the distribution can give."""
    if isinstance(distribution, CategoricalDistribution):
        return data.draw(st.sampled_from(distribution.choices))
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    if step is None:
        return data.draw(st.floats(low, high))
    return low + step * data.draw(st.integers(0, round((high - low) / step)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_configuration_a_shipped_space_can_draw_builds_a_model(path: Path, data: st.DataObject) -> None:
    space = read_space(path, BASE)
    parameters = {key: draw(data, distribution) for key, distribution in space.distributions().items()}
    chosen = configured(BASE, parameters)
    options = chosen.model.options
    if options.d_model <= 64:
        assert zoo.build(chosen.model.name, options, dimensions={"audio": 3}, classes=2) is not None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_space_explains_itself(path: Path) -> None:
    assert path.read_text().startswith("# ")
