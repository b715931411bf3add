"""Ports for servers of the tests, where nobody else looks for one.

The system's own choice (port 0) is from the range that connections and the Rays of other tests take theirs from: what
was free a moment ago may be taken when a server wants it.
"""

from __future__ import annotations

import os
import random
import re
import socket
from collections.abc import Iterator

_FIRST, _BAND, _BANDS = 20_000, 1_000, 12
"""Above the ports of Ray's workers (10002 to 19999) and below those that Linux hands out (from 32768)."""


def _ports() -> Iterator[int]:
    """Every port of this process's band once."""
    worker = re.search(r"\d+$", os.environ.get("PYTEST_XDIST_WORKER", ""))
    first = _FIRST + _BAND * (int(worker[0]) % _BANDS if worker else 0)
    yield from random.Random(os.getpid()).sample(range(first, first + _BAND), _BAND)  # another run has another order


_left = _ports()


def free_port() -> int:
    """A port on which nobody listens, never the same twice in a process."""
    for port in _left:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("this process has used up its ports")
