"""How long training will take, from a few real steps."""

from __future__ import annotations

import time
from pathlib import Path

import optuna
import torch

from edu_emotionnet.losses import combined_loss
from emolab.sessions.loading import SessionStore, epoch_batches
from emolab.training.averaging import averaged
from emolab.training.data import load_training_data
from emolab.training.recipe import TrainSettings
from emolab.training.train import training_device
from emolab.tuning.space import SHAPE_FREE, SearchSpace

SECONDS = 10.0
"""No further step is timed for a configuration once this long has passed."""


def sample_configurations(space: SearchSpace, count: int) -> list[dict[str, object]]:
    """Draws that stand for the space: one where no parameter changes the work of a step, else ``count``."""
    if all(key in SHAPE_FREE for key in space.parameters):
        count = 1
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.draw(study.ask()) for _ in range(count)]


def epoch_seconds(settings: TrainSettings, *, steps: int) -> float:
    """Seconds of one epoch, training and validation, estimated from at most ``steps`` steps of each."""
    data = load_training_data(Path(settings.data))
    device = training_device(settings)
    model = settings.model.build(data.manifest).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    averages = averaged(model, settings.training.ema_decay)

    def train_step(store: SessionStore, indices: object) -> None:
        batch = store.batch(indices).to(device)  # pyright: ignore[reportArgumentType]  # positions, as planned
        losses = combined_loss(model(batch), batch)
        optimizer.zero_grad(set_to_none=True)
        losses.total(settings.training.kl_weight).backward()
        optimizer.step()
        if averages is not None:
            averages.update_parameters(model)
        float(losses.steps)  # a GPU has finished before its answer is here

    def validation_step(store: SessionStore, indices: object) -> None:
        with torch.no_grad():
            batch = store.batch(indices).to(device)  # pyright: ignore[reportArgumentType]
            float(combined_loss(model(batch), batch).steps)

    size = settings.training.batch_size
    return _extrapolated(train_step, data.train, size, steps) + _extrapolated(
        validation_step, data.validation, size, steps
    )


def _extrapolated(step: object, store: SessionStore, batch_size: int, steps: int) -> float:
    """Seconds for all sessions, from the mean time per session of some batches after a first, untimed one."""
    batches = epoch_batches(store.lengths, batch_size, seed=0, epoch=0)
    step(store, batches[0])  # pyright: ignore[reportCallIssue]
    sessions, started = 0, time.perf_counter()
    for indices in (batches[1:] or batches)[:steps]:
        step(store, indices)  # pyright: ignore[reportCallIssue]
        sessions += len(indices)
        if time.perf_counter() - started > SECONDS:
            break
    return (time.perf_counter() - started) / sessions * len(store)
