"""Search spaces: YAML files that name configuration keys and the distributions to draw them from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import optuna
from pydantic import Field, field_validator, model_validator

from edu_emotionnet import zoo
from emolab.configuration import Settings, merge, nested, read_yaml, validate
from emolab.mistakes import shown
from emolab.names import UserError, nearest
from emolab.training.recipe import TrainSettings
from emolab.tuning.combinations import check_combinations, names

DISTRIBUTIONS = ("float", "int", "categorical")
SHAPE_FREE = (
    "training.kl_weight",
    "training.learning_rate",
    "training.weight_decay",
    "training.modality_dropout",
    "training.feature_noise",
    "training.gradient_clip",
    "training.ema_decay",
    "training.seed",
    "model.dropout",
)
"""Keys that change neither a tensor's shape nor how many steps an epoch has."""

_INNER = (5**0.5 - 1) / 2
"""Where in a range of real numbers a value is tried."""
_MOST_STEPS = 1_000_000
"""Of a range of real numbers: a grid writes them all down."""

Value = bool | int | float | str | None


class ParameterSettings(Settings):
    """What all distributions share."""

    when: dict[str, tuple[Value, ...]] = Field(
        default={},
        description="draw this parameter only in configurations in which each of these earlier, categorical "
        "parameters has one of the listed values",
    )


