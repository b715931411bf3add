"""What a study leaves: the same files in its folder and in its run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from emolab.sessions.manifest import write_atomically
from emolab.tracking.tracker import Run


def leave(files: Mapping[str, bytes], folder: Path, run: Run) -> None:
    """Write files into a study's folder and keep them as artifacts of its run.

    Args:
        files: name -> content; a name may begin with a folder.
    """
    for name, content in files.items():
        write_atomically(folder / name, content)
        run.log_file(folder / name, folder=str(Path(name).parent) if "/" in name else None)
