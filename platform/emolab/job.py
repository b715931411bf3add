"""One way into every job: what ends it is one line and an exit status, from its first import on.

Only the standard library is imported here, so that this is in force before a job's own imports, which take seconds.
"""

from __future__ import annotations

import argparse
import errno
import gc
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from emolab.memory import memory_mistake
from emolab.names import UserError
from emolab.redaction import redact_output


class Parser(argparse.ArgumentParser):
    """A command line that says what is wrong with it in one line, as everything else.

    Options are written out: an abbreviation would mean another option once a job gets one that begins alike.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def run_job(job: Callable[[], None]) -> NoReturn:
    """Run a job's main function: a user's mistake becomes one line on stderr and exit status 2.

    A folder that cannot be written to is such a mistake, whichever part of the job meets it first, and so is what is
    too large for the memory. Ctrl-C and SIGTERM
    (a job stopped by Ray, Kubernetes or a batch system) are an interruption, with the exit status that shells give
    them. Nothing that the process prints from here on holds a secret.

    Args:
        job: imports what it needs by itself: an interruption is one line then, too.
    """
    redact_output()
    _stop.number, _stop.unheeded = signal.SIGINT, False
    if threading.current_thread() is threading.main_thread():  # the only one that may say so
        signal.signal(signal.SIGTERM, _stop)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _stop)
    try:
        job()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        _interrupted()
    except Exception as error:
        if _stop.unheeded:  # what a library made of the interruption while it was imported
            _interrupted()
        mistake = memory_mistake(error)
        if isinstance(error, OSError) and error.errno in _UNUSABLE_PATH and error.filename is not None:
            mistake = UserError(f"{error.filename}: {error.strerror}: name another folder, or make this one usable")
        if mistake is None:
            raise
        sys.stderr.write(f"error: {mistake}\n")
        sys.exit(2)
    finally:
        # Python looks for garbage among all objects once more when it ends: over a second, with PyTorch and MLflow.
        gc.freeze()
    sys.exit(0)


def heed_interruption() -> None:
    """To be called after imports: some libraries swallow whatever is raised while they are imported.

    Raises:
        KeyboardInterrupt: there was one meanwhile.
    """
    if _stop.unheeded:
        raise KeyboardInterrupt


def imports_done() -> None:
    """To be called after a job's last import.

    Raises:
        KeyboardInterrupt: there was one meanwhile.
    """
    heed_interruption()
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # for which libraries look before they set their own


def _interrupted() -> NoReturn:
    sys.stderr.write("interrupted: run the same command again to continue\n")
    sys.exit(128 + _stop.number)


class _Stop:
    """Takes SIGTERM like Ctrl-C and remembers which it was: Ray raises a KeyboardInterrupt of its own for either."""

    number: int = signal.SIGINT
    unheeded: bool = False

    def __call__(self, number: int, frame: object) -> NoReturn:
        del frame
        self.number, self.unheeded = number, True
        raise KeyboardInterrupt


_stop = _Stop()
_UNUSABLE_PATH = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
"""What the system says of a path that cannot be read or written as it stands."""
