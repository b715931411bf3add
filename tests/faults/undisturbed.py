"""A sweep and a preparation that nothing happens to: what several files of faults compare with, made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.robustness.test_sweep import SUITE, no_report, opened
from tests.sessions.staged_corpus import StagedCorpus, write_recordings
from tests.training.test_loop import settings_for

from emolab.robustness.suites import expand, parse_suite
from emolab.robustness.sweep import run_sweep
from emolab.robustness.sweep_plan import SweepPlan, plan_sweep
from emolab.sessions.manifest import read_manifest
from emolab.sessions.preparation import prepare
from emolab.training.train import train

SESSIONS = 40


@dataclass(frozen=True)
class Sweep:
    """What is to be swept, and the folder of a sweep that nothing happened to."""

    plan: SweepPlan
    unbroken: Path


def swept(toy_data: Path, folder: Path) -> Sweep:
    """Two models, trained and swept."""
    models = []
    for name in ("edu_emotionnet", "late_fusion"):
        options = settings_for(toy_data, folder, model={"name": name}, epochs=2)
        options = options.model_copy(update={"tracking": options.tracking.model_copy(update={"enabled": False})})
        models.append(train(options).folder / "model")
    cells = expand(parse_suite(SUITE), ("audio", "visual", "text"))
    plan = plan_sweep(models, toy_data, "test", cells, sessions_per_unit=4, cells_per_unit=8)
    assert run_sweep(plan, folder / "units", report=no_report, actors=1, opening=opened) == len(plan.units)
    return Sweep(plan, folder / "units")


@dataclass(frozen=True)
class Recordings:
    """What is to be prepared, and what comes out where nothing happens."""

    media: Path
    expected: dict[str, bytes]

    @property
    def corpus(self) -> StagedCorpus:
        return StagedCorpus(source=str(self.media), staged=False)

    @property
    def shards(self) -> dict[str, bytes]:
        """Without the manifest's digest."""
        return {name: content for name, content in self.expected.items() if name}


def prepared(folder: Path) -> Recordings:
    """Recordings, made and prepared."""
    media = write_recordings(folder / "media", SESSIONS)
    found = Recordings(media, {})
    found.expected.update(finished(found, folder / "clean"))
    return found


def finished(recordings: Recordings, output: Path) -> dict[str, bytes]:
    """Prepare, or go on, in peace -> name and bytes of everything but the manifest, and the manifest's digest."""
    manifest = prepare(recordings.corpus, output, seed=0, shard_sessions=16, report=lambda _: None)
    assert read_manifest(output) == manifest
    return written(output) | {"": manifest.digest.encode()}


def written(output: Path) -> dict[str, bytes]:
    """Everything that a preparation has written but its manifest, which says when."""
    files = [path for path in sorted(output.rglob("*")) if path.is_file() and path.name != "dataset.json"]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}
