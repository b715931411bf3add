"""The driver with processes that answer by a script: who trains what together, who goes on, and how a search ends."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tuning.test_study import finish

from emolab.checkpoint import Checkpoint
from emolab.tracking.runs import open_tracker
from emolab.tracking.tracker import NoTracker, Tracker
from emolab.training.metrics import EpochReport
from emolab.tuning import packed, running
from emolab.tuning.finals import enqueue_finalists, final_space
from emolab.tuning.grouping import in_one_step
from emolab.tuning.methods import Scheduler, make_pruner, make_sampler, rungs
from emolab.tuning.pack import Answer, Answers, PackSettings
from emolab.tuning.packed import PackedPlan, PackedTrials
from emolab.tuning.pausing import paused_trial
from emolab.tuning.plan import SearchPlan
from emolab.tuning.processes import Process, Processes
from emolab.tuning.recorder import TrialRecorder
from emolab.tuning.running import run_trials
from emolab.tuning.settings import TuneSettings
from emolab.tuning.space import SearchSpace
from emolab.tuning.study import Study

EPOCHS = 12
KL_WEIGHT = {"distribution": "float", "low": 0.001, "high": 1.0, "log": True}
WIDTH = {"distribution": "categorical", "choices": [32, 64]}
LAMBDA = SearchSpace.model_validate({"parameters": {"training.kl_weight": KL_WEIGHT}})
SHAPES = SearchSpace.model_validate({"parameters": {"training.kl_weight": KL_WEIGHT, "model.d_model": WIDTH}})
Score = Callable[[int, int], float]
"""(number, epoch) -> validation macro-F1."""


def report_of(epoch: int, score: float) -> EpochReport:
    return EpochReport(
        epoch=epoch, train_loss=1.0, train_cross_entropy=1.0, train_smoothness=0.0, validation_loss=1.0,
        validation_cross_entropy=1.0, validation_accuracy=score, validation_macro_f1=score, best_macro_f1=score,
        best_epoch=epoch, kept_macro_f1=score, learning_rate=0.01, sessions_per_second=1.0, finished=epoch == EPOCHS,
    )  # fmt: skip


class CutOffError(Exception):
    """The search's own process ends here."""


class ScriptedProcesses(Processes):
    """They train nothing, and answer in turn."""

    score: Score = staticmethod(lambda number, epoch: 0.5)
    groups: ClassVar[list[list[int]]]
    """The trials of each group that was begun."""
    started: ClassVar[int]
    answers: ClassVar[int]
    """That come before the search is cut off."""

    def start(self, count: int) -> None:
        type(self).started += count
        for _ in range(count):
            actor = SimpleNamespace(advance=SimpleNamespace(remote=self._train))
            self._all.append(Process(actor=actor, ready=None, call=None, running=True, loaded=True))

    def _train(self, draws: Sequence[tuple[int, dict[str, Any]]], until: int, told: int) -> Answers:
        if not told:
            self.groups.append([number for number, _ in draws])
        epochs = range(told + 1, until + 1)
        return {n: Answer(reports=[report_of(epoch, self.score(n, epoch)) for epoch in epochs]) for n, _ in draws}

    def wait(self) -> list[Process]:
        type(self).answers -= 1
        if self.answers < 0:
            raise CutOffError
        self._all.append(self._all.pop(0))
        return [process for process in self._all if process.call is not None][:1]

    def answer(self, process: Process) -> Answers:
        answers, process.call = process.call, None
        return answers

    def end(self) -> None:
        """There is nothing to end."""


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedProcesses]:
    fresh = type("Fresh", (ScriptedProcesses,), {"groups": [], "started": 0, "answers": 10_000})
    monkeypatch.setattr(packed, "Processes", fresh)
    return fresh


def opened(folder: Path, name: str = "s", *, space: SearchSpace = LAMBDA, scheduler: Scheduler = "none") -> Study:
    pruner = make_pruner(scheduler, grace=2, factor=3, epochs=EPOCHS)
    sampler = make_sampler("random", seed=0, space=space)
    return Study(folder / "study.db", name, space=space, sampler=sampler, pruner=pruner)


def drive(study: Study, *, trials: int, processes: int = 1, deadline: float = math.inf, **plan: Any) -> list[str]:
    """Run the driver; its lines."""
    base = TuneSettings.model_validate({"training": {"epochs": EPOCHS}}).base().model_dump(mode="json")
    pack = PackSettings(base=base, robustness=False, limits={})
    recorder, lines = TrialRecorder(NoTracker(), ""), list[str]()
    asked = PackedPlan(pack=pack, processes=processes, resources={"CPU": 1.0}, trials=trials, **plan)
    PackedTrials(asked, study, recorder, lines.append, deadline=deadline).run()
    recorder.close()
    return lines


