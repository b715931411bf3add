"""The ``emolab`` command, also as ``python -m emolab``: small tools beside the jobs.

Only the standard library is imported before a command runs: PyTorch takes seconds, in which Ctrl-C and a mistyped
argument are answered like later on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from emolab.job import Parser, run_job
from emolab.names import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: of the command; None: those of this process.
    """
    run_job(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    parser = Parser(prog="emolab", description="Experiments on multimodal affect models.")
    commands = parser.add_subparsers(required=True, metavar="command")
    doctor = commands.add_parser("doctor", help="check versions, devices, resources against the plan, disk, tracker")
    doctor.add_argument("--preset", default="small", help="the plan to check (default: small)")
    doctor.set_defaults(run=lambda options: _doctor(options.preset))
    check = commands.add_parser("verify", help="read a whole data set, check every digest and session, describe it")
    check.add_argument("folder", type=Path)
    check.set_defaults(run=lambda options: _verify(options.folder))
    deliver = commands.add_parser("deliver", help="send the tracker what it missed while it could not be reached")
    deliver.add_argument("output", type=Path, help="folder of the results, which holds the outbox")
    deliver.add_argument("--uri", help="address of the tracker (default: MLFLOW_TRACKING_URI)")
    deliver.set_defaults(run=lambda options: deliver_outbox(options.output, options.uri))
    options = parser.parse_args(arguments)
    if not options.run(options):
        sys.exit(1)


def deliver_outbox(output: Path, uri: str | None) -> bool:
    """Send what waits in the outbox of a folder; whether nothing waits any more.

    Raises:
        UserError: there is no outbox, no address, or the tracker refuses.
    """
    from emolab.tracking.addresses import tracker_address
    from emolab.tracking.buffered import FOLDER, send_left_behind

    address = tracker_address(uri, key="--uri")
    if not (output / FOLDER).is_dir():
        raise UserError(f"{output} has no outbox: nothing was held back there")
    if not address:
        raise UserError("no tracker is named: give --uri or set MLFLOW_TRACKING_URI")
    outcome = send_left_behind(output, address)
    print(outcome.describe())
    return not outcome.waiting


def _doctor(preset: str) -> bool:
    from emolab.configuration import check_preset

    check_preset(preset)
    from emolab.doctor import examine, print_findings  # takes seconds that a mistyped preset need not wait

    return print_findings(examine(preset))


def _verify(folder: Path) -> bool:
    from emolab.sessions.shards import describe, verify

    print(describe(verify(folder)))
    return True


if __name__ == "__main__":
    main()
