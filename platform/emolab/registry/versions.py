"""Registering a trained model as a version that loads anywhere, without pickle and without this platform."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pyfunc
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import edu_emotionnet
from edu_emotionnet.conventions import MODALITIES
from emolab import checkpoint
from emolab.names import UserError, checked_name
from emolab.registry.lookup import ModelVersion
from emolab.tracking.reasons import reason_of
from emolab.training.made_for import normalisation

CHALLENGER = "challenger"
CHAMPION = "champion"
PREVIOUS_CHAMPION = "previous_champion"


def register(folder: Path, name: str, *, run_id: str, tracking_uri: str, alias: str = CHALLENGER) -> ModelVersion:
    """Log a kept model to its run, make it a version of ``name``, and point ``alias`` at it.

    A run is registered once: doing it again finds the version and moves the alias back to it.

    Raises:
        UserError: the checkpoint is damaged or the registry refuses.
    """
    checked_name(name, what="registered model name")
    saved = checkpoint.load(folder)
    client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
    try:
        version = _existing(client, name, run_id) or _log(
            folder, saved.state, name, run_id=run_id, tracking_uri=tracking_uri
        )
        client.set_model_version_tag(name, version, "emolab.dataset", saved.state["dataset_digest"])
        client.set_model_version_tag(name, version, "emolab.model", saved.state["model"]["name"])
        client.set_registered_model_alias(name, alias, version)
    except MlflowException as error:
        raise UserError(f"the registry refused {name}: {reason_of(error)}") from None
    return ModelVersion(name=name, version=version, run_id=run_id)


def _existing(client: MlflowClient, name: str, run_id: str) -> str | None:
    found = client.search_model_versions(f"name = '{name}'")
    return next((str(version.version) for version in found if version.run_id == run_id), None)


def _log(folder: Path, state: Mapping[str, Any], name: str, *, run_id: str, tracking_uri: str) -> str:
    with _fluent(tracking_uri, run_id):
        info = mlflow.pyfunc.log_model(
            name="registered_model",
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"checkpoint": str(folder)},
            code_paths=[str(Path(edu_emotionnet.__file__).parent)],
            pip_requirements=[
                f"{p}=={metadata.version(p)}" for p in ("mlflow", "torch", "safetensors", "numpy", "pydantic")
            ],
            registered_model_name=name,
            input_example=[example_session(state["dataset"])],  # the signature comes from the type hints of predict
            metadata=description(state),
        )
        return str(info.registered_model_version)


def example_session(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """A made-up session of three steps that fits the model: the training split's means, no learner's recording.

    The first modality is missing at the second step, to show how that is said.
    """
    session: dict[str, Any] = {"session_id": "example"}
    modalities = [name for name in MODALITIES if name in dataset["dimensions"]]
    for number, name in enumerate(modalities):
        session[name] = [[round(float(value), 6) for value in dataset["statistics"]["mean"][name]]] * 3
        session[f"{name}_present"] = [True, number > 0, True]
    return session


def description(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a user of the version needs to know without opening it, stored in its MLmodel file.

    The normalisation statistics are part of the weights, and of ``state.json`` beside them.
    """
    dataset = state["dataset"]
    return {
        "model": state["model"],
        "classes": dataset["classes"],
        "dimensions": dataset["dimensions"],
        "step_seconds": dataset["step_seconds"],
        "standardises_sessions": normalisation(dataset) == "session",
        "corpus": dataset["corpus"],
        "feature_provenance": dataset["provenance"],
        "dataset_digest": state["dataset_digest"],
        "training_run": state["run_id"],
    }


@contextmanager
def _fluent(tracking_uri: str, run_id: str) -> Iterator[None]:
    """MLflow's process-wide interface, which models are logged through, for the length of a block.

    It also writes the address into MLFLOW_TRACKING_URI, where a later tracker of this process would find it.
    """
    before = os.environ.get(_VARIABLE)
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)
    mlflow.start_run(run_id=run_id)
    try:
        yield
    finally:
        mlflow.end_run()
        os.environ.pop(_VARIABLE, None)
        if before is not None:
            os.environ[_VARIABLE] = before


_VARIABLE = "MLFLOW_TRACKING_URI"
