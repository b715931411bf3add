"""Trials that train in one step: what is too much for the memory together is tried in smaller groups, and alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.tuning.test_search import HARMLESS, tune_settings

from emolab.names import UserError
from emolab.tracking.tracker import NoTracker
from emolab.training.data import TrainingData
from emolab.training.fused import FusedTraining
from emolab.training.metrics import EpochReport
from emolab.training.recipe import TrainSettings
from emolab.training.train import epochs_in_process
from emolab.tuning import fused_group, pack, processes
from emolab.tuning.pack import Answers, PackSettings, SpoiledProcessError, TrialPack
from emolab.tuning.search import search
from emolab.tuning.settings import TuneSettings
from emolab.tuning.space import configured

pytestmark = pytest.mark.ray
DRAWS: list[tuple[int, dict[str, Any]]] = [(n, {"training.kl_weight": 0.1 * (n + 1)}) for n in range(3)]
GREEDY = 3
"""A trial whose first epoch leaves no memory for the second."""


class NarrowTraining(FusedTraining):
    """Fused training on a device that holds two models."""

    def __init__(self, members: Mapping[int, TrainSettings], data: TrainingData, device: torch.device) -> None:
        super().__init__(members, data, device)
        self._trained = 0
        if len(members) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory: no room for the third")

    def epoch(self) -> dict[int, EpochReport | UserError]:
        self._trained += 1
        if GREEDY in self.numbers and self._trained > 1:
            raise torch.OutOfMemoryError("CUDA out of memory: in the second epoch")
        return super().epoch()


def no_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory: alone")


class NarrowPack(TrialPack):
    """A process on such a device."""

    def advance(self, draws: Sequence[tuple[int, dict[str, Any]]], until: int, told: int = 0) -> Answers:
        fused_group.FusedTraining = NarrowTraining
        pack.epochs_in_process = no_memory if [number for number, _ in draws] == [GREEDY] else epochs_in_process
        return super().advance(draws, until, told)


def pack_settings(settings: TuneSettings) -> PackSettings:
    return PackSettings(base=settings.base().model_dump(mode="json"), robustness=False, limits={})


def test_a_group_that_does_not_fit_is_handed_back_and_a_smaller_one_trains(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_group, "FusedTraining", NarrowTraining)
    process = TrialPack(pack_settings(tune_settings(toy_data, tmp_path)))
    answers = process.advance(DRAWS, 2)
    assert {n: (a.crowded, a.failure, a.reports) for n, a in answers.items()} == dict.fromkeys(range(3), (True, "", []))
    answers = process.advance(DRAWS[:2], 2)
    assert {n: [r.epoch for r in a.reports] for n, a in answers.items()} == {0: [1, 2], 1: [1, 2]}
    assert not any(answer.crowded or answer.failure for answer in answers.values())


def test_what_else_goes_wrong_while_a_group_is_built_is_the_end_of_its_trials_only(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    process = TrialPack(pack_settings(tune_settings(toy_data, tmp_path)))
    with monkeypatch.context() as patch:
        patch.setattr(fused_group, "FusedTraining", broken)
        answers = process.advance(DRAWS, 2)
    assert {n: a.failure for n, a in answers.items()} == dict.fromkeys(
        range(3), "RuntimeError: no kernel image is available"
    )
    others = [(number + 3, parameters) for number, parameters in DRAWS]
    assert all(not answer.failure and answer.reports for answer in process.advance(others, 2).values())


class FailingTraining(FusedTraining):
    """Fused training on a GPU that fails in the second epoch."""

    def epoch(self) -> dict[int, EpochReport | UserError]:
        found = super().epoch()
        if any(report.epoch == 2 for report in found.values() if isinstance(report, EpochReport)):
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return found


class FailingPack(TrialPack):
    """A process with such a GPU, on which after a failure nothing works."""

    def advance(self, draws: Sequence[tuple[int, dict[str, Any]]], until: int, told: int = 0) -> Answers:
        fused_group.FusedTraining = FailingTraining
        try:
            return super().advance(draws, until, told)
        except SpoiledProcessError:
            pack.epochs_in_process = sticky
            raise


def sticky(*_: Any, **__: Any) -> Any:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.mark.fault
@pytest.mark.slow
def test_trials_whose_gpu_failed_are_begun_anew_alone_in_another_process(
    ray_cluster: None, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tune_settings(toy_data, tmp_path, trials=3, scheduler="none", sampler="random", fused=2)
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(HARMLESS))
    monkeypatch.setattr(processes, "TrialPack", FailingPack)
    found = search(settings, NoTracker()).records
    assert {r.number: (r.state, r.reason, r.epochs) for r in found} == dict.fromkeys(range(3), ("COMPLETE", "", 6))
    for record in found:
        alone = [r.kept_macro_f1 for r in epochs_in_process(configured(settings.base(), record.parameters))]
        assert record.curve == dict(enumerate(alone, start=1))


@pytest.mark.fault
@pytest.mark.slow
def test_a_search_whose_groups_do_not_fit_goes_on_with_smaller_ones(
    ray_cluster: None, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four at a time do not fit, then one of two runs out of memory with its neighbour, and again alone."""
    settings = tune_settings(toy_data, tmp_path, trials=6, scheduler="none", sampler="random", fused=4)
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(HARMLESS))
    monkeypatch.setattr(processes, "TrialPack", NarrowPack)
    lines: list[str] = []
    found = {r.number: r for r in search(settings, NoTracker(), report=lines.append).records}
    assert sorted(found) == list(range(6))
    assert (found[GREEDY].state, found[GREEDY].reason) == ("FAIL", "OutOfMemoryError: CUDA out of memory: alone")
    for number in set(found) - {GREEDY}:
        alone = [r.kept_macro_f1 for r in epochs_in_process(configured(settings.base(), found[number].parameters))]
        assert found[number].state == "COMPLETE"
        assert found[number].curve == dict(enumerate(alone, start=1))
    assert [line for line in lines if "fit the memory" in line] == [
        "4 configurations in one step do not fit the memory: from here at most 2",
        "2 configurations in one step do not fit the memory: from here at most 1",
    ]
