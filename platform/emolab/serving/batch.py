"""jobs/predict.py: what a model says of every step of stored sessions, shard by shard on Ray Data actors.

One Parquet file per shard, one row per step. A folder is one prediction's for ever: its record, and without --name its
name, is made of all that decides its content (version, weights, shards). A file appears whole and says which weights
and which shard it comes from: running the same command again computes what is missing or damaged, and the bytes do not
depend on the number of actors.

The test split is not predicted here. It is opened once per model, by a comparison, which records it; predictions of
it in a file would be a second, unrecorded look. Sessions that were never part of a split are given as a folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from ray.exceptions import RayError

from emolab import __version__, sealed
from emolab.cluster import connected, fitting, require, user_error, worker_environment
from emolab.corpora.corpus import SPLITS
from emolab.locks import HOLDER, LOCK, holding
from emolab.names import UserError, contained
from emolab.registry.lookup import kept_model
from emolab.serving.media import recorded_corpus, write_recordings
from emolab.serving.models import LoadedModel, find_model, load
from emolab.serving.settings import PredictSettings
from emolab.sessions.loading import Block, SessionStore, ordered_batches
from emolab.sessions.manifest import FILE_NAME, canonical_json, read_manifest, write_atomically
from emolab.sessions.shards import read_rows, sha256
from emolab.training.made_for import check_steps
from emolab.training.recipe import fingerprint

SESSIONS_PER_BATCH = 16
RECORD = "prediction.json"
"""In a folder of predictions: what they are of."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One shard and the file of its predictions."""

    shard: Path
    digest: str
    """SHA-256 of the shard."""
    file: Path
    model: str
    """Digest of the weights."""

    def done(self) -> bool:
        """Whether the file is there, whole, and of this shard and these weights."""
        try:
            table = sealed.from_parquet(self.file.read_bytes())
        except (OSError, ValueError):
            return False
        return {key: (table.schema.metadata or {}).get(key) for key in self.origin()} == self.origin()

    def origin(self) -> dict[bytes, bytes]:
        """What a file says of where it comes from."""
        return {b"emolab.model": self.model.encode(), b"emolab.shard": self.digest.encode()}


def predict(settings: PredictSettings, *, dry_run: bool, report: Callable[[str], None]) -> Path:
    """Predict all shards; returns the folder with the results.

    Raises:
        UserError: anything the user can mend, before any computation where it can be known.
    """
    kept = find_model(settings.model, output=Path(settings.output), tracking=settings.tracking)
    loaded = load(kept)
    if settings.manifest is not None:
        corpus = recorded_corpus(settings.manifest, settings.options, loaded)
        if dry_run:
            report(f"{kept.name} ({kept.digest[:16]}): {len(corpus.references())} recordings in {settings.manifest}")
            return Path(settings.output)
        with connected(settings.cluster):
            shards = write_recordings(
                corpus,
                Path(settings.output),
                loaded,
                shard_sessions=settings.shard_sessions,
                max_refused=settings.max_refused,
                stall_seconds=settings.stall_seconds,
                report=report,
            )
            return _predict(settings.model_copy(update={"shards": str(shards)}), loaded, dry_run=False, report=report)
    return _predict(settings, loaded, dry_run=dry_run, report=report)


def _predict(settings: PredictSettings, loaded: LoadedModel, *, dry_run: bool, report: Callable[[str], None]) -> Path:
    kept, (folder, record, units) = loaded.kept, _plan(settings, loaded)
    missing = [unit for unit in units if not unit.done()]
    report(
        f"{kept.name} ({kept.digest[:16]}): {len(units)} shards, {len(units) - len(missing)} done, of "
        f"{_source(settings, loaded)}, into {folder}"
    )
    if dry_run or not missing:
        return folder
    with connected(settings.cluster), holding(folder, what="prediction"):
        require({"CPU": 1.0}, purpose="batch prediction")
        _check_own(folder, record)  # once more: now it is held
        write_atomically(folder / RECORD, record.encode())
        for number, row in enumerate(_run(missing, kept.folder, settings.actors), start=1):
            report(f"shard {number} of {len(missing)}: {row['sessions']} sessions, {row['steps']} steps")
    report(f"tables  {folder} ({len(units)} Parquet file{'s' * (len(units) != 1)}, a row per step)")
    return folder


