"""Whether the nodes of a cluster see a data set: each reads it from its own disk, or from one that all share."""

from __future__ import annotations

from pathlib import Path

from emolab.cluster import on_every_node
from emolab.names import UserError
from emolab.sessions.manifest import FILE_NAME


def check_visible(folder: Path) -> None:
    """Refuse a data set that is here and not on every other node of the connected cluster that runs work.

    A node that does not answer in time is not waited for.

    Raises:
        UserError: naming the nodes that do not see it.
    """
    blind = [name for name, sees in on_every_node(_sees, str(folder.resolve() / FILE_NAME)) if not sees]
    if blind:
        nodes = f"node{'s' * (len(blind) > 1)} {', '.join(sorted(blind)[:5])}"
        raise UserError(
            f"{folder.resolve()} is not to be seen from {nodes}: put it on storage that all nodes share, at one path"
        )


def _sees(file: str) -> bool:
    return Path(file).is_file()
