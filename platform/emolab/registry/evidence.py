"""What the tracker and the registry hold about one version, gathered before anything is judged.

Everything hangs on the digest of the registered weights: a test result or a sweep counts only if it was recorded
for exactly these weights on exactly this data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow.artifacts
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from numpy.typing import NDArray

from emolab import checkpoint
from emolab.names import UserError
from emolab.registry.lookup import ModelVersion, kept_model
from emolab.registry.sweep_evidence import Curve, SingleLosses, Sweep, curves_of, no_sweep, single_losses_of, sweeps_of
from emolab.registry.verdict import Missing
from emolab.robustness.corruptions.observed import group_of
from emolab.sessions.manifest import Manifest
from emolab.studies import test_split
from emolab.studies.session_results import SessionResults, from_parquet
from emolab.tracking.provenance import CLEAN
from emolab.tracking.reasons import reason_of
from emolab.tracking.runs import MLflowTracker, RunRecord


@dataclass(frozen=True, kw_only=True)
class RegisteredWeights:
    """A registered version as it lies in the registry, fetched and verified."""

    version: ModelVersion
    model_id: str | None
    """Of the MLflow model, which keeps files of its own beside the run's."""
    folder: Path
    """The whole MLflow model."""
    weights: Path
    """The checkpoint inside it."""
    digest: str
    """Of the weights, as ``test_split.checkpoint_digest`` and sweeps know them."""
    state: Mapping[str, Any]
    """Model, training, data set: what the checkpoint says of itself."""
    manifest: Manifest
    parameters: int
    megabytes: float
    """Of the weights' file, 10^6 bytes."""

    @property
    def dataset(self) -> str:
        """Digest of the data that it was trained on."""
        return str(self.state["dataset_digest"])

    @property
    def modalities(self) -> tuple[str, ...]:
        return group_of([*self.manifest.dimensions])


@dataclass(frozen=True, kw_only=True)
class Tested:
    """The recorded result on the test split."""

    sessions: SessionResults
    openings: int
    opened: str
    opened_by: str
    committed: str
    """`true`, `false` or `unknown`: whether the code was committed that opened the split."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """(K, K) labelled steps of all sessions, rows true, columns predicted."""
        return self.sessions.confusion.sum(axis=0)


_THE_RATES = " covers the missing rates asked for"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything recorded about one version."""

    registered: RegisteredWeights
    tags: Mapping[str, str]
    """Of the version."""
    training: RunRecord
    tested: Tested | Missing
    sweeps: Sequence[Sweep]
    curves: Sequence[Curve]
    """Over the rates that are asked for; the first one counts."""
    single_losses: SingleLosses | Missing

    @property
    def curve(self) -> Curve | Missing:
        return self.curves[0] if self.curves else Missing(reason=no_sweep(self.version.uri, covering=_THE_RATES))

    @property
    def commits(self) -> dict[str, str]:
        """Run id -> `true`, `false` or `unknown`: whether the code of a run that this evidence is taken from was
        committed."""
        known = {self.version.run_id: self.training.tags.get(CLEAN, "unknown")}
        parts = (*self.sweeps[:1], self.curve, self.single_losses)  # the newest sweep tells the calibration
        swept = {sweep.run_id: sweep.tags.get(CLEAN, "unknown") for sweep in self.sweeps}
        known |= {part.run_id: swept[part.run_id] for part in parts if not isinstance(part, Missing)}
        return known | ({self.tested.opened_by: self.tested.committed} if isinstance(self.tested, Tested) else {})

    @property
    def version(self) -> ModelVersion:
        return self.registered.version

    @property
    def dataset(self) -> str:
        return self.registered.dataset


