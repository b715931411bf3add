"""Recorded sessions -> files of the work folder: a corpus's stages as pools of Ray Data actors.

What goes wrong inside one session stays with that session. A reason that its stage can give is a row like any other.
A process that dies (a decoder's crash, memory) takes the blocks it held with it; Ray Data leaves those out, and since
finished sessions lie on disk, the rest is read once more, one session at a time, before anything is blamed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.data.exceptions import ExecutionTimeoutError
from safetensors.numpy import load, save

from emolab.corpora.corpus import Arrays, Corpus, RefusedSessionError, SessionReference, Stage
from emolab.names import UserError, checked_name
from emolab.sessions.inventory import Refusal
from emolab.sessions.pools import Pool, cluster_size, plan_pools
from emolab.sessions.schema import Session
from emolab.sessions.work import Finished, WorkFolder

_LARGEST = 2**31 - 2**20
"""Bytes that one value of an Arrow binary column can hold, with room to spare."""

Row = dict[str, Any]


def ingest(
    corpus: Corpus,
    references: Sequence[SessionReference],
    work: WorkFolder,
    *,
    stall_seconds: float,
    report: Callable[[str], None],
) -> tuple[dict[str, Finished], list[Refusal]]:
    """Read every session that the work folder does not hold yet.

    Args:
        references: those that passed ``screen``.

    Returns:
        The finished sessions by id, and those that could not be read.

    Raises:
        UserError: a stage cannot start at all, the output cannot be written, or no session is finished for
            ``stall_seconds``.
    """
    refused: list[Refusal] = []
    finished = work.finished(corpus, references)
    pending = [reference for reference in references if reference.session_id not in finished]
    if finished:
        report(f"{len(finished)} sessions are finished already, {len(pending)} are left")
    for isolated in (False, True):
        if not pending:
            break
        reasons = _run(corpus, pending, work, isolated=isolated, stall_seconds=stall_seconds)
        finished |= work.finished(corpus, pending)
        refused += [_refusal(each, reasons[each.session_id]) for each in pending if each.session_id in reasons]
        pending = [each for each in pending if each.session_id not in finished and each.session_id not in reasons]
        if pending and not isolated:
            report(f"{len(pending)} sessions were lost with the process that read them; reading them one by one")
    died = "the process that read it died twice: its decoder crashed or memory ran out"
    return finished, refused + [_refusal(reference, died) for reference in pending]


def screen(corpus: Corpus, references: Sequence[SessionReference]) -> tuple[list[SessionReference], list[Refusal]]:
    """References whose ids can be used, and the others.

    An id that is listed twice is nobody's: where people list their own recordings (a corpus with stages) every
    session with that id is set aside, since nothing says which is meant. A published corpus that repeats an id is
    broken as a whole, or its reader is.

    Raises:
        UserError: a corpus without stages lists an id twice.
    """
    counts: dict[str, int] = {}
    for reference in references:
        counts[reference.session_id] = counts.get(reference.session_id, 0) + 1
    sound, refused = [], []
    for reference in references:
        times = counts[reference.session_id]
        try:
            checked_name(reference.session_id, what="session id")
            checked_name(reference.speaker_id, what="speaker id")
        except UserError as error:
            refused.append(_refusal(reference, str(error)))
            continue
        if times == 1:
            sound.append(reference)
        elif corpus.stages():
            refused.append(_refusal(reference, f"its id is listed {times} times, and only one session can have it"))
        else:
            raise UserError(f"session id {reference.session_id!r} is duplicated in corpus {corpus.name}")
    return sound, refused


def checked(corpus: Corpus, reference: SessionReference, session: Session) -> Session:
    """The session, if it keeps the contract and is the one that was asked for.

    Raises:
        UserError: it is not.
    """
    session.check(classes=len(corpus.classes))
    if session.session_id != reference.session_id or session.speaker_id != reference.speaker_id:
        raise UserError(f"corpus {corpus.name} returned {session.session_id!r} for {reference.session_id!r}")
    widths = {name: values.shape[1] for name, values in session.features.items()}
    if widths != dict(corpus.dimensions):
        raise UserError(f"session {session.session_id!r} has features {widths}, expected {dict(corpus.dimensions)}")
    return session


def _refusal(reference: SessionReference, reason: str) -> Refusal:
    return Refusal(session_id=reference.session_id, speaker_id=reference.speaker_id, reason=reason)


def _run(
    corpus: Corpus, pending: Sequence[SessionReference], work: WorkFolder, *, isolated: bool, stall_seconds: float
) -> dict[str, str]:
    """One pass over the sessions -> reasons of those that were refused. What was finished lies in the work folder."""
    reasons: dict[str, str] = {}
    try:
        with _tolerant(stall_seconds):
            for row in _pipeline(corpus, pending, work, isolated=isolated).iter_rows():
                if row["fatal"]:
                    raise UserError(row["fatal"])
                if row["reason"]:
                    reasons[pending[row["index"]].session_id] = row["reason"]
    except ExecutionTimeoutError:
        done = {*work.finished(corpus, pending), *reasons}
        left = [each.session_id for each in pending if each.session_id not in done]
        raise UserError(
            f"no session was finished for {stall_seconds:g} s; {len(left)} are left, and one of the first is stuck "
            f"({', '.join(left[:3])}): look at its files, then run again to continue, or with a larger stall_seconds"
        ) from None
    return reasons


@contextmanager
def _tolerant(stall_seconds: float) -> Iterator[None]:
    """Ray Data leaves blocks out whose process died, and waits longer than it does for a training run's data."""
    context, logger = DataContext.get_current(), logging.getLogger("ray.data")
    before = (context.max_errored_blocks, context.execution_no_progress_timeout_s, logger.level)
    context.max_errored_blocks, context.execution_no_progress_timeout_s = -1, stall_seconds
    logger.setLevel(logging.CRITICAL)  # a lost block is our business, not a page of traceback
    try:
        with warnings.catch_warnings():
            # Ray warns against arguments for retries before it has any other way to set them, and of pools that
            # a lost block left without work.
            warnings.filterwarnings("ignore", message=".*ray_remote_args.* is deprecated")
            warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")
            yield
    finally:
        context.max_errored_blocks, context.execution_no_progress_timeout_s = before[:2]
        logger.setLevel(before[2])


