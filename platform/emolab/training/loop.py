"""The one training loop: in the calling process, in a tuning trial, and in every worker of a DDP run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from edu_emotionnet.batch import SessionBatch
from edu_emotionnet.conventions import IGNORED_LABEL
from edu_emotionnet.losses import combined_loss
from emolab.checkpoint import Checkpoint, Checkpoints, optimizer_tensors, restore_optimizer
from emolab.names import UserError
from emolab.sessions.loading import SessionStore, epoch_batches, ordered_batches
from emolab.training.augmentation import add_noise, drop_steps
from emolab.training.averaging import averaged
from emolab.training.data import TrainingData
from emolab.training.metrics import EpochReport, Evaluation
from emolab.training.processes import Workers
from emolab.training.recipe import TrainingSettings

_NOTHING = np.zeros(0, dtype=np.int64)


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite (often: the learning rate is too high): that of a step, whose update is then not
    made, or that of the weights with which an epoch has ended, which are then neither saved nor kept."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands; with the weights and the optimizer's state, all that resuming needs."""

    epoch: int = 0
    best_macro_f1: float = -1.0
    best_epoch: int = 0
    reports: tuple[Mapping[str, float | None], ...] = ()
    finished: bool = False

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Out of a checkpoint's JSON."""
        return cls(**{**state, "reports": tuple(state["reports"])})


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A trained model: the weights to keep and how they came about."""

    weights: Mapping[str, Tensor]
    progress: Progress


def fit(
    model: nn.Module,
    wrapped: nn.Module,
    data: TrainingData,
    settings: TrainingSettings,
    *,
    workers: Workers,
    checkpoints: Checkpoints | None = None,
) -> Generator[EpochReport, None, Outcome]:
    """Train until the epochs are done or validation macro-F1 has stopped rising.

    A generator: it yields after every epoch, so that whoever drives it may report, prune or stop in between.

    Args:
        model: the bare module, whose weights are saved.
        wrapped: the module that is called: the same one, or its DDP wrapper.

    Raises:
        UserError: the checkpoints belong to another model, or the workers do not see the same one.
        NonFiniteLossError: before the update that a non-finite loss would have made, or after the epoch whose last
            update has spoiled the weights; on every worker alike.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    average = averaged(model, settings.ema_decay)
    best, progress = _resume(model, average, optimizer, checkpoints, workers)
    found = model if average is None else average.module  # what this training is to give
    while not progress.finished:
        started = time.perf_counter()
        losses = _train_epoch(wrapped, average, optimizer, data, settings, progress.epoch, workers)
        evaluation = evaluate(found, data.validation, settings, workers=workers) if len(data.validation) else None
        seconds = time.perf_counter() - started
        speed = len(data.train) / seconds
        _refuse_non_finite(found, data, settings, progress.epoch + 1, evaluation, workers)
        progress = advance(progress, settings, losses, evaluation, sessions_per_second=speed, workers=workers.count)
        if progress.best_epoch == progress.epoch or settings.selection == "last":
            best = _copy(found.state_dict())
        if checkpoints is not None and workers.rank == 0:
            checkpoints.save(progress.epoch, _checkpoint(model, average, best, optimizer, progress))
        yield EpochReport(**progress.reports[-1])  # pyright: ignore[reportArgumentType]  # its own asdict
    return Outcome(weights=best, progress=progress)


def run_to_end(epochs: Generator[EpochReport, None, Outcome], report: Callable[[EpochReport], None]) -> Outcome:
    """Drive ``fit`` to its end, reporting every epoch."""
    while True:
        try:
            report(next(epochs))
        except StopIteration as end:
            return end.value


