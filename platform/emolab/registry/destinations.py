"""Where a training is to leave what it makes, checked before it begins: what is refused at its end has cost all of
it."""

from __future__ import annotations

from pathlib import Path

from emolab.names import checked_name
from emolab.remote_checkpoints import run_checkpoints
from emolab.tracking.addresses import tracker_address
from emolab.training.readiness import check_writable
from emolab.training.recipe import TrainSettings


def check_destinations(settings: TrainSettings) -> None:
    """Refuse an output folder, a tracker's address, a place for checkpoints or a registered name that cannot be used.

    Nothing is written, and neither the tracker nor the registry is asked.

    Raises:
        UserError: the first that is of no use.
    """
    output = Path(settings.output)
    check_writable(output)
    if settings.tracking.enabled:
        tracker_address(settings.tracking.uri)
    run_checkpoints(settings.checkpoints, output, "check")
    if settings.register_as is not None:
        checked_name(settings.register_as, what="registered model name")
