"""Names that come from users or data. They become paths, run names and URLs only after this check."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

from emolab.redaction import redact

LONGEST = 120
"""Characters of a name at most."""
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._=+@-]{{0,{LONGEST - 1}}}")


class UserError(ValueError):
    """A mistake that the user can mend. Jobs print it as one line and exit with status 2.

    The line goes to logs and trackers, and may quote an address: secrets are left out of it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


def checked_name(name: str, *, what: str) -> str:
    """The name itself, if it may become part of a path.

    Raises:
        UserError: it is empty, too long, or holds anything but letters, digits and . _ = + @ - (the first
            character a letter or digit).
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{what} {name[:60]!r} is not allowed: use 1 to {LONGEST} letters, digits or . _ = + @ -, "
            "beginning with a letter or digit"
        )
    return name


def contained(root: Path, *parts: str, what: str) -> Path:
    """root / parts, guaranteed to lie below root after links are resolved.

    Raises:
        UserError: a part is not an allowed name, or the path leaves root.
    """
    path = root.joinpath(*(checked_name(part, what=what) for part in parts))
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{what} {'/'.join(parts)!r} leaves the folder {root}")
    return path


def nearest(name: str, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" where something known is close to the name, else ""."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
