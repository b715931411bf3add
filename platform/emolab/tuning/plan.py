"""A search that has been checked against its files and the cluster, before anything starts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emolab.cluster import fitting
from emolab.names import LONGEST, UserError, contained
from emolab.redaction import redact
from emolab.sessions.manifest import Manifest, read_manifest
from emolab.sessions.visibility import check_visible
from emolab.training.fused import FUSABLE
from emolab.training.readiness import check_room, check_writable
from emolab.training.recipe import check_labels, fingerprint
from emolab.tuning.grouping import in_one_step
from emolab.tuning.halving import halving_epochs, places
from emolab.tuning.methods import check_epoch_budget, check_methods, rungs
from emolab.tuning.points import points
from emolab.tuning.settings import TuneSettings
from emolab.tuning.space import SearchSpace, read_space

DATA = "data"
"""What a study calls its data in what it was made with."""
FUSED_ON_GPU = 8
"""Configurations of one fused step where the settings leave the number open."""


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """A search that can start."""

    folder: Path
    manifest: Manifest
    space: SearchSpace
    room: int
    """Processes, or trials of several workers, that may run at a time."""
    trials: int
    """In the study when the search is over; a grid has no more than its points."""
    rungs: list[int]
    fused: int
    """Configurations of one step, at most."""
    resources: Mapping[str, float]
    """Of each trial."""
    final_workers: int

    storage: str | None

    @property
    def database(self) -> Path | str:
        """The study's file, or the URL of its database."""
        return self.storage or self.folder / "study.db"

    @property
    def concurrency(self) -> int:
        """Processes, or trials of several workers, of the search."""
        return self.at_once(self.trials)

    def at_once(self, trials: int) -> int:
        """Processes, or trials of several workers, where there are so many trials."""
        return min(self.room, trials)

    @property
    def in_one_step(self) -> int:
        """Configurations that share a step in the search."""
        return in_one_step(self.fused, trials=self.trials, processes=self.concurrency)

    def describe(self, settings: TuneSettings) -> str:
        """The plan for people."""
        tuning, epochs = settings.tuning, settings.training.epochs
        holds = ", ".join(f"{amount:g} {name}" for name, amount in self.resources.items())
        stops = f", decisions after epochs {', '.join(map(str, self.rungs))}" if self.rungs else ""
        if tuning.stopping == "halving" and self.rungs:
            going = places(self.trials, rungs=len(self.rungs), factor=tuning.reduction_factor)
            stops += f", from which {', '.join(map(str, going))} go on"
        budget = f", {tuning.epoch_budget} epochs in all" if tuning.epoch_budget else ""
        budget += f", no trial begun after {tuning.time_budget_s:g} s" if tuning.time_budget_s else ""
        fused = f", {self.in_one_step} configurations in one step" if self.in_one_step > 1 else ""
        final = tuning.final
        last = f"the best {final.top} trained with {final.seeds} seeds each; " if final.wanted else ""
        keys = ", ".join(self.space.parameters)
        method = f"{tuning.sampler} over {keys}, scheduler {tuning.stopping}{stops}"
        if tuning.stopping == "pbt":
            method = (
                f"a population that begins with draws of {tuning.sampler} over {keys}; scheduler pbt compares it after "
                f"every {tuning.grace_epochs} epochs: the weakest go on from the weights of the strongest, with their "
                "parameters changed"
            )
        return (
            f"{self.trials} trials of at most {epochs} epochs ({settings.model.name}){budget}, "
            f"{self.concurrency} at a time with {holds} each{fused}, {method}; {last}"
            f"the best trained with {self.final_workers} worker(s); study {redact(str(self.database))}"
        )


