"""What PyTorch and NumPy say where memory does not suffice, in one line. Only the standard library is imported here."""

from __future__ import annotations

import re

from emolab.names import UserError

_SAID = re.compile(
    r"(?:DefaultCPUAllocator: (?:can't allocate|not enough) memory|CUDA out of memory|Unable to allocate [^\n]* for an)"
    r"[^\n]*"
)


def memory_mistake(error: BaseException) -> UserError | None:
    """The line for an allocation that failed, here or in the process whose failure this tells; None: no such thing."""
    found = _SAID.search(str(error))
    if found is None and not isinstance(error, MemoryError):
        return None
    said = " ".join(found[0].split())[:160].rstrip(". ") if found else "Python cannot allocate any"
    return UserError(f"the memory does not suffice ({said}): choose a smaller model, or a smaller batch")