def _source(settings: PredictSettings, loaded: LoadedModel) -> str:
    """What is predicted, and why it is not all of a data set; of shards from anywhere, what cannot be checked."""
    if settings.data is None:
        unknown = loaded.scales_sessions and settings.manifest is None
        rule = " (their features have to be standardised over each session, as the model's were)" if unknown else ""
        return f"{settings.shards}{rule}"
    splits = [*dict.fromkeys(settings.splits)]
    named = f"the {' and '.join(splits)} split{'s' * (len(splits) > 1)} of {settings.data}"
    return f"{named} (the test split is opened once, by jobs/compare.py, which records it)"


def _plan(settings: PredictSettings, loaded: LoadedModel) -> tuple[Path, str, list[Unit]]:
    """The folder of the results, what its record says, and the work."""
    shards = _of_data_set(settings, loaded) if settings.data else _of_folder(Path(settings.shards or ""), loaded)
    if not shards:
        raise UserError(f"there are no shards to predict in {settings.data or settings.shards}")
    identity = {
        "version": __version__,
        "model": loaded.kept.digest,
        "shards": {name: digest for name, _, digest in shards},
    }
    name = settings.name or f"predictions-{loaded.kept.name}-{fingerprint(identity)}"
    folder, record = contained(Path(settings.output).resolve(), name, what="name"), canonical_json(identity)
    _check_own(folder, record)
    units = [
        Unit(shard=path, digest=digest, file=contained(folder, file, what="shard"), model=loaded.kept.digest)
        for file, path, digest in shards
    ]
    return folder, record, units


def _check_own(folder: Path, record: str) -> None:
    """Refuse a folder that holds anything but a part of these predictions: the rest would pass for one of theirs."""
    found = folder / RECORD
    if not found.exists():
        strangers = sorted({each.name for each in folder.glob("[!.]*")} - {LOCK, HOLDER})
        if strangers:
            raise UserError(
                f"{folder} is not empty and holds no predictions ({strangers[0][:60]}): choose another --name"
            )
    elif found.read_text(encoding="utf-8", errors="replace") != record:
        raise UserError(
            f"{folder} holds predictions by another model or release, or of other shards: choose another --name, or "
            "move it away"
        )


def _of_data_set(settings: PredictSettings, loaded: LoadedModel) -> list[tuple[str, Path, str]]:
    """(file of the result, shard, digest)."""
    data = Path(settings.data or "").resolve()
    manifest = read_manifest(data)
    loaded.check_fit(manifest, data)
    chosen = [shard for split in dict.fromkeys(settings.splits) for shard in manifest.split_shards(split)]
    return [(shard.path.replace("/", "-"), data / shard.path, shard.sha256) for shard in chosen]


def _of_folder(folder: Path, loaded: LoadedModel) -> list[tuple[str, Path, str]]:
    folder = folder.resolve()
    if folder.name == "test" and (folder.parent / FILE_NAME).exists():
        raise UserError(f"{folder} is the test split of a data set: it is opened once, by jobs/compare.py")
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    if folder.name in SPLITS and (folder.parent / FILE_NAME).exists():
        loaded.check_fit(read_manifest(folder.parent), folder)
    files = sorted(folder.glob("*.parquet"))
    for file in files:
        widths, steps = _widths_and_steps(file)
        if widths != dict(loaded.dimensions):
            raise UserError(f"{file} has features {widths}, the model takes {dict(loaded.dimensions)}")
        if not steps:
            raise UserError(f"{file} holds no session with steps: leave it out")
        for step_seconds in steps:
            check_steps(loaded.dataset, step_seconds, model="the model", where=file)
    return [(file.name, file, sha256(file)) for file in files]


def _widths_and_steps(file: Path) -> tuple[dict[str, int], set[float]]:
    """Modality -> number of features, from a shard's metadata; seconds of a step, of its sessions."""
    try:
        table = pq.read_table(file, columns=["step_seconds"])
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"shard {file} cannot be read ({' '.join(str(error).split())[:120]})") from None
    metadata = table.schema.metadata or {}
    named = (re.fullmatch(rb"emolab\.dimension\.(\w+)", key) for key in metadata)
    return {match[1].decode(): int(metadata[match[0]]) for match in named if match}, {
        *table["step_seconds"].drop_null().to_pylist()
    }


