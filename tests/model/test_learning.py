"""Every model can learn: sixteen sessions by heart."""

import pytest
import torch
from tests.model.random_batches import CLASSES, DIMENSIONS, NAMES, small_model

from edu_emotionnet.batch import SessionBatch
from edu_emotionnet.losses import combined_loss


def sessions_with_constant_blocks() -> SessionBatch:
    """Sixteen sessions of random features; a random class every four steps."""
    draw = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, CLASSES, (16, 3), generator=draw)
    return SessionBatch(
        features={m: torch.randn(16, 12, size, generator=draw) for m, size in DIMENSIONS.items()},
        present={m: torch.rand(16, 12, generator=draw) < 0.9 for m in DIMENSIONS},
        lengths=torch.full((16,), 12),
        labels=blocks.repeat_interleave(4, dim=1),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_model_overfits_sixteen_sessions(name: str) -> None:
    batch = sessions_with_constant_blocks()
    model = small_model(name, dtype=torch.float32, d_model=32, heads=4).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    accuracy = 0.0
    for _ in range(400):
        predictions = model(batch)
        accuracy = (predictions.log_probabilities.argmax(-1) == batch.labels).float().mean().item()
        if accuracy > 0.95:
            break
        sums = combined_loss(predictions, batch)
        optimiser.zero_grad()
        (sums.total(kl_weight=0.01) / sums.steps).backward()
        optimiser.step()
    assert accuracy > 0.95
