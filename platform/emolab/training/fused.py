"""Several configurations of one shape trained in one step: stacked parameters under ``torch.func.vmap``.

Members share everything that decides shapes and the order of batches (architecture, seed, batch size, schedule);
learning rate, weight decay, lambda, dropout, modality dropout, feature noise, gradient clipping and averaging are each
member's own, as are its optimizer state and its dropout masks. Without dropout a member's weights are those of training
it alone, up to rounding. This pays on a GPU, where a small model leaves most of the device idle; on a CPU it does not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.overrides import TorchFunctionMode

from edu_emotionnet.batch import SessionBatch
from edu_emotionnet.losses import combined_loss
from emolab.names import UserError
from emolab.sessions.loading import epoch_batches, ordered_batches
from emolab.training.averaging import decay_at
from emolab.training.data import TrainingData
from emolab.training.loop import Progress, advance, confusion_counts, mix_seed, training_batch
from emolab.training.metrics import EpochReport, Evaluation
from emolab.training.recipe import TrainSettings

FUSABLE = ("edu_emotionnet", "edu_emotionnet-cmaa", "edu_emotionnet-mie", "edu_emotionnet-tfl")
"""Models that are known to give under ``vmap`` what they give alone."""
_OWN = (
    "learning_rate",
    "weight_decay",
    "kl_weight",
    "modality_dropout",
    "feature_noise",
    "gradient_clip",
    "ema_decay",
)
_MARK = 0.314159265358979
"""Dropout probability with which the shared module is built; wherever it turns up, a member's own is meant."""
_BETAS = (0.9, 0.999)
_EPSILON = 1e-8

Stacked = dict[str, Tensor]
"""Name -> tensor whose first axis counts the members."""


