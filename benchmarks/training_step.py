"""The whole training step of Edu-EmotionNet on a CPU: this package's network against a textbook implementation.

    python benchmarks/training_step.py            # about two minutes
    python benchmarks/training_step.py --quick    # some seconds: smaller, fewer repetitions, says nothing certain

Paper's size (d=256, 4 layers, 4 heads, T=100), forward, loss of equation 10 and backward, without the optimizer, which
is the same for both. One thread, CPU time of this process, interleaved A B B A, minimum and median. Before anything is
timed, loss and every gradient must agree: the textbook network holds the very same parameters. Writes JSON with the
versions and the hardware, by default benchmarks/results/training_step.json.

The textbook network is what the equations say in PyTorch's own parts: nn.TransformerEncoder with a causal mask, one
attention call per ordered pair of modalities with the softmax written out, the importance estimator per modality, and
a feedback loop that slices z[:, t] and joins it with the last prediction. `sliced` is that; `unbound` is the same with
z.unbind(1), the honest fast baseline. Dropout is off for parity; it is timed with and without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from measurement import (
    arguments,
    environment,
    interleaved,
    largest_difference,
    minimum_and_median,
    ratio,
    write_record,
)
from torch import Tensor, nn

from edu_emotionnet.batch import Predictions, SessionBatch
from edu_emotionnet.encoder import CausalBlock, ModalityEncoder, sinusoidal_positions
from edu_emotionnet.losses import combined_loss
from edu_emotionnet.network import EduEmotionNet, EduEmotionNetConfig
from edu_emotionnet.zoo import build

DIMENSIONS = {"audio": 40, "visual": 512, "text": 768}
CLASSES = 4
KL_WEIGHT = 0.1
PARITY_SESSIONS = 2
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Largest difference allowed before timing, relative to the largest entry of a tensor."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch of B sessions of T steps."""

    sessions: int
    steps: int
    dropout: float
    rounds: int
    width: int = 256
    layers: int = 4


CASES = (
    Case(sessions=8, steps=100, dropout=0.0, rounds=3),
    Case(sessions=8, steps=100, dropout=0.2, rounds=3),
    Case(sessions=3, steps=300, dropout=0.0, rounds=3),
)
QUICK_CASES = (Case(sessions=4, steps=60, dropout=0.0, rounds=2, width=64, layers=2),)


