"""What a model was trained on, compared with the data that it is asked about: other features give empty answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edu_emotionnet.conventions import MODALITIES
from emolab.names import UserError
from emolab.sessions.manifest import Manifest


def check_made_for(trained_on: Mapping[str, Any], manifest: Manifest, *, model: str, where: Path) -> None:
    """Refuse a data set with other features, classes, steps or scaling.

    Args:
        trained_on: manifest of the data set that the model was trained on, as it is kept with the weights.
        model: what to call it.
        where: the data set's folder.

    Raises:
        UserError: naming both sides.
    """
    if trained_on["dimensions"] != manifest.dimensions or trained_on["classes"] != manifest.classes:
        raise UserError(
            f"{model} takes {trained_on['dimensions']} and tells {', '.join(trained_on['classes'])}; "
            f"{where} has {manifest.dimensions} and {', '.join(manifest.classes)}"
        )
    check_steps(trained_on, manifest.step_seconds, model=model, where=where)
    theirs, ours = (normalisation(each) for each in (trained_on, manifest.model_dump(include={"protocol"})))
    if theirs != ours:
        raise UserError(
            f"{model} was trained on data with protocol.normalise={theirs}, {where} has protocol.normalise={ours}: "
            "prepare the data again as the model's were, into another folder"
        )


def check_steps(trained_on: Mapping[str, Any], step_seconds: float, *, model: str, where: Path) -> None:
    """Refuse sessions on another grid.

    Raises:
        UserError: naming both sides.
    """
    if not math.isclose(trained_on["step_seconds"], step_seconds, rel_tol=1e-6):  # shards hold it as float32
        raise UserError(
            f"{model} was trained on steps of {trained_on['step_seconds']:g} s, {where} has steps of {step_seconds:g} s"
        )


def looking_ahead(trained_on: Mapping[str, Any]) -> dict[str, str]:
    """Modality -> how its features depend on what comes later in the session, where those of recordings do.

    Features of the data set's own, as a published corpus or a simulation has them, are not known to.
    """
    found = {}
    for modality in MODALITIES:
        made = trained_on.get("options", {}).get(modality)
        extractor = made.get("extractor") if isinstance(made, Mapping) else None
        if extractor == "mfcc":
            found[modality] = "mfcc is standardised over the whole session"
        elif extractor == "wav2vec2":
            found[modality] = f"wav2vec2 hears {made['window_seconds'] + made['context_seconds']:g} s at once"
        elif extractor == "bert":
            found[modality] = f"bert reads {made['tokens']} tokens at once"
    return found


def normalisation(trained_on: Mapping[str, Any]) -> str:
    """How the features of a data set were scaled: a value of ``protocol.normalise``."""
    return str(trained_on.get("protocol", {}).get("normalise", "none"))