class FusedTraining:
    """Members that train together, epoch by epoch; they may leave one by one."""

    def __init__(self, members: Mapping[int, TrainSettings], data: TrainingData, device: torch.device) -> None:
        """
        Raises:
            UserError: a model that cannot be fused, or members that differ in more than they may.
        """
        self._members, self._data, self._device = dict(members), data, device
        first = next(iter(members.values()))
        check_fusable(list(members.values()))
        built = []
        for settings in members.values():
            torch.manual_seed(settings.training.seed)
            built.append(settings.model.build(data.manifest).to(device))
        parameters, self._buffers = (dict(part) for part in stack_module_state(built))
        self._shapes = {name: value.shape[1:] for name, value in parameters.items()}
        self._weights = _flat(parameters).detach()
        marked = first.model.model_copy(update={"dropout": _MARK})
        self._module = type(first.model).model_validate(marked.model_dump()).build(data.manifest).to(device)
        self._moments = tuple(torch.zeros_like(self._weights) for _ in range(2))
        averaging = any(settings.training.ema_decay for settings in members.values())
        self._averages = self._weights.clone() if averaging else None
        self._steps = 0
        self._progress = {number: Progress() for number in members}

    def _views(self, flat: Tensor) -> Stacked:
        """(members, P) weights -> the same as the module's parameters."""
        parts = flat.split([shape.numel() for shape in self._shapes.values()], dim=1)
        return {
            name: part.unflatten(1, shape) if shape else part.squeeze(1)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    @property
    def numbers(self) -> list[int]:
        """The members that are left, in the order of the stack."""
        return list(self._members)

    @property
    def _found(self) -> Stacked:
        """What the training is to give: the weights, or their averages."""
        return self._views(self._weights if self._averages is None else self._averages)

    def weights(self, number: int) -> dict[str, Tensor]:
        """Parameters and buffers of one member, as they are validated."""
        row = self.numbers.index(number)
        return {name: value[row].clone() for name, value in (self._found | self._buffers).items()}

    def keep(self, numbers: Sequence[int]) -> None:
        """Let all other members go."""
        rows = [row for row, number in enumerate(self.numbers) if number in numbers]
        if len(rows) == len(self._members):
            return
        self._weights, *moments = (flat[rows] for flat in (self._weights, *self._moments))
        self._moments = tuple(moments)
        self._averages = None if self._averages is None else self._averages[rows]
        self._buffers = {name: value[rows] for name, value in self._buffers.items()}
        self._members = {number: self._members[number] for number in self.numbers if number in numbers}

    def epoch(self) -> dict[int, EpochReport | UserError]:
        """Train and validate one epoch -> member -> report, or why it cannot go on; such a member is let go."""
        epoch = self._progress[self.numbers[0]].epoch
        started = time.perf_counter()
        losses, failures = self._train(epoch)
        self.keep([number for number in self.numbers if number not in failures])
        scores = self._validate() if self._members else {}
        for number, evaluation in scores.items():
            if not math.isfinite(evaluation.loss):  # its last update has spoiled it
                failures[number] = UserError(f"non-finite validation loss after epoch {epoch + 1}")
        self.keep([number for number in self.numbers if number not in failures])
        rate = len(self._data.train) / (time.perf_counter() - started)
        found: dict[int, EpochReport | UserError] = dict(failures)
        for number, settings in self._members.items():
            before = self._progress[number]
            after = advance(before, settings.training, losses[number], scores[number], sessions_per_second=rate)
            self._progress[number] = after
            found[number] = EpochReport(**after.reports[-1])  # pyright: ignore[reportArgumentType]  # its own asdict
        return found

    def _train(self, epoch: int) -> tuple[dict[int, Tensor], dict[int, UserError]]:
        shared = next(iter(self._members.values())).training
        torch.manual_seed(mix_seed(shared.seed, epoch + 1, 0))
        self._module.train()
        plan = epoch_batches(
            self._data.train.lengths,
            shared.batch_size,
            seed=shared.seed,
            epoch=epoch,
            bucket_batches=shared.length_buckets,
        )
        sums = torch.zeros(len(self._members), 4, dtype=torch.float64, device=self._device)
        failures: dict[int, UserError] = {}
        well = torch.ones(len(self._members), dtype=torch.bool, device=self._device)
        for step, indices in enumerate(plan):
            rates = self._column([s.training.learning_rate_at(epoch, step, len(plan)) for s in self._members.values()])
            gradients, terms = self._gradients(indices, epoch)
            lost = well & ~torch.isfinite(terms[:, 0])
            well &= ~lost
            for row in torch.nonzero(lost).flatten().tolist():
                message = f"non-finite loss at epoch {epoch + 1}, step {step + 1}"
                failures[self.numbers[row]] = UserError(message)
            self._update(gradients, torch.where(well, rates, 0.0), well)
            sums += terms.double()
        means = sums[:, :3] / sums[:, 3:].clamp_min(1.0)
        return {number: means[row].cpu() for row, number in enumerate(self.numbers)}, failures

    def _gradients(self, indices: NDArray[np.int64], epoch: int) -> tuple[Stacked, Tensor]:
        """Stacked gradients, and (members, 4) total, cross-entropy, smoothness and labelled steps of a batch."""
        shared, features, present, axis = self._inputs(indices, epoch)

        def loss(parameters: Stacked, buffers: Stacked, member: Stacked, x: Stacked, seen: Stacked) -> Any:
            batch = replace(shared, features=x, present=seen)
            with MemberDropout(member["dropout"]):
                found = combined_loss(functional_call(self._module, (parameters, buffers), (batch,)), batch)
            total = found.cross_entropy + member["kl_weight"] * found.smoothness + found.auxiliary
            steps = found.steps.to(total.dtype)
            terms = torch.stack([total, found.cross_entropy, found.smoothness, steps]).detach()
            return total / steps.clamp_min(1.0), terms

        return vmap(grad(loss, has_aux=True), in_dims=(0, 0, 0, axis, axis), randomness="different")(
            self._views(self._weights), self._buffers, self._own(), features, present
        )

    def _inputs(self, indices: NDArray[np.int64], epoch: int) -> tuple[SessionBatch, Stacked, Stacked, int | None]:
        """A batch, its features and presence masks, and the axis of these that counts the members: None where all
        members see the same."""
        recipes = [s.training for s in self._members.values()]
        if len({(recipe.modality_dropout, recipe.feature_noise) for recipe in recipes}) == 1:
            batch = training_batch(self._data, indices, recipes[0], epoch).to(self._device)
            return batch, dict(batch.features), dict(batch.present), None
        batches = [training_batch(self._data, indices, recipe, epoch).to(self._device) for recipe in recipes]
        features = {name: torch.stack([b.features[name] for b in batches]) for name in batches[0].features}
        present = {name: torch.stack([b.present[name] for b in batches]) for name in batches[0].present}
        return batches[0], features, present, 0

    def _own(self) -> Stacked:
        """What enters the loss of each member alone."""
        members = self._members.values()
        return {
            "dropout": self._column([s.model.options.dropout for s in members]),
            "kl_weight": self._column([s.training.kl_weight for s in members]),
        }

    def _update(self, gradients: Stacked, rates: Tensor, well: Tensor) -> None:
        """One step of AdamW for every member with a finite loss, its own rate and its own decay."""
        self._steps += 1
        # What is NaN in the row of a member that has failed must not spread.
        gradient = self._clipped(torch.where(well[:, None], _flat(gradients), 0.0))
        decay = 1.0 - rates * self._column([s.training.weight_decay for s in self._members.values()])
        first, second = (1.0 - beta**self._steps for beta in _BETAS)
        means, squares = self._moments
        means.lerp_(gradient, 1.0 - _BETAS[0])
        squares.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1.0 - _BETAS[1])
        direction = means / (squares.sqrt() / second**0.5 + _EPSILON)
        self._weights.mul_(decay[:, None]).sub_((rates / first)[:, None] * direction)
        if self._averages is not None:
            stays = self._column([decay_at(s.training.ema_decay, self._steps - 1) for s in self._members.values()])
            self._averages.lerp_(self._weights, 1.0 - stays[:, None])

    def _clipped(self, gradient: Tensor) -> Tensor:
        """(members, P) -> the same, every row no longer than its member's limit."""
        limits = [s.training.gradient_clip for s in self._members.values()]
        if all(limit is None for limit in limits):
            return gradient
        most = self._column([torch.inf if limit is None else limit for limit in limits])
        scale = (most / (gradient.square().sum(1).sqrt() + 1e-6)).clamp_max(1.0)
        return gradient * scale[:, None]

    @torch.no_grad()
    def _validate(self) -> dict[int, Evaluation]:
        self._module.eval()
        shared = next(iter(self._members.values())).training
        store = self._data.validation
        weights = self._column([s.training.kl_weight for s in self._members.values()])
        sums = torch.zeros(len(self._members), 3, dtype=torch.float64, device=self._device)
        counts = torch.zeros((), dtype=torch.int64, device=self._device)
        for indices in ordered_batches(len(store), shared.batch_size):
            batch = store.batch(indices).to(self._device)

            def score(parameters: Stacked, buffers: Stacked, weight: Tensor, batch: SessionBatch = batch) -> Any:
                with MemberDropout(weight):  # which is not asked for any dropout here
                    predictions = functional_call(self._module, (parameters, buffers), (batch,))
                found = combined_loss(predictions, batch)
                total = found.cross_entropy + weight * found.smoothness + found.auxiliary
                terms = torch.stack([total, found.cross_entropy, found.steps.to(total.dtype)])
                return terms, predictions.log_probabilities

            terms, log_probabilities = vmap(score)(self._found, self._buffers, weights)
            sums += terms.double()
            counts = counts + torch.stack([confusion_counts(rows, batch) for rows in log_probabilities])
        return {number: _evaluation(sums[row], counts[row]) for row, number in enumerate(self.numbers)}

    def _column(self, values: Sequence[float]) -> Tensor:
        """(members,) numbers."""
        return torch.tensor(values, dtype=torch.float32, device=self._device)


