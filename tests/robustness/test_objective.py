"""The robustness that a search maximises stands on the scale of the macro-F1 that it maximises beside it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.test_loop import settings_for

from edu_emotionnet.conventions import IGNORED_LABEL
from emolab.robustness.objective import missing_rate_area
from emolab.sessions.loading import SessionStore
from emolab.training.data import load_training_data
from emolab.training.loop import evaluate
from emolab.training.processes import Workers


def test_the_area_of_a_level_curve_is_the_validation_score_also_where_a_class_never_occurs(
    toy_data: Path, tmp_path: Path
) -> None:
    """A model that answers the same whatever is missing, on sessions without the last class."""
    settings, data = settings_for(toy_data, tmp_path), load_training_data(toy_data)
    model: Any = settings.model.build(data.manifest).eval()
    with torch.no_grad():
        model.tfl.classifier.weight.zero_()
        model.tfl.classifier.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    blocks = [replace(b, labels=b.labels.copy()) for b in data.validation.blocks]
    for block in blocks:
        block.labels[block.labels == 2] = IGNORED_LABEL
    store = SessionStore(blocks)
    scored = evaluate(model, store, settings.training, workers=Workers())
    assert not scored.confusion[2].any() and not scored.confusion[:, 1:].any()
    assert missing_rate_area(model, store, data.manifest) == pytest.approx(scored.macro_f1, abs=1e-12)
