"""The page of a search shows what the study holds."""

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from emolab.reports import search_figures as search_figures_module
from emolab.reports.page import Measured, Section, TableData, page
from emolab.reports.search import search_page, trained_again
from emolab.reports.search_figures import best_so_far, epochs_by_rung, history, parallel, search_figures, slices
from emolab.reports.tables import to_csv, to_latex
from emolab.studies.tuning import print_trials
from emolab.tuning.finals import Finalist
from emolab.tuning.methods import make_sampler
from emolab.tuning.outcome import left_of
from emolab.tuning.settings import TuneSettings
from emolab.tuning.space import SearchSpace
from emolab.tuning.study import Study
from emolab.tuning.trials import OVER, SPENT

SPACE = SearchSpace.model_validate(
    {
        "parameters": {
            "model.name": {"distribution": "categorical", "choices": ["late_fusion", "mult"]},
            "training.learning_rate": {"distribution": "float", "low": 1e-4, "high": 1e-1, "log": True},
            "model.attention_dropout": {
                "distribution": "float",
                "low": 0.0,
                "high": 0.3,
                "when": {"model.name": ["mult"]},
            },
        }
    }
)


@pytest.fixture
def result(tmp_path: Path) -> Any:
    """Twelve trials: every third complete after nine epochs, one failed, the others stopped after one or three."""
    study = Study(tmp_path / "study.db", "s", space=SPACE)
    study.use_sampler(make_sampler("random", seed=1, space=SPACE))
    for number in range(12):
        draw = study.ask()
        epochs = 9 if number % 3 == 0 else 0 if number == 4 else 1 + 2 * (number % 2)
        for epoch in range(1, epochs + 1):
            study.report(number, epoch, 0.01 * number + 0.05 * epoch)
        if number == 4:
            study.tell(number, "FAIL", reason="<non-finite> loss", epochs=0)
        elif epochs == 9:
            study.tell(number, "COMPLETE", [0.01 * number + 0.45], epochs=9)
        else:
            study.tell(number, "PRUNED", reason=f"pruned after epoch {epochs}", epochs=epochs)
        assert draw.number == number
    best = study.best()
    assert best is not None
    split = SimpleNamespace(reference_scores={"ceiling_accuracy": 0.9, "ceiling_macro_f1": 0.88})
    return SimpleNamespace(
        folder=tmp_path,
        run_id="run-1",
        manifest=SimpleNamespace(
            splits={"validation": split}, class_prior=0.4, class_prior_macro_f1=0.1429, digest="d" * 64
        ),
        records=study.records(),
        best=best,
        finalists=[Finalist(record=best, values=(0.5, 0.52, 0.54))],
        left=left_of(study, trials=12, epochs=None),
        rungs=[1, 3],
        fused=1,
        study=study,
    )


WINNER: Any = SimpleNamespace(run_id="run-2", progress=SimpleNamespace(best_macro_f1=0.55, best_epoch=7, reports=[]))


