"""Sessions in memory and the plan by which an epoch visits them.

Sessions stay in the columnar memory that Arrow read or Ray's object store shares between processes; a batch copies
the rows it needs and nothing else. Which sessions make a global batch depends on the seed and the epoch alone, so a
run with W workers sees the batches of a run with one: each worker takes every W-th session of every batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from edu_emotionnet.batch import SessionBatch
from edu_emotionnet.conventions import IGNORED_LABEL, MODALITIES
from emolab.corpora.corpus import Split
from emolab.names import UserError
from emolab.sessions.manifest import Manifest
from emolab.sessions.schema import Session, check_steps
from emolab.sessions.shards import read_shard


@dataclass(frozen=True)
class Block:
    """Rows of one Arrow table; every array is laid out step after step, session after session."""

    session_ids: list[str]
    speaker_ids: list[str]
    starts: NDArray[np.int64]
    """(N + 1,) index of each session's first step; the last entry is the number of steps."""
    features: dict[str, NDArray[np.float32]]
    """Modality -> (steps, D_m), a view of the table's buffer."""
    present: dict[str, NDArray[np.bool_]]
    quality: dict[str, NDArray[np.float32]]
    labels: NDArray[np.int64]

    @classmethod
    def from_table(cls, table: pa.Table) -> Block:
        """View a table of the shard schema as arrays.

        Raises:
            UserError: no row; or, naming the session, a feature that is not finite although its modality is marked
                present, or lists that are not as long as its number of steps.
        """
        if not table.num_rows:
            raise UserError("there is no session in it")
        check_steps(table)
        table = table.combine_chunks()
        lengths = table.column("num_steps").to_numpy()
        steps = int(lengths.sum())

        def flat(column: str) -> NDArray[Any]:
            parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table.column(column).chunks]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        modalities = [name for name in MODALITIES if f"features.{name}" in table.column_names]
        block = cls(
            session_ids=table.column("session_id").to_pylist(),
            speaker_ids=table.column("speaker_id").to_pylist(),
            starts=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
            features={name: flat(f"features.{name}").reshape(steps, -1) for name in modalities},
            present={name: flat(f"present.{name}") for name in modalities},
            quality={name: flat(f"quality.{name}") for name in modalities if f"quality.{name}" in table.column_names},
            labels=flat("labels"),
        )
        block._refuse_non_finite()
        return block

    def _refuse_non_finite(self) -> None:
        for name, values in self.features.items():
            bad = ~np.isfinite(values).all(axis=1) & self.present[name]
            if bad.any():
                step = int(np.argmax(bad))
                session = int(np.searchsorted(self.starts, step, side="right")) - 1
                raise UserError(
                    f"session {self.session_ids[session]!r}: {name} features are not finite at step "
                    f"{step - int(self.starts[session])} although marked present"
                )


