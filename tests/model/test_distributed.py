"""Two processes that share a batch learn what one process learns from the whole of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.model.random_batches import NAMES, random_batch, small_model
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from edu_emotionnet.batch import SessionBatch
from edu_emotionnet.conventions import IGNORED_LABEL
from edu_emotionnet.losses import combined_loss

WORKERS = 2
UPDATES = 3


def share(batch: SessionBatch, rank: int) -> SessionBatch:
    rows = slice(rank, None, WORKERS)
    return SessionBatch(
        features={m: value[rows] for m, value in batch.features.items()},
        present={m: mask[rows] for m, mask in batch.present.items()},
        lengths=batch.lengths[rows],
        labels=batch.labels[rows],
    )


def global_batch(update: int) -> SessionBatch:
    """Ragged, so that shares hold different numbers of labels; in the last one, worker 1 has none."""
    batch = random_batch(seed=update, sessions=8)
    if update < UPDATES - 1:
        return batch
    labels = batch.labels.clone()
    labels[1::WORKERS] = IGNORED_LABEL
    return replace(batch, labels=labels)


def train(model: nn.Module, wrapped: nn.Module, rank: int | None) -> dict[str, torch.Tensor]:
    """Weights and buffers after a few updates; the loss is divided by the labelled steps of all workers."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    wrapped.train()
    for update in range(UPDATES):
        batch = global_batch(update)
        steps = batch.labelled.sum()
        mine = batch if rank is None else share(batch, rank)
        scale = 1 if rank is None else WORKERS  # gradients are averaged over workers afterwards
        optimiser.zero_grad()
        (combined_loss(wrapped(mine), mine).total(kl_weight=0.3) * scale / steps).backward()
        optimiser.step()
    return {key: value.clone() for key, value in model.state_dict().items()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORKERS)
    states = {}
    for name in NAMES:
        model = small_model(name)
        states[name] = train(model, DistributedDataParallel(model), rank)
    torch.save(states, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def distributed_states(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """State of every model on both workers; one start of the processes for all models."""
    folder = tmp_path_factory.mktemp("processes")
    spawn(worker, args=(str(folder),), nprocs=WORKERS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORKERS)]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one(name: str, distributed_states: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    model = small_model(name)
    untrained = {key: value.clone() for key, value in model.state_dict().items()}
    alone = train(model, model, rank=None)
    assert any(not torch.equal(untrained[key], alone[key]) for key in alone)
    for states in distributed_states:
        for key, expected in alone.items():
            scale = expected.abs().max().item() if expected.is_floating_point() else 0.0
            torch.testing.assert_close(states[name][key], expected, rtol=1e-5, atol=1e-5 * scale)
