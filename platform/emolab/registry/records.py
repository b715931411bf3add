"""Where a verdict and a model card are kept: in the promotion's run, with the version, and in the output folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from emolab.names import contained
from emolab.registry.aliases import Mark
from emolab.registry.judged import Judged
from emolab.registry.verdict import Verdict
from emolab.reports.model_card import card_files, card_summary
from emolab.reports.promotion import promotion_page
from emolab.sessions.manifest import write_atomically
from emolab.tracking.runs import MLflowTracker
from emolab.tracking.tracker import Run

VERDICT = "emolab.verdict"
"""Tag of a version: `passed` or `refused`, by its latest promotion."""
VERDICT_RUN = "emolab.verdict_run"
REPLACED = "emolab.replaced"
"""Tag of a version: the champion that it took the place of; empty for the first one."""
PROMOTED = "emolab.promoted"
"""Tag of a version: when it became the champion, UTC."""
MOST_DESCRIPTION = 4900
"""Characters; the registry keeps 5,000."""


def record_verdict(
    judged: Judged, tracker: MLflowTracker, run: Run, output: Path, report: Callable[[str], None]
) -> None:
    """Store the verdict and the model card, and tag the version with every gate; no alias moves here."""
    verdict = judged.verdict
    card = card_files(judged)
    files = card | {
        "verdict.json": json.dumps(verdict.record(), indent=1, allow_nan=False).encode(),
        "verdict.html": promotion_page(judged),
    }
    folder = contained(output, "promotions", verdict.model, run.run_id, what="promotion")
    for name, content in files.items():
        write_atomically(folder / name, content)
        run.log_file(folder / name)
    run.log_metrics({f"gate.{g.name}": g.value for g in verdict.gates if g.value is not None}, step=0)
    run.set_tags({VERDICT: _word(verdict), "emolab.dataset": verdict.dataset})
    _tag_version(judged, tracker, card)
    report(f"verdict {folder / 'verdict.html'}\ncard    {folder / 'model_card.html'}")


def promoted_marks(verdict: Verdict) -> list[Mark]:
    """What a version says once the alias has moved to it."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    tags = {PROMOTED: when, REPLACED: verdict.champion or ""}
    return [Mark(version=verdict.version, key=key, value=value) for key, value in tags.items()]


def _tag_version(judged: Judged, tracker: MLflowTracker, card: dict[str, bytes]) -> None:
    verdict, client = judged.verdict, tracker.client
    tags = {VERDICT: _word(verdict), VERDICT_RUN: verdict.run_id}
    tags |= {f"emolab.gate.{gate.name}": gate.outcome for gate in verdict.gates}
    for key, value in tags.items():
        client.set_model_version_tag(verdict.model, verdict.version, key, value)
    client.update_model_version(verdict.model, verdict.version, card_summary(judged)[:MOST_DESCRIPTION])
    model_id = judged.challenger.registered.model_id
    with tempfile.TemporaryDirectory() as temporary:
        for name, content in card.items():
            (Path(temporary) / name).write_bytes(content)
        if model_id:  # beside the weights: whoever fetches the version has its card
            client.log_model_artifacts(model_id, temporary)
        else:
            tracker.resume(judged.challenger.version.run_id).log_file(Path(temporary), folder="model_card")


def _word(verdict: Verdict) -> str:
    return "passed" if verdict.passed else "refused"