class SessionStore:
    """All sessions of one split, by position."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = [block for block in blocks if block.session_ids]
        self._rows = [(b, i) for b, block in enumerate(self.blocks) for i in range(len(block.session_ids))]
        ids = self.session_ids
        if len(set(ids)) != len(ids):
            raise UserError(f"session id {_first_duplicate(ids)!r} is duplicated")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.blocks[0].features) if self.blocks else ()

    @cached_property
    def session_ids(self) -> list[str]:
        return [name for block in self.blocks for name in block.session_ids]

    @cached_property
    def speaker_ids(self) -> list[str]:
        return [name for block in self.blocks for name in block.speaker_ids]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) steps per session."""
        return np.concatenate([np.diff(block.starts) for block in self.blocks] or [np.zeros(0, np.int64)])

    def batch(self, indices: Iterable[int]) -> SessionBatch:
        """The sessions at these positions, padded to the longest of them."""
        rows = [self._rows[index] for index in indices]
        spans = [(self.blocks[b], int(self.blocks[b].starts[i]), int(self.blocks[b].starts[i + 1])) for b, i in rows]
        shape = (len(spans), max(end - start for _, start, end in spans))
        labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
        widths = {name: values.shape[1] for name, values in self.blocks[0].features.items()}
        features = {name: np.zeros((*shape, width), np.float32) for name, width in widths.items()}
        present = {name: np.zeros(shape, np.bool_) for name in widths}
        for row, (block, start, end) in enumerate(spans):
            labels[row, : end - start] = block.labels[start:end]
            for name in widths:
                features[name][row, : end - start] = block.features[name][start:end]
                present[name][row, : end - start] = block.present[name][start:end]
        return SessionBatch(
            features={name: torch.from_numpy(values) for name, values in features.items()},
            present={name: torch.from_numpy(values) for name, values in present.items()},
            lengths=torch.tensor([end - start for _, start, end in spans]),
            labels=torch.from_numpy(labels),
        )

    def session(self, index: int, manifest: Manifest) -> Session:
        """One session on its own; its arrays are views of the block's."""
        b, i = self._rows[index]
        block = self.blocks[b]
        steps = slice(int(block.starts[i]), int(block.starts[i + 1]))
        return Session(
            session_id=block.session_ids[i],
            speaker_id=block.speaker_ids[i],
            corpus=manifest.corpus,
            step_seconds=manifest.step_seconds,
            features={name: values[steps] for name, values in block.features.items()},
            present={name: values[steps] for name, values in block.present.items()},
            labels=block.labels[steps],
            quality={name: values[steps] for name, values in block.quality.items()},
        )


def load_split(folder: Path, manifest: Manifest, split: Split) -> SessionStore:
    """Read one split in this process, every digest checked.

    Raises:
        UserError: a shard is missing, damaged, or holds something a model cannot be trained on.
    """
    return SessionStore([*split_blocks(folder, manifest, split)])


def split_blocks(folder: Path, manifest: Manifest, split: Split) -> Iterator[Block]:
    """The shards of a split one by one, as ``load_split`` reads them."""
    for shard in manifest.split_shards(split):
        try:
            yield Block.from_table(read_shard(folder, shard))
        except UserError as error:
            raise UserError(str(error) if shard.path in str(error) else f"shard {shard.path}: {error}") from None


def epoch_batches(
    lengths: NDArray[np.int64],
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    workers: int = 1,
    bucket_batches: int = 0,
) -> list[NDArray[np.int64]]:
    """Positions of the sessions in each batch of one worker, for one shuffled epoch.

    Every worker gets equally many batches; at the end of an epoch a worker's share of the smallest batch can be empty.

    Args:
        lengths: (N,) steps per session.
        batch_size: the global one.
        bucket_batches: sessions of so many batches are sorted by length before they are cut, and the batches are
            shuffled afterwards, so that a batch holds sessions of similar length; 0 cuts the shuffled order as it is.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    if not bucket_batches:
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    else:
        batches = _buckets(order, lengths, batch_size, bucket_batches, generator)
    return [batch[rank::workers] for batch in batches]


def _buckets(
    order: NDArray[np.int64],
    lengths: NDArray[np.int64],
    batch_size: int,
    bucket_batches: int,
    generator: np.random.Generator,
) -> list[NDArray[np.int64]]:
    batches = []
    for start in range(0, len(order), batch_size * bucket_batches):
        pool = order[start : start + batch_size * bucket_batches]
        pool = pool[np.argsort(lengths[pool], kind="stable")]  # equal lengths stay as they were shuffled
        full, rest = divmod(len(pool), batch_size)
        sizes = [batch_size] * full
        if rest:  # the short batch lies anywhere, or it would always hold the longest sessions
            sizes.insert(int(generator.integers(full + 1)), rest)
        batches += np.split(pool, np.cumsum(sizes)[:-1])
    return [batches[place] for place in generator.permutation(len(batches))]


def ordered_batches(sessions: int, batch_size: int, *, rank: int = 0, workers: int = 1) -> list[NDArray[np.int64]]:
    """Every session once, in order, dealt to the workers one by one: for evaluation, where shares may differ."""
    mine = np.arange(rank, sessions, workers)
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


def _first_duplicate(names: Sequence[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))
