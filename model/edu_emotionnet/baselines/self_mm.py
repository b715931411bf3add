"""Self-MM (Yu et al., AAAI 2021): auxiliary unimodal tasks whose labels the model generates for itself.

As published: a fused head and one head per modality, each a ReLU projection and a linear layer; the Unimodal
Label Generation Module (ULGM) compares the distance of a representation to the class centres in the fused and
in the unimodal space, delta = (d_other - d_own) / (d_own + eps) with d the Euclidean distance over
sqrt(width), and shifts the human label y_f by both rules of the paper, y_s = 0.5 (delta_s / delta_f) y_f +
0.5 (y_f + delta_s - delta_f); a modality's loss weighs tanh |y_s - y_f|; generated labels are used only after
a first epoch.

Adaptations, since Self-MM regresses one sentiment score per clip:
- one label per step and K classes: y_f is one-hot, delta is taken per class (the own centre against the mean
  distance to the others; two classes give the published form), the shifted label is clipped to [0, 1] and
  normalised, |y_s - y_f| is the L1 distance of distributions and the unimodal loss a cross-entropy against
  y_s;
- no history per sample: the paper keeps every sample's features and running label ((n-1)/(n+1) momentum).
  Here the label is generated afresh at every update and the smoothing lies in the centroids, running means in
  which a step counts for a class as much as its label says (human label in the fused space, generated ones in
  the unimodal spaces). State is therefore of fixed size, lives in buffers (every checkpoint has it), and
  batch sums are added over all processes before they are used, so that every process holds the same
  centroids;
- "from the second epoch" becomes: after `warm_up_updates` updates, once every class has been seen in both
  spaces;
- a step at which a modality is absent neither moves that modality's centroids nor trains its head;
- the encoders are the full model's in place of BERT and LSTMs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from edu_emotionnet.baselines.layers import ModalityEncoders, check_options
from edu_emotionnet.batch import Predictions, SessionBatch
from edu_emotionnet.conventions import FeatureStatistics
from edu_emotionnet.network import EncoderConfig
from edu_emotionnet.zoo import ModelEntry, register


@dataclass(frozen=True, kw_only=True)
class SelfMMConfig(EncoderConfig):
    """Encoders as in the full model; the widths of the heads, the momentum and the warm-up are chosen here."""

    fused_width: int = 128
    """Width of the fused representation."""
    unimodal_width: int = 32
    """Width of each unimodal representation."""
    centroid_momentum: float = 0.9
    """Share of the old centroid in an update."""
    warm_up_updates: int = 30
    """Training batches before generated labels are used; about an epoch of 3,500 sessions by 128."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, at_least_one=("fused_width", "unimodal_width"))
        if not 0.0 <= self.centroid_momentum < 1.0:
            raise ValueError(f"centroid_momentum must lie in [0, 1), got {self.centroid_momentum}")
        if self.warm_up_updates < 0:
            raise ValueError(f"warm_up_updates must not be negative, got {self.warm_up_updates}")


class Centroids(nn.Module):
    """One centre per class in one representation space, the same on every process."""

    centre: Tensor
    seen: Tensor

    def __init__(self, classes: int, width: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(classes, width))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))

    def relative_distance(self, representation: Tensor) -> Tensor:
        """delta of every class, (B, T, width) -> (B, T, K): positive where the class's own centre is near."""
        # Not cdist: its matrix-product form loses the digits that a ratio of distances needs.
        difference = representation[..., None, :] - self.centre
        distance = torch.linalg.vector_norm(difference, dim=-1) / math.sqrt(self.centre.shape[1])
        others = (distance.sum(-1, keepdim=True) - distance) / max(distance.shape[-1] - 1, 1)
        return (others - distance) / (distance + 1e-6)

    def update(self, representation: Tensor, weight: Tensor) -> None:
        """Move the centres to the mean of (B, T, width) under weights (B, T, K), summed over all processes.

        A collective call: every process must make it, also one whose batch has no label.
        """
        sums = torch.einsum("btk,btd->kd", weight, representation)
        totals = torch.cat([sums, weight.sum((0, 1))[:, None]], dim=1).to(self.centre.dtype)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(totals)
        sums, mass = totals[:, :-1], totals[:, -1:]
        mean = sums / mass.clamp_min(1e-6)
        moved = torch.lerp(mean, self.centre, self.momentum)
        fresh = torch.where(self.seen[:, None], moved, mean)
        observed = mass > 1e-6
        self.centre.copy_(torch.where(observed, fresh, self.centre))
        self.seen.logical_or_(observed[:, 0])