@pytest.mark.parametrize(
    ("trials", "processes", "sizes"),
    [(8, 4, [2, 2, 2, 2]), (16, 8, [2] * 8), (20, 4, [5, 5, 5, 5]), (3, 4, [1, 1, 1]), (12, 1, [8, 4])],
)
def test_no_process_is_without_a_trial_that_another_has_in_its_step(
    trials: int, processes: int, sizes: list[int], scripted: type[ScriptedProcesses], tmp_path: Path
) -> None:
    study = opened(tmp_path)
    drive(study, trials=trials, processes=processes, fused=8)
    assert [len(group) for group in scripted.groups] == sizes
    assert study.finished() == trials
    assert scripted.started == min(trials, processes)


@given(most=st.integers(1, 16), trials=st.integers(1, 200), processes=st.integers(1, 16))
def test_what_shares_a_step_leaves_enough_for_all_others(most: int, trials: int, processes: int) -> None:
    share = in_one_step(most, trials=trials, processes=processes)
    assert 1 <= share <= most
    assert share == most or (share - 1) * processes < trials <= share * processes


def test_the_trainings_of_a_final_share_their_steps_where_shape_and_seed_are_the_same(
    scripted: type[ScriptedProcesses], tmp_path: Path
) -> None:
    study = opened(tmp_path, space=SHAPES)
    for number, width in enumerate((32, 64, 32, 64)):  # no two neighbours have one shape
        study.enqueue({"training.kl_weight": 0.1 * (number + 1), "model.d_model": width}, {"wanted": number})
        finish(study, study.ask().number, 0.1 * number)
    settings = TuneSettings.model_validate({"tuning": {"final": {"top": 4, "seeds": 5}}})
    space = final_space(SHAPES)
    final = opened(tmp_path, "final", space=space)
    candidates = enqueue_finalists(settings, study, final)
    assert [record.number for record in candidates] == [3, 2, 1, 0]
    drive(final, trials=20, fused=8)
    records = {record.number: record for record in final.records()}
    groups = [
        [(records[n].labels["candidate"], records[n].parameters["training.seed"]) for n in group]
        for group in scripted.groups
    ]
    assert groups == [[(a, seed), (b, seed)] for seed in range(1, 6) for a, b in ((3, 1), (2, 0))]


@pytest.mark.parametrize("ranks", [list(range(8)), list(range(8))[::-1], [3, 7, 0, 5, 1, 6, 2, 4]])
def test_trials_of_one_step_are_judged_by_each_other_whatever_their_order(
    ranks: list[int], scripted: type[ScriptedProcesses], tmp_path: Path
) -> None:
    """Of eight that come to a rung together two go on, and of these the better one from the next."""
    scripted.score = staticmethod(lambda number, epoch: 0.1 * ranks[number])
    study = opened(tmp_path, scheduler="asha")
    drive(study, trials=8, fused=8, rungs=rungs("asha", grace=2, factor=3, epochs=EPOCHS))
    epochs = {ranks[record.number]: record.epochs for record in study.records()}
    assert epochs == {7: 12, 6: 6} | dict.fromkeys(range(6), 2)


def test_a_trial_of_one_step_is_judged_also_by_those_that_came_before(tmp_path: Path) -> None:
    """As it would be alone, if it were the last to come; with hyperband within its bracket."""
    kept: dict[Scheduler, list[set[float]]] = {"asha": [], "hyperband": []}
    for scheduler, found in kept.items():
        for order in (1, -1):
            study = opened(tmp_path / f"{scheduler}{order}", scheduler=scheduler)
            values = [0.9, 0.1, 0.2, 0.3, 0.8, 0.7, 0.6, 0.5, 0.4]
            for value in values:
                study.report(study.ask().number, 2, value)
            for number in range(4):
                study.should_prune(number)
            group = list(range(4, 9))[::order]
            stopped = study.stopped(group)
            found.append({values[number] for number in group if number not in stopped})
    assert kept["asha"] == [{0.8, 0.7}] * 2, "they and 0.9 are the third of nine"
    assert kept["hyperband"][0] == kept["hyperband"][1] != set(values[4:])


def planned(folder: Path, *, trials: int, rungs: list[int], room: int = 1) -> SearchPlan:
    return SearchPlan(
        folder=folder, manifest=cast(Any, None), space=LAMBDA, room=room, trials=trials, rungs=rungs, fused=1,
        resources={"CPU": 1.0}, final_workers=1, storage=None,
    )  # fmt: skip


def test_once_the_time_is_over_no_trial_starts_and_those_that_train_come_to_their_end(
    scripted: type[ScriptedProcesses], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter)
    for module in (packed, running):
        monkeypatch.setattr(module, "time", clock)

    def score(number: int, epoch: int) -> float:
        now[0] += 1.0  # an epoch of any trial takes a second
        return 0.5

    scripted.score = staticmethod(score)
    settings = TuneSettings.model_validate({"training": {"epochs": EPOCHS}, "tuning": {"time_budget_s": 30}})
    study, lines = opened(tmp_path), list[str]()

    def call() -> list[int]:
        plan = planned(tmp_path, trials=8, rungs=[], room=2)
        run_trials(settings, plan, study, NoTracker(), "", lines.append, trials=8)
        assert {trial.state.name for trial in study.history()} == {"COMPLETE"}
        return [trial.number for trial in study.history()]

    assert call() == [0, 1, 2]  # the second of which was given out after 12 s, the third after 24
    assert lines[-1] == (
        "tuning.time_budget_s=30 is over; the search is not over: 3 of 8 trials have ended, and the next call goes on"
    )
    assert call() == [*range(6)]  # every call has as many seconds
    assert call() == [*range(8)]
    assert lines[-1].endswith("(8 of 8)")