def _train_epoch(
    model: nn.Module,
    average: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
    data: TrainingData,
    settings: TrainingSettings,
    epoch: int,
    workers: Workers,
) -> Tensor:
    """One pass over the training split -> (3,) loss, cross-entropy and smoothness per labelled step."""
    model.train()
    # Random streams are a function of (seed, epoch, rank), so a resumed epoch draws what the unbroken one drew.
    torch.manual_seed(mix_seed(settings.seed, epoch + 1, workers.rank))
    batches = epoch_batches(
        data.train.lengths,
        settings.batch_size,
        seed=settings.seed,
        epoch=epoch,
        rank=workers.rank,
        workers=workers.count,
        bucket_batches=settings.length_buckets,
    )
    sums = torch.zeros(4, dtype=torch.float64, device=workers.device)
    for step, indices in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(epoch, step, len(batches))
        batch = training_batch(data, indices, settings, epoch).to(workers.device)
        losses = combined_loss(model(batch), batch)
        total = losses.total(settings.kl_weight)
        shared = workers.sum(
            torch.stack(
                [total.detach(), losses.cross_entropy.detach(), losses.smoothness.detach(), losses.steps]
            ).double()
        )
        if not torch.isfinite(shared[0]):
            raise NonFiniteLossError(f"non-finite loss at epoch {epoch + 1}, step {step + 1}")
        optimizer.zero_grad(set_to_none=True)
        # DDP averages gradients over workers; times the count over all labelled steps, that is the global mean.
        (total * (workers.count / shared[3].clamp_min(1.0)).to(total.dtype)).backward()
        if settings.gradient_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        if average is not None:
            average.update_parameters(model)
        sums += shared
    return sums[:3] / sums[3].clamp_min(1.0)


def _refuse_non_finite(
    model: nn.Module,
    data: TrainingData,
    settings: TrainingSettings,
    epoch: int,
    evaluation: Evaluation | None,
    workers: Workers,
) -> None:
    """Refuse what an epoch's last update has made of the weights, which no later step of the epoch has met; without
    validation data, by one training batch of every worker.

    Raises:
        NonFiniteLossError: on every worker alike.
    """
    of = "validation " if evaluation is not None else ""
    met = evaluation or evaluate(model, data.train, settings, workers=workers, batches=1)
    if not math.isfinite(met.loss):
        raise NonFiniteLossError(f"non-finite {of}loss after epoch {epoch}")


@torch.no_grad()
def evaluate(
    model: nn.Module, store: SessionStore, settings: TrainingSettings, *, workers: Workers, batches: int | None = None
) -> Evaluation:
    """Score every session once. Counts are summed over the workers, whose shares may differ in size.

    Args:
        batches: only the first so many of every worker.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=workers.device)
    confusion = torch.zeros((), dtype=torch.int64, device=workers.device)
    shares = ordered_batches(len(store), settings.batch_size, rank=workers.rank, workers=workers.count)
    for indices in shares[:batches] or [_NOTHING]:
        batch = _share(store, indices).to(workers.device)
        predictions = model(batch)
        losses = combined_loss(predictions, batch)
        sums += torch.stack([losses.total(settings.kl_weight), losses.cross_entropy, losses.steps]).double()
        confusion = confusion + confusion_counts(predictions.log_probabilities, batch)
    confusion = workers.sum(confusion)
    loss, cross_entropy, steps = workers.sum(sums).tolist()
    return Evaluation(
        confusion=confusion.cpu().numpy(),
        loss=loss / max(1.0, steps),
        cross_entropy=cross_entropy / max(1.0, steps),
    )


def confusion_counts(log_probabilities: Tensor, batch: SessionBatch) -> Tensor:
    """(K, K) int64 counts over the labelled steps of a batch, rows true, columns predicted."""
    classes = log_probabilities.shape[-1]
    pairs = batch.labels * classes + log_probabilities.argmax(-1)
    return torch.bincount(pairs[batch.labelled], minlength=classes * classes).view(classes, classes)


def training_batch(
    data: TrainingData, indices: NDArray[np.int64], settings: TrainingSettings, epoch: int
) -> SessionBatch:
    """The sessions at these positions as an epoch's training sees them, with what the recipe takes away or adds."""
    batch = _share(data.train, indices)
    ids = [data.train.session_ids[index] for index in indices]
    if settings.modality_dropout and ids:
        batch = drop_steps(batch, ids, share=settings.modality_dropout, seed=settings.seed, epoch=epoch)
    if settings.feature_noise and ids:
        std = data.manifest.statistics.std
        batch = add_noise(batch, ids, std=std, largest=settings.feature_noise, seed=settings.seed, epoch=epoch)
    return batch