def check_search(settings: TuneSettings) -> SearchSpace:
    """Check what can be known of a search without its data and the cluster.

    Raises:
        UserError: the first thing that does not fit.
    """
    tuning, training = settings.tuning, settings.training
    check_writable(Path(settings.output))
    space = read_space(Path(tuning.space), settings.base())
    check_methods(
        tuning.sampler,
        tuning.stopping,
        space,
        objectives=len(tuning.objectives),
        constrained=bool(tuning.constraints.limits()),
        workers=settings.workers.count,
        grace=tuning.grace_epochs,
        factor=tuning.reduction_factor,
        epochs=training.epochs,
        trials=tuning.trials,
    )
    _check_limits(settings)
    points(tuning, space, settings.base())
    check_epoch_budget(tuning.epoch_budget, training, space)
    if tuning.final.wanted and "training.seed" in space.parameters:
        raise UserError(
            f"{tuning.space}: training.seed is searched, and a final trains with seeds of its own: take it out of the "
            "space, or set tuning.final={top: 1, seeds: 1}"
        )
    return space


def plan_search(settings: TuneSettings) -> SearchPlan:
    """Check a search against its files and the cluster, without starting anything.

    Raises:
        UserError: the first thing that does not fit.
    """
    tuning, training = settings.tuning, settings.training
    manifest = read_manifest(Path(settings.data))
    space = check_search(settings)
    if not manifest.splits["validation"].sessions:
        raise UserError(f"{settings.data} has no validation split, which a search selects by")
    for split in ("train", "validation"):
        check_labels(manifest, split, data=settings.data, remedy="a search has nothing to go by")
    room, final_workers = check_cluster(settings)
    check_visible(Path(settings.data))
    trials = tuning.trials
    if tuning.sampler == "grid":
        trials = min(trials, math.prod(len(values) for values in space.grid().values()))
    decisions = rungs(
        tuning.stopping, grace=tuning.grace_epochs, factor=tuning.reduction_factor, epochs=training.epochs
    )
    if tuning.stopping == "halving":
        _check_budget(settings, trials, decisions)
    name = _name(settings, space, manifest)
    _check_length(name, trials)
    return SearchPlan(
        folder=contained(Path(settings.output), name, what="study name"),
        manifest=manifest,
        space=space,
        room=min(tuning.concurrency or room, room),
        trials=trials,
        rungs=decisions,
        fused=_fused(settings, space),
        resources=settings.workers.resources(settings.workers.count),
        final_workers=final_workers,
        storage=tuning.storage,
    )


def check_cluster(settings: TuneSettings) -> tuple[int, int]:
    """Check a search against the connected cluster, without its data.

    Returns:
        How many trials the cluster holds at a time, and the workers that train the best configuration.

    Raises:
        UserError: what does not fit.
    """
    workers = settings.workers
    _check_workers(settings)
    room = fitting(workers.resources(1)) // workers.count
    final_workers = settings.tuning.final_workers or max(workers.count, min(4, room * workers.count))
    purpose = f"training the best configuration with {final_workers} workers"
    check_room(workers, count=final_workers, purpose=purpose)
    return room, final_workers


def _check_budget(settings: TuneSettings, trials: int, rungs: Sequence[int]) -> None:
    """Refuse a halving of which no trial would see the end."""
    tuning, epochs = settings.tuning, settings.training.epochs
    budget, factor = tuning.epoch_budget, tuning.reduction_factor
    needed = halving_epochs(trials, rungs, factor=factor, epochs=epochs)
    if budget is None or needed <= budget:
        return
    fitting = [n for n in range(1, trials) if halving_epochs(n, rungs, factor=factor, epochs=epochs) <= budget]
    instead = f"set tuning.trials={fitting[-1]}" if fitting else f"set tuning.epoch_budget to at least {epochs}"
    raise UserError(f"halving of {trials} trials takes {needed} epochs, tuning.epoch_budget is {budget}: {instead}")


def _fused(settings: TuneSettings, space: SearchSpace) -> int:
    """Configurations of one step: what was asked for, else several on a GPU where that can be done.

    Raises:
        UserError: several were asked for where they cannot be had.
    """
    tuning = settings.tuning
    obstacles = [
        (settings.workers.count > 1, "trials of several workers"),
        ("robustness" in tuning.objectives, "robustness as an objective"),
        (bool(tuning.constraints.limits()), "constraints"),
        (tuning.stopping in ("halving", "pbt"), f"scheduler {tuning.stopping}"),
        ("model.name" in space.parameters, "a search over model.name"),
        (settings.model.name not in FUSABLE, f"model {settings.model.name}"),
    ]
    present = [what for there, what in obstacles if there]
    if tuning.fused is None:
        return FUSED_ON_GPU if settings.workers.gpus and not present else 1
    if tuning.fused > 1 and present:
        raise UserError(f"tuning.fused={tuning.fused} does not go with {present[0]}: set tuning.fused=1")
    return tuning.fused