class TextbookEncoder(nn.Module):
    """Equations 1-3 with nn.TransformerEncoder, on the parameters of one of our encoders."""

    def __init__(self, ours: ModalityEncoder, width: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.standardise, self.project, self.absent = ours.standardise, ours.project, ours.absent
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.dropout = nn.Dropout(dropout)
        self.transformer = nn.TransformerEncoder(layer, layers, norm=ours.norm, enable_nested_tensor=False)
        for theirs, block in zip(self.transformer.layers, ours.blocks, strict=True):
            assert isinstance(theirs, nn.TransformerEncoderLayer) and isinstance(block, CausalBlock)
            _share(theirs, block)

    def forward(self, features: Tensor, present: Tensor) -> Tensor:
        steps = features.shape[1]
        mask = present[..., None]
        h = torch.where(mask, self.project(self.standardise(features).masked_fill(~mask, 0.0)), self.absent)
        h = self.dropout(h + sinusoidal_positions(steps, h.shape[2], h.device))
        causal = nn.Transformer.generate_square_subsequent_mask(steps)
        return self.transformer(h, mask=causal, is_causal=True)


def _share(theirs: nn.TransformerEncoderLayer, block: CausalBlock) -> None:
    """The same parameter objects on both sides; PyTorch's query, key and value have a bias, ours have none."""
    attention = theirs.self_attn
    attention.in_proj_weight = block.query_key_value.weight
    nn.init.zeros_(attention.in_proj_bias).requires_grad_(False)
    attention.out_proj.weight, attention.out_proj.bias = block.output.weight, block.output.bias
    widen, narrow = block.feedforward[0], block.feedforward[-1]
    assert isinstance(widen, nn.Linear) and isinstance(narrow, nn.Linear)
    theirs.norm1, theirs.norm2, theirs.linear1, theirs.linear2 = (
        block.attention_norm, block.feedforward_norm, widen, narrow,
    )  # fmt: skip


class Textbook(nn.Module):
    """Equations 1-9 one after the other, on the parameters of an Edu-EmotionNet."""

    def __init__(self, ours: EduEmotionNet, *, unbound: bool) -> None:
        super().__init__()
        config = ours.config
        self.ours, self.unbound = [ours], unbound  # in a list: its parameters are not counted twice
        self.heads, self.dropout, self.attention_dropout = config.heads, ours.dropout, nn.Dropout(config.dropout)
        encoders = {}
        for name, encoder in ours.encoders.items():
            assert isinstance(encoder, ModalityEncoder)
            encoders[name] = TextbookEncoder(encoder, config.d_model, config.heads, config.layers, config.dropout)
        self.encoders = nn.ModuleDict(encoders)

    def forward(self, batch: SessionBatch) -> Predictions:
        (ours,) = self.ours
        assert ours.cmaa is not None and ours.mie is not None
        h = [encoder(batch.features[name], batch.present[name]) for name, encoder in self.encoders.items()]
        g = []
        for i, query in enumerate(h):
            views = [self.attend(query, key) for j, key in enumerate(h) if j != i]
            g.append(torch.stack(views).mean(0))
        scores = [ours.mie.score(F.relu(ours.mie.hidden(torch.cat(pair, dim=-1)))) for pair in zip(h, g, strict=True)]
        weights = torch.sigmoid(torch.cat(scores, dim=-1))
        weights = weights / weights.sum(-1, keepdim=True)
        z = sum((weights[..., i, None] * g[i] for i in range(len(g))), torch.zeros_like(g[0]))
        return Predictions(log_probabilities=self.feed_back(self.dropout(z)), confidence=weights)

    def attend(self, h: Tensor, other: Tensor) -> Tensor:
        """Equation 4 for one ordered pair."""
        cmaa, (sessions, steps, width) = self.ours[0].cmaa, h.shape
        assert cmaa is not None
        shape = (sessions, steps, self.heads, width // self.heads)
        q, k, v = (
            part(x).view(shape).transpose(1, 2) for part, x in ((cmaa.query, h), (cmaa.key, other), (cmaa.value, other))
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)
        later = torch.ones(steps, steps, dtype=torch.bool).triu(1)
        shares = self.attention_dropout(F.softmax(scores.masked_fill(later, -torch.inf), dim=-1))
        return (shares @ v).transpose(1, 2).reshape(sessions, steps, width)

    def feed_back(self, z: Tensor) -> Tensor:
        """Equations 8 and 9, step by step."""
        loop = self.ours[0].tfl
        assert loop.previous is not None
        weight = torch.cat([loop.fused.weight, loop.previous.weight], dim=1)
        classes = loop.classifier.out_features
        belief = z.new_full((len(z), classes), 1.0 / classes)
        slices: Sequence[Tensor] = z.unbind(1) if self.unbound else []
        steps = []
        for t in range(z.shape[1]):
            joined = torch.cat([slices[t] if self.unbound else z[:, t], belief], dim=-1)
            hidden = F.relu(F.linear(joined, weight, loop.fused.bias))
            steps.append(F.log_softmax(loop.classifier(hidden), dim=-1))
            belief = steps[-1].exp()
        return torch.stack(steps, dim=1)


def problem(
    case: Case, precision: torch.dtype = torch.float32
) -> tuple[dict[str, nn.Module], SessionBatch, EduEmotionNet]:
    """Three networks on one set of parameters, and a batch with gaps and ragged lengths."""
    torch.manual_seed(0)
    config = EduEmotionNetConfig(d_model=case.width, layers=case.layers, dropout=case.dropout)
    ours = build("edu_emotionnet", config, dimensions=DIMENSIONS, classes=CLASSES)
    assert isinstance(ours, EduEmotionNet)
    ours = ours.to(precision)
    lengths = torch.linspace(case.steps, case.steps // 2, case.sessions).long()
    real = torch.arange(case.steps) < lengths[:, None]
    labels = torch.randint(0, CLASSES, real.shape).masked_fill(~real, -100)
    batch = SessionBatch(
        features={
            name: torch.randn(case.sessions, case.steps, size).to(precision) for name, size in DIMENSIONS.items()
        },
        present={name: (torch.rand(real.shape) > 0.1) & real for name in DIMENSIONS},
        lengths=lengths,
        labels=labels,
    )
    networks = {"ours": ours} | {
        name: Textbook(ours, unbound=name == "unbound").to(precision) for name in ("sliced", "unbound")
    }
    return networks, batch, ours


def training_step(network: nn.Module, batch: SessionBatch, ours: EduEmotionNet) -> list[Tensor]:
    """The loss per labelled step, then the gradient of every parameter."""
    ours.zero_grad()
    losses = combined_loss(network(batch), batch)
    loss = losses.total(KL_WEIGHT) / losses.steps
    loss.backward()
    return [loss.detach(), *(value.grad for value in ours.parameters() if value.grad is not None)]


def parity(case: Case) -> dict[str, float]:
    """Largest relative difference of loss and gradients between ours and each baseline, without dropout.

    In double precision, where nothing but a mistake can differ; the loss in single precision as well.

    Raises:
        AssertionError: they compute something different, or a parameter has no gradient.
    """
    found = {}
    for precision, sessions in ((torch.float64, PARITY_SESSIONS), (torch.float32, case.sessions)):
        networks, batch, ours = problem(replace(case, dropout=0.0, sessions=sessions), precision)
        results = {name: [x.clone() for x in training_step(net, batch, ours)] for name, net in networks.items()}
        assert len(results["ours"]) == 1 + len(list(ours.parameters()))
        exact = precision == torch.float64
        for name in ("sliced", "unbound"):
            one, two = (results[key] if exact else results[key][:1] for key in ("ours", name))
            difference = largest_difference(one, two)
            assert difference <= TOLERANCES[precision], (name, precision, difference)
            found[f"{name}, {'loss and gradients' if exact else 'loss'}, {str(precision)[6:]}"] = difference
    return found


def measure(case: Case) -> dict[str, Any]:
    differences = parity(case)
    networks, batch, ours = problem(case)

    def timed(name: str) -> Callable[[], object]:
        return lambda: training_step(networks[name], batch, ours)

    seconds = interleaved({name: timed(name) for name in networks}, case.rounds)
    return {
        **asdict(case),
        "repetitions": 2 * case.rounds,
        "seconds": minimum_and_median(seconds),
        "ratio": {name: ratio(seconds, name, "ours") for name in ("sliced", "unbound")},
        "relative_difference": differences,
    }


def main(given: list[str] | None = None) -> None:
    options = arguments("Time the whole training step on one CPU thread.", "training_step", "smaller, fewer", given)
    torch.set_num_threads(1)
    results = []
    for case in QUICK_CASES if options.quick else CASES:
        result = measure(case)
        results.append(result)
        said = ", ".join(
            f"{found['min']:.2f}x (median {found['median']:.2f}x) over {name}"
            for name, found in result["ratio"].items()
        )
        print(f"B={case.sessions} T={case.steps} dropout={case.dropout}: {said}", flush=True)
    write_record(options.output, {"quick": options.quick, "environment": environment(), "cases": results})


if __name__ == "__main__":
    main()
