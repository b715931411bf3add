"""Figures and tables of a verdict and of a card, from made-up evidence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from emolab.registry import evidence
from emolab.registry.sweep_evidence import Curve
from emolab.reports.model_card import _by_class, _data
from emolab.reports.page import shown
from emolab.reports.promotion_figures import curves, recalls
from emolab.sessions.manifest import read_manifest
from emolab.studies.session_results import SessionResults

COUNTS = np.array([[8, 2, 0], [1, 9, 0], [0, 0, 0]])
"""Nobody is bored, and nobody is taken to be."""


def evaluated() -> evidence.Tested:
    sessions = SessionResults(
        classes=("confused", "curious", "bored"), modalities=("audio",), session_ids=("s",), speaker_ids=("p",),
        steps=np.array([20]), confusion=COUNTS[None], confidence=None,
    )  # fmt: skip
    return evidence.Tested(sessions=sessions, openings=1, opened="", opened_by="", committed="true")


def judged(**known: Any) -> Any:
    gates = SimpleNamespace(
        floors=SimpleNamespace(class_recall=None),
        missing_modalities=SimpleNamespace(least_area=None),
        calibration=SimpleNamespace(most_error=None),
    )
    challenger = SimpleNamespace(version=SimpleNamespace(version="1"), **known)
    return SimpleNamespace(gates=gates, challenger=challenger, champion=None)


def test_a_class_without_steps_has_no_recall_and_no_precision() -> None:
    figure = recalls(judged(tested=evaluated()))
    assert figure is not None
    assert b">0.80<" in figure and b">no steps<" in figure and b">0.00<" not in figure
    assert [shown(value) for value in _by_class(evaluated()).rows[2]] == ["bored", "0", "–", "–", ""]


def test_the_line_at_the_mean_says_so() -> None:
    curve = Curve(run_id="r", rates=(0.0, 0.5), scores=(0.6, 0.4), calibration=(0.1, 0.1), cells=())
    figure = curves(judged(curve=curve))
    assert figure is not None and figure.count(b">mean over the rates<") == 1


def test_the_card_says_how_features_were_scaled(toy_data: Path) -> None:
    manifest = read_manifest(toy_data)

    def told(protocol: dict[str, Any]) -> str:
        registered = SimpleNamespace(manifest=manifest.model_copy(update={"protocol": protocol}))
        return _data(judged(registered=registered))[0].text

    end = "standardised with the training split's mean and deviation, which are part of the weights."
    assert told({}).endswith(f". They are {end}")
    assert told({"normalise": "session"}).endswith(
        f". They are scaled within each session to mean 0 and deviation 1 over its observed steps, then {end}"
    )
