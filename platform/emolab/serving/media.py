"""Recordings that were never part of a data set -> session shards that a model can be asked about.

What hears, sees and reads them must be what the model was trained with: extractors, their parameters and the digests
of their weights are compared with what the model carries.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edu_emotionnet.conventions import MODALITIES
from emolab.corpora.corpus import Corpus, SessionReference
from emolab.locks import holding
from emolab.names import UserError, contained
from emolab.serving.models import LoadedModel
from emolab.sessions.ingestion import screen
from emolab.sessions.manifest import canonical_json, write_atomically
from emolab.sessions.preparation import read_recordings
from emolab.sessions.protocol import normalised
from emolab.sessions.schema import Session
from emolab.sessions.settings import PrepareSettings
from emolab.sessions.shards import sha256, write_rows
from emolab.sessions.work import Finished, WorkFolder, session_schema
from emolab.training.recipe import fingerprint

RECORD = "recordings.json"
"""Written last: which recordings the shards hold and in which state they were, and the digests of the shards."""


def recorded_corpus(manifest: str, options: Mapping[str, Any], loaded: LoadedModel) -> Corpus:
    """The recordings that a table lists, as a corpus with the model's classes, steps and features.

    Args:
        options: of the extractors, as they were given when the model's data were prepared.

    Raises:
        UserError: the model was not trained on recordings, or with other extractors.
    """
    trained = {name: loaded.dataset.get("options", {}).get(name) for name in MODALITIES}
    if not all(isinstance(each, dict) and "extractor" in each for each in trained.values()):
        raise UserError(
            f"{loaded.kept.name} was trained on {loaded.dataset['corpus']}, which was not made from recordings: "
            "it can be asked about session shards alone"
        )
    fixed = {"class_names": list(loaded.classes), "step_seconds": loaded.dataset["step_seconds"]}
    corpus = PrepareSettings(corpus="media", manifest=manifest, options={**options, **fixed}).build()
    here = json.loads(canonical_json(corpus.options()))
    for name in MODALITIES:
        if here[name] != trained[name]:
            raise UserError(
                f"{name} features: the model was trained with {_difference(trained[name], here[name])}; "
                f"set options.{name}.* as they were when its data were prepared"
            )
    return corpus


def write_recordings(
    corpus: Corpus,
    output: Path,
    loaded: LoadedModel,
    *,
    shard_sessions: int,
    max_refused: float,
    stall_seconds: float,
    report: Callable[[str], None],
) -> Path:
    """Read all recordings and write them as shards; Ray must be connected.

    Running again finds whole shards of the same recordings and reads nothing; where a shard is missing or damaged, all
    recordings are read again, which gives the same bytes.

    Returns:
        The folder of the shards.

    Raises:
        UserError: more recordings than ``max_refused`` allows cannot be used.
    """
    references = corpus.references()
    key = {"options": corpus.options(), "sessions": [(each.session_id, corpus.input_key(each)) for each in references]}
    folder = contained(output.resolve(), f"recordings-{fingerprint({'options': corpus.options()})}", what="name")
    if _whole(folder, key):
        return folder
    work = WorkFolder(folder)
    screened = screen(corpus, references)
    with holding(work.root, what="preparation"):
        finished, _ = read_recordings(
            corpus, screened, work, folder, max_refused=max_refused, stall_seconds=stall_seconds, report=report
        )
        (folder / RECORD).unlink(missing_ok=True)  # first: it never speaks of shards that are not there
        for old in folder.glob("*.parquet"):
            old.unlink()
        chosen = [each for each in references if each.session_id in finished]
        shards: dict[str, str] = {}
        for start in range(0, len(chosen), shard_sessions):
            sessions = list(
                _sessions(work, finished, chosen[start : start + shard_sessions], scaled=loaded.scales_sessions)
            )
            path = folder / f"part-{start // shard_sessions:05d}.parquet"
            shards[path.name] = write_rows(path, sessions, session_schema(corpus))
        write_atomically(folder / RECORD, canonical_json({**key, "shards": shards}).encode())
        work.remove()
    report(f"{len(chosen)} of {len(references)} recordings read into {folder}")
    return folder


def _whole(folder: Path, key: Mapping[str, Any]) -> bool:
    """Whether a folder holds these recordings in the shards that were written, all of them and no other."""
    try:
        record = (folder / RECORD).read_text(encoding="utf-8")
        shards = {path.name: sha256(path) for path in folder.glob("*.parquet")}
    except (OSError, ValueError):
        return False
    return record == canonical_json({**key, "shards": shards})


def _sessions(
    work: WorkFolder, finished: Mapping[str, Finished], references: Sequence[SessionReference], *, scaled: bool
) -> Iterator[Session]:
    for reference in references:
        session = work.load(reference.session_id, finished[reference.session_id].sha256)
        yield normalised(session) if scaled else session


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first value that differs, as text."""
    key = next(key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key))
    return f"{key}={str(theirs.get(key))[:80]}, not {str(ours.get(key))[:80]}"
