"""jobs/tune.py as a whole: data, search, the winner trained with DDP, registered and reported."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from emolab.cluster import connected
from emolab.commands import beside_interpreter, job_command, tool_command
from emolab.registry.destinations import check_destinations
from emolab.registry.training import UNREACHED, progress_line, register_where_reached, resuming_line
from emolab.reports.search import search_page, trained_again
from emolab.reports.search_figures import search_figures
from emolab.sessions.manifest import read_manifest, write_atomically
from emolab.studies.dataset import dataset, will_be_made
from emolab.tracking.runs import open_tracker
from emolab.tracking.tracker import Run, Tracker, ending
from emolab.training.recipe import TrainSettings
from emolab.training.train import TrainedModel, finished_before, run_folder, train
from emolab.tuning.forecast import calibrate
from emolab.tuning.looking import look
from emolab.tuning.outcome import mean_over_seeds, read_with_care, stopped_by
from emolab.tuning.plan import check_cluster, check_search, plan_search, winner_name
from emolab.tuning.points import beside_base
from emolab.tuning.search import SearchResult, holding_search, search_in
from emolab.tuning.settings import TuneSettings
from emolab.tuning.trials import TrialRecord

DASHBOARD = "optuna-dashboard"
"""The program that shows a study in a browser; the extra `dashboard`."""


def tune(settings: TuneSettings, *, dry_run: bool, report: Callable[[str], None]) -> TrainedModel | None:
    """Prepare the data where they are missing, search, train the winner, register it, write the report.

    Running the same call again goes on where it stopped.

    Raises:
        UserError: anything the user can mend.
    """
    check_destinations(settings)
    space = check_search(settings)  # before Ray starts and data are made
    made = will_be_made(settings.data, settings.prepare)
    if not made:
        read_manifest(Path(settings.data))
    with connected(settings.cluster):
        if made:  # which may take hours: what can be refused without them is refused before
            check_cluster(settings)
            look(settings, space)
        if dataset(settings.data, settings.prepare, report=report, dry_run=dry_run) is None:
            return None
        plan = plan_search(settings)
        report(plan.describe(settings))
        if dry_run:
            report(calibrate(settings, plan, look(settings, space, plan)))
            return None
        with holding_search(plan):
            tracker = open_tracker(**settings.tracking.model_dump(), output=Path(settings.output))
            result = search_in(plan, settings, tracker, report=report)
            run = tracker.resume(result.run_id)
            with ending(run):
                winner = _train_winner(result, tracker, run, report)
                _conclude(settings, result, winner, tracker, run, report)
    return winner


def _train_winner(result: SearchResult, tracker: Tracker, run: Run, report: Callable[[str], None]) -> TrainedModel:
    chosen = result.settings.model_copy(update={"name": winner_name(result.folder.name, result.best.number)})
    best = f"the best configuration (trial {result.best.number})"
    if finished_before(run_folder(chosen, result.manifest)):
        report(f"{best} was trained before: nothing is left to train")
    else:
        run.reopen()  # all trials may have ended in an earlier call
        report(f"training {best} with {chosen.workers.count} worker(s)")
    return train(
        chosen,
        tracker=tracker,
        parent=result.run_id,
        tags={"emolab.kind": "best"},
        report=lambda epoch: report(progress_line(epoch, chosen)),
        resuming=lambda epoch: report(resuming_line(epoch, chosen)),
    )


def _conclude(
    settings: TuneSettings,
    result: SearchResult,
    winner: TrainedModel,
    tracker: Tracker,
    run: Run,
    report: Callable[[str], None],
) -> None:
    page = result.folder / "report.html"
    figures = search_figures(result)
    write_atomically(page, search_page(result, winner, figures, settings))
    run.log_file(page)
    for name, figure in figures.items():
        run.log_text(figure.decode(), f"figures/{name}.svg")
    run.log_metrics({"best_trial_macro_f1": result.best.value or 0.0}, step=len(result.records))
    lines = [
        *_comparison(settings, result, winner),
        f"report  {page}",
        *_study_lines(result.study.url),
        f"runs    {tracker.instructions()}",
        f"best    {job_command('train', _alone(settings, result), config=result.folder / 'best.yaml')}",
    ]
    if settings.register_as and tracker.uri:
        lines.append(_register(settings.register_as, winner, tracker, run))
    run.finish()
    print_trials(result)
    report("\n".join(lines))


def _study_lines(url: str) -> list[str]:
    """How to look at the study, and how to install what it takes where that is not there."""
    lines = [f"study   {tool_command(DASHBOARD, url)}"]
    if beside_interpreter(DASHBOARD) is None and shutil.which(DASHBOARD) is None:
        python = tool_command("python", "-m", "pip", "install", "--constraint", "constraints.txt", DASHBOARD)
        lines.append(f"        after {python}")
    return lines


def _alone(settings: TuneSettings, result: SearchResult) -> TrainSettings:
    """What jobs/train.py must be told beside best.yaml to train the best configuration as it was trained here."""
    return TrainSettings(
        data=settings.data,
        output=settings.output,
        checkpoints=settings.checkpoints,
        workers=result.settings.workers,
        tracking=settings.tracking,
    )


def _register(name: str, winner: TrainedModel, tracker: Tracker, run: Run) -> str:
    """Register the winner where the registry can be reached; a line that says what became of it."""
    version = register_where_reached(winner, name, tracker)
    if version is None:
        return f"model   {UNREACHED}"
    run.set_tags({"emolab.registered": version.uri})
    return f"model   {version.uri}  (alias challenger)"


def print_trials(result: SearchResult, *, most: int = 20) -> None:
    """The table of trials, best first, and why some of them did not complete."""
    keys = list(result.best.parameters)
    table = Table(title=f"{len(result.records)} trials of {result.folder.name}")
    for column in ("trial", "state", "validation macro-F1", "epochs", *keys):
        table.add_column(escape(column), justify="left" if column == "state" else "right")
    for record in result.records[:most]:
        score = "-" if record.value is None else f"{record.value:.4f}"
        if record.robustness is not None:
            score += f" / {record.robustness:.4f}"
        values = [escape(_number(record.parameters.get(key))) for key in keys]
        table.add_row(str(record.number), record.state.lower(), score, str(record.epochs), *values)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    for line in ends(result.records):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def ends(records: Sequence[TrialRecord]) -> list[str]:
    """A line for each reason for which trials were stopped or failed, which the table has no room for."""
    stopped: dict[str, list[TrialRecord]] = {}
    failed: dict[str, list[TrialRecord]] = {}
    for record in records:
        if cause := stopped_by(record):
            stopped.setdefault(cause, []).append(record)
        elif record.state == "FAIL":
            failed.setdefault(record.reason, []).append(record)
    return [
        *(f"stopped by {cause}: {_numbered(those)}{_beyond(those)}" for cause, those in stopped.items()),
        *(f"failed: {_numbered(those)}: {reason}" for reason, those in failed.items()),
    ]


def _numbered(records: Sequence[TrialRecord], *, most: int = 12) -> str:
    numbers = sorted(record.number for record in records)
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"trial{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:most]))}{more}"


def _beyond(records: Sequence[TrialRecord]) -> str:
    """By how much trials exceed limits."""
    beyond: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.excess.items():
            if value > 0:
                beyond.setdefault(name, []).append(value)
    ranges = [
        f"{name} over by {min(values):.6g}" + (f" to {max(values):.6g}" if len(values) > 1 else "")
        for name, values in beyond.items()
    ]
    return f" ({', '.join(ranges)})" if ranges else ""


def _comparison(settings: TuneSettings, result: SearchResult, winner: TrainedModel) -> list[str]:
    manifest = result.manifest
    reference = manifest.splits["validation"].reference_scores
    parameters = ", ".join(f"{key}={_number(value)}" for key, value in result.best.parameters.items())
    ceiling = f", ceiling {reference['ceiling_macro_f1']:.4f}" if "ceiling_macro_f1" in reference else ""
    chosen = result.finalists[0] if result.finalists else None
    return [
        f"best parameters: {parameters}",
        *([f"final: {mean_over_seeds(chosen)}", read_with_care(result.finalists)] if chosen else []),
        f"validation macro-F1: chosen trial {result.best.value:.4f}, trained again for {winner.progress.epoch} epochs "
        f"{winner.progress.best_macro_f1:.4f} (class prior {manifest.class_prior_macro_f1:.4f}{ceiling})",
        *beside_base(result.records, result.best),
        *trained_again(settings, result, winner),
    ]


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
