"""The one evaluation on the test split that a promotion may ask for, through the one door that counts it."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from emolab.registry.evidence import RegisteredWeights
from emolab.studies.test_split import RECORDED, score_on_test_split
from emolab.tracking.runs import MLflowTracker


def evaluate_once(registered: RegisteredWeights, data: Path, *, tracker: MLflowTracker, opened_by: str) -> bool:
    """Test a registered version unless its run holds a result already; a registered version is frozen.

    Returns:
        Whether the test split was opened.

    Raises:
        UserError: as ``score_on_test_split``: other data, or a data set that is damaged.
    """
    run_id = registered.version.run_id
    if tracker.read(run_id).tags.get(RECORDED) == "true":
        return False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(registered.weights, folder / "model")
        return score_on_test_split(
            folder,
            data,
            run_id=run_id,
            tracker=tracker,
            opened_by=opened_by,
            frozen={registered.digest},
            training_seconds=_training_seconds(registered, tracker),
        )


def _training_seconds(registered: RegisteredWeights, tracker: MLflowTracker) -> float:
    sessions = registered.manifest.splits["train"].sessions
    reports = json.loads(tracker.artifact(registered.version.run_id, "history.json"))
    return sum(sessions / report["sessions_per_second"] for report in reports if report["sessions_per_second"])
