"""A registered model is whole: it loads in a clean process, without pickle and without the platform."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from mlflow.models import Model
from tests.serving.parts import MODEL, keep_model, make_data
from tests.training.test_loop import settings_for

from emolab import checkpoint
from emolab.names import UserError
from emolab.registry.lookup import kept_model
from emolab.registry.pyfunc_model import EmotionModel, SessionInput
from emolab.registry.versions import description, register
from emolab.serving.batch import predictions
from emolab.serving.models import load
from emolab.sessions.loading import Block, SessionStore
from emolab.sessions.protocol import normalised
from emolab.sessions.schema import Session, arrow_schema, to_row
from emolab.tracking.runs import MLflowTracker, open_tracker
from emolab.training.train import TrainedModel, load_model, train


@pytest.fixture(scope="module")
def trained(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainedModel, MLflowTracker]:
    output = tmp_path_factory.mktemp("registry")
    settings = settings_for(toy_data, output)
    tracker = open_tracker(enabled=True, uri=None, experiment="tests", output=output)
    assert isinstance(tracker, MLflowTracker)
    return train(settings, tracker=tracker), tracker


Trained = tuple[TrainedModel, MLflowTracker]

CLIENT = """
import importlib.abc, json, sys
class NoPlatform(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("emolab", "ray", "optuna"):
            raise ImportError(name)
sys.meta_path.insert(0, NoPlatform())
import mlflow
uri, model, sessions = sys.argv[1:]
mlflow.set_tracking_uri(uri)
loaded = mlflow.pyfunc.load_model(model)
answers = loaded.predict(json.loads(sessions))
print(json.dumps([a.model_dump() if hasattr(a, "model_dump") else a for a in answers]))
"""


def ask(tracker: MLflowTracker, model: str, sessions: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Predict in a fresh interpreter that cannot import the platform and may not unpickle."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"
    }
    result = subprocess.run(
        [sys.executable, "-c", CLIENT, tracker.uri, model, json.dumps(sessions)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_the_registered_model_answers_in_a_clean_process_as_the_trained_one(trained: Trained, tmp_path: Path) -> None:
    result, tracker = trained
    version = register(result.folder / "model", "tests-model", run_id=result.run_id, tracking_uri=tracker.uri)
    again = register(result.folder / "model", "tests-model", run_id=result.run_id, tracking_uri=tracker.uri)
    assert again == version
    assert "MLFLOW_TRACKING_URI" not in os.environ  # MLflow leaves it behind, and a later tracker would follow it
    assert str(tracker.client.get_model_version_by_alias("tests-model", "challenger").version) == version.version

    model, _ = load_model(result.folder / "model")
    batch_sessions = _sessions(result)
    answers = ask(tracker, "models:/tests-model@challenger", [s for s, _ in batch_sessions], tmp_path)
    for answer, (session, batch) in zip(answers, batch_sessions, strict=True):
        with torch.no_grad():
            expected = model(batch)
        np.testing.assert_allclose(answer["probabilities"], expected.log_probabilities[0].exp().numpy(), atol=1e-6)
        np.testing.assert_allclose(answer["confidence"], expected.confidence[0].numpy(), atol=1e-6)
        assert answer["session_id"] == session["session_id"]
        assert answer["classes"] == ["low", "middle", "high"]


def test_nothing_that_was_registered_is_a_pickle(trained: Trained) -> None:
    result, tracker = trained
    version = register(result.folder / "model", "tests-model", run_id=result.run_id, tracking_uri=tracker.uri)
    location = tracker.client.get_model_version_download_uri(version.name, version.version)
    files = [p for p in Path(location.removeprefix("file://")).rglob("*") if p.is_file()]
    assert {p.suffix for p in files} >= {".safetensors", ".json", ".py"}
    assert not [p for p in files if p.suffix in (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib")]
    assert not [p for p in files if p.read_bytes()[:2] in (b"\x80\x03", b"\x80\x04", b"\x80\x05")]


def test_the_version_says_by_itself_what_it_takes_and_what_it_gives(trained: Trained) -> None:
    result, tracker = trained
    version = register(result.folder / "model", "tests-model", run_id=result.run_id, tracking_uri=tracker.uri)
    location = Path(
        tracker.client.get_model_version_download_uri(version.name, version.version).removeprefix("file://")
    )
    described = Model.load(location)
    assert described.signature is not None
    assert {column.name for column in described.signature.inputs.inputs[0].type.properties} >= {
        "session_id", "audio", "visual", "text", "audio_present",
    }  # fmt: skip
    (example,) = described.load_input_example(str(location))
    assert {name: len(example[name][0]) for name in ("audio", "visual", "text")} == result.manifest.dimensions
    assert example["audio_present"] == [True, False, True]
    assert described.metadata["classes"] == result.manifest.classes
    assert described.metadata["dataset_digest"] == result.manifest.digest
    assert described.metadata["feature_provenance"] == result.manifest.provenance
    (state,) = location.rglob("state.json")
    assert json.loads(state.read_text())["dataset"]["statistics"] == result.manifest.statistics.model_dump()


def test_a_model_of_standardised_sessions_standardises_raw_ones_as_their_preparation_does(tmp_path: Path) -> None:
    manifest, sessions = make_data(tmp_path / "data")
    manifest = manifest.model_copy(update={"protocol": {"normalise": "session"}})
    folder = keep_model(tmp_path / "model", manifest, MODEL, run_id="scaled")
    registered = EmotionModel()
    registered.load_context(SimpleNamespace(artifacts={"checkpoint": str(folder)}))
    chosen = [shifted(session, by=100.0) for session in sessions["validation"][:3]]
    table = pa.Table.from_pylist(
        [to_row(normalised(session)) for session in chosen], schema=arrow_schema(manifest.dimensions, quality=False)
    )
    expected = predictions(load(kept_model(folder)), SessionStore([Block.from_table(table)]))
    answers = registered.predict([SessionInput(session_id=each.session_id, **as_given(each)) for each in chosen])
    np.testing.assert_allclose(
        np.concatenate([answer.probabilities for answer in answers]),
        np.stack([expected[f"probability.{name}"] for name in manifest.classes], axis=1),
        atol=1e-6,
    )
    assert description(checkpoint.load(folder).state)["standardises_sessions"] is True


def shifted(session: Session, *, by: float) -> Session:
    return replace(session, features={name: values * 3.0 + by for name, values in session.features.items()})


def as_given(session: Session) -> dict[str, Any]:
    present = {f"{name}_present": mask.tolist() for name, mask in session.present.items()}
    return {name: values.tolist() for name, values in session.features.items()} | present


def test_a_damaged_checkpoint_and_a_bad_name_are_not_registered(trained: Trained, tmp_path: Path) -> None:
    result, tracker = trained
    with pytest.raises(UserError, match="not allowed"):
        register(result.folder / "model", "../evil", run_id=result.run_id, tracking_uri=tracker.uri)
    with pytest.raises(UserError, match="manifest"):
        register(tmp_path, "tests-model", run_id=result.run_id, tracking_uri=tracker.uri)


def _sessions(result: TrainedModel) -> list[tuple[dict[str, Any], Any]]:
    """Two sessions as the registered model takes them and as batches; one lacks a modality."""
    from edu_emotionnet.batch import SessionBatch

    generator = np.random.default_rng(0)
    pairs = []
    for number, steps in enumerate((4, 7)):
        widths = result.manifest.dimensions
        values = {name: generator.normal(size=(steps, width)).astype(np.float32) for name, width in widths.items()}
        masks = {name: generator.random(steps) > 0.3 for name in widths}
        session: dict[str, Any] = {"session_id": f"x{number}"}
        for name in widths:
            if number == 1 and name == "text":
                masks[name][:] = False
                continue
            session |= {name: values[name].tolist(), f"{name}_present": masks[name].tolist()}
        batch = SessionBatch(
            features={name: torch.from_numpy(v)[None] for name, v in values.items()},
            present={name: torch.from_numpy(m)[None] for name, m in masks.items()},
            lengths=torch.tensor([steps]),
            labels=torch.full((1, steps), -100),
        )
        pairs.append((session, batch))
    return pairs
