"""jobs/prepare.py as a whole: the data set, its report beside it, and a run in the tracker that holds the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from emolab.cluster import connected
from emolab.corpora.corpus import Corpus, RefusedSessionError, SessionReference
from emolab.names import UserError, checked_name
from emolab.reports.data import data_page
from emolab.sessions.inventory import FILE_NAME as INVENTORY
from emolab.sessions.inventory import QUARANTINE
from emolab.sessions.manifest import FILE_NAME, Manifest, write_atomically
from emolab.sessions.preparation import REPORT, listed, make_data_set, too_many
from emolab.sessions.shards import describe
from emolab.studies.preparation_settings import PreparationSettings
from emolab.tracking.provenance import code_version
from emolab.tracking.runs import open_tracker
from emolab.tracking.tracker import Tracker

_NAMED = 3
"""Sessions that a dry run names of those whose files are missing."""
REPORT_OF = "emolab.data_report"
"""Tag of the run that holds a data set's report; its value is the digest."""


def prepare_and_describe(settings: PreparationSettings, *, dry_run: bool, report: Callable[[str], None]) -> None:
    """Make the data set, or find it made, and tell what is in it; a dry run tells what would be made.

    Raises:
        UserError: as ``prepare``, and where weights of its encoders are missing.
    """
    if dry_run:
        _check(settings, report)
        return
    report(describe(prepare_and_report(settings, report=report)))


def prepare_and_report(settings: PreparationSettings, *, report: Callable[[str], None]) -> Manifest:
    """Make the data set, or find it made; write its report and record it once.

    A tracker that cannot be reached costs the record, not the data set.

    Raises:
        UserError: as ``prepare``.
    """
    corpus = settings.build()  # a mistake is told before a cluster starts
    if not (Path(settings.output) / FILE_NAME).exists():  # a finished data set is found again without its source
        listed(corpus)
    with connected(settings.cluster):
        manifest = make_data_set(settings, report=report)
    folder = Path(settings.output)
    if not (folder / REPORT).exists():
        write_atomically(folder / REPORT, data_page(folder))
    report(f"report  {folder / REPORT}")
    try:
        tracker = open_tracker(**settings.tracking.model_dump(), output=Path(settings.runs))
        _record(tracker, folder, manifest)
        report(f"runs    {tracker.instructions()}")
    except Exception as error:  # whichever way a tracker fails, the data set is there
        report(f"the report is not in the tracker: {' '.join(str(error).split())[:200]}")
    return manifest


def _check(settings: PreparationSettings, report: Callable[[str], None]) -> None:
    """Tell what would be made, and what of it could not.

    Raises:
        UserError: the sessions cannot be listed, weights are missing, or so many sessions name a file that is not there
            that the preparation would be refused.
    """
    corpus = settings.build()
    references = listed(corpus)
    corpus.provenance()  # weights that are missing are told now
    missing = [(each, files) for each in references if (files := _missing(corpus, each))]
    lines = [f"session {each.session_id[:60]}: {files[0]}" for each, files in missing[:_NAMED]]
    found = f"{len(missing)} of {len(references)} sessions name a file that is not there ({'; '.join(lines)})"
    none_is_left = len(missing) == len(references)
    if none_is_left or too_many(len(missing), len(references), settings.max_refused):
        why = "which leaves none" if none_is_left else f"more than max_refused={settings.max_refused:g} allows"
        raise UserError(f"{found}, {why}: put the files there, or mend the list")
    report(f"would write {len(references) - len(missing)} sessions of {corpus.name} to {settings.output}")
    if missing:
        report(f"warning: {found} and would be set aside")


def _missing(corpus: Corpus, reference: SessionReference) -> Sequence[Path]:
    try:
        return corpus.missing_files(reference)
    except RefusedSessionError:  # set aside as well, but not for want of a file
        return ()


def _record(tracker: Tracker, folder: Path, manifest: Manifest) -> None:
    if tracker.find(REPORT_OF, manifest.digest):
        return
    name = checked_name(f"data-{manifest.corpus}-{manifest.digest[:10]}", what="run name")
    tags = {"emolab.kind": "data", "emolab.dataset": manifest.digest}
    run = tracker.start(name, tags=code_version() | tags, key=f"data-{manifest.digest}")
    sessions = {f"sessions_{split}": summary.sessions for split, summary in manifest.splits.items()}
    steps = {f"steps_{split}": summary.steps for split, summary in manifest.splits.items()}
    left_out = {"dropped": sum(manifest.dropped.values()), "quarantined": manifest.quarantined}
    run.log_metrics({key: float(value) for key, value in (sessions | steps | left_out).items()}, step=0)
    run.log_parameters({"corpus": manifest.corpus, "seed": manifest.seed, "folder": str(folder)})
    for file in (FILE_NAME, REPORT, INVENTORY, QUARANTINE):
        if (folder / file).exists():
            run.log_file(folder / file)
    run.set_tags({REPORT_OF: manifest.digest})  # last: a run that was cut short is recorded again
    run.finish()