class FloatParameter(ParameterSettings):
    """A real number in [low, high]."""

    distribution: Literal["float"]
    low: float
    high: float
    log: bool = Field(default=False, description="draw uniformly on a logarithmic scale")
    step: float | None = Field(
        default=None,
        gt=0.0,
        description="distance of neighbouring values, from low on and none above high; null: continuous",
    )

    @model_validator(mode="after")
    def _ordered(self) -> FloatParameter:
        _check_range(self.low, self.high, log=self.log)
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other")
        if self.step is not None and (self.high - self.low) / self.step > _MOST_STEPS:
            raise ValueError(f"more than {_MOST_STEPS} steps of {self.step:g} between low and high: leave step out")
        return self

    @property
    def highest(self) -> float:
        """The largest value there is: high, or the last step before it."""
        return self.high if self.step is None else self._at(self._steps)

    @property
    def _steps(self) -> int:
        assert self.step is not None
        return int((_decimal(self.high) - _decimal(self.low)) // _decimal(self.step))

    def _at(self, step: int) -> float:
        """The value after so many steps: decimal, as people wrote the range, and as Optuna counts them."""
        assert self.step is not None
        return float(_decimal(self.low) + step * _decimal(self.step))

    def draw(self, trial: optuna.Trial, key: str) -> Any:
        return trial.suggest_float(key, self.low, self.highest, log=self.log, step=self.step)

    def examples(self) -> list[Any]:
        """Values by which it is seen whether a key takes this parameter: both ends, and one between them that no key
        for whole numbers takes."""
        if self.low == self.high:
            return [self.low]
        if self.step is not None:
            return [self.low, self.highest, self._at(min(1, self._steps))]
        if self.log:
            return [self.low, self.high, self.low * (self.high / self.low) ** _INNER]
        return [self.low, self.high, self.low + (self.high - self.low) * _INNER]

    def representatives(self) -> Sequence[Any]:
        """Values that stand for all others in combination with other parameters: what lies between shapes nothing."""
        return [self.low, self.highest]

    def values(self) -> Sequence[Any] | None:
        """Every value it can take; None where there are infinitely many."""
        if self.step is None:
            return [self.low] if self.low == self.high else None
        return [self._at(step) for step in range(self._steps + 1)]

    def contains(self, value: Any) -> bool:
        """Whether it can take this value."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        if self.step is None:
            return self.low <= value <= self.high
        steps, most = (value - self.low) / self.step, (self.high - self.low) / self.step
        return math.isclose(steps, round(steps), abs_tol=1e-8) and 0 <= round(steps) <= most + 1e-8


class IntParameter(ParameterSettings):
    """A whole number in [low, high]."""

    distribution: Literal["int"]
    low: int = Field(ge=-(2**31), lt=2**31)
    high: int = Field(ge=-(2**31), lt=2**31)
    log: bool = Field(default=False, description="draw uniformly on a logarithmic scale")
    step: int = Field(default=1, ge=1, description="distance of neighbouring values, from low on and none above high")

    @model_validator(mode="after")
    def _ordered(self) -> IntParameter:
        _check_range(self.low, self.high, log=self.log)
        if self.log and self.step != 1:
            raise ValueError("log and step exclude each other")
        return self

    def draw(self, trial: optuna.Trial, key: str) -> Any:
        return trial.suggest_int(key, self.low, self.representatives()[-1], log=self.log, step=self.step)

    def examples(self) -> list[Any]:
        return [self.low, self.representatives()[-1]]

    def representatives(self) -> Sequence[Any]:
        return range(self.low, self.high + 1, self.step)

    def values(self) -> Sequence[Any]:
        return self.representatives()

    def contains(self, value: Any) -> bool:
        """Whether it can take this value."""
        return isinstance(value, int) and not isinstance(value, bool) and value in self.representatives()


class CategoricalParameter(ParameterSettings):
    """One of a list of values."""

    distribution: Literal["categorical"]
    choices: tuple[Value, ...] = Field(min_length=1)

    @field_validator("choices", mode="before")
    @classmethod
    def _single(cls, choices: Any) -> Any:
        for choice in choices if isinstance(choices, list | tuple) else ():
            if isinstance(choice, list | tuple | dict):
                raise ValueError(
                    f"a choice is one plain value, got {shown(choice)}: lists and sections cannot be searched"
                )
        return choices

    @field_validator("choices")
    @classmethod
    def _distinct(cls, choices: tuple[Value, ...]) -> tuple[Value, ...]:
        for place, choice in enumerate(choices):
            if choice in choices[:place]:
                raise ValueError(f"{shown(choice)} is there twice, and would be tried twice: name each choice once")
        return choices

    def draw(self, trial: optuna.Trial, key: str) -> Any:
        return trial.suggest_categorical(key, self.choices)

    def examples(self) -> list[Any]:
        return list(self.choices)

    def representatives(self) -> Sequence[Any]:
        return self.choices

    def values(self) -> list[Any]:
        return list(self.choices)

    def contains(self, value: Any) -> bool:
        """Whether it can take this value; true is not 1."""
        return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in self.choices)


Parameter = Annotated[FloatParameter | IntParameter | CategoricalParameter, Field(discriminator="distribution")]


class SearchSpace(Settings):
    """What a search draws: dotted configuration key -> distribution."""

    parameters: dict[str, Parameter] = Field(
        min_length=1,
        description="dotted configuration key -> distribution",
        json_schema_extra={"propertyNames": {"pattern": r"^(model|training)\."}},
    )

    @field_validator("parameters", mode="before")
    @classmethod
    def _known_distributions(cls, parameters: Any) -> Any:
        for key, value in parameters.items() if isinstance(parameters, dict) else ():
            kind = value.get("distribution") if isinstance(value, dict) else None
            if kind not in DISTRIBUTIONS:
                raise ValueError(
                    f"{key}: unknown distribution {kind!r}{nearest(str(kind), DISTRIBUTIONS)} "
                    f"(distributions: {', '.join(DISTRIBUTIONS)})"
                )
        return parameters

    @model_validator(mode="after")
    def _conditions(self) -> SearchSpace:
        earlier: dict[str, Parameter] = {}
        for key, parameter in self.parameters.items():
            for parent, wanted in parameter.when.items():
                _check_condition(key, parent, wanted, earlier)
            earlier[key] = parameter
        return self

    @property
    def conditional(self) -> bool:
        return any(parameter.when for parameter in self.parameters.values())

    def draw(self, trial: optuna.Trial) -> dict[str, Any]:
        """Values for one trial, in the order of the file; conditional ones where their condition holds."""
        drawn: dict[str, Any] = {}
        for key, parameter in self.parameters.items():
            if self.holds(parameter, drawn):
                drawn[key] = parameter.draw(trial, key)
        return drawn

    def holds(self, parameter: Parameter, drawn: Mapping[str, Any]) -> bool:
        """Whether a parameter takes part in a configuration, given the ones before it."""
        return all(parent in drawn and drawn[parent] in wanted for parent, wanted in parameter.when.items())

    def grid(self) -> dict[str, Sequence[Any]]:
        """Every parameter's values.

        Raises:
            UserError: a parameter has infinitely many.
        """
        found = {key: parameter.values() for key, parameter in self.parameters.items()}
        endless = [key for key, values in found.items() if values is None]
        if endless:
            raise UserError(f"a grid needs a step or a list of choices for {', '.join(endless)}")
        return {key: values for key, values in found.items() if values is not None}

    def identity(self) -> dict[str, Any]:
        """What decides which configurations can be drawn."""
        values = self.model_dump(mode="json")
        for parameter in values["parameters"].values():
            if not parameter["when"]:
                del parameter["when"]
        return values


def _check_condition(key: str, parent: str, wanted: tuple[Value, ...], earlier: Mapping[str, Parameter]) -> None:
    if parent not in earlier:
        raise ValueError(
            f"{key}: its condition names {parent!r}, which is no earlier parameter{nearest(parent, earlier)}"
        )
    parameter = earlier[parent]
    if not isinstance(parameter, CategoricalParameter):
        raise ValueError(f"{key}: its condition names {parent!r}, which is not categorical")
    stray = [value for value in wanted if value not in parameter.choices]
    if stray or not wanted:
        raise ValueError(f"{key}: its condition wants {parent} in {list(wanted)}, of which it has {parameter.choices}")


def read_space(path: Path, base: TrainSettings) -> SearchSpace:
    """A search space that fits a configuration.

    Raises:
        UserError: naming the file and the key: unreadable, unknown distribution, empty range, a condition that can
            never hold, a key the configuration does not have, a value it refuses, or a combination of values from
            which no model can be built.
    """
    space = validate(SearchSpace, read_yaml(path), where=f"{path}: ")
    for key, parameter in space.parameters.items():
        if not key.startswith(("model.", "training.")):
            raise UserError(f"{path}: {key}: only keys of model and training can be searched")
        if key == "training.epochs":
            raise UserError(f"{path}: {key} cannot be searched: what stops trials early counts on their length")
        for value in parameter.examples():
            for surroundings in _surroundings(space, key):
                _check_alone(space, base, key, surroundings | {key: value}, where=f"{path}: ")
    check_combinations(space, lambda parameters: configured(base, parameters), where=f"{path}: ")
    return space


def _check_alone(space: SearchSpace, base: TrainSettings, key: str, values: dict[str, Any], *, where: str) -> None:
    """Refuse a value of a parameter that the configuration refuses whatever the other parameters are."""
    try:
        configured(base, values)
    except UserError as error:
        reason = str(error)
        unknown = "unknown key" in reason
        others = [other for other in space.parameters if other not in values and names(reason, other)]
        if key.startswith("model.") and others and not unknown:
            return  # depends on a second parameter: the combinations are checked
        said = "" if key in reason or unknown else f"{key}={shown(values[key])}: "
        raise UserError(f"{where}{said}{reason.removeprefix('model: ')}") from None


def _surroundings(space: SearchSpace, key: str) -> list[dict[str, Any]]:
    """The parents of a parameter at the values under which it is drawn, a configuration for each model it meets."""
    when = space.parameters[key].when
    fixed = {parent: wanted[0] for parent, wanted in when.items() if parent != "model.name"}
    if key == "model.name" or "model.name" not in space.parameters or not key.startswith("model."):
        return [fixed]
    names = when.get("model.name") or space.parameters["model.name"].examples()
    return [{"model.name": name} | fixed for name in names]


def configured(base: TrainSettings, parameters: Mapping[str, Any]) -> TrainSettings:
    """The base configuration with a trial's parameters in place.

    Where ``model.name`` names another model, the base's model options carry over as far as that model has them.

    Raises:
        UserError: a key or value that the configuration refuses.
    """
    values = base.model_dump(mode="json")
    name = parameters.get("model.name", base.model.name)
    if name != base.model.name:
        known = zoo.ZOO.get(name)
        shared = {
            key: value
            for key, value in values["model"].items()
            if known is not None and hasattr(known.config, key) and key not in known.fixed
        }
        values["model"] = shared | {"name": name}
    for key, value in parameters.items():
        merge(values, nested(key, value))
    return validate(type(base), values)


def _decimal(value: float) -> Decimal:
    return Decimal(str(value))


def _check_range(low: float, high: float, *, log: bool) -> None:
    if low > high:
        raise ValueError(f"low must not exceed high, got low={low:g}, high={high:g}")
    if log and low <= 0:
        raise ValueError(f"a logarithmic range must be above 0, got low={low:g}")
