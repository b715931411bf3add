"""How a job begins: it reads its options before it imports what it works with, which takes seconds.

    invocation = read_invocation(PredictSettings, __doc__)
    from emolab.serving.batch import predict  # not before: --help and a mistyped option need not wait

    invocation.run(predict)

So the settings lie in modules that import neither MLflow nor Ray nor whatever else only the work needs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from emolab.configuration import SettingsType, parse
from emolab.job import imports_done

Taken = TypeVar("Taken", contravariant=True)
Given = TypeVar("Given", covariant=True)
Result = TypeVar("Result")


class Work(Protocol[Taken, Given]):
    """What a job does with its settings."""

    def __call__(self, settings: Taken, /, *, dry_run: bool, report: Callable[[str], None]) -> Given: ...


@dataclass(frozen=True, kw_only=True)
class Invocation(Generic[SettingsType]):
    """A job as it was called."""

    settings: SettingsType
    dry_run: bool

    def run(self, work: Work[SettingsType, Result]) -> Result:
        """Do the work, whose import must be the job's last; its lines are printed as they come.

        Raises:
            KeyboardInterrupt: there was one while the work was imported.
        """
        imports_done()
        return work(self.settings, dry_run=self.dry_run, report=lambda line: print(line, flush=True))


def read_invocation(
    settings: type[SettingsType],
    description: str | None,
    *,
    arguments: Sequence[str] | None = None,
    default_preset: Callable[[], tuple[str, str]] | None = None,
) -> Invocation[SettingsType]:
    """Read the command line of this process.

    Args:
        description: what ``--help`` says first, the docstring of the job.
        arguments: instead of those of this process.
        default_preset: as ``parse`` takes it.

    Raises:
        UserError: as ``parse``.
    """
    given = sys.argv[1:] if arguments is None else arguments
    resolved, dry_run = parse(settings, given, description=description or "", default_preset=default_preset)
    return Invocation(settings=resolved, dry_run=dry_run)