def _check_workers(settings: TuneSettings) -> None:
    several = settings.workers.count > 1
    if several and "robustness" in settings.tuning.objectives:
        raise UserError("robustness as an objective needs trials of one worker: set workers.count=1")
    if several and settings.tuning.constraints.limits():
        raise UserError("constraints need trials of one worker: set workers.count=1")
    check_room(settings.workers, count=settings.workers.count, purpose="a trial")


def _check_limits(settings: TuneSettings) -> None:
    """Refuse limits of a search that Ray Tune's loop would not keep."""
    tuning = settings.tuning
    if settings.workers.count > 1 and tuning.timeout_s is not None:
        raise UserError("tuning.timeout_s needs trials of one worker: leave it out, or set workers.count=1")
    if tuning.stopping in ("halving", "pbt") and tuning.time_budget_s is not None:
        raise UserError(
            f"scheduler {tuning.stopping} needs all of its trials: leave out tuning.time_budget_s, or choose asha"
        )
    if tuning.stopping != "pbt":
        return
    if tuning.constraints.limits():
        raise UserError("scheduler pbt does not look at constraints: leave out tuning.constraints, or choose asha")
    if tuning.epoch_budget is not None:
        raise UserError("scheduler pbt trains all members to their end: leave out tuning.epoch_budget, or choose asha")
    if tuning.timeout_s is not None:
        raise UserError("scheduler pbt does not look for hung trials: leave out tuning.timeout_s, or choose asha")
    if tuning.concurrency is not None:
        raise UserError(
            "scheduler pbt trains as many members at a time as the cluster holds: leave out tuning.concurrency"
        )


def methods(settings: TuneSettings) -> dict[str, Any]:
    """What draws and stops the trials; a study that was given a name may go on by another method."""
    tuning = settings.tuning
    chosen: dict[str, Any] = {"sampler": tuning.sampler, "scheduler": tuning.stopping}
    if tuning.sampler != "grid":
        chosen["seed"] = tuning.seed
    if tuning.sampler in ("tpe", "gp"):
        chosen["startup_trials"] = tuning.startup_trials
    if tuning.stopping in ("asha", "halving", "hyperband", "median", "pbt"):
        chosen["grace_epochs"] = tuning.grace_epochs
    if tuning.stopping in ("asha", "halving", "hyperband"):
        chosen["reduction_factor"] = tuning.reduction_factor
    return chosen


def experiment(settings: TuneSettings, space: SearchSpace, manifest: Manifest | None) -> dict[str, Any]:
    """What all trials of a study share, whatever draws and stops them.

    Args:
        manifest: None where the data are still to be made: they are left out.
    """
    tuning, limits = settings.tuning, settings.tuning.constraints.limits()
    objectives = {} if tuning.objectives == ("macro_f1",) else {"objectives": list(tuning.objectives)}
    shared = settings.base().identity() | objectives | {"space": space.identity()}
    shared |= {DATA: manifest.digest} if manifest is not None else {}
    return shared | ({"constraints": limits} if limits else {})


def winner_name(study: str, number: int) -> str:
    """The run that trains the best configuration of a study."""
    return f"{study}-best-{number}"


def _check_length(name: str, trials: int) -> None:
    """Refuse a study whose winner could not be named when all trials are done."""
    most = LONGEST - len(winner_name("", 10 * trials))  # trials that were interrupted have numbers too
    if len(name) > most:
        raise UserError(
            f"study name {name[:60]!r} is too long: use at most {most} characters, since the best configuration is "
            "trained as NAME-best-NUMBER"
        )


def _name(settings: TuneSettings, space: SearchSpace, manifest: Manifest) -> str:
    """The given name, or one that searches of one experiment by one method share, whatever their budget."""
    if settings.name:
        return settings.name
    shared = experiment(settings, space, manifest) | {"methods": methods(settings)}
    return f"search-{Path(settings.tuning.space).stem}-{fingerprint(shared)}"