def _run(units: Sequence[Unit], model: Path, actors: int | None) -> Iterator[dict[str, Any]]:
    """Counts of a shard whenever one is done."""
    cpus = fitting({"CPU": 1.0})
    environment = {"env_vars": worker_environment() | {"OMP_NUM_THREADS": "1"}}
    rows = [{"shard": str(u.shard), "digest": u.digest, "file": str(u.file), "model": u.model} for u in units]
    try:
        yield from (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .map_batches(
                Predictor,
                fn_constructor_args=(model,),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(actors or cpus, cpus, len(units))),
                num_cpus=1,
                runtime_env=environment,
            )
            .iter_rows()
        )
    except (RayError, UserError) as error:
        cause = user_error(error)
        raise cause if isinstance(cause, UserError) else error from None


class Predictor:
    """Holds the model and predicts shard after shard."""

    def __init__(self, model: Path) -> None:
        torch.set_num_threads(1)
        self.loaded = load(kept_model(model))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        unit = Unit(
            shard=Path(str(batch["shard"][0])),
            digest=str(batch["digest"][0]),
            file=Path(str(batch["file"][0])),
            model=str(batch["model"][0]),
        )
        store = SessionStore([Block.from_table(read_rows(unit.shard, unit.digest))])
        table = predictions(self.loaded, store)
        write_atomically(unit.file, sealed.to_parquet(table, unit.origin()))
        return {"sessions": np.array([len(store)]), "steps": np.array([table.num_rows])}


@torch.inference_mode()
def predictions(loaded: LoadedModel, store: SessionStore) -> pa.Table:
    """One row per step of every session, in the order of the store.

    Raises:
        UserError: an answer is not finite, naming the session and the step with its largest feature.
    """
    names = list(loaded.dimensions)
    parts: dict[str, list[Any]] = {"probability": [], "confidence": [], "present": []}
    for indices in ordered_batches(len(store), SESSIONS_PER_BATCH):
        batch = store.batch(indices)
        said, real = loaded.model(batch), batch.real
        parts["probability"].append(said.log_probabilities.exp()[real].numpy())
        parts["present"].append(torch.stack([batch.present[name] for name in names], dim=-1)[real].numpy())
        if said.confidence is not None:
            parts["confidence"].append(said.confidence[real].numpy())
    probability = np.concatenate(parts["probability"])
    broken = ~np.isfinite(probability).all(axis=1)
    if broken.any():
        raise _unanswerable(store, int(np.repeat(np.arange(len(store)), store.lengths)[broken][0]))
    columns: dict[str, Any] = {
        "session_id": np.repeat(store.session_ids, store.lengths),
        "step": np.concatenate([np.arange(length, dtype=np.int32) for length in store.lengths]),
        "class": np.asarray(loaded.classes)[probability.argmax(axis=1)],
    }
    columns |= {f"probability.{name}": probability[:, k] for k, name in enumerate(loaded.classes)}
    if parts["confidence"]:
        confidence = np.concatenate(parts["confidence"])
        columns |= {f"confidence.{name}": confidence[:, m] for m, name in enumerate(names)}
    present = np.concatenate(parts["present"])
    return pa.table(columns | {f"present.{name}": present[:, m] for m, name in enumerate(names)})


def _unanswerable(store: SessionStore, index: int) -> UserError:
    """About a session with an answer that is not finite: in a forward pass one step's features can spoil any step."""
    batch = store.batch([index])
    sizes = {
        name: np.abs(np.where(batch.present[name][0, :, None], values[0], 0.0)).max(axis=1)
        for name, values in batch.features.items()
    }
    name = max(sizes, key=lambda modality: sizes[modality].max())
    step = int(sizes[name].argmax())
    return UserError(
        f"session {store.session_ids[index]!r}: the model has no answer, as features are too large for float32 "
        f"(the largest at step {step}: {name} {sizes[name][step]:.3g})"
    )
