"""Shared by all tests: a small corpus, data sets made of it, and one Ray cluster of our own."""

from __future__ import annotations

import os

os.environ["RAY_AUTH_MODE"] = "disabled"  # loopback clusters of these tests
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("RAY_ADDRESS", None)

import shutil
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import ray

from emolab.cluster import ClusterSettings, connected
from emolab.corpora.corpus import Corpus, SessionReference
from emolab.names import UserError
from emolab.sessions.manifest import Manifest
from emolab.sessions.preparation import prepare
from emolab.sessions.schema import Session

REPOSITORY = Path(__file__).resolve().parent.parent
JOBS = sorted(path.stem for path in (REPOSITORY / "jobs").glob("*.py") if path.stem != "__init__")

# How long an example takes says something of the machine, not of what is tested.
hypothesis.settings.register_profile(
    "any-machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any-machine")

NEEDED = {"predict": ("--data=data",), "report": ("--run=run",)}
"""Options that a job cannot do without."""


@dataclass(frozen=True, kw_only=True)
class ToyCorpus(Corpus):
    """Short sessions in which audio tells the class, so that a tiny model learns in seconds."""

    name = "toy"
    generated = True
    sessions: int = 60
    speakers: int = 10
    seed: int = 0
    labelled: bool = True

    @property
    def classes(self) -> tuple[str, ...]:
        return ("low", "middle", "high")

    @property
    def dimensions(self) -> dict[str, int]:
        return {"audio": 6, "visual": 4, "text": 3}

    def references(self) -> list[SessionReference]:
        return [
            SessionReference(session_id=f"s{i:03d}", speaker_id=f"p{i % self.speakers}") for i in range(self.sessions)
        ]

    def load(self, reference: SessionReference) -> Session:
        generator = np.random.default_rng([self.seed, int(reference.session_id[1:])])
        steps = int(generator.integers(3, 9))
        labels = generator.integers(0, 3, steps)
        features = {
            name: generator.normal(size=(steps, width)).astype(np.float32) for name, width in self.dimensions.items()
        }
        features["audio"][:, 0] += 5.0 * labels
        labels[generator.random(steps) < (0.1 if self.labelled else 1.0)] = -100
        return Session(
            session_id=reference.session_id,
            speaker_id=reference.speaker_id,
            corpus=self.name,
            step_seconds=1.0,
            features=features,
            present={name: generator.random(steps) > 0.1 for name in self.dimensions},
            labels=labels,
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first, before them those with a test that asks for more time than others: with
    several processes, none is left alone with a long file at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    slow.update({item.path: 1000 for item in items if item.get_closest_marker("timeout")})
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def quick_stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path, Path], None] | None]:
    """MLflow makes the tables of an SQLite file in dozens of migrations: here for the first file, which is copied.

    In this process alone, and where a test module has imported the tracker: nobody else waits for MLflow's import.
    Gives what makes a file in truth.
    """
    store = sys.modules.get("emolab.tracking.sqlite_store")
    if store is None:
        yield None
        return
    first = tmp_path_factory.mktemp("store") / "mlflow.db"
    make = store._make

    def copied(database: Path, artifacts: Path) -> None:
        if not first.exists():
            make(first, first.parent)
        unfinished = database.with_name(f".{database.name}.new")
        shutil.copyfile(first, unfinished)
        with closing(sqlite3.connect(unfinished)) as connection, connection:
            location = f"{artifacts.resolve().as_uri()}/0"  # of the one experiment that is there
            connection.execute("UPDATE experiments SET artifact_location = ?", (location,))
        unfinished.replace(database)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_make", copied)
        yield make


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with two CPUs that belongs to this test run alone."""
    # Sockets below this folder must have short names, so it lies in the system's own temporary folder.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        with ExitStack() as stack:
            for tries_left in (2, 1, 0):
                try:
                    stack.enter_context(connected(ClusterSettings(address="local", cpus=2)))
                    break
                except UserError as error:  # a machine that is too busy may be less so a moment later
                    ray.shutdown()
                    if not tries_left or not str(error).startswith("Ray did not start"):
                        raise
            yield


@pytest.fixture(scope="session")
def make_dataset(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Manifest]]:
    """Writes a toy data set into a fresh folder."""

    def make(shard_sessions: int = 16, **options: int) -> tuple[Path, Manifest]:
        folder = tmp_path_factory.mktemp("data") / "toy"
        return folder, prepare(
            ToyCorpus(**options), folder, seed=0, shard_sessions=shard_sessions, report=lambda _: None
        )

    return make


@pytest.fixture(scope="session")
def toy_data(make_dataset: Callable[..., tuple[Path, Manifest]]) -> Path:
    """A toy data set that tests only read."""
    return make_dataset()[0]


@dataclass(frozen=True, kw_only=True)
class TrainingCorpus(ToyCorpus):
    """All of it published as a training split."""

    name = "training-only"

    def references(self) -> list[SessionReference]:
        return [replace(reference, published_split="train") for reference in super().references()]


@pytest.fixture(scope="session")
def unvalidated_data(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set without validation sessions."""
    folder = tmp_path_factory.mktemp("unvalidated")
    prepare(TrainingCorpus(sessions=12), folder, seed=0, shard_sessions=16, report=lambda _: None)
    return folder


@pytest.fixture
def one_line() -> Callable[[pytest.ExceptionInfo[BaseException], str], None]:
    """Checks that an error is a user's error, names what it should, and is one line."""

    def check(error: pytest.ExceptionInfo[BaseException], *parts: str) -> None:
        assert error.type is UserError or issubclass(error.type, ValueError)
        assert "\n" not in str(error.value)
        for part in parts:
            assert part in str(error.value), str(error.value)

    return check  # pyright: ignore[reportReturnType]