def generated_label(human: Tensor, fused: Tensor, unimodal: Tensor) -> Tensor:
    """y_s (B, T, K) from the one-hot human label and the relative distances in both spaces, (B, T, K)."""
    ratio = unimodal / torch.where(fused.abs() < 1e-6, torch.full_like(fused, 1e-6), fused)
    shifted = (0.5 * ratio * human + 0.5 * (human + unimodal - fused)).clamp(0.0, 1.0)
    mass = shifted.sum(-1, keepdim=True)
    return torch.where(mass > 1e-3, shifted / mass.clamp_min(1e-3), human)


class SelfMM(nn.Module):
    """Causal encoders -> fused head (the prediction) and unimodal heads (training only)."""

    updates: Tensor

    def __init__(
        self,
        config: SelfMMConfig,
        *,
        dimensions: Mapping[str, int],
        classes: int,
        statistics: FeatureStatistics,
    ) -> None:
        super().__init__()
        self.modalities = tuple(dimensions)
        self.classes = classes
        self.warm_up_updates = config.warm_up_updates
        self.encoders = ModalityEncoders(config, dimensions=dimensions, statistics=statistics)
        self.dropout = nn.Dropout(config.dropout)
        self.fused = nn.Linear(len(dimensions) * config.d_model, config.fused_width)
        self.fused_classifier = nn.Linear(config.fused_width, classes)
        self.fused_centroids = Centroids(classes, config.fused_width, config.centroid_momentum)
        self.unimodal = nn.ModuleList(nn.Linear(config.d_model, config.unimodal_width) for _ in dimensions)
        self.unimodal_classifiers = nn.ModuleList(nn.Linear(config.unimodal_width, classes) for _ in dimensions)
        self.unimodal_centroids = nn.ModuleList(
            Centroids(classes, config.unimodal_width, config.centroid_momentum) for _ in dimensions
        )
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: SessionBatch) -> Predictions:
        h = [self.dropout(x) for x in self.encoders(batch)]
        fused = F.relu(self.fused(torch.cat(h, dim=-1)))
        unimodal = [F.relu(project(x)) for project, x in zip(self.unimodal, h, strict=True)]
        return Predictions(
            log_probabilities=F.log_softmax(self.fused_classifier(fused), dim=-1),
            auxiliary_loss=self.unimodal_loss(batch, fused, unimodal),
        )

    def unimodal_loss(self, batch: SessionBatch, fused: Tensor, unimodal: list[Tensor]) -> Tensor:
        """Sum over labelled steps and modalities of tanh|y_s - y_f| CE(y_s, .); in training, moves the state.

        Zero during warm-up, where y_s is y_f; the heads still receive a (zero) gradient then, as gradient
        averaging over processes requires.
        """
        # All-zero rows on unlabelled steps: they weigh nothing below, without an index of varying size.
        human = F.one_hot(batch.labels.clamp_min(0), self.classes).to(fused.dtype)
        human = human * batch.labelled[..., None]
        generated = self.generate(batch, human, fused.detach(), [x.detach() for x in unimodal])
        loss = fused.new_zeros(())
        for i, name in enumerate(self.modalities):
            weight = torch.tanh((generated[i] - human).abs().sum(-1))
            log_p = F.log_softmax(self.unimodal_classifiers[i](unimodal[i]), dim=-1)
            cross_entropy = -(generated[i] * log_p).sum(-1)
            counted = batch.labelled & batch.present[name]
            loss = loss + (weight * cross_entropy * counted).sum()
        return loss

    @torch.no_grad()
    def generate(self, batch: SessionBatch, human: Tensor, fused: Tensor, unimodal: list[Tensor]) -> list[Tensor]:
        """y_s of every modality, (B, T, K) each, from the centroids as they were before this batch."""
        fused_distance = self.fused_centroids.relative_distance(fused)
        warm = (self.updates >= self.warm_up_updates) & self.fused_centroids.seen.all()
        labels = []
        for centroids, x in zip(self.unimodal_centroids, unimodal, strict=True):
            assert isinstance(centroids, Centroids)
            label = generated_label(human, fused_distance, centroids.relative_distance(x))
            labels.append(torch.where(warm & centroids.seen.all(), label, human) * batch.labelled[..., None])
        if self.training:
            self.fused_centroids.update(fused, human)
            for name, centroids, x, label in zip(
                self.modalities, self.unimodal_centroids, unimodal, labels, strict=True
            ):
                assert isinstance(centroids, Centroids)
                centroids.update(x, label * batch.present[name][..., None])
            self.updates += 1
        return labels


register("self_mm", ModelEntry(config=SelfMMConfig(), build=SelfMM))
