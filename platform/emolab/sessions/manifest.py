"""dataset.json: what a folder of session shards holds, and the digests that prove it still does."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edu_emotionnet.conventions import FeatureStatistics
from emolab.corpora.corpus import Split
from emolab.limits import TABLE_BYTES, read_bytes
from emolab.mistakes import explain
from emolab.names import UserError
from emolab.sessions.schema import SCHEMA_VERSION

FILE_NAME = "dataset.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Record):
    """One Parquet file."""

    path: str = Field(pattern=r"^(train|validation|test)/[A-Za-z0-9._-]+\.parquet$")
    """Relative to the manifest; the pattern keeps a manifest from pointing anywhere else."""
    sha256: str
    rows: int
    steps: int


class Statistics(_Record):
    """Per-feature mean and standard deviation over the observed steps of the training split."""

    mean: dict[str, list[float]]
    std: dict[str, list[float]]


class SplitSummary(_Record):
    """What a split holds, for people and for reports."""

    sessions: int
    steps: int
    speakers: list[str]
    label_counts: list[int]
    """Labelled steps per class."""
    present: dict[str, float]
    """Modality -> share of steps at which it was observed."""
    reference_scores: dict[str, float] = {}
    """Scores to read results against, from the corpus itself (EduSim: the exact filter's ceiling)."""


class Manifest(_Record):
    """The contract between preparation and every later stage."""

    schema_version: int = SCHEMA_VERSION
    corpus: str
    classes: list[str]
    dimensions: dict[str, int]
    step_seconds: float
    seed: int
    command: str
    options: dict[str, Any] = {}
    """The corpus's options, so that the same command finds its own data set again."""
    provenance: dict[str, Any] = {}
    protocol: dict[str, Any] = {}
    """What was done to the corpus's sessions: the options of ``Protocol`` that differ from doing nothing."""
    dropped: dict[str, int] = {}
    """Rule of the protocol -> sessions that it left out."""
    quarantined: int = 0
    """Sessions that could not be read; quarantine.csv says why."""
    annotation: dict[str, Any] = {}
    """What the corpus says of its labels: agreement of the annotators, labels that no table maps."""
    statistics: Statistics
    splits: dict[Split, SplitSummary]
    shards: list[Shard]

    @property
    def digest(self) -> str:
        """SHA-256 over the content of the data set: the same data has the same digest wherever it lies."""
        content: dict[str, Any] = {
            "classes": self.classes,
            "dimensions": self.dimensions,
            "shards": [(shard.path, shard.sha256) for shard in self.shards],
        }
        if self.protocol:
            content["protocol"] = self.protocol
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def feature_statistics(self) -> FeatureStatistics:
        return FeatureStatistics(mean=self.statistics.mean, std=self.statistics.std)

    def split_shards(self, split: Split) -> list[Shard]:
        return [shard for shard in self.shards if shard.path.startswith(f"{split}/")]

    @property
    def class_prior(self) -> float:
        """Accuracy on validation of always answering with the training split's most frequent class."""
        return self.class_prior_on("validation")[0]

    @property
    def class_prior_macro_f1(self) -> float:
        """Macro-F1 of the same answer: the F1 of one class, and 0 for all others."""
        return self.class_prior_on("validation")[1]

    def class_prior_on(self, split: Split) -> tuple[float, float]:
        """Accuracy and macro-F1 of the same answer on any split."""
        train, counts = self.splits["train"].label_counts, self.splits[split].label_counts
        share = counts[train.index(max(train))] / max(1, sum(counts))
        return share, 2 * share / (1 + share) / len(self.classes)


class _Sealed(Manifest):
    """As it is written down."""

    sha256: str
    """Of all the rest, whose statistics become weights and whose counts are scores to read results against."""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a data set.

    Raises:
        UserError: the folder or its manifest is missing, malformed, changed or of another schema version.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise UserError(f"{folder} is not a data set ({FILE_NAME} is missing): make one with jobs/prepare.py")
    content = read_bytes(path, most=TABLE_BYTES, what="a manifest")
    return parse_manifest(content, where=str(path), remedy="prepare the data set again")


def parse_manifest(content: bytes, *, where: str, remedy: str) -> Manifest:
    """The manifest in the bytes of a dataset.json, wherever they lie.

    Raises:
        UserError: it is malformed, of another schema version, or not as it was written.
    """
    try:
        sealed = _Sealed.model_validate_json(content)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, _Sealed)}: {remedy}") from None
    if sealed.schema_version != SCHEMA_VERSION:
        raise UserError(
            f"{where}: schema version {sealed.schema_version}, this release reads {SCHEMA_VERSION}: {remedy}"
        )
    if not _is_as_written(content):
        raise UserError(f"{where} was changed after it was written, its SHA-256 differs: {remedy}")
    return Manifest.model_validate(sealed.model_dump(exclude={"sha256"}))


def manifest_text(manifest: Manifest) -> str:
    """What dataset.json holds."""
    return _sealed(manifest.model_dump(mode="json"))


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write dataset.json; last of all, so that a folder with a manifest is a whole data set."""
    write_atomically(folder / FILE_NAME, manifest_text(manifest).encode())


def _sealed(values: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(canonical_json(values).encode()).hexdigest()
    return json.dumps({**values, "sha256": digest}, indent=1) + "\n"


def _is_as_written(content: bytes) -> bool:
    """Whether every byte is: the values say what the bytes must be, white space and all."""
    try:
        values = json.loads(content)
        del values["sha256"]
        return _sealed(values).encode() == content
    except ValueError:  # not a number where a number was
        return False


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is found whole or not at all, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def canonical_json(value: Mapping[str, Any]) -> str:
    """JSON with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