def test_a_trial_that_was_set_aside_for_its_shape_does_not_begin_once_the_time_is_over(
    scripted: type[ScriptedProcesses], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first group is cut where a draw has another width; that draw begins the next group, or the next call."""
    now = [0.0]
    monkeypatch.setattr(packed, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter))

    def score(number: int, epoch: int) -> float:
        now[0] += 100.0
        return 0.5

    scripted.score = staticmethod(score)
    study = opened(tmp_path, space=SHAPES)
    drive(study, trials=8, fused=4, deadline=50.0)
    widths = [trial.params["model.d_model"] for trial in study.history()]
    (group,) = scripted.groups
    assert len(study.history()) == len(group) + 1 and widths[-1] != widths[0], "one was set aside"
    assert [trial.state.name for trial in study.history()] == ["COMPLETE"] * len(group) + ["RUNNING"]
    again = opened(tmp_path, space=SHAPES)
    assert again.requeue_interrupted() == 1
    drive(again, trials=8, fused=4)
    assert again.finished() == 8


HALVING = TuneSettings.model_validate({"training": {"epochs": EPOCHS}, "tuning": {"scheduler": "halving"}})
RUNGS = [2, 6]


def halved(study: Study, folder: Path, *, trials: int, tracker: Tracker, parent: str) -> list[str]:
    """Go on with a halving as a search does; its lines."""
    study.requeue_interrupted(paused_at=RUNGS)
    plan = planned(folder, trials=trials, rungs=RUNGS)
    lines: list[str] = []
    run_trials(HALVING, plan, study, tracker, parent, lines.append, trials=trials, rungs=RUNGS)
    return lines


@pytest.mark.parametrize(
    ("trials", "answers", "fewer", "expected"),
    [
        (12, 8, 4, {"COMPLETE": [12], "PRUNED": [2] * 7}),  # four wait at the first rung, the fifth was at its start
        (27, 37, 9, {"COMPLETE": [12], "PRUNED": [2] * 18 + [6] * 8}),  # two of three that had gone on to the end
    ],
)
def test_a_search_that_is_told_to_end_early_leaves_no_trial_at_a_rung(
    trials: int, answers: int, fewer: int, expected: dict[str, list[int]],
    scripted: type[ScriptedProcesses], tmp_path: Path,
) -> None:  # fmt: skip
    """The best of those that wait go on as far as fewer trials have places; the others end, for everyone to see."""
    tracker = open_tracker(enabled=True, uri=f"sqlite:///{tmp_path / 'mlflow.db'}", experiment="e", output=tmp_path)
    parent = tracker.start("search").run_id
    scripted.score = staticmethod(lambda number, epoch: 0.01 * number)
    scripted.answers = answers
    study = opened(tmp_path)
    with pytest.raises(CutOffError):
        halved(study, tmp_path, trials=trials, tracker=tracker, parent=parent)
    study.flush()
    for trial in study.history():
        if trial.state.name == "RUNNING" and "paused" in trial.user_attrs:
            kept = paused_trial(tmp_path, trial.number, trial.params, HALVING.base(), RUNGS)
            kept.save(2, Checkpoint(tensors={"model": {"w": torch.zeros(1)}}, state={}))
    assert list((tmp_path / "paused").iterdir())

    scripted.answers = 10_000
    began = scripted.started
    again = opened(tmp_path)
    lines = halved(again, tmp_path, trials=fewer, tracker=tracker, parent=parent)
    there = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 'study.db'}").trials
    ended = [t for t in there if t.user_attrs.get("reason") != "interrupted" and t.state.name != "WAITING"]
    found = {state: sorted(t.user_attrs["epochs"] for t in ended if t.state.name == state) for state in expected}
    assert found == expected
    assert sum(map(len, expected.values())) == len(ended) == again.finished()
    assert (scripted.started > began) == (trials == 12), "nothing was left to train of the other"
    assert lines[-1].endswith(f"({len(ended)} of {len(ended)})")
    runs = [tracker.client.get_run(run_id) for run_id in tracker.children(parent)]
    states = {int(run.data.tags["emolab.trial"]): run.info.status for run in runs}
    assert {number for number, state in states.items() if state == "FINISHED"} == {t.number for t in ended}
    assert set(states.values()) <= {"FINISHED", "KILLED"}
    assert not [place for place in (tmp_path / "paused").rglob("*") if place.is_file()]