@pytest.mark.parametrize("scored", [1, 12])
def test_the_worst_trial_is_seen_and_the_colours_are_explained(
    result: Any, scored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(search_figures_module, "svg", lambda figure: drawn.append(figure) or b"")
    records = [record for record in result.records if record.value is not None][:scored]
    parallel(records, chosen=records[0].number)
    axes, colours = drawn[0].axes
    lines = [line for line in axes.lines if len(line.get_xydata()) > 2]  # the others are the parameters' axes
    assert len(lines) == len(records) + 1
    for line in lines:
        assert np.dot(to_rgb(line.get_color()), (0.299, 0.587, 0.114)) < 0.7  # white is 1
        assert line.get_linewidth() >= 1.0
    assert colours.get_ylabel() == "validation macro-F1"
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["chosen"]


def test_the_chosen_trial_is_the_one_that_stands_out_although_others_scored_higher(
    result: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(search_figures_module, "svg", lambda figure: drawn.append(figure) or b"")
    stopped = next(record for record in result.records if record.state == "PRUNED")
    result.records[result.records.index(stopped)] = replace(stopped, value=0.9)  # before its score fell
    search_figures(result)
    (marked,) = [line for line in drawn[-1].axes[0].lines if line.get_label() == "chosen"]
    values = [record.value for record in result.records if record.value is not None]
    heights = np.asarray(marked.get_ydata(), dtype=float)
    assert heights[-1] == pytest.approx((result.best.value - min(values)) / (0.9 - min(values)))
    shown = search_page(result, WINNER, {}, TuneSettings()).decode()
    assert f"Chosen: trial {result.best.number}, the winner of the final. Validation macro-F1:" in shown
    result.finalists = []
    shown = search_page(result, WINNER, {}, TuneSettings()).decode()
    assert f"Chosen: trial {result.best.number}, the best that completed." in shown


def test_epochs_are_counted_in_the_order_in_which_trials_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(search_figures_module, "svg", lambda figure: drawn.append(figure) or b"")
    study = Study(tmp_path / "study.db", "s", space=SPACE)
    study.use_sampler(make_sampler("random", seed=1, space=SPACE))
    for number in range(3):
        study.ask()
        study.report(number, 1, 0.1 * number + 0.1)
    study.tell(2, "COMPLETE", [0.3], epochs=9)
    study.tell(0, "PRUNED", reason="pruned after epoch 1", epochs=1)
    study.flush()
    reopened = Study(tmp_path / "study.db", "s", space=SPACE)
    reopened.requeue_interrupted()  # trial 1
    draw = reopened.ask()
    reopened.tell(draw.number, "COMPLETE", [0.2], epochs=4)
    assert reopened.order_of_end() == [2, 0, draw.number]
    history(reopened.records(), reopened.order_of_end())
    by_trial, by_epoch = drawn[0].axes
    points = [tuple(point) for dots in by_epoch.collections for point in np.asarray(dots.get_offsets()).tolist()]
    assert sorted(points) == [(9.0, 0.3), (10.0, 0.1), (14.0, 0.2)]
    (best,) = by_epoch.lines
    assert np.asarray(best.get_xydata()).tolist() == [[9.0, 0.3], [10.0, 0.3], [14.0, 0.3]]
    assert by_epoch.get_xlabel() == "epochs of the trials that had ended"
    assert {x for dots in by_trial.collections for x, _ in np.asarray(dots.get_offsets()).tolist()} == {0, 2, 3}


def test_the_page_holds_every_trial_every_figure_and_the_final(result: Any) -> None:
    figures = search_figures(result)
    assert list(figures) == ["history", "budget", "slices", "parallel"]
    shown = search_page(result, WINNER, figures, TuneSettings()).decode()
    assert shown.count("<svg") == len(figures) + 1  # and the training curves
    for part in (
        "run-1", "run-2", "The final", "0.52", "Where the epochs went", "&lt;non-finite&gt; loss", "0.1429",
        "11 trials have scores that can be compared after the same epoch (1); it takes 20",
    ):  # fmt: skip
        assert part in shown, part
    rows = re.findall(r"<tr><td data-value=\"(\d+)\">\d+</td><td data-value=\"(complete|pruned|failed|fail)\"", shown)
    assert len(rows) == 12
    assert search_figures(result) == figures  # equal results, equal bytes


@pytest.mark.parametrize(
    ("epochs", "said"),
    [
        (None, "The search is not over: 12 of 20 trials have ended, and the next call goes on."),
        (30, "The search is over with 12 of 20 trials, which took all of its 30 epochs."),
    ],
)
def test_the_page_says_where_a_search_ended_without_all_of_its_trials(
    result: Any, epochs: int | None, said: str
) -> None:
    assert "The search is" not in search_page(result, WINNER, {}, TuneSettings()).decode()
    result.left = left_of(result.study, trials=20, epochs=epochs)
    assert said in search_page(result, WINNER, {}, TuneSettings()).decode()


def test_the_figure_of_importances_says_what_was_compared(result: Any) -> None:
    for number in range(12, 22):
        result.study.ask()
        result.study.report(number, 1, 0.01 * number)
        result.study.tell(number, "PRUNED", reason="pruned after epoch 1", epochs=1)
    figures = search_figures(result)
    assert list(figures) == ["history", "budget", "slices", "parallel", "importances"]
    drawn = figures["importances"].decode()
    assert ">score after epoch 1 of 21 trials</text>" in drawn
    assert "explained variation" not in drawn  # PED-ANOVA measures no such thing
    shown = search_page(result, WINNER, figures, TuneSettings()).decode()
    assert "not how much of the score it explains" in shown
    assert shown.count("Importance of the parameters") == 1


@pytest.mark.parametrize("trials", [1, 3])
def test_trials_and_epochs_are_counted_in_whole_numbers(result: Any, trials: int) -> None:
    few = [record for record in result.records if record.number < trials]
    ticks = re.findall(r">(\d+\.\d+)</text>", history(few, range(12)).decode())
    assert all(float(tick) < 1 for tick in ticks)  # those of the score alone
    assert (
        ">9</text>" in history(few[:1], range(12)).decode()
    )  # an axis with a single whole number on it shows that one


def test_whole_parameters_have_whole_ticks(tmp_path: Path) -> None:
    layers = {"model.layers": {"distribution": "int", "low": 1, "high": 2}}
    space = SearchSpace.model_validate({"parameters": layers})
    study = Study(tmp_path / "study.db", "layers", space=space)
    study.use_sampler(make_sampler("random", seed=1, space=space))
    for number in range(4):
        study.ask()
        study.tell(number, "COMPLETE", [0.5 + 0.01 * number], epochs=1)
    assert {record.parameters["model.layers"] for record in study.records()} == {1, 2}
    ticks = [float(tick) for tick in re.findall(r">(\d+\.\d+)</text>", slices(study.records()).decode())]
    assert ticks and all(tick < 1 for tick in ticks)


def test_the_reason_of_a_failure_has_room_of_its_own(result: Any) -> None:
    sections = search_page(result, WINNER, {}, TuneSettings()).decode().split("<section>")
    (trials,) = [section for section in sections if "<h2>Trials</h2>" in section]
    assert "non-finite" not in trials  # a column beside all parameters was cut off
    (failed,) = [section for section in sections if "<h2>Failed trials</h2>" in section]
    assert '<td class="prose" data-value="&lt;non-finite&gt; loss">' in failed  # it wraps
    result.records = [record for record in result.records if record.state != "FAIL"]
    assert "Failed trials" not in search_page(result, WINNER, {}, TuneSettings()).decode()


@pytest.fixture
def limited(result: Any, tmp_path: Path) -> Any:
    """A search with a limit of 5,000 parameters, two of whose four trials were over it and one met a spent budget."""
    study = Study(tmp_path / "limited.db", "s", space=SPACE)
    study.use_sampler(make_sampler("random", seed=1, space=SPACE))
    for number, excess in enumerate((-1000.0, 3240.0, 120.0, 0.0)):
        study.ask()
        study.constrain(number, {"parameters": excess})
        if excess > 0:
            study.tell(number, "PRUNED", reason=f"{OVER}: parameters")
    study.report(3, 1, 0.2)
    study.tell(3, "PRUNED", reason=f"{SPENT} after epoch 1", epochs=1)
    study.tell(0, "COMPLETE", [0.4], epochs=9)
    study.flush()
    reopened = Study(tmp_path / "limited.db", "s", space=SPACE)
    assert reopened.records() == study.records()
    return SimpleNamespace(**vars(result) | {"records": reopened.records(), "best": reopened.best(), "study": reopened})


def test_the_page_says_what_stopped_a_trial_and_what_its_model_measured(limited: Any) -> None:
    settings = TuneSettings.model_validate({"tuning": {"constraints": {"parameters": 5000}}})
    (trials,) = re.findall("<h2>Trials</h2>.*?</table>", search_page(limited, WINNER, {}, settings).decode())
    rows = [re.findall(r"<t[dh][^>]*>([^<]*)", row)[:6] for row in trials.split("<tr>")[1:]]
    assert rows == [
        ["trial", "state", "validation macro-F1", "epochs", "stopped by", "parameters (at most 5000)"],
        ["0", "complete", "0.4", "9", "", "4000"],
        ["3", "pruned", "0.2", "1", "epoch budget", "5000"],
        ["1", "pruned", "", "0", "limit on parameters", "8240"],
        ["2", "pruned", "", "0", "limit on parameters", "5120"],
    ]


def test_the_table_of_trials_is_followed_by_what_stopped_some(
    limited: Any, result: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    print_trials(limited)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "stopped by epoch budget: trial 3",
        "stopped by limit on parameters: trials 1, 2 (parameters over by 120 to 3240)",
    ]
    print_trials(result)
    assert "stopped by scheduler: trials 1, 2, 5, 7, 8, 10, 11" in capsys.readouterr().out.splitlines()
    many = [replace(record, state="PRUNED", reason="pruned after epoch 1") for record in result.records] * 2
    print_trials(SimpleNamespace(**vars(result) | {"records": many}), most=0)
    assert capsys.readouterr().out.splitlines()[-1].endswith("4, 4, 5, 5 and 12 more")


def test_the_final_says_what_its_interval_leaves_out_and_has_none_for_one_seed(result: Any) -> None:
    def final() -> str:
        (found,) = re.findall("<h2>The final</h2>.*?</table>", search_page(result, WINNER, {}, TuneSettings()).decode())
        return found

    assert "the luck of the seeds, not that of the sessions." in final()
    other = result.finalists[0].record
    result.finalists.append(Finalist(record=other, values=(0.4, 0.5), failures=1))
    assert "It is that of the best of 2, chosen by these same trainings" in final()
    assert "<th>failed</th>" in final()
    result.finalists[1] = Finalist(record=other, values=(), failures=3)
    assert "inf" not in final()
    result.finalists = [Finalist(record=other, values=(value,)) for value in (0.6, 0.5)]
    assert "trained with a seed that the search did not use" in final()
    for absent in ("half-width", "95 %", "nan", "failed"):
        assert absent not in final()


def again(score: float, workers: int) -> Any:
    """The best configuration trained again."""
    reports = ({"epoch": 1, "workers": workers},)
    return SimpleNamespace(progress=SimpleNamespace(best_macro_f1=score, reports=reports))


@pytest.mark.parametrize(
    ("change", "workers", "values", "parts"),
    [
        (-0.0152, 2, {}, ["0.0152 below its trial", "2 workers draw other dropout masks than 1 worker"]),
        (0.01, 2, {}, ["0.0100 above its trial", "tuning.final_workers=1"]),
        (0.0, 2, {}, ["as good as its trial"]),
        (-0.01, 1, {"workers": {"count": 2}}, ["1 worker draws other dropout masks than 2 workers"]),
        (-0.01, 1, {"tuning": {"scheduler": "pbt"}}, ["changed its parameters on the way"]),
        (-0.01, 1, {"workers": {"gpus": 1}}, ["number of workers are the same"]),
        (-0.01, 1, {}, ["number of workers are the same"]),
        (0.0, 1, {"register_as": None}, ["Kept is the model that was trained again"]),
        (0.0, 1, {"tracking": {"enabled": False}}, ["Kept is the model that was trained again"]),
    ],
)
def test_it_is_said_which_model_is_kept_and_why_it_scores_otherwise(
    result: Any, change: float, workers: int, values: dict[str, Any], parts: list[str]
) -> None:
    settings = TuneSettings.model_validate(values)
    said = trained_again(settings, result, again(result.best.value + change, workers))
    for part in parts:
        assert part in " ".join(said), said
    assert len(said) == 1 + bool(change)  # no reason where nothing differs
    if not values:
        assert "Kept, and goes to the registry as edu-emotionnet, is the model that was trained again" in said[0]


def test_trials_that_shared_their_steps_drew_other_masks(result: Any) -> None:
    result.fused = 8
    said = trained_again(TuneSettings(), result, again(0.4, 1))
    assert "shares its steps with others" in said[1]


def test_a_winner_that_the_search_had_stopped_is_called_so(result: Any) -> None:
    result.best = replace(result.best, state="PRUNED", epochs=9)
    said = trained_again(TuneSettings(), result, again(0.9, 1))
    assert said[1] == "They differ because its trial was stopped after 9 epochs; the final trained it whole."


def test_a_column_without_anything_in_it_is_not_shown() -> None:
    table = TableData(columns=["trial", "score", "failure"], rows=[[0, 0.5, ""], [1, None, None]])
    shown = page("t", [], [Section(title="s", table=table)]).decode()
    assert "<th>score</th>" in shown
    assert "failure" not in shown
    assert to_csv(table).decode().splitlines()[0] == "trial,score,failure"


def test_what_is_unknown_is_an_empty_field_of_a_csv() -> None:
    rows = [["a", Measured(math.nan), math.nan], ["b", Measured(0.5), None], ["c", math.nan, 0.25]]
    table = TableData(columns=["model", "score", "rate"], rows=rows)
    assert to_csv(table).decode().splitlines() == ["model,score,score std,rate", "a,,,", "b,0.5,,", "c,,,0.25"]


def test_numbers_of_a_latex_column_have_one_precision() -> None:
    table = TableData(columns=["model", "score"], rows=[["a", 0.29], ["b", 0.2874], ["c", 0.0], ["d", 123456.0]])
    rows = to_latex(table).decode().splitlines()[4:8]
    assert [row.split("$")[1] for row in rows] == ["0.2900", "0.2874", "0", "123456"]


def test_powers_of_ten_and_what_is_unknown_are_latex() -> None:
    values = [2.3e-6, -5e-5, 12345678901.0, math.inf, -math.inf, 1234.4, math.nan, None, Measured(math.nan)]
    rows = to_latex(TableData(columns=["model", "p"], rows=[["a", value] for value in values])).decode().splitlines()
    assert [row.removesuffix(r" \\").split(" & ")[1] for row in rows[4:-2]] == [
        r"$2.3 \times 10^{-6}$", r"$-5 \times 10^{-5}$", r"$1.235 \times 10^{10}$", r"$\infty$", r"$-\infty$",
        "$1234$", "--", "--", "--",
    ]  # fmt: skip


def test_the_stretches_between_decisions_hold_all_epochs(result: Any) -> None:
    rows = epochs_by_rung(result.records, [1, 3])
    assert [name for name, _, _ in rows] == ["1", "2-3", "4-9"]
    assert [trials for _, trials, _ in rows] == [11, 8, 4]
    assert sum(epochs for _, _, epochs in rows) == result.study.epochs()


def test_the_best_so_far_never_falls_and_counts_completed_trials_only(result: Any) -> None:
    line = best_so_far(sorted(result.records, key=lambda record: record.number))
    assert line[0] == (0, pytest.approx(0.45))
    values = [value for _, value in line]
    assert values == sorted(values)
    assert values[-1] == result.best.value


def test_the_interval_of_a_finalist_is_students(result: Any) -> None:
    (finalist,) = result.finalists
    assert finalist.mean == pytest.approx(0.52)
    assert finalist.half_width == pytest.approx(4.302653 * 0.02 / 3**0.5, abs=1e-6)


def test_the_table_of_trials_is_followed_by_why_some_failed(result: Any, capsys: pytest.CaptureFixture[str]) -> None:
    print_trials(result)
    assert "failed: trial 4: <non-finite> loss" in capsys.readouterr().out.splitlines()


def test_trials_that_failed_for_the_same_reason_share_a_line_however_long_it_is(
    result: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "[red]RuntimeError: " + "a very long reason " * 20
    failed = [replace(record, state="FAIL", reason=reason) for record in result.records]
    print_trials(SimpleNamespace(**vars(result) | {"records": failed[:3]}), most=0)
    numbers = ", ".join(str(number) for number in sorted(record.number for record in failed[:3]))
    assert f"failed: trials {numbers}: {reason}".strip() in capsys.readouterr().out
