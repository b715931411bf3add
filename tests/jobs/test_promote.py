"""jobs/promote.py as a person or a nightly job calls it: real processes, exit statuses, one line for a mistake."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from tests.jobs.test_jobs import run, run_here
from tests.registry.promotion_lab import gates_file
from tests.training.test_loop import settings_for

from emolab.registry.aliases import standing
from emolab.registry.versions import register
from emolab.tracking.runs import MLflowTracker, open_tracker
from emolab.training.train import train

pytestmark = [pytest.mark.slow, pytest.mark.ray]
NAME = "edu-emotionnet"


@dataclass(frozen=True)
class Place:
    folder: Path
    data: Path
    gates: Path
    tracker: MLflowTracker


@pytest.fixture(scope="module")
def place(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A folder as a user has it after training: one registered version, and gates that ask for no sweep."""
    folder = tmp_path_factory.mktemp("promote")
    tracker = open_tracker(enabled=True, uri=None, experiment="edu-emotionnet", output=folder / "runs")
    assert isinstance(tracker, MLflowTracker)
    trained = train(settings_for(toy_data, folder / "runs", epochs=8, patience=8), tracker=tracker)
    register(trained.folder / "model", NAME, run_id=trained.run_id, tracking_uri=tracker.uri)
    gates = gates_file(
        folder,
        floors={"macro_f1": 0.2, "class_recall": 0.0},
        calibration={"most_error": None},
        missing_modalities={"least_area": None, "area_margin": None, "most_single_loss": None},
        provenance={"clean_commit": False},
    )
    return Place(folder, toy_data, gates, tracker)


@pytest.mark.slow
@pytest.mark.scenario
def test_the_way_of_a_first_model_from_refused_to_promoted(place: Place) -> None:
    refused = run("promote", "--gates", place.gates.name, cwd=place.folder)
    assert refused.returncode == 1, refused.stderr
    assert "missing evidence  macro_f1" in refused.stdout
    assert f"refused: {NAME} version 1 is refused (no champion): test_split_opened_once, macro_f1" in refused.stdout
    assert standing(place.tracker.client, NAME).champion is None
    assert "Traceback" not in refused.stderr

    evaluated = run("promote", "--gates", place.gates.name, "--evaluate", str(place.data), cwd=place.folder)
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    assert f"promoted: models:/{NAME}@champion is version 1" in evaluated.stdout
    assert standing(place.tracker.client, NAME).champion == "1"
    (verdict,) = [line.split()[1] for line in evaluated.stdout.splitlines() if line.startswith("verdict ")]
    assert (place.folder / verdict).read_text().startswith("<!doctype html>")

    again = run("promote", "--gates", place.gates.name, cwd=place.folder)
    assert again.returncode == 2
    assert "the champion already" in again.stderr
    back = run("promote", "--rollback", "--reason", "a test", cwd=place.folder)
    assert back.returncode == 2
    assert "no previous champion" in back.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--rollbak"], ["--rollbak"]),
        (["--gates", "typo.yaml"], ["typo.yaml", "floors.macro_f2", "did you mean 'macro_f1'"]),
        (["--reason", "none"], ["--reason belongs to --rollback"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_two(
    arguments: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = yaml.safe_load(gates_file(tmp_path).read_text())
    values["floors"]["macro_f2"] = 0.1
    (tmp_path / "gates.yaml").unlink()
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump(values))
    result = run_here("promote", *arguments, cwd=tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert result.status == 2, result.output
    (line,) = [line for line in result.errors.splitlines() if line.strip()]
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    assert [path.name for path in tmp_path.iterdir()] == ["typo.yaml"]
