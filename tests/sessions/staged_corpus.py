"""A corpus that behaves as recordings do: a folder of files, two stages that cost something, and files that are bad."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emolab.corpora.corpus import Arrays, Corpus, RefusedSessionError, SessionReference, Stage
from emolab.sessions.manifest import write_atomically
from emolab.sessions.schema import Session

DIMENSIONS = {"audio": 5, "visual": 3, "text": 2}


def write_recordings(folder: Path, sessions: int, *, bad: Mapping[int, str] | None = None) -> Path:
    """One file per session; its content is what happens when it is read."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(sessions):
        (folder / f"s{index:03d}").write_text((bad or {}).get(index, "sound"))
    return folder


@dataclass(frozen=True, kw_only=True)
class StagedCorpus(Corpus):
    """Every file of the folder is a session of one of ten speakers."""

    name = "staged"
    source: str
    staged: bool = True
    seconds: float = 0.0
    """That the first stage takes for each session."""
    gap: int = 0
    """Steps at which every fourth session lacks sound, in one stretch."""
    step_seconds: float = 0.5
    starts: bool = True
    """Whether the second stage finds its weights."""
    repeated: bool = False
    """Whether the list names its first session twice."""

    @property
    def classes(self) -> tuple[str, ...]:
        return ("low", "high")

    @property
    def dimensions(self) -> dict[str, int]:
        return dict(DIMENSIONS)

    def references(self) -> list[SessionReference]:
        names = sorted(path.name for path in (Path(self.source)).iterdir())
        names += names[:1] if self.repeated else []
        return [SessionReference(session_id=name, speaker_id=f"p{int(name[1:]) % 10}") for name in names]

    def stages(self) -> list[Stage]:
        if not self.staged:
            return []
        return [
            Stage(name="decode", build=_Builder(self, "decode")),
            Stage(name="encode", build=_Builder(self, "encode"), uses_gpu=True),
        ]

    def load(self, reference: SessionReference) -> Session:
        arrays: dict[str, Any] = {}
        for build in (_Builder(self, "decode"), _Builder(self, "encode")):
            arrays |= build()(reference, arrays)
        return self.assemble(reference, arrays)

    def assemble(self, reference: SessionReference, arrays: Arrays) -> Session:
        index = int(reference.session_id[1:])
        features = {name: np.asarray(arrays[name], np.float32) for name in DIMENSIONS}
        steps = len(features["audio"])
        present = {name: np.ones(steps, bool) for name in DIMENSIONS}
        if self.gap and index % 4 == 0:
            present["audio"][1 : 1 + self.gap] = False
        return Session(
            session_id=reference.session_id,
            speaker_id=reference.speaker_id,
            corpus=self.name,
            step_seconds=self.step_seconds,
            features=features,
            present=present,
            labels=np.full(steps, int(index % 3 == 0), np.int64),
        )

    def options(self) -> dict[str, Any]:
        return {"gap": self.gap}

    def input_key(self, reference: SessionReference) -> str:
        return str((Path(self.source) / reference.session_id).stat().st_mtime_ns)

    def provenance(self) -> dict[str, Any]:
        return {"source": "made by the tests"}

    def annotation_summary(self) -> dict[str, Any]:
        return {"kappa": 0.71, "unmapped": {"surprised": 3}}


@dataclass(frozen=True)
class _Builder:
    corpus: StagedCorpus
    stage: str

    def __call__(self) -> Any:
        if self.stage == "encode" and not self.corpus.starts:
            raise RefusedSessionError("weights are missing: put them into weights/")
        return self._decode if self.stage == "decode" else self._encode

    def _decode(self, reference: SessionReference, arrays: Arrays) -> dict[str, NDArray[Any]]:
        path = Path(self.corpus.source) / reference.session_id
        with (path.parent.parent / "read.log").open("a") as log:
            log.write(f"{reference.session_id}\n")
        write_atomically(path.parent.parent / "decoder", str(os.getpid()).encode())
        content = path.read_text()
        time.sleep(self.corpus.seconds)
        if content == "truncated":
            raise RefusedSessionError(f"{path.name} is truncated")
        if content == "strange":
            raise KeyError("no such stream")
        if content == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if content == "hang":
            time.sleep(30)  # nothing ends a task of Ray Data: it keeps its CPU from later tests
        if content == "memory":
            raise MemoryError
        index = int(reference.session_id[1:])
        signal_ = np.random.default_rng(index).normal(3.0, 2.0, (6 + index % 5, 10))
        if content == "nan":
            signal_[2, 0] = np.nan
        return {"signal": signal_}

    def _encode(self, reference: SessionReference, arrays: Arrays) -> dict[str, NDArray[Any]]:
        first, second, third = np.split(np.asarray(arrays["signal"]), (5, 8), axis=1)
        return {"audio": first, "visual": second, "text": third}
