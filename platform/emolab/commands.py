"""Commands that people are told to run: built in one place, quoted for a shell, complete.

A command line that is printed must work when it is pasted where the job ran, so it names everything in which the next
job's settings differ from that job's defaults: the output folder, the tracker, the data. Secrets are left out of it,
as out of all that is printed; a job that is given such a mask asks for the secret itself.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from emolab.configuration import Settings
from emolab.redaction import redact, redacted


def job_command(job: str, settings: Settings, *, config: Path | None = None) -> str:
    """The command line of a job of ours that reads back as these settings.

    Args:
        job: name of the script in ``jobs/``.
        config: YAML file that the job reads first; ``settings`` then holds what is set beside it.
    """
    given = _with_tracker_of_the_environment(settings.model_dump(mode="json", exclude_defaults=True))
    file = ["--config", str(config)] if config is not None else []
    return shlex.join([_interpreter(), str(_script(job)), *file, *_arguments(type(settings), redacted(given))])


def tool_command(tool: str, *arguments: str) -> str:
    """The command line of a program that is installed beside the interpreter, such as MLflow's."""
    return shlex.join([str(beside_interpreter(tool) or tool), *(redact(argument) for argument in arguments)])


def beside_interpreter(tool: str) -> Path | None:
    """The program of the environment that this process was started from, as a shell here would call it.

    Returns:
        None where the interpreter was found on PATH, where the program then is too, or where there is no such program.
    """
    interpreter = _interpreter()
    if "/" not in interpreter:
        return None
    program = Path(interpreter).with_name(tool)
    return program if program.exists() else None


def _interpreter() -> str:
    """Python as this process was called: `python`, or `.venv/bin/python`."""
    return (sys.orig_argv or ["python"])[0] or "python"


def _script(job: str) -> Path:
    """The script of a job, reached as the one that runs now."""
    running = Path(sys.argv[0] if sys.argv else "")
    folder = running.parent if running.suffix == ".py" and running.parent.name == "jobs" else Path("jobs")
    return folder / f"{job}.py"


def _with_tracker_of_the_environment(values: dict[str, Any]) -> dict[str, Any]:
    """MLFLOW_TRACKING_URI may have been set for one command alone; one with a password in it stays where it is."""
    variable = os.environ.get("MLFLOW_TRACKING_URI")
    tracking = values.get("tracking", {})
    if not variable or tracking.get("uri") or redact(variable) != variable:
        return values
    return values | {"tracking": {"uri": variable} | tracking}


def _arguments(settings: type[Settings], values: Mapping[str, Any]) -> Iterator[str]:
    """Flags for the keys of the top, dotted overrides for those of sections, as ``parse`` takes them."""
    overrides: list[str] = []
    for key, value in values.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, Mapping):
            overrides += _overrides(value, key)
        elif settings.model_fields[key].annotation is bool:
            yield flag if value else f"--no-{flag.removeprefix('--')}"
        else:
            text = _text(value)
            yield from [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    yield from overrides


def _overrides(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in values.items():
        name = f"{prefix}.{key}"
        if isinstance(value, Mapping) and value:
            yield from _overrides(value, name)
        else:
            yield f"{name}={_text(value)}"


def _text(value: Any) -> str:
    """A value in one line of YAML, as which the command line is read: the name `2026` keeps its quotes."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
