"""Finding a trained model by what people call it: a folder, a run, or a name in the registry."""

from __future__ import annotations

import re
from pathlib import Path

from mlflow.exceptions import MlflowException

from emolab import checkpoint
from emolab.names import UserError, checked_name
from emolab.tracking.runs import MLflowTracker

_REGISTERED = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")
_RUN = re.compile(r"(?:runs:/)?([0-9a-f]{32})")


def model_folders(uri: str, tracker: MLflowTracker, cache: Path) -> list[Path]:
    """Folders with the kept weights that a URI stands for; what is remote is fetched into the cache.

    Args:
        uri: a run's folder or its ``model`` folder; ``runs:/ID`` or the bare id, a comparison's id standing for
            all of its finished models; ``models:/name@alias`` or ``models:/name/version``.

    Raises:
        UserError: nothing is there, or what is there is damaged.
    """
    registered, run = _REGISTERED.fullmatch(uri), _RUN.fullmatch(uri)
    if registered:
        return [_of_run(_run_of_version(tracker, *registered.groups()), tracker, cache)]
    if run:
        children = [child for child in tracker.children(run[1]) if tracker.read(child).ended is not None]
        return [_of_run(run_id, tracker, cache) for run_id in children or [run[1]]]
    for folder in (Path(uri), Path(uri) / "model"):
        if (folder / checkpoint.MANIFEST).exists():
            checkpoint.load(folder)
            return [folder]
    raise UserError(f"no model at {uri!r}: give a run's folder, runs:/ID, models:/name@alias or models:/name/version")


def _run_of_version(tracker: MLflowTracker, name: str, alias: str | None, version: str | None) -> str:
    try:
        found = (
            tracker.client.get_model_version_by_alias(name, alias)
            if alias
            else tracker.client.get_model_version(name, version or "")
        )
    except MlflowException as error:
        raise UserError(f"the registry has no {name}: {' '.join(str(error).split())[:160]}") from None
    return str(found.run_id)


def _of_run(run_id: str, tracker: MLflowTracker, cache: Path) -> Path:
    folder = cache / checked_name(run_id, what="run id")
    if not (folder / "model" / checkpoint.MANIFEST).exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            tracker.client.download_artifacts(run_id, "model", str(folder))
        except (MlflowException, OSError) as error:
            raise UserError(f"run {run_id} holds no model: {' '.join(str(error).split())[:160]}") from None
    checkpoint.load(folder / "model")
    return folder / "model"
