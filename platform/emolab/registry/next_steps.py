"""What brings the evidence that a promotion lacks: commands to paste where the promotion ran, and what must get better
first where they would be refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow.exceptions import MlflowException

from emolab.commands import job_command
from emolab.names import UserError
from emolab.registry.evidence import Evidence
from emolab.registry.judged import Judged
from emolab.registry.judgement import NEED_THE_TEST
from emolab.registry.verdict import Missing
from emolab.robustness.suites import expand, load_suite
from emolab.sessions.manifest import read_manifest
from emolab.studies.robustness_settings import RobustnessSettings
from emolab.studies.test_split import RECORDED
from emolab.tracking.runs import MLflowTracker

if TYPE_CHECKING:
    from emolab.registry.promotion import PromoteSettings

SUITE = "promotion"
_AGAINST = "missing_rate_area_against_champion"
_NEED_A_SWEEP = ("calibration", "missing_rate_area", _AGAINST, "worst_single_modality_loss")


def next_steps(
    settings: PromoteSettings, judged: Judged, tracker: MLflowTracker, *, closed: Mapping[str, Sequence[str]]
) -> list[str]:
    """What to do about gates without evidence, in the order in which it is to be done; empty where none lacks any.

    Args:
        closed: why -> gates that keep the test split closed.
    """
    lacking = {gate.name for gate in judged.verdict.gates if gate.outcome == "missing evidence"}
    steps: list[str] = []
    if not lacking:
        return steps
    data = _data(settings, judged.challenger, tracker)
    unswept = _unswept(judged, lacking)
    if unswept:
        steps.append(_sweep(settings, judged, unswept, data))
    if lacking & set(NEED_THE_TEST) and _untested(judged):
        brought = set(_NEED_A_SWEEP) if unswept else set[str]()  # by the step before
        closed_by = [name for names in closed.values() for name in names if name not in lacking & brought]
        steps += _mend(judged, closed_by) if closed_by else [_test(settings, judged, data)]
    return steps


def _mend(judged: Judged, closed_by: Sequence[str]) -> list[str]:
    """What has to become better before the test split is opened: the sentences of the gates say value and limit."""
    told = {gate.name: gate.sentence for gate in judged.verdict.gates}
    return [
        f"before the test split is opened: {f'{name}: {told[name]}' if name in told else name}" for name in closed_by
    ]


def _unswept(judged: Judged, lacking: set[str]) -> list[Evidence]:
    """Versions whose sweep a gate asks for: the champion only where its curve is, and on the same data."""
    mine, other = judged.challenger, judged.champion
    unswept = not mine.sweeps or isinstance(mine.curve, Missing) or isinstance(mine.single_losses, Missing)
    found = [mine] if unswept and lacking & set(_NEED_A_SWEEP) else []
    if _AGAINST in lacking and other is not None and other.dataset == mine.dataset:
        if isinstance(other.curve, Missing):
            return [*found, other]
        if not isinstance(mine.curve, Missing):
            return [mine, other]  # there is no pair of curves under the same conditions: one sweep of both makes it
    return found


def _sweep(settings: PromoteSettings, judged: Judged, versions: Sequence[Evidence], data: Path | None) -> str:
    uris = tuple(evidence.version.uri for evidence in versions)
    rates = judged.gates.missing_modalities.rates
    if not set(rates) <= _rates_of_the_suite(judged.challenger.registered.modalities):
        told = ", ".join(f"{rate:g}" for rate in rates)
        return f"sweep {' and '.join(uris)} over a suite of yours with the missing rates {told} (jobs/robustness.py)"
    if data is None:
        return f"jobs/robustness.py --suite {SUITE} on {_wanted(judged)}, for {' and '.join(uris)}"
    return job_command(
        "robustness",
        RobustnessSettings(
            model=uris[0] if len(uris) == 1 else uris,
            suite=SUITE,
            data=str(data),
            output=settings.output,
            tracking=settings.tracking,
        ),
    )


def _untested(judged: Judged) -> bool:
    """Whether an opening of the test split would bring a result that a gate asks for."""
    both = [judged.challenger, *([judged.champion] if judged.champion is not None else [])]
    mine = [evidence for evidence in both if evidence.dataset == judged.challenger.dataset]
    return any(evidence.training.tags.get(RECORDED) != "true" for evidence in mine)


def _test(settings: PromoteSettings, judged: Judged, data: Path | None) -> str:
    if data is None:
        return f"jobs/promote.py --evaluate with the folder of {_wanted(judged)}"
    return job_command("promote", settings.model_copy(update={"evaluate": str(data)}))


def _rates_of_the_suite(modalities: Sequence[str]) -> set[float]:
    cells = expand(load_suite(SUITE), modalities)
    return {0.0} | {c.level for c in cells if c.corruption == "frame_missing" and c.modalities == tuple(modalities)}


def _data(settings: PromoteSettings, challenger: Evidence, tracker: MLflowTracker) -> Path | None:
    """The folder of the data set, as this call or the training named it; None where it does not lie there."""
    try:
        trained = tracker.client.get_run(challenger.version.run_id).data.params.get("data")
    except (UserError, MlflowException):
        trained = None
    for folder in (settings.evaluate, trained):
        try:
            if folder is not None and read_manifest(Path(folder)).digest == challenger.dataset:
                return Path(folder)
        except (UserError, OSError):  # not there any more, or a folder of somebody else's
            continue
    return None


def _wanted(judged: Judged) -> str:
    return f"data set {judged.challenger.dataset[:16]}"
