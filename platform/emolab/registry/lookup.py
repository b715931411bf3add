"""Finding a trained model by what people call it: a folder, a run, or a name in the registry.

MLflow is imported where something is asked of it: the processes that only load a folder's weights need none.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yaml import YAMLError

from emolab import checkpoint
from emolab.limits import load_yaml
from emolab.names import UserError, checked_name
from emolab.sessions.manifest import FILE_NAME as DATA_SET
from emolab.sessions.manifest import read_manifest
from emolab.tracking.beginning import CONFIGURATION
from emolab.tracking.reasons import reason_of
from emolab.tracking.tracker import NoRun
from emolab.training.train import flatten

if TYPE_CHECKING:
    from emolab.tracking.runs import MLflowTracker

_REGISTERED = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")
_DIGITS = 16
"""Of a digest: a data set's in the settings of a kept model, its own in the place of a run id."""
_RUN = re.compile(r"(?:runs:/)?([0-9a-f]{32})")


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """One version of a registered model."""

    name: str
    version: str
    run_id: str

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


def find_version(uri: str, tracker: MLflowTracker) -> ModelVersion:
    """The version that ``models:/name@alias`` or ``models:/name/version`` stands for.

    Raises:
        UserError: it is written otherwise, or the registry has no such version.
    """
    from mlflow.exceptions import MlflowException

    parts = _REGISTERED.fullmatch(uri)
    if parts is None:
        raise UserError(f"{uri!r} is no registered version: give models:/name@alias or models:/name/version")
    name, alias, version = parts.groups()
    try:
        found = (
            tracker.client.get_model_version_by_alias(name, alias)
            if alias
            else tracker.client.get_model_version(name, version)
        )
    except MlflowException as error:
        known = _known_aliases(name, tracker)
        hint = f" (aliases: {', '.join(known)})" if alias and known else ""
        if alias == "champion" and known:
            hint += ", jobs/promote.py makes a champion"
        raise UserError(f"the registry has no {uri}{hint}: {reason_of(error)}") from None
    return ModelVersion(name=name, version=str(found.version), run_id=str(found.run_id))


def _known_aliases(name: str, tracker: MLflowTracker) -> list[str]:
    from mlflow.exceptions import MlflowException

    try:
        return sorted(tracker.client.get_registered_model(name).aliases)
    except MlflowException:
        return []


def model_folders(uri: str, tracker: Callable[[], MLflowTracker], cache: Path) -> list[Path]:
    """Folders with the kept weights that a URI stands for; what is remote is fetched into the cache.

    Args:
        uri: a run's folder or its ``model`` folder; ``runs:/ID`` or the bare id, the id of a comparison or a search
            standing for all of its finished models; ``models:/name@alias`` or ``models:/name/version``.
        tracker: opens the tracker; not called for a folder.

    Raises:
        UserError: nothing is there, or what is there is damaged.
    """
    registered, run = _REGISTERED.fullmatch(uri), _RUN.fullmatch(uri)
    if registered:
        return [_of_run(find_version(uri, tracker()).run_id, tracker(), cache)]
    if run:
        return [_of_run(run_id, tracker(), cache) for run_id in _models_below(run[1], tracker()) or [run[1]]]
    for folder in (Path(uri), Path(uri) / "model"):
        if (folder / checkpoint.MANIFEST).exists():
            return [kept_model(folder).folder]
    raise UserError(f"no model at {uri!r}: give a run's folder, runs:/ID, models:/name@alias or models:/name/version")


@dataclass(frozen=True, kw_only=True)
class KeptModel:
    """Kept weights and how they came about."""

    folder: Path
    digest: str
    """SHA-256 over the manifest, which holds the digests of all files: equal weights of one run, however found."""
    run_id: str
    """Of the training; for one that was not tracked, made of the digest."""
    settings: dict[str, Any]
    """Model, training and the digest of the data, flat; without the seed."""

    @property
    def name(self) -> str:
        """In the zoo."""
        return str(self.settings["model.name"])


def kept_model(folder: Path) -> KeptModel:
    """Describe a folder with kept weights.

    Raises:
        UserError: a file is missing or damaged, or the folder is a checkpoint to resume from.
    """
    state = checkpoint.load(folder).state
    if not {"model", "training", "dataset_digest", "run_id"} <= set(state):
        raise UserError(f"{folder} is no kept model but a checkpoint to resume from: give the run's folder")
    training = {key: value for key, value in state["training"].items() if key != "seed"}
    digest = hashlib.sha256((folder / checkpoint.MANIFEST).read_bytes()).hexdigest()
    tracked = state["run_id"] != NoRun.run_id
    return KeptModel(
        folder=folder,
        digest=digest,
        run_id=str(state["run_id"]) if tracked else f"{NoRun.run_id}-{digest[:_DIGITS]}",
        settings=flatten({"model": state["model"], "training": training, "data": state["dataset_digest"][:_DIGITS]}),
    )


def training_data(models: Sequence[KeptModel], tracker: Callable[[], MLflowTracker]) -> Path:
    """The data set that models were trained on, by the folder that the first one's run names.

    Args:
        tracker: opens the tracker; not called where the run's own folder says it.

    Raises:
        UserError: they were trained on different ones, or theirs does not lie there any more.
    """
    if len({model.settings["data"] for model in models}) > 1:
        raise UserError("the models were trained on different data sets: give one with --data")
    place = _named_data(models[0], tracker)
    if place is None:
        raise UserError(f"it is not known on which data {models[0].folder} was trained: give a data set with --data")
    if not (place / DATA_SET).is_file() or read_manifest(place).digest[:_DIGITS] != models[0].settings["data"]:
        raise UserError(f"{place} does not hold the data that {models[0].folder} was trained on: give it with --data")
    return place


def _named_data(model: KeptModel, tracker: Callable[[], MLflowTracker]) -> Path | None:
    beside = model.folder.parent / CONFIGURATION
    try:
        content = beside.read_bytes() if beside.is_file() else tracker().artifact(model.run_id, CONFIGURATION)
        values = load_yaml(content.decode())
    except (UserError, OSError, UnicodeDecodeError, YAMLError):
        return None
    named = values.get("data") if isinstance(values, dict) else None
    return Path(named).resolve() if isinstance(named, str) else None


def _models_below(run_id: str, tracker: MLflowTracker) -> list[str]:
    """The children of a run that ended well and kept a model: not a search's trials, nor cells that diverged."""
    return [
        child
        for child in tracker.children(tracker.read(run_id).run_id)
        if tracker.client.get_run(child).info.status == "FINISHED" and tracker.client.list_artifacts(child, "model")
    ]


def _of_run(run_id: str, tracker: MLflowTracker, cache: Path) -> Path:
    from mlflow.exceptions import MlflowException

    folder = cache / checked_name(run_id, what="run id")
    with suppress(UserError):  # not fetched yet, or damaged since
        return kept_model(folder).folder
    with tempfile.TemporaryDirectory() as temporary:
        try:
            fetched = Path(tracker.client.download_artifacts(run_id, "model", temporary))
        except (MlflowException, OSError) as error:
            raise UserError(f"run {run_id} holds no model: {reason_of(error)}") from None
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        try:
            shutil.copytree(kept_model(fetched).folder, partial)
            _settle(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _settle(partial: Path, folder: Path) -> None:
    """Move a fetched model to its place; a whole one that another process was faster to put there stays, since that
    process may be reading it."""
    try:
        partial.replace(folder)
    except OSError:  # something is there
        try:
            kept_model(folder)
        except UserError:
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
