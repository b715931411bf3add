"""Lemma 1 and Theorem 1 measured on a trained model, on sessions it was selected by and never on the test split.

The paper claims a bound (the lemma) and a unique limit (the theorem) and measures neither; what is measured here,
and what that says about the claims, is explained in ``edu_emotionnet.theory`` and ``edu_emotionnet.fixed_points``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edu_emotionnet.batch import SessionBatch
from edu_emotionnet.feedback import TemporalFeedbackLoop
from edu_emotionnet.fixed_points import FixedPoints, contraction, feedback_inputs, fixed_points
from edu_emotionnet.theory import lipschitz_table
from emolab.configuration import Settings
from emolab.studies.comparison_settings import TheorySettings
from emolab.studies.test_split import checkpoint_digest
from emolab.tracking.runs import MLflowTracker
from emolab.training.data import load_training_data
from emolab.training.recipe import fingerprint
from emolab.training.train import load_model

FILE_NAME = "theory.json"
MEASURED = "emolab.theory"
"""Tag: fingerprint of the weights and settings that were measured; set once FILE_NAME is stored."""
SHOWN_STEPS = 40
"""Iterations of the feedback map whose changes are kept for the figure."""


class LipschitzCase(Settings):
    """Local Lipschitz constants of one model with respect to one modality."""

    modality: str
    missing: str | None
    """The modality that was taken away; None where none was."""
    constants: tuple[float, ...]
    """One per session, in probability per unit of raw feature; a lower bound where not converged."""
    converged: int
    """Sessions whose power iteration converged."""


class FeedbackMeasured(Settings):
    """The map y -> TFL(z, y) at N inputs z of real steps."""

    inputs: int
    factors: tuple[float, ...]
    """Per input, the largest local contraction factor over the beliefs sampled."""
    upper_bound: float
    """Holds for every input and belief."""
    unique: int
    """Inputs at which every start settled, and on the same point."""
    steps: tuple[int, ...]
    """Per input, steps until the slowest start has settled; -1 where one never does."""
    rates: tuple[float | None, ...]
    """Per input, typical ratio of successive changes; None where none is left to measure."""
    changes: tuple[float, ...]
    """Largest |y_{t+1} - y_t| over inputs and starts, by step."""


class TheoryRecord(Settings):
    """What was measured of one model; stored as an artifact of its run."""

    split: str
    session_ids: tuple[str, ...]
    lipschitz: tuple[LipschitzCase, ...]
    not_measured: str = ""
    """Why there are no Lipschitz constants."""
    feedback: FeedbackMeasured | None
    """None for a model without a feedback loop."""


def record_theory(
    folder: Path, data: Path, settings: TheorySettings, *, run_id: str, tracker: MLflowTracker
) -> TheoryRecord | None:
    """Measure a trained run and store the result in it; None where the same measurement is stored already.

    Args:
        folder: of the run; ``folder/model`` holds the kept weights.
        data: folder of the data set that the model was trained on.
        settings: how thoroughly.
        run_id: the run, in the tracker.

    Raises:
        UserError: the weights or the data are missing or damaged.
    """
    identity = fingerprint({"weights": checkpoint_digest(folder / "model")} | settings.model_dump(mode="json"))
    if tracker.read(run_id).tags.get(MEASURED) == identity:
        return None
    sessions = load_training_data(data)
    split, store = ("validation", sessions.validation) if len(sessions.validation) else ("train", sessions.train)
    chosen = np.unique(np.linspace(0, len(store) - 1, settings.sessions).round().astype(int)).tolist()
    record = measure_theory(
        load_model(folder / "model")[0],
        store.batch(chosen),
        settings,
        split=split,
        session_ids=[store.session_ids[index] for index in chosen],
    )
    run = tracker.resume(run_id)
    run.log_text(record.model_dump_json(indent=1), FILE_NAME)
    run.set_tags({MEASURED: identity})
    return record


def measure_theory(
    model: nn.Module, batch: SessionBatch, settings: TheorySettings, *, split: str, session_ids: list[str]
) -> TheoryRecord:
    """Both measurements on the sessions of a batch, the model being in evaluation mode."""
    not_measured, cases = "", ()
    try:
        measured = lipschitz_table(model, batch, iterations=settings.iterations, tolerance=settings.tolerance)
        cases = tuple(
            LipschitzCase(
                modality=case.modality,
                missing=case.missing,
                constants=tuple(case.constants.tolist()),
                converged=int(case.converged.sum()),
            )
            for case in measured
        )
    except RuntimeError as error:  # a layer without the derivatives needed: said in the report
        not_measured = " ".join(str(error).split())[:200]
    return TheoryRecord(
        split=split,
        session_ids=tuple(session_ids),
        lipschitz=cases,
        not_measured=not_measured,
        feedback=_feedback(model, batch, settings.inputs),
    )


def _feedback(model: nn.Module, batch: SessionBatch, inputs: int) -> FeedbackMeasured | None:
    loops = [part for part in model.modules() if isinstance(part, TemporalFeedbackLoop) and part.previous is not None]
    if len(loops) != 1:
        return None
    every = feedback_inputs(model, batch)
    z = every[torch.linspace(0, len(every) - 1, min(inputs, len(every))).round().long()]
    shrinking, iterated = contraction(loops[0], z), fixed_points(loops[0], z)
    return FeedbackMeasured(
        inputs=len(z),
        factors=tuple(shrinking.supremum.tolist()),
        upper_bound=shrinking.upper_bound,
        unique=int(iterated.unique.sum()),
        steps=tuple(_slowest(iterated).tolist()),
        rates=tuple(None if rate != rate else rate for rate in iterated.rates.tolist()),
        changes=tuple(iterated.changes.amax((0, 1))[:SHOWN_STEPS].tolist()),
    )


def _slowest(iterated: FixedPoints) -> Tensor:
    """(N,) steps of the start that settles last; -1 where one never does."""
    return torch.where((iterated.steps < 0).any(1), -1, iterated.steps.amax(1))
