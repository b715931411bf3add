"""The data set of a study: found, or made by the study's own plan where it is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from emolab.names import UserError
from emolab.sessions.manifest import FILE_NAME, Manifest, read_manifest
from emolab.sessions.preparation import make_data_set
from emolab.sessions.settings import PrepareSettings


def will_be_made(data: str, plan: PrepareSettings | None) -> bool:
    """Whether the data set is missing and the plan is one for its very folder."""
    return plan is not None and Path(plan.output) == Path(data) and not (Path(data) / FILE_NAME).exists()


def dataset(
    data: str, plan: PrepareSettings | None, *, report: Callable[[str], None], dry_run: bool = False
) -> Manifest | None:
    """The manifest of the data set, after making it where it is missing; Ray must then be connected.

    Returns:
        None where a dry run leaves the data set unmade.

    Raises:
        UserError: the data set is missing and the plan does not make it, or it cannot be made.
    """
    if plan is not None and will_be_made(data, plan):
        _check(plan)
        report(f"data set {data} is missing and will be made: {plan.corpus} {plan.options}")
        if dry_run:
            return None
        make_data_set(plan, report=report)
    return read_manifest(Path(data))


def _check(plan: PrepareSettings) -> None:
    """Refuse a plan that cannot be carried out, by the key that the plan has in a study's configuration."""
    try:
        plan.build()
    except UserError as error:
        line = str(error)
        raise UserError(f"prepare.{line}" if line.startswith("options.") else f"prepare: {line}") from None
