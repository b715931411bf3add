"""In a module of its own: the process of a trial imports it, and not MLflow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from emolab.tuning import workers


def mortal_trial(config: dict[str, Any]) -> None:
    """A trial of several workers whose own process dies as its training ends, once; where its folder says that training
    is broken, it fails."""
    folder = Path(config[workers.BASE]["output"])
    fit = workers.fit_distributed

    def fit_and_die(*arguments: Any, **options: Any) -> None:
        fit(*arguments, **options)
        (folder / "died").touch()
        os._exit(1)

    if not (folder / "died").exists():
        workers.fit_distributed = fit_and_die
    elif (folder / "broken").exists():
        workers.fit_distributed = broken
    workers.distributed_trial(config)


def broken(*_: Any, **__: Any) -> None:
    raise RuntimeError("a cable was pulled")