def _share(store: SessionStore, indices: NDArray[np.int64]) -> SessionBatch:
    """A worker's share of a batch. An empty share becomes one step without label, which adds nothing to any sum:
    the worker must still take part in the collective operations."""
    if len(indices):
        return store.batch(indices)
    batch = store.batch([0])
    return replace(batch, labels=torch.full_like(batch.labels, IGNORED_LABEL), lengths=torch.ones_like(batch.lengths))


def advance(
    progress: Progress,
    settings: TrainingSettings,
    losses: Tensor,
    evaluation: Evaluation | None,
    *,
    sessions_per_second: float,
    workers: int = 1,
) -> Progress:
    """Where a run stands after one more epoch.

    Args:
        losses: (3,) loss, cross-entropy and smoothness per labelled step.
    """
    epoch = progress.epoch + 1
    score = evaluation.macro_f1 if evaluation is not None else None
    improved = score is not None and score > progress.best_macro_f1
    best, best_epoch = (score, epoch) if improved else (progress.best_macro_f1, progress.best_epoch)
    waited = epoch - best_epoch
    finished = epoch >= settings.epochs or (settings.selection == "best" and waited >= settings.patience)
    loss, cross_entropy, smoothness = losses.tolist()
    report = EpochReport(
        epoch=epoch,
        train_loss=loss,
        train_cross_entropy=cross_entropy,
        train_smoothness=smoothness,
        validation_loss=evaluation.loss if evaluation else None,
        validation_cross_entropy=evaluation.cross_entropy if evaluation else None,
        validation_accuracy=evaluation.accuracy if evaluation else None,
        validation_macro_f1=score,
        best_macro_f1=best if best is not None and best >= 0 else None,
        best_epoch=best_epoch,
        kept_macro_f1=score if settings.selection == "last" else best if best is not None and best >= 0 else None,
        learning_rate=settings.learning_rate_at(epoch - 1, 0, 1),
        sessions_per_second=sessions_per_second,
        finished=finished,
        workers=workers,
    )
    return Progress(
        epoch=epoch,
        best_macro_f1=best if best is not None else -1.0,
        best_epoch=best_epoch,
        reports=(*progress.reports, asdict(report)),
        finished=finished,
    )


def _checkpoint(
    model: nn.Module,
    average: AveragedModel | None,
    best: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> Checkpoint:
    tensors = {"model": model.state_dict(), "best": best, "optimizer": optimizer_tensors(optimizer)}
    if average is not None:
        tensors["average"] = average.state_dict()
    return Checkpoint(tensors=tensors, state=asdict(progress))


def _resume(
    model: nn.Module,
    average: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
    checkpoints: Checkpoints | None,
    workers: Workers,
) -> tuple[Mapping[str, Tensor], Progress]:
    newest = checkpoints.newest() if checkpoints is not None else None
    if checkpoints is not None and workers.count > 1:
        _require_one(newest, checkpoints.place, workers)
    if newest is None:
        return _copy(model.state_dict()), Progress()
    try:
        model.load_state_dict(newest.tensors["model"])
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoints of this run belong to another model ({first}); choose another name") from None
    restore_optimizer(optimizer, newest.tensors["optimizer"])
    if average is not None and "average" in newest.tensors:  # else it begins at the next step, with these weights
        average.load_state_dict(newest.tensors["average"])
    return newest.tensors["best"], Progress.from_state(newest.state)


def _require_one(newest: Checkpoint | None, place: str, workers: Workers) -> None:
    """Refuse to go on from different checkpoints. Over a shared folder a worker may not see yet what another has
    written, and gradients of different weights would be averaged without a sign.

    Raises:
        UserError: on every worker alike.
    """
    seen = (newest.state["epoch"], int.from_bytes(newest.digest()[:7])) if newest is not None else (0, 0)
    least, most = workers.spread(torch.tensor(seen, device=workers.device))
    if not torch.equal(least, most):
        raise UserError(
            f"the workers would go on from different checkpoints in {place} (after epochs {int(least[0])} and "
            f"{int(most[0])}): make sure that all nodes share this folder, then run the same command again"
        )


def _copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in weights.items()}


def mix_seed(*parts: int) -> int:
    """One 64-bit seed out of several small numbers (splitmix64), equal on every platform."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state
