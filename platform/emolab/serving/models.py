"""The one model that a prediction job works with, found by what people call it and loaded without pickles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from edu_emotionnet.conventions import MODALITIES
from edu_emotionnet.streaming import StreamingModel, streaming
from emolab.names import UserError
from emolab.registry.lookup import KeptModel, kept_model, model_folders
from emolab.sessions.manifest import Manifest
from emolab.tracking.settings import TrackingSettings
from emolab.training.made_for import check_made_for, looking_ahead, normalisation
from emolab.training.train import load_model


def find_model(uri: str, *, output: Path, tracking: TrackingSettings) -> KeptModel:
    """The kept model that a URI stands for; what is remote is fetched into the output folder.

    Raises:
        UserError: nothing is there, what is there is damaged, or it is several models.
    """
    from emolab.tracking.runs import existing_tracker  # MLflow, which the predicting processes never need

    tracker = cache(lambda: existing_tracker(**tracking.model_dump(), output=output))
    folders = model_folders(uri, tracker, output / "fetched-models")
    if len(folders) != 1:
        raise UserError(f"{uri!r} stands for {len(folders)} models: name one of them")
    return kept_model(folders[0].resolve())


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in memory with what is needed to ask it."""

    kept: KeptModel
    model: nn.Module
    classes: tuple[str, ...]
    dimensions: Mapping[str, int]
    """Modality -> number of features, in the order of the confidence weights."""
    dataset: Mapping[str, Any]
    """Manifest of the data set that it was trained on."""

    @property
    def scales_sessions(self) -> bool:
        """Whether it takes features that were standardised over the session they belong to."""
        return normalisation(self.dataset) == "session"

    @property
    def looks_ahead(self) -> dict[str, str]:
        """Modality -> why the features that it was trained on cannot be had while a session is under way."""
        return looking_ahead(self.dataset)

    def warnings(self) -> Iterator[str]:
        """What to know before it follows a session under way, one line each.

        Features that look ahead are no reason to refuse, as sessions standardised whole are: a modality may be left
        out or replaced by a causal estimate, the others stay as they were, and what is sent is the client's to choose.
        """
        if self.looks_ahead:
            ahead = "; ".join(f"{modality}: {how}" for modality, how in self.looks_ahead.items())
            yield (
                f"warning: {self.kept.name} was trained on features that a session under way does not have yet "
                f"({ahead}): send such as are computed from what was there so far, or null, and expect other "
                "probabilities than jobs/predict.py gives for the finished session"
            )

    def live(self, window: int | None) -> StreamingModel:
        """Its streaming form.

        Raises:
            UserError: the model cannot stream, or not with a window.
        """
        # Mean and deviation of a session are known when it is over; those of its beginning would be other features
        # than the model has seen, and so are raw ones.
        if self.scales_sessions:
            raise UserError(
                f"{self.kept.name} was trained on features standardised over whole sessions "
                "(protocol.normalise=session), which those of a session under way cannot be: train it on data prepared "
                "without that, or ask it about finished sessions with jobs/predict.py"
            )
        try:
            return streaming(self.kept.name, self.model, dimensions=self.dimensions, window=window)
        except ValueError as error:
            raise UserError(str(error)) from None

    def check_fit(self, manifest: Manifest, where: Path) -> None:
        """Refuse a data set with other features, classes, steps or scaling.

        Raises:
            UserError: naming both sides.
        """
        check_made_for(self.dataset, manifest, model="the model", where=where)


def load(kept: KeptModel) -> LoadedModel:
    """Read a kept model; every digest is checked.

    Raises:
        UserError: a file is missing or damaged.
    """
    model, saved = load_model(kept.folder)
    dataset = saved.state["dataset"]
    dimensions = {name: dataset["dimensions"][name] for name in MODALITIES if name in dataset["dimensions"]}
    return LoadedModel(
        kept=kept, model=model, classes=tuple(dataset["classes"]), dimensions=dimensions, dataset=dataset
    )
