"""The process in which trials run, called as its driver calls it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tuning.test_search import tune_settings

from emolab.training.train import epochs_in_process, training_device
from emolab.tuning import fused_group, pack
from emolab.tuning.pack import PackSettings, SpoiledProcessError, TrialPack, excess_over
from emolab.tuning.space import configured

pytestmark = pytest.mark.ray
RUNGS = (1, 3)
DRAW: tuple[int, dict[str, Any]] = (4, {"training.kl_weight": 0.1})


def test_a_paused_trial_is_ahead_of_a_driver_that_was_killed_and_tells_it_what_it_missed(
    toy_data: Path, tmp_path: Path
) -> None:
    """Another process took the trial to epoch 3, and the driver died before it knew of more than the first."""
    base = tune_settings(toy_data, tmp_path).base()
    unbroken = [report.kept_macro_f1 for report in epochs_in_process(configured(base, DRAW[1]))]
    settings = PackSettings(
        base=base.model_dump(mode="json"), robustness=False, limits={}, study=str(tmp_path / "study"), rungs=RUNGS
    )
    assert [r.epoch for r in TrialPack(settings).advance([DRAW], 3)[4].reports] == [1, 2, 3]

    trained = list((tmp_path / "study").rglob("epoch-*"))
    again = TrialPack(settings)
    missed = again.advance([DRAW], 3, 1)[4].reports
    assert [r.epoch for r in missed] == [2, 3]
    assert list((tmp_path / "study").rglob("epoch-*")) == trained
    rest = again.advance([DRAW], 6, 3)[4].reports
    assert [r.epoch for r in rest] == [4, 5, 6]
    assert [r.kept_macro_f1 for r in missed + rest] == unbroken[1:]
    # One that comes later, and knows of less than either rung, gets both and trains nothing for it.
    assert [r.epoch for r in TrialPack(settings).advance([DRAW], 1)[4].reports] == [1]


def test_the_device_of_a_trial_is_that_of_its_training(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tune_settings(toy_data, tmp_path).base()
    on_gpu = base.model_copy(update={"workers": base.workers.model_copy(update={"gpus": 1})})
    for there, chosen in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert [training_device(settings).type for settings in (base, on_gpu)] == ["cpu", chosen]


GPU_ERRORS = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ..."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
]
OTHER_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
    ValueError("CUDA error: of another kind"),
]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("error", GPU_ERRORS + OTHER_ERRORS, ids=str)
def test_a_failure_of_the_gpu_is_one_of_the_process_and_any_other_one_of_the_trials(
    error: Exception, together: bool, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise error

    base = tune_settings(toy_data, tmp_path).base()
    process = TrialPack(PackSettings(base=base.model_dump(mode="json"), robustness=False, limits={}))
    monkeypatch.setattr(pack, "epochs_in_process", broken)
    monkeypatch.setattr(fused_group, "FusedTraining", broken)
    draws = [DRAW, (5, DRAW[1])] if together else [DRAW]
    if error in GPU_ERRORS:
        with pytest.raises(SpoiledProcessError) as raised:
            process.advance(draws, 2)
        assert str(raised.value).startswith(f"the GPU failed ({type(error).__name__}: ")
        assert "\n" not in str(raised.value)
    else:
        answers = process.advance(draws, 2)
        assert all(answer.failure or answer.crowded for answer in answers.values())
        assert sorted(answers) == [number for number, _ in draws]


def test_latency_is_measured_on_the_device_of_the_trial(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device without memory stands for a GPU: what it computes is told from what a CPU computes."""
    base = tune_settings(toy_data, tmp_path).base()
    monkeypatch.setattr(pack, "training_device", lambda _: torch.device("meta"))
    seen: set[str] = set()

    def look(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen.update(value.device.type for value in (*inputs, output) if isinstance(value, torch.Tensor))
        seen.update(parameter.device.type for parameter in module.parameters())

    watching = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        assert excess_over(base, {"latency_ms": 1e9})["latency_ms"] < 0
    finally:
        watching.remove()
    assert seen == {"meta"}
