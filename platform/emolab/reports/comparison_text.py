"""The first lines of a comparison's page."""

from __future__ import annotations

import math

from emolab.registry.verdict import times
from emolab.sessions.manifest import Manifest
from emolab.studies.comparison_analysis import Analysis
from emolab.studies.comparison_results import Comparison


def header_lines(analysis: Analysis) -> list[str]:
    """What a reader must know before the tables: the verdict, the data, the openings, the provenance."""
    comparison = analysis.comparison
    manifest, test = comparison.manifest, comparison.manifest.splits["test"]
    failed = [cell for cell in comparison.cells if cell.failure]
    lines = [
        analysis.ranking_sentence(),
        f"Test split of {manifest.corpus}: {test.sessions} sessions, {sum(test.label_counts)} labelled steps, "
        f"{len(test.speakers)} speakers. {_reference_points(manifest)}",
        *_caveats(manifest),
        _openings(analysis),
    ]
    if hungry := still_improving(comparison):
        tested = len(comparison.cells) - len(failed)
        lines.append(f"{hungry} of {tested} models had their best epoch last: more epochs might change the order.")
    if late := analysis.trained_late():
        lines.append(
            f"{late} of these models {'was' if late == 1 else 'were'} trained after the first opening, because models "
            "or seeds were added: the p-values know nothing of the decision to go on."
        )
    if failed:
        names = ", ".join(f"{cell.model} (seed {cell.seed})" for cell in failed)
        lines.append(f"{len(failed)} cells diverged and have no result: {names}. Their models are judged by the rest.")
    tags = comparison.tags
    clean = {"true": "", "false": " with changes"}.get(tags.get("emolab.git_clean", ""), " (changes unknown)")
    commits, versions = (
        tags.get("emolab.git_commit", "unknown").split(),
        tags.get("emolab.versions", "versions unknown"),
    )
    code = ", ".join(commit[:12] for commit in commits)
    lines.append(
        f"Run {comparison.run_id}, data set {manifest.digest[:16]}, code {code}{clean}, {versions}. "
        f"Command: {tags.get('emolab.command', 'unknown')}"
    )
    return lines


def _openings(analysis: Analysis) -> str:
    """How often and when the test split was opened, here and by others."""
    cells = [cell for cell in analysis.comparison.cells if cell.openings]
    first, last = min(cell.first_opened for cell in cells), max(cell.opened for cell in cells)
    again = [f"{cell.model} (seed {cell.seed}) {times(cell.openings)}" for cell in cells if cell.openings > 1]
    often = f"once for every model and seed but {', '.join(again)}" if again else "once for every model and seed"
    after = "" if analysis.trained_late() else ", after all of them were trained"
    here, known = sum(cell.openings for cell in cells), analysis.comparison.openings
    return (
        f"The test split was opened {often}{after}: {first} to {last}. This tracker has seen it opened "
        f"{times(known['models'])} for models in all, {here} of these here, and {times(known['sweeps'])} for "
        "robustness sweeps."
    )


def still_improving(comparison: Comparison) -> int:
    """Models whose best validation score was that of the very last epoch that they were allowed."""
    return sum(
        cell.history[-1]["epoch"] == cell.history[-1].get("best_epoch") == cell.configuration["training"]["epochs"]
        for cell in comparison.cells
        if cell.history and cell.configuration
    )


def _reference_points(manifest: Manifest) -> str:
    accuracy, macro_f1 = class_prior(manifest)
    known = manifest.splits["test"].reference_scores
    text = f"Always answering the most frequent class of training: accuracy {accuracy:.4f}, macro-F1 {macro_f1:.4f}."
    if "ceiling_accuracy" not in known:
        return text
    return (
        f"{text} Exact filter, the ceiling for causal models: accuracy {known['ceiling_accuracy']:.4f}, macro-F1 "
        f"{known['ceiling_macro_f1']:.4f} (over {known.get('ceiling_sessions', math.nan):.0f} sessions)."
    )


def class_prior(manifest: Manifest) -> tuple[float, float]:
    """Test accuracy and macro-F1 of always answering with the training split's most frequent class."""
    return manifest.class_prior_on("test")


def _caveats(manifest: Manifest) -> list[str]:
    lines = []
    if manifest.corpus == "edusim":
        lines.append(
            "The sessions are simulated. These scores are not to be set beside the paper's, which were measured on "
            "recordings of people; only the order of the models, and why it comes out so, can be discussed."
        )
    if "caveat" in manifest.provenance:
        lines.append(f"Caveat of the data set: {manifest.provenance['caveat']}.")
    return lines
