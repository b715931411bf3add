"""Every model by name. A model registered here is trained, tuned, compared and property-tested like any other."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from edu_emotionnet import baselines
from edu_emotionnet.conventions import MODALITIES, FeatureStatistics
from edu_emotionnet.network import EduEmotionNet, EduEmotionNetConfig

Builder = Callable[..., nn.Module]
"""(config, *, dimensions, classes, statistics) -> a module that maps a SessionBatch to Predictions."""


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One row of the zoo."""

    config: Any
    """The model's default configuration, a frozen dataclass; its type says which options exist."""
    build: Builder
    causal: bool = True
    """Whether the output at step t depends on steps 1..t alone."""
    fixed: frozenset[str] = frozenset()
    """Options that make the entry what it is and that a user may not change (an ablation's switch)."""


ZOO: dict[str, ModelEntry] = {}


def register(name: str, entry: ModelEntry) -> None:
    """Add a model under a name of its own.

    Raises:
        ValueError: the name is taken.
    """
    if name in ZOO:
        raise ValueError(f"model {name!r} is registered twice")
    ZOO[name] = entry


def entry(name: str) -> ModelEntry:
    """The row of a model.

    Raises:
        ValueError: no such model; the message names the nearest ones.
    """
    if name not in ZOO:
        near = difflib.get_close_matches(name, ZOO, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown model {name!r}{hint} (models: {', '.join(ZOO)})")
    return ZOO[name]


def build(
    name: str,
    config: Any = None,
    *,
    dimensions: Mapping[str, int],
    classes: int,
    statistics: FeatureStatistics | None = None,
) -> nn.Module:
    """A freshly initialised model for features of the given dimensions.

    Args:
        name: a name of the zoo.
        config: the model's configuration; its registered default where None.
        dimensions: modality -> number of features; any non-empty subset of MODALITIES.
        classes: number of classes K.
        statistics: of the training split, kept inside the model; the identity where None.

    Raises:
        ValueError: unknown name or modality, or no modality at all.
    """
    chosen = entry(name)
    unknown = sorted(set(dimensions) - set(MODALITIES))
    if unknown or not dimensions:
        raise ValueError(f"modalities must be a non-empty subset of {', '.join(MODALITIES)}, got {unknown or 'none'}")
    ordered = {modality: dimensions[modality] for modality in MODALITIES if modality in dimensions}
    return chosen.build(
        config if config is not None else chosen.config,
        dimensions=ordered,
        classes=classes,
        statistics=statistics or FeatureStatistics.identity(ordered),
    )


register("edu_emotionnet", ModelEntry(config=EduEmotionNetConfig(), build=EduEmotionNet))
for _part in ("cmaa", "mie", "tfl"):
    register(
        f"edu_emotionnet-{_part}",
        ModelEntry(
            config=replace(EduEmotionNetConfig(), **{_part: False}),
            build=EduEmotionNet,
            fixed=frozenset({_part}),
        ),
    )

for _module in pkgutil.iter_modules(baselines.__path__):  # last, since each of them imports `register` from here
    importlib.import_module(f"{baselines.__name__}.{_module.name}")
