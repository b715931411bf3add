"""The one loop: equal runs are equal to the bit, however they are interrupted."""

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from emolab.checkpoint import CheckpointFolder
from emolab.locks import holding
from emolab.names import UserError
from emolab.sessions.loading import SessionStore
from emolab.sessions.manifest import read_manifest
from emolab.tracking import beginning
from emolab.tracking.beginning import RECORD
from emolab.tracking.provenance import CLEAN, COMMIT
from emolab.tracking.runs import existing_tracker
from emolab.tracking.tracker import MissingRunError
from emolab.training.augmentation import add_noise, drop_steps
from emolab.training.data import load_training_data
from emolab.training.loop import NonFiniteLossError, Outcome, Progress, evaluate, fit, run_to_end
from emolab.training.metrics import Evaluation
from emolab.training.processes import Workers
from emolab.training.recipe import TrainSettings
from emolab.training.train import epochs_in_process, load_model, train

SMALL = {"d_model": 16, "layers": 1, "heads": 2, "dropout": 0.1}


def settings_for(data: Path, output: Path, *, model: dict[str, Any] | None = None, **training: Any) -> TrainSettings:
    recipe = {"epochs": 4, "batch_size": 8, "learning_rate": 1e-2, "warmup_epochs": 1, "patience": 4} | training
    return TrainSettings.model_validate(
        {"data": str(data), "output": str(output), "model": SMALL | (model or {}), "training": recipe}
    )


def digest(weights: Mapping[str, Tensor]) -> str:
    joined = b"".join(name.encode() + value.contiguous().numpy().tobytes() for name, value in sorted(weights.items()))
    return hashlib.sha256(joined).hexdigest()


def finish(settings: TrainSettings, checkpoints: CheckpointFolder | None = None) -> Outcome:
    return run_to_end(epochs_in_process(settings, checkpoints=checkpoints), lambda _: None)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(toy_data: Path, tmp_path: Path) -> None:
    first, second = (finish(settings_for(toy_data, tmp_path)) for _ in range(2))
    other = finish(settings_for(toy_data, tmp_path, seed=1))
    assert digest(first.weights) == digest(second.weights)
    assert digest(first.weights) != digest(other.weights)
    timeless = [{k: v for k, v in r.items() if k != "sessions_per_second"} for r in first.progress.reports]
    assert timeless == [{k: v for k, v in r.items() if k != "sessions_per_second"} for r in second.progress.reports]


def test_length_buckets_are_repeatable_and_change_which_sessions_meet(toy_data: Path, tmp_path: Path) -> None:
    plain = finish(settings_for(toy_data, tmp_path))
    first, second = (finish(settings_for(toy_data, tmp_path, length_buckets=3)) for _ in range(2))
    assert digest(first.weights) == digest(second.weights) != digest(plain.weights)
    losses = [[report["validation_loss"] for report in run.progress.reports][-1] for run in (plain, first)]
    assert losses[0] == pytest.approx(losses[1], rel=0.3)  # another order of the same sessions


@pytest.mark.fault
@pytest.mark.parametrize(("stop_after", "recipe"), [(1, {}), (3, {}), (2, {"ema_decay": 0.9, "selection": "last"})])
def test_a_stopped_and_resumed_run_equals_the_unbroken_one(
    toy_data: Path, tmp_path: Path, stop_after: int, recipe: dict[str, Any]
) -> None:
    settings = settings_for(toy_data, tmp_path, modality_dropout=0.5, **recipe)
    unbroken = finish(settings)
    folder = CheckpointFolder(tmp_path / "checkpoints")
    epochs = epochs_in_process(settings, checkpoints=folder)
    for _ in range(stop_after):
        next(epochs)
    epochs.close()
    resumed = finish(settings, folder)
    assert digest(resumed.weights) == digest(unbroken.weights)
    assert resumed.progress.epoch == 4


