"""Search spaces: YAML files that name configuration keys and the distributions to draw them from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import optuna
from pydantic import Field, field_validator, model_validator

from emolab.configuration import Settings, merge, nested, read_yaml, validate
from emolab.names import UserError, nearest
from emolab.training.recipe import TrainSettings

DISTRIBUTIONS = ("float", "int", "categorical")


class FloatParameter(Settings):
    """A real number in [low, high]."""

    distribution: Literal["float"]
    low: float
    high: float
    log: bool = Field(default=False, description="draw uniformly on a logarithmic scale")
    step: float | None = Field(default=None, gt=0.0)

    @model_validator(mode="after")
    def _ordered(self) -> FloatParameter:
        _check_range(self.low, self.high, log=self.log)
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other")
        return self

    def to_optuna(self) -> optuna.distributions.BaseDistribution:
        return optuna.distributions.FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def extremes(self) -> list[Any]:
        return [self.low, self.high]


class IntParameter(Settings):
    """A whole number in [low, high]."""

    distribution: Literal["int"]
    low: int
    high: int
    log: bool = False
    step: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> IntParameter:
        _check_range(self.low, self.high, log=self.log)
        return self

    def to_optuna(self) -> optuna.distributions.BaseDistribution:
        return optuna.distributions.IntDistribution(self.low, self.high, log=self.log, step=self.step)

    def extremes(self) -> list[Any]:
        return [self.low, self.high]


class CategoricalParameter(Settings):
    """One of a list of values."""

    distribution: Literal["categorical"]
    choices: tuple[bool | int | float | str | None, ...] = Field(min_length=1)

    def to_optuna(self) -> optuna.distributions.BaseDistribution:
        return optuna.distributions.CategoricalDistribution(self.choices)

    def extremes(self) -> list[Any]:
        return list(self.choices)


Parameter = Annotated[FloatParameter | IntParameter | CategoricalParameter, Field(discriminator="distribution")]


class SearchSpace(Settings):
    """What a search draws: dotted configuration key -> distribution."""

    parameters: dict[str, Parameter] = Field(min_length=1)

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

    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """As Optuna wants them."""
        return {key: parameter.to_optuna() for key, parameter in self.parameters.items()}


def read_space(path: Path, base: TrainSettings) -> SearchSpace:
    """A search space that fits a configuration.

    Raises:
        UserError: naming the file and the key: unreadable, unknown distribution, empty range, a key the
            configuration does not have, or a value it refuses.
    """
    space = validate(SearchSpace, read_yaml(path), where=f"{path}: ")
    for key, parameter in space.parameters.items():
        if not key.startswith(("model.", "training.")):
            raise UserError(f"{path}: {key}: only keys of model and training can be searched")
        for value in parameter.extremes():
            try:
                configured(base, {key: value})
            except UserError as error:
                if "multiple of heads" not in str(error):  # depends on a second parameter; drawn trials are checked
                    raise UserError(f"{path}: {error}") from None
    return space


def configured(base: TrainSettings, parameters: dict[str, Any]) -> TrainSettings:
    """The base configuration with a trial's parameters in place.

    Raises:
        UserError: a key or value that the configuration refuses.
    """
    values = base.model_dump(mode="json")
    for key, value in parameters.items():
        merge(values, nested(key, value))
    return validate(type(base), values)


def _check_range(low: float, high: float, *, log: bool) -> None:
    if low > high:
        raise ValueError(f"low must not exceed high, got low={low:g}, high={high:g}")
    if log and low <= 0:
        raise ValueError(f"a logarithmic range must be above 0, got low={low:g}")
