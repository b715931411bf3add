"""What a dry run of a rollback says is what the rollback then does, also after a move that broke off."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from emolab.registry.aliases import CLAIM, Mark, Move, standing
from emolab.registry.judgement import ROLLED_BACK
from emolab.registry.promotion import PromoteSettings, roll_back
from emolab.registry.versions import CHAMPION, PREVIOUS_CHAMPION
from emolab.tracking.runs import MLflowTracker, open_tracker

NAME = "toy-model"


@pytest.fixture
def tracker(tmp_path: Path) -> MLflowTracker:
    """A registry with three versions, the last of which is the champion; previous_champion is the first."""
    tracker = open_tracker(enabled=True, uri=None, experiment="edu-emotionnet", output=tmp_path)
    assert isinstance(tracker, MLflowTracker)
    tracker.client.create_registered_model(NAME)
    for number in (1, 2, 3):
        run_id = tracker.start(f"training-{number}").run_id
        tracker.client.create_model_version(NAME, source=str(tmp_path), run_id=run_id)
    tracker.client.set_registered_model_alias(NAME, CHAMPION, "3")
    tracker.client.set_registered_model_alias(NAME, PREVIOUS_CHAMPION, "1")
    return tracker


def cut_short(tracker: MLflowTracker, *, expected: str, previous: str, marks: Sequence[Mark] = ()) -> None:
    """As if a process had died when it had moved the champion to version 3 and nothing else."""
    run_id = tracker.start("killed").run_id
    change = Move(name=NAME, run_id=run_id, expected=expected, champion="3", previous=previous, marks=marks)
    content = json.dumps(asdict(change) | {"time": time.time()})
    tracker.client.set_registered_model_tag(NAME, CLAIM + run_id, content)


@pytest.mark.parametrize("begun", ["nothing", "a promotion", "a rollback"])
def test_a_dry_run_tells_what_the_rollback_does(tracker: MLflowTracker, tmp_path: Path, begun: str) -> None:
    if begun == "a promotion":
        cut_short(tracker, expected="2", previous="2")
    elif begun == "a rollback":
        cut_short(tracker, expected="2", previous="1", marks=[Mark(version="2", key=ROLLED_BACK, value="now")])
    settings = PromoteSettings(model=f"models:/{NAME}", rollback=True, output=str(tmp_path))
    before, told, done = standing(tracker.client, NAME), list[str](), list[str]()
    planned = roll_back(settings, dry_run=True, report=told.append)
    assert standing(tracker.client, NAME) == before
    assert roll_back(settings, dry_run=False, report=done.append) == planned
    if begun == "a rollback":
        assert told == [f"{done[0].removesuffix('is finished now')}would be finished"]
    else:
        assert told == [done[0].replace("went back", "would go back")]
