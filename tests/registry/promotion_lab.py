"""A registry in which promotions are tried: tiny trained models, tested and swept by the code that studies use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tests.registry.two_signals import TwoSignals
from tests.training.test_loop import settings_for

from emolab.registry import gates as gates_module
from emolab.registry.aliases import CLAIM, standing
from emolab.registry.lookup import ModelVersion
from emolab.registry.promotion import PromoteSettings
from emolab.registry.versions import CHAMPION, PREVIOUS_CHAMPION, register
from emolab.sessions.preparation import prepare
from emolab.studies.robustness import RobustnessSettings, robustness
from emolab.studies.test_split import checkpoint_digest, score_on_test_split
from emolab.tracking.runs import MLflowTracker, open_tracker
from emolab.training.train import TrainedModel, train

NAME = "toy-model"
RATES = [0.0, 0.3, 0.6, 0.9]
SUITE = {
    "name": "promotion",
    "seeds": [0],
    "sweeps": [
        {"corruption": "frame_missing", "levels": RATES[1:]},
        {"corruption": "absent", "modalities": "each"},
    ],
}
ROLES: dict[str, tuple[str, dict[str, Any]]] = {
    # Audio and visual both tell the class, so that a model of both survives the loss of either.
    "first": ("early_fusion", {"epochs": 4, "modality_dropout": 0.5, "learning_rate": 3e-3}),
    "better": ("early_fusion", {"epochs": 20, "patience": 20, "modality_dropout": 0.5}),
    "worse": ("text_only", {"epochs": 2}),
    "fragile": ("audio_only", {"epochs": 20, "patience": 20}),
}


@dataclass(frozen=True)
class Lab:
    """A tracker with one registered model, one version for each role."""

    output: Path
    data: Path
    tracker: MLflowTracker
    versions: dict[str, ModelVersion]
    trained: dict[str, TrainedModel]

    def settings(self, role: str, gates: Path, **values: Any) -> PromoteSettings:
        base = {"model": self.versions[role].uri, "gates": str(gates), "output": str(self.output)}
        return PromoteSettings.model_validate(base | values)

    def aliases(self) -> tuple[str | None, str | None]:
        """Roles of champion and previous champion."""
        now, roles = standing(self.tracker.client, NAME), {v.version: role for role, v in self.versions.items()}
        return roles.get(now.champion or ""), roles.get(now.previous or "")

    def crown(self, role: str) -> None:
        self.tracker.client.set_registered_model_alias(NAME, CHAMPION, self.versions[role].version)

    def tags(self, role: str) -> dict[str, str]:
        return dict(self.tracker.client.get_model_version(NAME, self.versions[role].version).tags)

    def promotions(self) -> list[str]:
        return list(self.tracker.find("emolab.kind", "promotion"))

    def forget(self) -> None:
        """Back to a registry in which nothing was ever promoted."""
        client = self.tracker.client
        for alias in (CHAMPION, PREVIOUS_CHAMPION):
            client.delete_registered_model_alias(NAME, alias)
        for run_id in standing(client, NAME).claims:
            client.delete_registered_model_tag(NAME, CLAIM + run_id)
        for role, version in self.versions.items():
            for tag in self.tags(role):
                if tag not in ("emolab.dataset", "emolab.model"):
                    client.delete_model_version_tag(NAME, version.version, tag)


def build(folder: Path) -> Lab:
    """Train, test once, register; the sweep comes apart because it needs Ray."""
    data, output = folder / "data", folder / "runs"
    prepare(TwoSignals(sessions=150), data, seed=0, shard_sessions=64, report=lambda _: None)
    tracker = open_tracker(enabled=True, uri=None, experiment="edu-emotionnet", output=output)
    assert isinstance(tracker, MLflowTracker)
    parent = tracker.start("comparison", tags={"emolab.kind": "comparison", "emolab.git_clean": "true"})
    trained = {role: train_role(role, data, output, tracker, parent.run_id) for role in ROLES}
    frozen = {role: checkpoint_digest(model.folder / "model") for role, model in trained.items()}
    for model in trained.values():
        score_on_test_split(
            model.folder, data, run_id=model.run_id, tracker=tracker, opened_by=parent.run_id,
            frozen=list(frozen.values()), training_seconds=1.0,
        )  # fmt: skip
    sweep(parent.run_id, data, output, tracker)
    versions = {role: enter(model, tracker) for role, model in trained.items()}
    return Lab(output, data, tracker, versions, trained)


def train_role(role: str, data: Path, output: Path, tracker: MLflowTracker, parent: str) -> TrainedModel:
    name, training = ROLES[role]
    model = {"name": name, "d_model": 16, "layers": 1, "heads": 2, "dropout": 0.0}
    trained = train(settings_for(data, output, model=model, **training), tracker=tracker, parent=parent)
    return committed(trained, tracker)


def committed(trained: TrainedModel, tracker: MLflowTracker) -> TrainedModel:
    """As if the code that trained it had been committed, which a developer's working tree is not."""
    tracker.resume(trained.run_id).set_tags({"emolab.git_clean": "true", "emolab.git_commit": "0123456789abcdef"})
    return trained


def enter(trained: TrainedModel, tracker: MLflowTracker) -> ModelVersion:
    return register(trained.folder / "model", NAME, run_id=trained.run_id, tracking_uri=tracker.uri)


def sweep(model: str, data: Path, output: Path, tracker: MLflowTracker) -> None:
    """A real sweep by the job's own function."""
    suite = output / "promotion-suite.yaml"
    suite.write_text(yaml.safe_dump(SUITE))
    values = {"model": model, "suite": str(suite), "data": str(data), "output": str(output), "actors": 1}
    results = robustness(RobustnessSettings.model_validate(values), dry_run=False, report=lambda _: None)
    assert results is not None
    tracker.resume(results.run_id).set_tags({"emolab.git_clean": "true"})


GateChanges = Callable[..., Path]


def gates_file(folder: Path, **changes: dict[str, Any]) -> Path:
    """The shipped gates, with thresholds that toy models can reach, and with these changes."""
    shipped = Path(gates_module.__file__).with_name("default_gates.yaml")
    values = yaml.safe_load(shipped.read_text())
    toy = {
        "floors": {"macro_f1": 0.5, "class_recall": 0.3},
        "against_champion": {"margin": 0.02},
        "calibration": {"most_error": 0.4},
        "missing_modalities": {"rates": RATES, "least_area": 0.4, "area_margin": 0.05, "most_single_loss": 0.35},
        "serving": {"session_steps": 30, "most_milliseconds": 20_000},
    }
    for layer in (toy, changes):
        for section, keys in layer.items():
            values[section] |= keys
    path = folder / "gates.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def show(lab: Lab) -> dict[str, dict[str, float]]:
    """Scores of every role, for choosing the roles."""
    return {role: dict(lab.tracker.read(m.run_id).metrics) for role, m in lab.trained.items()}
