"""Random ragged batches and small models of the zoo, shared by the tests of the model package."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from edu_emotionnet import zoo
from edu_emotionnet.batch import Predictions, SessionBatch
from edu_emotionnet.conventions import IGNORED_LABEL, FeatureStatistics

DIMENSIONS = {"audio": 6, "visual": 5, "text": 4}
CLASSES = 4
NAMES = sorted(zoo.ZOO)
SMALL = {"d_model": 16, "heads": 2, "layers": 1, "recurrent_layers": 1, "warm_up_updates": 1}


def small_config(name: str, **options: Any) -> Any:
    """The registered configuration at test size without dropout; options a model lacks are skipped."""
    default = zoo.entry(name).config
    names = [field.name for field in fields(default)]
    chosen = SMALL | {option: 0.0 for option in names if option.endswith("dropout")} | options
    return replace(default, **{option: value for option, value in chosen.items() if option in names})


def small_model(
    name: str,
    *,
    dimensions: dict[str, int] | None = None,
    statistics: FeatureStatistics | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **options: Any,
) -> Any:
    """A model in evaluation mode, every parameter random (some start at zero, which would hide them)."""
    torch.manual_seed(seed)
    model = zoo.build(
        name,
        small_config(name, **options),
        dimensions=dimensions or DIMENSIONS,
        classes=CLASSES,
        statistics=statistics,
    ).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def random_batch(
    *,
    seed: int,
    sessions: int = 4,
    longest: int = 7,
    dimensions: dict[str, int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> SessionBatch:
    """Sessions of 1..longest steps; a fifth of the observations missing, a fifth of the labels too."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (sessions,), generator=draw)
    lengths[0] = longest
    real = torch.arange(longest)[None, :] < lengths[:, None]
    labels = torch.randint(0, CLASSES, (sessions, longest), generator=draw)
    unlabelled = torch.rand(sessions, longest, generator=draw) < 0.2
    unlabelled[0, 0] = False
    present = {name: real & (torch.rand(sessions, longest, generator=draw) < 0.8) for name in dimensions or DIMENSIONS}
    features = {
        name: torch.randn(sessions, longest, size, generator=draw, dtype=torch.float64).to(dtype)
        for name, size in (dimensions or DIMENSIONS).items()
    }
    return SessionBatch(
        features=features,
        present=present,
        lengths=lengths,
        labels=labels.masked_fill(unlabelled | ~real, IGNORED_LABEL),
    )


def same_on_real_steps(first: Predictions, second: Predictions, real: Tensor, *, within: float = 1e-6) -> None:
    """Both predictions, confidence included, agree on the steps that are true in `real` (B, T)."""
    pairs = [(first.log_probabilities, second.log_probabilities)]
    assert (first.confidence is None) == (second.confidence is None)
    if first.confidence is not None and second.confidence is not None:
        pairs.append((first.confidence, second.confidence))
    for a, b in pairs:
        torch.testing.assert_close(a[real], b[real], rtol=0.0, atol=within)
