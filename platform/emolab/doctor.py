"""``emolab doctor``: what an experiment needs, checked before it is started."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from emolab.cluster import connected
from emolab.cluster_settings import joins_cluster
from emolab.configuration import read_preset, validate
from emolab.names import UserError
from emolab.redaction import redact
from emolab.sessions.manifest import FILE_NAME, read_manifest
from emolab.tracking.runs import open_tracker, tracker_file
from emolab.tuning.search import TuneSettings, plan_search

_TESTED = {"torch": "2.14", "ray": "2.60", "optuna": "5.0", "mlflow": "3.17", "pyarrow": "25.0", "pydantic": "2."}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The answer to one question."""

    topic: str
    good: bool
    detail: str


def examine(preset: str) -> list[Finding]:
    """Check this machine, or the cluster it would join, against a preset's plan.

    Raises:
        UserError: no such preset.
    """
    settings = validate(TuneSettings, read_preset(preset, TuneSettings))
    checks: list[Callable[[TuneSettings], Finding]] = [_versions, _devices, _disk, _tracker, _data, _plan]
    return [_guarded(check, settings) for check in checks]


def print_findings(findings: list[Finding]) -> bool:
    """A table for people; whether all is well."""
    table = Table(show_header=False)
    for finding in findings:
        table.add_row("[green]ok[/]" if finding.good else "[red]!![/]", finding.topic, escape(finding.detail))
    Console(width=None if Console().is_terminal else 120).print(table)
    return all(finding.good for finding in findings)


def _guarded(check: Callable[[TuneSettings], Finding], settings: TuneSettings) -> Finding:
    try:
        return check(settings)
    except UserError as error:
        return Finding(topic=check.__name__.strip("_"), good=False, detail=str(error))


def _versions(_: TuneSettings) -> Finding:
    found = {name: metadata.version(name) for name in _TESTED}
    other = [
        f"{name} {found[name]} (tested: {tested})"
        for name, tested in _TESTED.items()
        if not found[name].startswith(tested)
    ]
    detail = "; ".join(other) or ", ".join(f"{name} {version}" for name, version in found.items())
    return Finding(topic="versions", good=not other, detail=detail)


def _devices(_: TuneSettings) -> Finding:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    place = "joins the Ray cluster of RAY_ADDRESS" if joins_cluster() else "starts a local Ray"
    return Finding(topic="devices", good=True, detail=f"{', '.join(names) or 'no GPU: runs on CPUs'}; {place}")


def _disk(settings: TuneSettings) -> Finding:
    folder = Path(settings.output).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    return Finding(topic="disk", good=free > 2, detail=f"{free:.0f} GiB free for {settings.output} (2 GiB wanted)")


def _tracker(settings: TuneSettings) -> Finding:
    """Who only looks makes nothing: neither the tracker's file, nor an outbox for what it does not record."""
    output = Path(settings.output)
    file = tracker_file(uri=settings.tracking.uri, output=output)
    if settings.tracking.enabled and file is not None and not file.exists():
        return Finding(topic="tracker", good=True, detail=f"{file} is missing and will be made by the first job")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as nowhere, redirect_stderr(io.StringIO()):
        tracker = open_tracker(**settings.tracking.model_dump(), output=output if file else Path(nowhere))
        try:
            tracker.find("emolab.kind", "doctor")  # a tracker that does not answer is no error of opening it
        finally:
            tracker.close()
    return Finding(topic="tracker", good=True, detail=redact(tracker.uri))


def _data(settings: TuneSettings) -> Finding:
    if not (Path(settings.data) / FILE_NAME).exists():
        made = settings.prepare is not None and Path(settings.prepare.output) == Path(settings.data)
        return Finding(
            topic="data", good=made, detail=f"{settings.data} is missing{' and will be made' if made else ''}"
        )
    manifest = read_manifest(Path(settings.data))
    sessions = sum(split.sessions for split in manifest.splits.values())
    return Finding(topic="data", good=True, detail=f"{settings.data}: {manifest.corpus}, {sessions} sessions")


def _plan(settings: TuneSettings) -> Finding:
    if not (Path(settings.data) / FILE_NAME).exists():
        return Finding(topic="plan", good=True, detail="can be checked when the data set exists")
    with connected(settings.cluster):
        return Finding(topic="plan", good=True, detail=plan_search(settings).describe(settings))
