"""The registered model as MLflow loads it: this file is stored as source, the weights as safetensors beside it.

Self-contained on purpose: it imports the model package, which travels with it, and nothing of the platform.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pydantic
import torch
from mlflow.models import set_model
from safetensors.torch import load_file

from edu_emotionnet import zoo
from edu_emotionnet.batch import SessionBatch
from edu_emotionnet.conventions import IGNORED_LABEL, MODALITIES, FeatureStatistics
from edu_emotionnet.scaling import standardised


class SessionInput(pydantic.BaseModel):
    """One whole session: raw features per step for each modality that was recorded, all of the same number of steps.

    A model of sessions that were standardised each by itself standardises what it is given in the same way.
    """

    session_id: str
    audio: list[list[float]] | None = None
    visual: list[list[float]] | None = None
    text: list[list[float]] | None = None
    audio_present: list[bool] | None = None
    visual_present: list[bool] | None = None
    text_present: list[bool] | None = None


class SessionOutput(pydantic.BaseModel):
    """What the model says of one session, step by step."""

    session_id: str
    classes: list[str]
    probabilities: list[list[float]]
    """T x K."""
    modalities: list[str]
    present: dict[str, list[bool]]
    confidence: list[list[float]] | None = None
    """T x M weights of the modalities, where the model has them."""


class EmotionModel(mlflow.pyfunc.PythonModel):
    """Sessions in, per-step class probabilities and modality confidences out."""

    def load_context(self, context: Any) -> None:
        folder = Path(context.artifacts["checkpoint"])
        state = json.loads((folder / "state.json").read_text())
        dataset = state["dataset"]
        options = dict(state["model"])
        name = options.pop("name")
        self.classes = dataset["classes"]
        self.dimensions = {m: dataset["dimensions"][m] for m in MODALITIES if m in dataset["dimensions"]}
        self.scales_sessions = dataset.get("protocol", {}).get("normalise") == "session"
        self.model = zoo.build(
            name,
            type(zoo.entry(name).config)(**options),
            dimensions=self.dimensions,
            classes=len(self.classes),
            statistics=FeatureStatistics(**dataset["statistics"]),
        )
        self.model.load_state_dict(load_file(folder / "model.safetensors"))
        self.model.eval()

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]  # MLflow finds the context by name
        self, model_input: list[SessionInput], params: dict[str, Any] | None = None
    ) -> list[SessionOutput]:
        """One answer per session, in the order given."""
        return [self._predict_one(session) for session in model_input]

    def _predict_one(self, session: SessionInput) -> SessionOutput:
        batch = self._batch(session)
        with torch.no_grad():
            predictions = self.model(batch)
        return SessionOutput(
            session_id=session.session_id,
            classes=self.classes,
            probabilities=predictions.log_probabilities[0].exp().tolist(),
            modalities=list(self.dimensions),
            present={name: batch.present[name][0].tolist() for name in self.dimensions},
            confidence=predictions.confidence[0].tolist() if predictions.confidence is not None else None,
        )

    def _batch(self, session: SessionInput) -> SessionBatch:
        given = {name: getattr(session, name) for name in self.dimensions}
        lengths = {len(values) for values in given.values() if values is not None}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"session {session.session_id!r}: give one or more modalities, of one number of steps")
        (steps,) = lengths
        features, present = {}, {}
        for name, width in self.dimensions.items():
            values = given[name]
            features[name] = torch.zeros(1, steps, width)
            present[name] = torch.zeros(1, steps, dtype=torch.bool)
            if values is None:
                continue
            if any(len(row) != width for row in values):
                raise ValueError(f"session {session.session_id!r}: {name} needs {width} features at every step")
            mask = getattr(session, f"{name}_present") or [True] * steps
            if len(mask) != steps:
                raise ValueError(
                    f"session {session.session_id!r}: {name}_present needs {steps} values, got {len(mask)}"
                )
            raw, observed = np.array(values, np.float32), np.array(mask, np.bool_)
            scaled = standardised(raw, observed) if self.scales_sessions else raw
            features[name][0], present[name][0] = torch.from_numpy(scaled), torch.from_numpy(observed)
        return SessionBatch(
            features=features,
            present=present,
            lengths=torch.tensor([steps]),
            labels=torch.full((1, steps), IGNORED_LABEL),
        )


set_model(EmotionModel())
