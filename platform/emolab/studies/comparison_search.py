"""The same tuning budget for every model of a comparison: one search each, and its best settings for the cells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from emolab.configuration import merge, nested, validate
from emolab.names import UserError
from emolab.studies.comparison_settings import CompareSettings
from emolab.tracking.runs import MLflowTracker
from emolab.tracking.tracker import Run
from emolab.tuning.plan import plan_search
from emolab.tuning.search import search
from emolab.tuning.settings import SearchSettings, TuneSettings

SEARCH_SEED = 0
"""Training seed of every search, whatever seeds the cells have: seeds may be added before the first one too."""
SEARCHES = "searches.json"
"""Artifact of the comparison's run: model -> run, trials, best validation score and parameters of its search."""


def search_settings(settings: CompareSettings, model: str, folder: Path) -> TuneSettings:
    """The search for one model: its cell with SEARCH_SEED, the trials and the space that all models share.

    Raises:
        UserError: the model refuses its options.
    """
    values = settings.cell(model, SEARCH_SEED, folder).settings.model_dump(mode="json")
    values |= {
        "output": str(folder.resolve() / "searches"),
        "name": model,
        "register_as": None,
        "tuning": settings.search.model_dump(mode="json") | _scheduler(values["training"]["epochs"]),
    }
    return validate(TuneSettings, values, where=f"{model}: ")


def _scheduler(epochs: int) -> dict[str, str]:
    """Trials so short that nothing could be decided about them before their end are not stopped."""
    return {"scheduler": "none"} if epochs <= SearchSettings().grace_epochs else {}


def check_searches(settings: CompareSettings, folder: Path) -> None:
    """Refuse a space that a model cannot be searched in, before anything starts; Ray must be connected.

    Raises:
        UserError: the first model and key that do not fit.
    """
    for model in settings.models:
        plan = plan_search(search_settings(settings, model, folder))
        if "model.name" in plan.space.parameters:
            raise UserError(f"{settings.search.space} chooses among models (model.name); here each is searched alone")


def tuned_by_search(
    settings: CompareSettings, folder: Path, tracker: MLflowTracker, run: Run, *, report: Callable[[str], None]
) -> CompareSettings:
    """The comparison with the best settings of every model's search under ``tuned``; searches resume.

    Raises:
        UserError: a search found nothing, or cannot go on.
    """
    tuned: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = {}
    for model in settings.models:
        report(f"searching {model}: {settings.search.trials} trials")
        result = search(search_settings(settings, model, folder), tracker, report=report)
        own: dict[str, Any] = {}
        for values in (settings.tuned.get(model, {}), *(nested(*item) for item in result.best.parameters.items())):
            merge(own, values)
        tuned[model] = own
        found[model] = {
            "run_id": result.run_id,
            "trials": len(result.records),
            "best_validation_macro_f1": result.best.value,
            "parameters": dict(result.best.parameters),
        }
    run.log_json(found, SEARCHES)
    return settings.model_copy(update={"tuned": tuned})
