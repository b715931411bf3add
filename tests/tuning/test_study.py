"""What Optuna is told is what happened, and what the database holds survives the process."""

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy import event
from tests.conftest import REPOSITORY

from emolab.databases import place_of
from emolab.names import UserError
from emolab.tuning.finals import enqueue_finalists, final_space, ranked
from emolab.tuning.holding import holding_study
from emolab.tuning.methods import make_pruner, make_sampler
from emolab.tuning.outcome import none_completed
from emolab.tuning.plan import methods
from emolab.tuning.settings import TuneSettings
from emolab.tuning.space import SearchSpace
from emolab.tuning.storage import WriteBehindStorage
from emolab.tuning.study import Study
from emolab.tuning.trials import OVER, SPENT

SPACE = SearchSpace.model_validate(
    {
        "parameters": {
            "training.learning_rate": {"distribution": "float", "low": 1e-4, "high": 1e-2, "log": True},
            "model.dropout": {"distribution": "float", "low": 0.0, "high": 0.5},
        }
    }
)


def open_study(folder: Path, *, scheduler: str = "none") -> Study:
    pruner = make_pruner(scheduler, grace=1, factor=3, epochs=9)  # pyright: ignore[reportArgumentType]
    study = Study(folder / "study.db", "s", space=SPACE, pruner=pruner)
    study.use_sampler(make_sampler("tpe", seed=0, space=SPACE, earlier=study.history()))
    return study