def _pipeline(
    corpus: Corpus, pending: Sequence[SessionReference], work: WorkFolder, *, isolated: bool
) -> ray.data.Dataset:
    stages = list(corpus.stages())
    cpus, gpus = cluster_size()
    # One session per block where something can crash or sessions are long; else enough blocks to keep all CPUs busy.
    blocks = len(pending) if stages or isolated else min(len(pending), max(8 * int(cpus), len(pending) // 64))
    items = [{"index": index, "arrays": b"", "reason": "", "fatal": ""} for index in range(len(pending))]
    data = ray.data.from_items(items, override_num_blocks=blocks)
    finish = _Finish(corpus, pending, work)
    if not stages:
        return data.map(_Loader(finish), max_retries=0)
    for stage, pool in zip(stages, plan_pools(stages, cpus=cpus, gpus=gpus), strict=True):
        last = finish if stage is stages[-1] else None
        data = data.map(
            _StageWorker,  # pyright: ignore[reportArgumentType]  # Ray builds it in the actor
            fn_constructor_args=(stage, pending, last),
            compute=_strategy(pool),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
            max_restarts=-1,
            max_task_retries=0,  # a session that crashes its process must not crash the next one at once
        )
    return data


def _strategy(pool: Pool) -> ActorPoolStrategy:
    return ActorPoolStrategy(size=pool.size, max_tasks_in_flight_per_actor=1)


class _CannotWriteError(Exception):
    """The output cannot take what was read: no fault of the session, and the next one would fare no better."""


class _Finish:
    """The last step of a session: assembled or loaded, checked, written."""

    def __init__(self, corpus: Corpus, references: Sequence[SessionReference], work: WorkFolder) -> None:
        self.corpus, self.references, self.work = corpus, references, work

    def assemble(self, index: int, arrays: Arrays) -> None:
        self._keep(self.references[index], self.corpus.assemble(self.references[index], arrays))

    def load(self, index: int) -> None:
        self._keep(self.references[index], self.corpus.load(self.references[index]))

    def _keep(self, reference: SessionReference, session: Session) -> None:
        session = checked(self.corpus, reference, session)
        try:
            self.work.add(self.corpus, reference, session)
        except OSError as error:
            raise _CannotWriteError(
                f"cannot write to {self.work.root}: {error.strerror or error}; run again to continue"
            ) from None


class _Loader:
    """Ray Data task for a corpus without stages: reference -> finished session."""

    def __init__(self, finish: _Finish) -> None:
        self.finish = finish

    def __call__(self, row: Row) -> Row:
        return _guarded(row, lambda: self.finish.load(int(row["index"])) or b"")


class _StageWorker:
    """Ray Data actor: one stage with all that it keeps in memory; the last one also finishes the session."""

    def __init__(self, stage: Stage, references: Sequence[SessionReference], finish: _Finish | None) -> None:
        self.references, self.finish, self.fatal = references, finish, ""
        try:
            self.run = stage.build()
        except Exception as error:  # an exception here would be retried; the job is to end with its message instead
            self.fatal = f"stage {stage.name} cannot start: {_said(error)}"

    def __call__(self, row: Row) -> Row:
        if self.fatal or row["fatal"]:
            return row | {"arrays": b"", "fatal": row["fatal"] or self.fatal}
        return row if row["reason"] else _guarded(row, lambda: self._arrays(row))

    def _arrays(self, row: Row) -> bytes:
        index = int(row["index"])
        known = load(row["arrays"]) if row["arrays"] else {}
        arrays = known | dict(self.run(self.references[index], known))
        if self.finish is not None:
            self.finish.assemble(index, arrays)
            return b""
        packed = save({name: np.ascontiguousarray(values) for name, values in arrays.items()})
        if len(packed) > _LARGEST:
            raise RefusedSessionError(f"it needs {len(packed) / 2**30:.1f} GiB between two stages; the limit is 2 GiB")
        return packed


def _guarded(row: Row, work: Callable[[], bytes]) -> Row:
    """The row with the work's arrays, or with the reason for which its session is set aside."""
    try:
        return row | {"arrays": work()}
    except _CannotWriteError as error:
        return row | {"arrays": b"", "fatal": str(error)}
    except Exception as error:  # whatever a damaged file raises in whichever library
        return row | {"arrays": b"", "reason": _said(error) or type(error).__name__}


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
