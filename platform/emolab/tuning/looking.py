"""What a search would find, seen without leaving anything behind: for a dry run, and before data are made for hours."""

from __future__ import annotations

import os
from pathlib import Path

from sqlalchemy import inspect, text
from sqlalchemy.exc import SQLAlchemyError

from emolab.databases import message_of, sqlite_file, sqlite_url
from emolab.locks import check_not_held
from emolab.names import UserError, contained
from emolab.training.train import flatten
from emolab.tuning.expectation import Begun
from emolab.tuning.finals import final_space
from emolab.tuning.holding import check_study_not_held, connected_to
from emolab.tuning.methods import check_members
from emolab.tuning.plan import DATA, SearchPlan, experiment, methods
from emolab.tuning.search import check_folder, final_name
from emolab.tuning.settings import TuneSettings
from emolab.tuning.space import SearchSpace
from emolab.tuning.study import Study
from emolab.tuning.study_file import check_study_file

_NAMED = text("select 1 from studies where study_name = :name")


def look(settings: TuneSettings, space: SearchSpace, plan: SearchPlan | None = None) -> Begun:
    """Refuse what a search would be refused for when it begins. Nothing is made, held or written.

    Args:
        plan: None where the data are still to be made: a search without a name has no study then to be looked at.

    Raises:
        UserError: another process holds the study, or it is of something else; its database cannot be opened.
    """
    name = settings.name if plan is None else plan.folder.name
    if name is None:
        if settings.tuning.storage is not None:
            _holds(settings.tuning.storage, "")
        return Begun()
    folder = contained(Path(settings.output), name, what="study name")
    database = settings.tuning.storage or folder / "study.db"
    manifest = None if plan is None else plan.manifest
    check_not_held(folder, what="study")
    check_study_not_held(database, name)
    check_folder(folder, settings.tuning.storage, manifest)
    if not _holds(database, name):
        return Begun()
    study = Study(database, name, space=space, objectives=settings.tuning.objectives)
    study.check(
        flatten(experiment(settings, space, manifest)),
        methods(settings),
        trials=settings.tuning.trials if plan is None else plan.trials,
        epochs=settings.tuning.epoch_budget,
        unknown=() if manifest is not None else (DATA,),
    )
    if settings.tuning.stopping == "pbt":
        check_members(study.finished(), settings.tuning.trials)
    finals = 0
    if settings.tuning.final.wanted and _holds(database, final_name(name)):
        space = final_space(space)
        finals = Study(database, final_name(name), space=space, objectives=settings.tuning.objectives).finished()
    return Begun(trials=study.finished(), epochs=study.epochs() + study.paused_epochs(), finals=finals)


def _holds(database: Path | str, name: str) -> bool:
    """Whether a database holds a study; one that is not there yet holds none, if it can be made.

    Raises:
        UserError: it cannot be opened or made, or its file is damaged.
    """
    file = database if isinstance(database, Path) else sqlite_file(database)
    if file is not None:
        check_study_file(file)
        if not file.exists():
            _check_place(file)
            return False
        database = sqlite_url(file)
    assert isinstance(database, str)
    try:
        with connected_to(database) as connection:
            there = inspect(connection).has_table("studies")
            return there and connection.execute(_NAMED, {"name": name}).first() is not None
    except SQLAlchemyError as error:
        raise UserError(f"the study's database {database} cannot be read: {message_of(error)}") from None


def _check_place(file: Path) -> None:
    """Refuse the file of a database that cannot be made."""
    place = file.resolve().parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"the study's database {file} cannot be opened: {place} is not a folder that can be written to")