def stored(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """The study as another program reads it."""
    return optuna.load_study(study_name="s", storage=f"sqlite:///{folder / 'study.db'}").trials


def finish(study: Study, number: int, value: float) -> None:
    study.report(number, 1, value)
    study.tell(number, "COMPLETE", [value], epochs=1)


def test_every_way_to_end_is_recorded_as_what_it_was(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    for expected in range(4):
        assert study.ask().number == expected
    study.report(0, 1, 0.5)
    study.report(0, 2, 0.6)
    study.tell(0, "COMPLETE", [0.6], epochs=2, seconds=1.5)
    study.report(1, 1, 0.2)
    study.report(1, 2, 0.3)
    study.tell(1, "PRUNED", reason="pruned after epoch 2", epochs=2)
    study.tell(2, "FAIL", reason="non-finite loss at epoch 2, step 1", epochs=1)
    study.constrain(3, {"parameters": 12.0})
    study.tell(3, "PRUNED", reason="over the limit: parameters")
    study.flush()
    trials = stored(tmp_path)
    assert [t.state for t in trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.PRUNED]
    assert trials[0].value == 0.6
    assert trials[0].intermediate_values == {1: 0.5, 2: 0.6}
    assert trials[1].value == 0.3  # a pruned trial's last value
    assert "non-finite loss at epoch 2, step 1" in trials[2].user_attrs["reason"]
    assert trials[3].constraints == {"parameters": 12.0}
    assert all(t.user_attrs.get("reason") for t in trials[1:])
    assert study.finished() == 4
    assert study.epochs() == 5
    best = study.best()
    assert best is not None
    assert best.number == 0
    assert [r.state for r in study.records()] == ["COMPLETE", "PRUNED", "PRUNED", "FAIL"]


@pytest.mark.fault
def test_interrupted_trials_are_queued_again_with_their_parameters_and_nothing_is_drawn_twice(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    drawn = [study.ask() for _ in range(5)]
    for draw in drawn[:3]:
        finish(study, draw.number, 0.1 * draw.number)
    study.flush()
    reopened = open_study(tmp_path)
    assert reopened.requeue_interrupted() == 2
    assert reopened.requeue_interrupted() == 0
    assert reopened.finished() == 3
    again = [reopened.ask() for _ in range(4)]
    assert [draw.parameters for draw in again[:2]] == [draw.parameters for draw in drawn[3:]]
    assert not [draw for draw in again[2:] if draw.parameters in [d.parameters for d in drawn]]
    for draw in again:
        finish(reopened, draw.number, 0.5)
    assert reopened.finished() == 7
    assert len(reopened.records()) == 7
    reopened.flush()
    assert sum(t.user_attrs.get("reason") == "interrupted" for t in stored(tmp_path)) == 2


def test_a_sampler_learns_from_a_paused_trial_as_from_one_that_was_pruned_there(tmp_path: Path) -> None:
    """Also after a restart. To a sampler a trial that runs is a bad one, and paused trials hold all that is known."""

    def next_draw(folder: Path, *, pause: bool, reopen: bool) -> dict[str, Any]:
        study = open_study(folder)
        for draw in [study.ask() for _ in range(12)]:
            study.report(draw.number, 1, draw.parameters["model.dropout"])
            if pause:
                study.pause(draw.number, [{"epoch": 1}])
            else:
                study.tell(draw.number, "PRUNED", epochs=1)
        study.flush()
        if reopen:
            study = open_study(folder)
            assert study.requeue_interrupted(paused_at=[1, 3]) == 0
            assert [(d.number, len(curve), value) for d, curve, value in study.resume_paused()] == [
                (t.number, 1, t.params["model.dropout"]) for t in stored(folder)
            ]
        study.use_sampler(make_sampler("tpe", seed=5, space=SPACE))
        assert {t.state for t in stored(folder)} == {TrialState.RUNNING if pause else TrialState.PRUNED}
        return study.ask().parameters

    known = next_draw(tmp_path / "pruned", pause=False, reopen=False)
    assert next_draw(tmp_path / "paused", pause=True, reopen=False) == known
    assert next_draw(tmp_path / "reopened", pause=True, reopen=True) == known


def test_paused_trials_are_queued_again_where_nothing_goes_on_from_them(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    draw = study.ask()
    study.report(draw.number, 1, 0.5)
    study.pause(draw.number, [{"epoch": 1}])
    study.flush()
    again = open_study(tmp_path)
    assert again.requeue_interrupted(paused_at=[2, 6]) == 1, "the rungs were others then"
    assert again.resume_paused() == []
    assert again.ask().parameters == draw.parameters


def test_a_configuration_with_the_same_labels_is_queued_once_also_by_a_later_process(tmp_path: Path) -> None:
    point = {"training.learning_rate": 1e-3, "model.dropout": 0.25}
    for _ in range(2):
        study = open_study(tmp_path)
        study.requeue_interrupted()
        for seed in (1, 2):
            study.enqueue(point, {"seed": seed})
        assert study.waiting() == 2
        draw = study.ask()  # and the process dies
        assert draw.parameters == point
        study.flush()


def test_one_process_draws_the_same_points_for_the_same_seed(tmp_path: Path) -> None:
    points = []
    for name in ("a", "b"):
        study = open_study(tmp_path / name)
        mine = []
        for _ in range(14):
            draw = study.ask()
            mine.append(draw.parameters)
            finish(study, draw.number, draw.parameters["model.dropout"])
        points.append(mine)
    assert points[0] == points[1]


def test_the_pruner_is_asked_with_what_was_reported(tmp_path: Path) -> None:
    study = open_study(tmp_path, scheduler="asha")
    stopped = []
    for value in (0.5, 0.1, 0.2, 0.9):
        draw = study.ask()
        study.report(draw.number, 1, value)
        stopped.append(study.should_prune(draw.number))
        study.tell(draw.number, "PRUNED", epochs=1) if stopped[-1] else finish(study, draw.number, value)
    assert stopped == [False, True, True, False]


@pytest.mark.fault
def test_a_trial_that_was_interrupted_after_a_rung_does_not_compete_with_those_after_it(tmp_path: Path) -> None:
    """It is run again, and would count twice: one decision after it would be another one."""

    def decisions(folder: Path, *, killed: bool) -> list[bool]:
        study = open_study(folder, scheduler="asha")
        stopped = []
        for number, value in enumerate((0.50, 0.60, 0.40, 0.45, 0.42, 0.58, 0.57)):
            draw = study.ask()
            study.report(draw.number, 1, value)
            stopped.append(study.should_prune(draw.number))
            if killed and number == 1:
                study.flush()
                study = open_study(folder, scheduler="asha")
                assert study.requeue_interrupted() == 1
                draw = study.ask()
                study.report(draw.number, 1, value)
                assert study.should_prune(draw.number) == stopped[-1]
            study.tell(draw.number, "PRUNED" if stopped[-1] else "COMPLETE", [value], epochs=1)
        study.flush()
        return stopped

    undisturbed = decisions(tmp_path / "undisturbed", killed=False)
    assert undisturbed == [False, False, True, True, True, False, True]
    assert decisions(tmp_path / "killed", killed=True) == undisturbed


def test_tpe_learns_to_stay_within_a_limit_from_trials_that_were_never_trained(tmp_path: Path) -> None:
    """Half of the space is over it."""
    study = open_study(tmp_path)
    excess = []
    for _ in range(50):
        draw = study.ask()
        excess.append(draw.parameters["model.dropout"] - 0.25)
        study.constrain(draw.number, {"parameters": excess[-1]})
        if excess[-1] > 0:
            study.tell(draw.number, "PRUNED", reason=f"{OVER}: parameters")
        else:
            finish(study, draw.number, draw.parameters["training.learning_rate"])
    study.flush()
    assert sum(each > 0 for each in excess[-25:]) <= 6


def test_importances_need_enough_trials(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    for count in range(20):
        assert study.importances().shares == {}, count
        draw = study.ask()
        finish(study, draw.number, draw.parameters["model.dropout"])
    importances = study.importances()
    assert next(iter(importances.shares)) == "model.dropout"
    assert importances.compared == "score after epoch 1 of 20 trials"


PARTS = ("number", "state", "params", "distributions", "values", "intermediate_values", "user_attrs", "system_attrs")
ACTIONS = st.lists(
    st.one_of(
        st.just(("ask",)),
        st.just(("enqueue",)),
        st.tuples(st.just("report"), st.integers(0, 5), st.floats(0, 1)),
        st.tuples(st.just("attribute"), st.integers(0, 5), st.text(max_size=5)),
        st.tuples(st.just("end"), st.integers(0, 5), st.sampled_from(["COMPLETE", "PRUNED", "FAIL"])),
        st.just(("flush",)),
        st.just(("reopen",)),
    ),
    min_size=5,
    max_size=25,
)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS)
def test_the_database_always_ends_where_memory_is(actions: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("storage")
    url = f"sqlite:///{folder / 'study.db'}"

    def opened() -> tuple[WriteBehindStorage, optuna.Study]:
        storage = WriteBehindStorage(url, "s", [StudyDirection.MAXIMIZE])
        return storage, optuna.load_study(study_name="s", storage=storage, sampler=optuna.samplers.RandomSampler(0))

    storage, study = opened()
    for action, *rest in actions:
        running = [t for t in study.trials if t.state == TrialState.RUNNING]
        if action == "ask":
            with storage.together():
                study.ask().suggest_float("x", 0, 1)
        elif action == "enqueue":
            study.enqueue_trial({"x": 0.25}, user_attrs={"from": "queue"})
        elif action == "flush":
            storage.flush()
        elif action == "reopen":
            storage.flush()
            storage, study = opened()
        elif running:
            trial = optuna.Trial(study, running[rest[0] % len(running)]._trial_id)
            if action == "report":
                trial.report(rest[1], trial.number)
            elif action == "attribute":
                trial.set_user_attr("note", rest[1])
            else:
                state = TrialState[rest[1]]
                study.tell(trial, [0.5] if state == TrialState.COMPLETE else None, state=state)
    storage.flush()
    there = optuna.load_study(study_name="s", storage=url).trials
    assert len(there) == len(study.trials)
    for mine, theirs in zip(study.trials, there, strict=True):
        for part in (*PARTS, "datetime_start", "datetime_complete"):
            assert getattr(mine, part) == getattr(theirs, part), part


def test_moments_are_stored_as_optuna_reads_them_in_every_time_zone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    try:
        monkeypatch.setenv("TZ", "Asia/Kolkata")
        time.tzset()
        storage = WriteBehindStorage(url, "s", [StudyDirection.MAXIMIZE])
        study = optuna.load_study(study_name="s", storage=storage)
        study.tell(study.ask(), 0.5)
        storage.flush()
        (mine,), (theirs,) = study.trials, optuna.load_study(study_name="s", storage=url).trials
        assert (mine.datetime_start, mine.datetime_complete) == (theirs.datetime_start, theirs.datetime_complete)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.fault
@pytest.mark.parametrize("ends", [False, True])
def test_a_write_that_is_cut_off_leaves_no_half_of_a_change(ends: bool, tmp_path: Path) -> None:
    """A trial that has paused once pauses again, or ends; the database is lost at every single statement of that."""

    def there(folder: Path) -> tuple[Any, ...]:
        (trial,) = stored(folder)
        curves, paused = trial.user_attrs["curves"], trial.user_attrs["paused"]
        return len(curves), paused, sorted(trial.intermediate_values), trial.state, trial.values

    before = (1, 1, [1], TrialState.RUNNING, None)
    after = (3, 1, [1, 2, 3], TrialState.COMPLETE, [0.3]) if ends else (3, 3, [1, 2, 3], TrialState.RUNNING, None)
    cuts = 0
    for statement in range(1, 30):
        folder = tmp_path / str(statement)
        study = open_study(folder)
        number = study.ask().number
        study.report(number, 1, 0.1)
        study.pause(number, [{"epoch": 1}])
        study.flush()
        with cut_off(study, statement) as was_cut, study.deciding():
            study.report(number, 2, 0.2)
            study.report(number, 3, 0.3)
            curve = [{"epoch": epoch} for epoch in (1, 2, 3)]
            if ends:
                study.tell(number, "COMPLETE", [0.3], epochs=3, curves=curve)
            else:
                study.pause(number, curve)
        assert there(folder) == (before if was_cut else after)
        if not was_cut:
            break
        cuts += 1
        reopened = open_study(folder)
        reopened.requeue_interrupted(paused_at=[1, 3])
        ((_, resumed, value),) = reopened.resume_paused()
        assert (len(resumed), value) == (1, 0.1)
    assert cuts > 2


@contextmanager
def cut_off(study: Study, statement: int) -> Iterator[list[str]]:
    """The database is lost at the n-th statement from here; what that was, if there were so many."""
    left, was_cut = [statement], []

    def count(connection: Any, cursor: Any, text: str, *_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            was_cut.append(text)
            raise OSError("the database is gone")

    engine = study._storage._database.engine  # pyright: ignore[reportPrivateUsage]  # where the fault is injected
    event.listen(engine, "before_cursor_execute", count)
    try:
        yield was_cut
        with suppress(UserError):
            study.flush()
    finally:
        event.remove(engine, "before_cursor_execute", count)


def test_a_study_belongs_to_one_experiment(tmp_path: Path) -> None:
    open_study(tmp_path).claim({"training.epochs": 5, "data": "a"})
    open_study(tmp_path).claim({"training.epochs": 5, "data": "a"})
    with pytest.raises(
        UserError, match=r"study s was made with training\.epochs 5, not 50 \(and 1 more differ\): choose"
    ):
        open_study(tmp_path).claim({"training.epochs": 50, "data": "a", "constraints.parameters": 1000})
    with pytest.raises(UserError, match=r"study s was made without constraints\.parameters: choose another name"):
        open_study(tmp_path).claim({"training.epochs": 5, "data": "a", "constraints.parameters": 1000})
    with pytest.raises(UserError, match=r"study s was made with 1 objective\(s\), not 2: choose another name"):
        Study(tmp_path / "study.db", "s", space=SPACE, objectives=("macro_f1", "robustness"))


def test_a_configuration_that_was_drawn_twice_takes_one_place_in_the_final(tmp_path: Path) -> None:
    """The better of two that completed, and one that completed rather than one that was stopped."""
    study = open_study(tmp_path)
    ends = [("COMPLETE", 0.25, 0.5), ("COMPLETE", 0.5, 0.6), ("COMPLETE", 0.25, 0.7), ("PRUNED", 0.25, 0.9),
            ("PRUNED", 0.0, 0.2), ("COMPLETE", 0.5, 0.6)]  # fmt: skip
    for number, (state, dropout, value) in enumerate(ends):
        study.enqueue({"training.learning_rate": 1e-3, "model.dropout": dropout}, {"wanted": number})
        draw = study.ask()
        study.report(draw.number, 1, value)
        study.tell(draw.number, state, [value] if state == "COMPLETE" else [], epochs=1)
    final = Study(tmp_path / "study.db", "final", space=final_space(SPACE))
    asked = TuneSettings.model_validate({"tuning": {"final": {"top": 4, "seeds": 5}}})
    assert [record.number for record in enqueue_finalists(asked, study, final)] == [2, 1, 4]
    assert final.waiting() == 15


def test_where_few_completed_the_final_takes_those_that_went_furthest(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    ends = [("PRUNED", 1, 0.9, ""), ("PRUNED", 3, 0.4, ""), ("COMPLETE", 9, 0.5, ""), ("PRUNED", 3, 0.6, ""),
            ("PRUNED", 0, None, f"{OVER}: parameters"), ("FAIL", 4, 0.8, "lost")]  # fmt: skip
    for state, epochs, value, reason in ends:
        draw = study.ask()
        if value is not None:
            study.report(draw.number, epochs, value)
        study.tell(draw.number, state, [value] if state == "COMPLETE" else [], epochs=epochs, reason=reason)
    final = Study(tmp_path / "study.db", "final", space=final_space(SPACE))
    asked = TuneSettings.model_validate({"tuning": {"final": {"top": 3, "seeds": 2}}})
    assert [record.number for record in enqueue_finalists(asked, study, final)] == [2, 3, 1]
    assert final.waiting() == 6


def test_a_final_without_a_winner_trains_again_what_failed_and_one_with_a_winner_nothing(
    tmp_path: Path, one_line: Callable[..., None]
) -> None:
    study = open_study(tmp_path)
    for value in (0.5, 0.6):
        finish(study, study.ask().number, value)
    final = Study(tmp_path / "study.db", "final", space=final_space(SPACE))
    asked = TuneSettings.model_validate({"tuning": {"final": {"top": 2, "seeds": 2}}})

    def train_all(*failing: tuple[int, int]) -> None:
        while final.waiting():
            number = final.ask().number
            labels = final.record(number).labels
            if (labels["candidate"], labels["final_seed"]) in failing:
                final.tell(number, "FAIL", reason="lost")
            else:
                finish(final, number, 0.5)

    candidates = enqueue_finalists(asked, study, final)
    train_all((0, 1), (1, 2))
    with pytest.raises(UserError) as error:
        ranked(candidates, final, asked)
    one_line(error, "no finalist completed all of its 2 trainings (lost)", "the same command trains again")
    enqueue_finalists(asked, study, final)
    assert final.waiting() == 2
    train_all((0, 1))
    assert [finalist.record.number for finalist in ranked(candidates, final, asked)] == [1, 0]
    enqueue_finalists(asked, study, final)
    assert final.waiting() == 0


def test_a_study_of_another_search_is_not_taken_for_the_final_of_this_one(tmp_path: Path) -> None:
    Study(tmp_path / "study.db", "s-final", space=SPACE).claim({"model.name": "mult"})
    with pytest.raises(UserError, match=r"the study s-final was made .*choose another name"):
        Study(tmp_path / "study.db", "s-final", space=SPACE).claim({"final_of": "s"})


@pytest.mark.parametrize("folder", ["wh?at", "50%", "a#b", "a b", "ü"])
def test_a_study_lies_in_its_folder_whatever_that_is_called(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    study = open_study(tmp_path / folder)
    finish(study, study.ask().number, 0.5)
    study.flush()
    assert [path.name for path in tmp_path.iterdir()] == [folder]
    assert open_study(tmp_path / folder).finished() == 1


@pytest.mark.fault
def test_a_study_in_a_shared_file_has_one_driver_and_the_second_is_told(
    tmp_path: Path, one_line: Callable[..., None]
) -> None:
    """A lock of one process does not hold off itself: the second driver is another."""
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    code = (
        "import sys; from emolab.tuning.holding import holding_study\n"
        "with holding_study(sys.argv[1], 's'): print('held', flush=True); sys.stdin.read()"
    )
    paths = os.pathsep.join([str(REPOSITORY / "platform"), str(REPOSITORY / "model")])
    first = subprocess.Popen(
        [sys.executable, "-c", code, url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    with first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError) as error, holding_study(url, "s"):
            pass
        one_line(error, "the study s is in use by another process", "studies.db.s.lock")
        with holding_study(url, "another"):
            pass
        first.kill()
    with holding_study(url, "s"):
        pass


@pytest.mark.parametrize(
    ("url", "other", "same"),
    [
        ("postgresql://anna:secret@host/studies", "postgresql+psycopg://ben@host/studies?sslmode=require", True),
        ("postgresql://host/studies", "postgresql://host/others", False),
        ("postgresql:///studies?host=/run/a", "postgresql:///studies?host=/run/b", False),
        ("sqlite:///studies.db", f"sqlite:///{Path('studies.db').resolve()}", True),
        ("sqlite:////a/studies.db", "sqlite:////b/studies.db", False),
    ],
)
def test_a_database_is_the_same_whoever_asks_for_it(url: str, other: str, same: bool) -> None:
    assert (place_of(url) == place_of(other)) == same
    assert "secret" not in place_of(url)


def test_a_study_goes_on_by_another_method_and_does_not_answer_in_its_name(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    assert study.draw_with({"sampler": "tpe", "seed": 0}, trials=2) == ""
    finish(study, study.ask().number, 0.5)
    assert study.draw_with({"sampler": "tpe", "seed": 0}, trials=2) == ""
    said = study.draw_with({"sampler": "random", "seed": 0}, trials=2)
    assert said == "so far its trials were made with sampler tpe, not random"
    finish(study, study.ask().number, 0.5)
    again = open_study(tmp_path)
    assert again.draw_with({"sampler": "random", "seed": 0}, trials=2) == ""
    other = {"sampler": "gp", "seed": 1}
    with pytest.raises(UserError, match=r"all its 2 trials, made with sampler random, not gp, with seed 0, not 1"):
        again.draw_with(other, trials=2)
    with pytest.raises(UserError, match="or let it have more trials or epochs"):
        again.draw_with(other, trials=9, epochs=again.epochs())
    assert again.draw_with(other, trials=3) != ""
    assert open_study(tmp_path).draw_with({"sampler": "random", "seed": 0}, trials=2) == ""  # the other drew nothing
    said = again.draw_with({"sampler": "tpe", "seed": 0}, trials=3)
    assert said == "so far its trials were made with sampler random, not tpe"


def test_a_halving_does_not_take_trials_for_its_own_that_it_did_not_stop(
    tmp_path: Path, one_line: Callable[..., None]
) -> None:
    """They would have taken all its places, and every new trial would end at the first rung."""

    def chosen(scheduler: str, **tuning: Any) -> dict[str, Any]:
        return methods(TuneSettings.model_validate({"tuning": {"scheduler": scheduler, **tuning}}))

    study = open_study(tmp_path)
    study.draw_with(chosen("none"), trials=24)
    assert study.draw_with(chosen("halving"), trials=24) == "", "none has drawn nothing"
    study.draw_with(chosen("none"), trials=24)
    for _ in range(12):
        finish(study, study.ask().number, 0.5)
    with pytest.raises(UserError) as error:
        study.draw_with(chosen("halving"), trials=24)
    one_line(error, "the study s holds trials made with scheduler none, not halving", "choose another name, or another")
    assert study.draw_with(chosen("asha"), trials=24).startswith("so far its trials were made with scheduler none")

    halved = open_study(tmp_path / "halved")
    for number, scheduler in enumerate(("halving", "halving", "asha")):
        halved.draw_with(
            chosen(scheduler, sampler="random" if number else "tpe"), trials=24
        )  # another sampler may draw
        finish(halved, halved.ask().number, 0.5)
        if scheduler == "halving":
            with pytest.raises(
                UserError, match=r"made with grace_epochs 2, not 3, with reduction_factor 3, not 2, and"
            ):
                halved.draw_with(chosen("halving", grace_epochs=3, reduction_factor=2), trials=24)
    with pytest.raises(UserError, match=r"holds trials made with scheduler asha, not halving, and halving lets"):
        halved.draw_with(chosen("halving"), trials=24)


@pytest.mark.fault
def test_what_was_acknowledged_survives_a_sudden_death(tmp_path: Path) -> None:
    """The process ends by SIGKILL right after a trial became durable, with another one just begun."""
    code = f"""
import os, signal, sys
sys.path[:0] = {[str(REPOSITORY), str(REPOSITORY / "platform"), str(REPOSITORY / "model")]!r}
from pathlib import Path
from tests.tuning.test_study import finish, open_study
study = open_study(Path({str(tmp_path)!r}))
for i in range(3):
    finish(study, study.ask().number, 0.1 * i)
while not study.durable(2): pass
study.ask()
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == -9, result.stderr
    study = open_study(tmp_path)
    assert [r.value for r in sorted(study.records(), key=lambda r: r.number)] == [0.0, 0.1, 0.2]
    assert study.requeue_interrupted() in (0, 1)  # the last one may not have reached the database
    assert study.finished() == 3


def test_why_no_trial_completed_is_counted_by_reason(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    assert none_completed(study, {}) == ("none of the 0 trials completed (none was begun): raise tuning.time_budget_s")
    for parameters, latency in ((30.0, 5.0), (12.0, -1.0), (-3.0, 0.5)):
        number = study.ask().number
        excess = {"parameters": parameters, "latency_ms": latency}
        study.constrain(number, excess)
        study.tell(number, "PRUNED", reason=f"{OVER}: {', '.join(name for name in excess if excess[name] > 0)}")
    study.tell(study.ask().number, "PRUNED", reason=f"{SPENT} after epoch 2", epochs=2)
    study.tell(study.ask().number, "PRUNED", reason="pruned after epoch 1", epochs=1)
    for number in range(2):
        study.tell(study.ask().number, "FAIL", reason=f"non-finite loss at epoch 1, step {number}")
    assert none_completed(study, {"parameters": 1000.0, "latency_ms": 20.0}) == (
        "none of the 7 trials completed (2 pruned over the limit tuning.constraints.parameters=1000, the smallest "
        "had 1012; 2 pruned over the limit tuning.constraints.latency_ms=20, the smallest had 20.5; 1 pruned "
        "when the epoch budget was spent; 1 pruned by the scheduler; 2 failed: non-finite loss at epoch 1, step 0; "
        "non-finite loss at epoch 1, step 1): raise tuning.constraints.parameters or search smaller models, "
        "raise tuning.constraints.latency_ms or search smaller models, raise tuning.epoch_budget"
    )


@pytest.mark.fault
def test_a_database_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    draw = study.ask()
    study.flush()
    holder = sqlite3.connect(tmp_path / "study.db")
    holder.execute("DROP TABLE trial_values")
    holder.commit()
    finish(study, draw.number, 0.5)
    with pytest.raises(
        UserError, match=r"study\.db cannot be written: no such table: trial_values$"
    ):  # without the statement
        study.flush()
    with pytest.raises(UserError, match=r"study\.db cannot be written"):
        study.ask()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("nothing of the kind\n" * 100)
    with pytest.raises(UserError, match="cannot be opened"):
        open_study(tmp_path)
    assert (tmp_path / "study.db").read_text().startswith("nothing")


DAMAGE = {
    "cut short": lambda content: content[: len(content) // 2],
    "its last byte lost": lambda content: content[:-1],
    "its beginning only": lambda content: content[:10],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "another text": lambda content: b"nothing of the kind\n" * 400,
    "overwritten within": lambda content: content[:4096] + b"\xff" * 2000 + content[6096:],
}


@pytest.mark.fault
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_database_is_refused_in_one_line_and_left_as_it_is(
    how: str, tmp_path: Path, one_line: Callable[..., None]
) -> None:
    study = open_study(tmp_path)
    for _ in range(30):
        finish(study, study.ask().number, 0.5)
    study.flush()
    (tmp_path / "run.json").write_text("{}")  # as a search leaves it once it has begun
    file = tmp_path / "study.db"
    file.write_bytes(DAMAGE[how](file.read_bytes()))
    found = file.read_bytes()
    with pytest.raises(UserError) as error:
        open_study(tmp_path)
    one_line(error, f"{file} cannot be opened, it is damaged (", f"move its folder {tmp_path} away")
    for stranger in ("SQL", "sqlite3", "PRAGMA", "sqlalche.me"):
        assert stranger not in str(error.value)
    assert file.read_bytes() == found


def test_a_search_that_was_killed_before_its_first_transaction_begins(tmp_path: Path) -> None:
    (tmp_path / "study.db").touch()
    assert open_study(tmp_path).ask().number == 0


def test_cma_es_keeps_no_pickle_in_the_database(tmp_path: Path) -> None:
    study = Study(tmp_path / "study.db", "s", space=SPACE)
    study.use_sampler(make_sampler("cmaes", seed=0, space=SPACE))
    for _ in range(12):
        draw = study.ask()
        finish(study, draw.number, draw.parameters["model.dropout"])
    study.flush()
    assert any(key.startswith("cma:") for t in study.history() for key in t.system_attrs)
    assert not [key for t in stored(tmp_path) for key in t.system_attrs if key.startswith("cma:")]
    resumed = Study(tmp_path / "study.db", "s", space=SPACE)
    resumed.use_sampler(make_sampler("cmaes", seed=0, space=SPACE, earlier=resumed.history()))
    draws = [resumed.ask().parameters["model.dropout"] for _ in range(6)]
    assert sum(draws) / len(draws) > 0.25  # it goes on where the good ones were