class MemberDropout(TorchFunctionMode):
    """Dropout whose probability is a tensor: inside ``vmap`` every member's own. What the module calls with the
    probability it was built with is answered here; everything else goes its way."""

    def __init__(self, rate: Tensor) -> None:
        super().__init__()
        self._rate = rate

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout and kwargs.get("p") == _MARK and kwargs.get("training"):
            return self._drop(args[0])
        if func is F.scaled_dot_product_attention:  # whose kernels on CPUs `vmap` would call member by member
            weights = self._weights(*args[:2], mask=kwargs.get("attn_mask"), causal=kwargs.get("is_causal", False))
            return (self._drop(weights) if kwargs.get("dropout_p") == _MARK else weights) @ args[2]
        return func(*args, **kwargs)

    def _drop(self, values: Tensor) -> Tensor:
        kept = torch.rand_like(values) >= self._rate
        return values * kept / (1.0 - self._rate)

    def _weights(self, query: Tensor, key: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
        """(..., T, d), (..., S, d) -> (..., T, S) attention weights."""
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1)


def check_fusable(members: Sequence[TrainSettings]) -> None:
    """Refuse members that cannot train in one step.

    Raises:
        UserError: naming the model or the keys.
    """
    first = members[0]
    if first.model.name not in FUSABLE:
        raise UserError(f"model {first.model.name} cannot be trained fused (models: {', '.join(FUSABLE)})")
    differing = {
        f"{section}.{key}"
        for other in members[1:]
        for section in ("model", "training")
        for key, value in getattr(other, section).model_dump().items()
        if value != getattr(first, section).model_dump().get(key)
    }
    refused = sorted(differing - {f"training.{key}" for key in _OWN} - {"model.dropout"})
    if refused:
        raise UserError(f"configurations that differ in {', '.join(refused)} cannot be trained fused")


def _flat(stacked: Stacked) -> Tensor:
    """Stacked tensors side by side, (members, P): an optimizer step is then a dozen operations instead of a dozen for
    every tensor, which on a GPU is most of its time."""
    return torch.cat([value.flatten(1) if value.dim() > 1 else value[:, None] for value in stacked.values()], dim=1)


def _evaluation(sums: Tensor, counts: Tensor) -> Evaluation:
    loss, cross_entropy, steps = sums.tolist()
    return Evaluation(
        confusion=counts.cpu().numpy(), loss=loss / max(1.0, steps), cross_entropy=cross_entropy / max(1.0, steps)
    )
