"""Whether every configuration that a search space can draw is one that a model can be built from.

The settings alone are asked, no network is made: so this is known before anything starts.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from emolab.mistakes import shown
from emolab.names import UserError

if TYPE_CHECKING:
    from emolab.tuning.space import SearchSpace

MOST = 2000
"""Combinations that are tried at most; where there are more, so many draws of them."""


def check_combinations(space: SearchSpace, build: Callable[[Mapping[str, Any]], object], *, where: str) -> None:
    """Refuse a space that can draw what no model can be built from.

    Args:
        build: refuses, with a ``UserError``, parameters from which no configuration can be made.

    Raises:
        UserError: naming the keys, an example of their values and the reason.
    """
    for combination in combinations(space):
        try:
            build(combination)
        except UserError as error:
            reason = str(error).removeprefix("model: ")
            named = [key for key in combination if names(reason, key)] or [*combination]
            values = " with ".join(f"{key}={shown(combination[key])}" for key in named)
            raise UserError(
                f"{where}{values} cannot be built ({reason}): choose values of which every combination can"
            ) from None


def combinations(space: SearchSpace) -> Iterator[dict[str, Any]]:
    """Values of the parameters that shape a model, combined as the space can draw them. What shapes none has been
    checked by itself."""
    shaping = {key: parameter for key, parameter in space.parameters.items() if key.startswith("model.")}
    parents = {parent for parameter in shaping.values() for parent in parameter.when}
    keys = [key for key in space.parameters if key in shaping or key in parents]
    known: set[tuple[Any, ...]] = set()
    for values in _chosen([space.parameters[key].representatives() for key in keys]):
        drawn: dict[str, Any] = {}
        for key, value in zip(keys, values, strict=True):
            if space.holds(space.parameters[key], drawn):
                drawn[key] = value
        if tuple(drawn.items()) not in known:
            known.add(tuple(drawn.items()))
            yield drawn


def names(text: str, key: str) -> bool:
    """Whether a text speaks of a dotted key by its last part."""
    return re.search(rf"\b{re.escape(key.rpartition('.')[2])}\b", text) is not None


def _chosen(choices: Sequence[Sequence[Any]]) -> Iterator[Sequence[Any]]:
    if math.prod(map(len, choices)) <= MOST:
        yield from itertools.product(*choices)
        return
    generator = np.random.default_rng(0)
    for _ in range(MOST):
        yield [values[int(generator.integers(len(values)))] for values in choices]
