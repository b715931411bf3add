"""Trials that train in one fused step on a GPU: sixteen configurations against one, and against one after the other.

    python benchmarks/fused_trials.py                 # some minutes, preparing EduSim included
    python benchmarks/fused_trials.py --data FOLDER   # a data set that jobs/prepare.py has made
    python benchmarks/fused_trials.py --quick         # smaller, fewer repetitions, says nothing certain

Wall time of whole training epochs (batches made, forward, loss, backward, AdamW, then the validation split), until the
GPU is done, variants interleaved A B B A, minimum and median. Before anything is timed, two epochs without dropout must
give every member the losses that it has alone. Writes JSON with the versions and the hardware, by default
benchmarks/results/fused_trials.json.

Variants: `fused`, sixteen members of a FusedTraining; `one`, the ordinary loop with one configuration, which is what
the others would each cost if trained one after the other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measurement import environment, gpu_clock, interleaved, minimum_and_median, parser_for, require_gpu, write_record

from emolab.training.data import load_training_data
from emolab.training.fused import FusedTraining
from emolab.training.recipe import TrainSettings
from emolab.training.train import epochs_in_process

MEMBERS, DEVICE = 16, torch.device("cuda")
TOLERANCE = 1e-4
"""Largest relative difference allowed between a member's training loss in the second epoch and that of it alone."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model of the paper's depth."""

    width: int
    batch_size: int
    rounds: int
    most: float | None = None
    """Times as long as one configuration that sixteen may take, if that is claimed."""
    throughput: float | None = None
    """Sixteen after each other over sixteen fused, if that is claimed."""


CASES = (
    Case(width=32, batch_size=32, rounds=3, most=2.0),
    Case(width=64, batch_size=32, rounds=3, most=2.0),
    Case(width=256, batch_size=32, rounds=2, throughput=3.0),
    Case(width=256, batch_size=128, rounds=2),
)
QUICK_CASES = (Case(width=32, batch_size=32, rounds=1, most=2.0),)


def members(case: Case, folder: Path, *, dropout: float) -> dict[int, TrainSettings]:
    """Configurations that a search over learning rate, lambda and dropout could draw."""
    return {
        number: TrainSettings.model_validate(
            {
                "data": str(folder),
                "workers": {"gpus": 1},
                "model": {"d_model": case.width, "layers": 4, "heads": 4, "dropout": dropout},
                "training": {
                    "batch_size": case.batch_size,
                    "epochs": 1000,
                    "patience": 1000,
                    "learning_rate": 1e-4 * (1 + number / MEMBERS),
                    "kl_weight": 0.02 * number,
                },
            }
        )
        for number in range(MEMBERS)
    }


def parity(case: Case, folder: Path) -> float:
    """Largest relative difference between the losses of the first, a middle and the last member and theirs alone.

    Raises:
        AssertionError: it is above the tolerance.
    """
    settings = members(case, folder, dropout=0.0)
    fused = FusedTraining(settings, load_training_data(folder), DEVICE)
    fused.epoch()
    together: Mapping[int, Any] = fused.epoch()
    worst = 0.0
    for number in (0, MEMBERS // 2, MEMBERS - 1):
        epochs = epochs_in_process(settings[number])
        next(epochs)
        expected = next(epochs).train_loss
        worst = max(worst, abs(together[number].train_loss - expected) / expected)
    assert worst <= TOLERANCE, worst
    return worst


def measure(case: Case, folder: Path) -> dict[str, Any]:
    difference = parity(case, folder)
    settings = members(case, folder, dropout=0.2)
    fused, one = FusedTraining(settings, load_training_data(folder), DEVICE), epochs_in_process(settings[0])
    seconds = interleaved({"fused": fused.epoch, "one": lambda: next(one)}, case.rounds, clock=gpu_clock)
    found = minimum_and_median(seconds)
    times = {which: found["fused"][which] / found["one"][which] for which in ("min", "median")}
    gain = {which: MEMBERS / value for which, value in times.items()}
    met = [max(times.values()) <= case.most] if case.most else []
    met += [min(gain.values()) >= case.throughput] if case.throughput else []
    return {
        **asdict(case),
        "members": MEMBERS,
        "seconds": found,
        "times_as_long_as_one": times,
        "throughput": gain,
        "met": all(met) if met else None,
        "relative_difference": difference,
    }


def main(given: list[str] | None = None) -> None:
    parser = parser_for("Time fused trials on a GPU.", "fused_trials", "smaller, fewer repetitions")
    parser.add_argument(
        "--data", type=Path, help="a prepared data set; default: EduSim, 320 sessions of about 100 steps"
    )
    options = parser.parse_args(given)
    require_gpu()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or _prepared(Path(temporary) / "data")
        results = []
        for case in QUICK_CASES if options.quick else CASES:
            result = measure(case, folder)
            results.append(result)
            times, gain = result["times_as_long_as_one"], result["throughput"]
            print(
                f"d={case.width} B={case.batch_size}: {MEMBERS} take {times['min']:.2f}x (median "
                f"{times['median']:.2f}x) as long as one, throughput {gain['min']:.1f}x (median {gain['median']:.1f}x),"
                f" met: {result['met']}",
                flush=True,
            )
    write_record(options.output, {"quick": options.quick, "environment": environment(), "cases": results})


def _prepared(folder: Path) -> Path:
    from emolab.cluster import ClusterSettings, connected
    from emolab.corpora.edusim import EduSim
    from emolab.sessions.preparation import prepare

    with connected(ClusterSettings(address="local", cpus=2)):
        prepare(
            EduSim(sessions=320, speakers=20, mean_steps=100), folder, seed=0, shard_sessions=64, report=lambda _: None
        )
    return folder


if __name__ == "__main__":
    main()