def fetch(tracker: MLflowTracker, version: ModelVersion, folder: Path) -> RegisteredWeights:
    """Download a version and check it against its manifest.

    Raises:
        UserError: it cannot be fetched, is damaged, or was not registered by this platform.
    """
    try:
        location = tracker.client.get_model_version_download_uri(version.name, version.version)
        folder.mkdir(parents=True, exist_ok=True)
        fetched = Path(
            mlflow.artifacts.download_artifacts(artifact_uri=location, dst_path=str(folder), tracking_uri=tracker.uri)
        )
        described = Model.load(fetched)
        inside = described.flavors["python_function"]["artifacts"]["checkpoint"]["path"]
    except (MlflowException, OSError) as error:
        raise UserError(f"{version.uri} cannot be fetched: {reason_of(error)}") from None
    except KeyError:
        raise UserError(f"{version.uri} holds no checkpoint: it was not registered by this platform") from None
    weights = (fetched / inside).resolve()
    if not weights.is_relative_to(fetched.resolve()):
        raise UserError(f"{version.uri} points outside its own folder")
    saved = checkpoint.load(weights)
    return RegisteredWeights(
        version=version,
        model_id=described.model_id,
        folder=fetched,
        weights=weights,
        digest=kept_model(weights).digest,
        state=saved.state,
        manifest=Manifest.model_validate(saved.state["dataset"]),
        parameters=sum(value.numel() for value in saved.tensors["model"].values()),
        megabytes=(weights / "model.safetensors").stat().st_size / 1e6,
    )


def gather(tracker: MLflowTracker, registered: RegisteredWeights, rates: Sequence[float]) -> Evidence:
    """All that is recorded for these weights.

    Args:
        rates: of the missing-rate curve that is asked for.

    Raises:
        UserError: the run that trained the version is gone, or a recorded result is damaged.
    """
    version = registered.version
    training = tracker.read(version.run_id)
    sweeps = sweeps_of(tracker, run_id=version.run_id, weights=registered.digest, dataset=registered.dataset)
    tested = recorded_test(tracker, registered, training, swept=bool(sweeps))
    return Evidence(
        registered=registered,
        tags=dict(tracker.client.get_model_version(version.name, version.version).tags),
        training=training,
        tested=tested,
        sweeps=sweeps,
        curves=curves_of(sweeps, registered.modalities, rates),
        single_losses=single_losses_of(sweeps, registered.modalities, version.uri),
    )


def paired(challenger: Evidence, champion: Evidence) -> tuple[Evidence, Evidence]:
    """The two with the newest curves first that were measured under the same conditions; unchanged without a pair."""
    for ours in challenger.curves:
        for theirs in champion.curves:
            if ours.cells == theirs.cells:
                return replace(challenger, curves=(ours,)), replace(champion, curves=(theirs,))
    return challenger, champion


def untested(uri: str, *, swept: bool) -> str:
    """That a version lacks a result on the test split, and whether a sweep has met that split all the same."""
    return f"{uri} has no test evaluation on record" + (", though a sweep has opened the split" if swept else "")


def recorded_test(
    tracker: MLflowTracker, registered: RegisteredWeights, training: RunRecord, *, swept: bool
) -> Tested | Missing:
    """The test result of these weights on the data that they were trained on, if there is one."""
    tags, uri = training.tags, registered.version.uri
    if tags.get(test_split.RECORDED) != "true":
        absent = untested(uri, swept=swept)
        return Missing(reason=f"{absent}: add --evaluate DATA, or compare it (jobs/compare.py)")
    if tags.get(test_split.CHECKPOINT) != registered.digest:
        return Missing(reason=f"the test result in run {training.run_id} belongs to other weights than {uri}")
    if tags.get(test_split.DATASET) != registered.dataset:
        return Missing(reason=f"{uri} was tested on another data set than it was trained on")
    sessions = from_parquet(tracker.artifact(training.run_id, test_split.FILE_NAME))
    if sessions.classes != tuple(registered.manifest.classes) or not sessions.confusion.sum():
        return Missing(reason=f"the test result in run {training.run_id} has other classes, or no labelled step")
    return Tested(
        sessions=sessions,
        openings=int(tags.get(test_split.OPENINGS, "0")),
        opened=tags.get(test_split.OPENED, ""),
        opened_by=tags.get(test_split.OPENED_BY, ""),
        committed=_committed(tracker, tags.get(test_split.OPENED_BY, "")),
    )


def _committed(tracker: MLflowTracker, run_id: str) -> str:
    try:
        return tracker.read(run_id).tags.get(CLEAN, "unknown")
    except UserError:
        return "unknown"