def test_the_average_of_the_weights_is_what_is_validated_and_kept(toy_data: Path, tmp_path: Path) -> None:
    """One step an epoch, so that the weights of every step are seen: the average is theirs by its definition, and the
    training is the one that it would be without."""
    data = load_training_data(toy_data)
    seen: dict[float, list[dict[str, Tensor]]] = {}
    for decay in (0.0, 0.5):
        recipe = {"epochs": 12, "batch_size": 64, "patience": 12, "selection": "last", "ema_decay": decay}
        settings = settings_for(toy_data, tmp_path, **recipe)
        torch.manual_seed(0)
        model = settings.model.build(data.manifest)
        outcome = run_to_end(
            fit(model, model, data, settings.training, workers=Workers()),
            lambda _, at=decay, now=model: seen.setdefault(at, []).append(
                {name: value.clone() for name, value in now.state_dict().items()}
            ),
        )
    steps = seen[0.5]
    assert [digest(step) for step in steps] == [digest(step) for step in seen[0.0]]
    for name, value in outcome.weights.items():
        expected = steps[0][name].double()
        for updates, step in enumerate(steps[1:], start=1):
            stays = min(0.5, (1 + updates) / (10 + updates))
            expected = stays * expected + (1.0 - stays) * step[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    kept = settings.model.build(data.manifest)
    kept.load_state_dict(outcome.weights)
    score = evaluate(kept, data.validation, settings.training, workers=Workers())
    assert score.loss == outcome.progress.reports[-1]["validation_loss"]
    assert score.loss != evaluate(model, data.validation, settings.training, workers=Workers()).loss


def test_training_learns_and_keeps_the_best_epoch(toy_data: Path, tmp_path: Path) -> None:
    outcome = finish(settings_for(toy_data, tmp_path, epochs=25, patience=25))
    scores = [report["validation_macro_f1"] for report in outcome.progress.reports]
    assert outcome.progress.best_macro_f1 == max(scores)  # pyright: ignore[reportArgumentType]
    assert outcome.progress.best_epoch == int(np.argmax(np.array(scores, float))) + 1
    assert outcome.progress.best_macro_f1 > 0.75  # the class is written into the audio, in nine steps of ten


def test_early_stopping_waits_exactly_its_patience(toy_data: Path, tmp_path: Path) -> None:
    progress = finish(settings_for(toy_data, tmp_path, epochs=40, patience=2)).progress
    assert progress.finished
    assert progress.epoch == progress.best_epoch + 2 or progress.epoch == 40


@pytest.mark.fault
def test_a_non_finite_loss_stops_before_the_update_with_epoch_and_step(toy_data: Path, tmp_path: Path) -> None:
    settings = settings_for(toy_data, tmp_path, learning_rate=1e30, warmup_epochs=0)
    with pytest.raises(NonFiniteLossError, match=r"non-finite loss at epoch 1, step 2"):
        finish(settings)
    folder = CheckpointFolder(tmp_path / "checkpoints")
    with pytest.raises(NonFiniteLossError):
        finish(settings, folder)
    assert folder.newest() is None


@pytest.mark.fault
@pytest.mark.parametrize("checkpoints", [True, False])
@pytest.mark.parametrize(
    ("selection", "reason"),
    [("best", "non-finite validation loss after epoch 1"), ("last", "non-finite loss after epoch 1")],
)
def test_weights_that_an_epochs_last_update_has_spoiled_are_neither_saved_nor_kept(
    toy_data: Path, tmp_path: Path, selection: str, reason: str, checkpoints: bool
) -> None:
    """One step an epoch, so that no other step meets its weights: they are finite, what they predict is not."""
    settings = settings_for(
        toy_data, tmp_path, learning_rate=1e30, warmup_epochs=0, batch_size=64, epochs=1, selection=selection
    )
    data = load_training_data(toy_data)
    if selection == "last":
        data = replace(data, validation=SessionStore([]))
    torch.manual_seed(0)
    model = settings.model.build(data.manifest)
    folder = CheckpointFolder(tmp_path / "checkpoints") if checkpoints else None
    with pytest.raises(NonFiniteLossError, match=f"^{reason}$"):
        run_to_end(
            fit(model, model, data, settings.training, workers=Workers(), checkpoints=folder), lambda _: pytest.fail()
        )
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert folder is None or folder.newest() is None


@pytest.mark.fault
def test_a_run_whose_validation_loss_is_not_finite_has_failed_however_often_it_is_run(
    toy_data: Path, tmp_path: Path
) -> None:
    settings = settings_for(toy_data, tmp_path, learning_rate=1e30, warmup_epochs=0, batch_size=64)
    for _ in range(2):
        with pytest.raises(NonFiniteLossError, match="non-finite validation loss after epoch 1"):
            train(settings)
    tracker = existing_tracker(**settings.tracking.model_dump(), output=tmp_path)
    [run] = [tracker.client.get_run(run_id) for run_id in tracker.find("emolab.kind", "train")]
    assert run.info.status == "FAILED"
    assert run.data.tags["failure"] == "non-finite validation loss after epoch 1"


def test_the_loss_of_an_epoch_is_a_mean_over_labelled_steps(toy_data: Path, tmp_path: Path) -> None:
    settings = settings_for(toy_data, tmp_path, model={"dropout": 0.0})
    data = load_training_data(toy_data)
    torch.manual_seed(0)
    model = settings.model.build(data.manifest).eval()
    whole = evaluate(model, data.train, settings.training, workers=Workers())
    one_by_one = settings.training.model_copy(update={"batch_size": 1})
    apart = evaluate(model, data.train, one_by_one, workers=Workers())
    assert whole.cross_entropy == pytest.approx(apart.cross_entropy, rel=1e-6)
    np.testing.assert_array_equal(whole.confusion, apart.confusion)
    assert whole.confusion.sum() == sum(read_manifest(toy_data).splits["train"].label_counts)


def test_scores_of_a_confusion_matrix_against_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, f1_score

    generator = np.random.default_rng(0)
    true, predicted = generator.integers(0, 4, 500), generator.integers(0, 4, 500)
    confusion = np.bincount(true * 4 + predicted, minlength=16).reshape(4, 4)
    evaluation = Evaluation(confusion=confusion, loss=0.0, cross_entropy=0.0)
    assert evaluation.accuracy == pytest.approx(accuracy_score(true, predicted))
    assert evaluation.macro_f1 == pytest.approx(f1_score(true, predicted, average="macro"))
    np.testing.assert_allclose(evaluation.class_f1, f1_score(true, predicted, average=None))


def test_modality_dropout_is_a_function_of_the_session_not_of_the_batch(toy_data: Path) -> None:
    store = load_training_data(toy_data).train
    forward, backward = [0, 5, 9, 11], [11, 9, 5, 0]
    arguments = {"share": 1.0, "seed": 3, "epoch": 2}
    one = drop_steps(store.batch(forward), [store.session_ids[i] for i in forward], **arguments)  # pyright: ignore[reportArgumentType]
    two = drop_steps(store.batch(backward), [store.session_ids[i] for i in backward], **arguments)  # pyright: ignore[reportArgumentType]
    clean = store.batch(forward)
    for name in clean.modalities:
        assert torch.equal(one.present[name], two.present[name].flip(0))
        assert not (one.present[name] & ~clean.present[name]).any()
    assert any(one.present[n].sum() < clean.present[n].sum() for n in clean.modalities)


def test_feature_noise_is_a_function_of_the_session_and_never_touches_the_padding(toy_data: Path) -> None:
    data = load_training_data(toy_data)
    arguments: dict[str, Any] = {"std": data.manifest.statistics.std, "largest": 1.0, "seed": 3, "epoch": 2}
    order = [0, 5, 9, 11]
    ids = [data.train.session_ids[i] for i in order]
    clean = data.train.batch(order)
    one = add_noise(clean, ids, **arguments)
    two = add_noise(data.train.batch(order[::-1]), ids[::-1], **arguments)
    for name in clean.modalities:
        assert torch.equal(one.features[name], two.features[name].flip(0))
        assert (one.features[name] != clean.features[name]).any()
        assert (one.features[name][~clean.real] == 0).all()
        deviation = (one.features[name] - clean.features[name])[clean.real].std(0)
        assert (deviation < 2 * torch.tensor(data.manifest.statistics.std[name])).all()


def test_a_tracked_run_is_resumed_by_the_same_settings_and_guards_its_folder(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(toy_data, tmp_path).model_copy(update={"name": "mine"})
    first = train(settings)
    tracker = existing_tracker(**settings.tracking.model_dump(), output=tmp_path)
    before = tracker.read(first.run_id).tags
    monkeypatch.setattr(beginning, "code_version", lambda: {COMMIT: "later", CLEAN: "false"})
    second = train(settings)
    assert (first.run_id, first.progress) == (second.run_id, second.progress)
    assert tracker.read(first.run_id).tags == before  # of the code that trained, not of that which found it trained
    with pytest.raises(UserError, match="another configuration"):
        train(settings_for(toy_data, tmp_path, seed=9).model_copy(update={"name": "mine"}))
    with pytest.raises(UserError, match="not allowed"):
        train(settings.model_copy(update={"name": "../evil"}))


HOLDING = """
import sys
from pathlib import Path
from emolab.locks import holding
with holding(Path(sys.argv[1]), what="run"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_trains_a_run_and_the_second_waits_where_it_is_told_to(
    toy_data: Path, tmp_path: Path
) -> None:
    settings = settings_for(toy_data, tmp_path, epochs=1)
    folder = tmp_path / settings.run_name(read_manifest(toy_data).digest)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"in use by another process .*{holder.pid}"):
            train(settings)
        assert not (folder / "checkpoints").exists()
        threading.Timer(1.0, holder.kill).start()
        assert train(settings, patience=60.0).progress.finished


def test_a_file_system_without_locks_is_warned_of_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(_: int, __: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with holding(tmp_path, what="run"):
        pass
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {tmp_path} cannot be locked (No locks available): let one job at a time use it"
    ]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"identity": {}}', "\x00\xff"])
def test_a_damaged_record_is_one_line_and_without_it_the_run_is_found_again(
    toy_data: Path, tmp_path: Path, content: str
) -> None:
    settings = settings_for(toy_data, tmp_path, epochs=1)
    trained = train(settings)
    record = trained.folder / RECORD
    record.write_bytes(content.encode("latin-1"))
    with pytest.raises(
        UserError, match=r"run\.json is damaged .* remove this file and run the same command again"
    ) as e:
        train(settings)
    assert "\n" not in str(e.value)
    record.unlink()
    again = train(settings)
    assert again.run_id == trained.run_id
    assert again.progress.epoch == 1


@pytest.mark.fault
@pytest.mark.parametrize("purged", [False, True])
def test_a_run_that_was_deleted_in_the_tracker_is_recorded_anew(toy_data: Path, tmp_path: Path, purged: bool) -> None:
    settings = settings_for(toy_data, tmp_path)
    first = train(settings)
    tracker = existing_tracker(**settings.tracking.model_dump(), output=tmp_path)
    tracker.client.delete_run(first.run_id)
    if purged:
        where = ["--backend-store-uri", tracker.uri, "--tracking-uri", tracker.uri]
        subprocess.run([sys.executable, "-m", "mlflow", "gc", *where, "--run-ids", first.run_id], check=True)
    with pytest.raises(MissingRunError, match=rf"mlflow.db has no run {first.run_id} any more: restore it there, or"):
        tracker.resume(first.run_id)
    second, third = train(settings), train(settings)
    assert first.run_id != second.run_id == third.run_id
    assert [second.progress, third.progress] == [first.progress] * 2  # nothing was trained again
    assert third.resumed_finished
    assert tracker.find("emolab.kind", "train") == [second.run_id]
    run = tracker.client.get_run(second.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["training.batch_size"] == "8"
    steps = [metric.step for metric in tracker.client.get_metric_history(second.run_id, "train_loss")]
    assert sorted(steps) == [1, 2, 3, 4]
    assert {"model", "config.yaml"} <= {file.path for file in tracker.client.list_artifacts(second.run_id)}


def test_a_kept_model_predicts_as_it_did_in_training(toy_data: Path, tmp_path: Path) -> None:
    settings = settings_for(toy_data, tmp_path)
    trained = train(settings)
    model, saved = load_model(trained.folder / "model")
    data = load_training_data(toy_data)
    again = evaluate(model, data.validation, settings.training, workers=Workers())
    assert again.macro_f1 == pytest.approx(trained.progress.best_macro_f1, abs=1e-12)
    assert saved.state["dataset_digest"] == data.manifest.digest


def test_progress_survives_json() -> None:
    progress = Progress(epoch=3, best_macro_f1=0.5, best_epoch=2, reports=({"a": 1.0},), finished=True)
    state = {"epoch": 3, "best_macro_f1": 0.5, "best_epoch": 2, "reports": [{"a": 1.0}], "finished": True}
    assert Progress.from_state(state) == progress
