"""G7: how many epochs a search needs to find what the full grid finds.

    python benchmarks/search_efficiency.py                      # about two hours
    python benchmarks/search_efficiency.py --quick              # one seed
    python benchmarks/search_efficiency.py --validation 300     # fewer sessions to choose by: luck decides more
    python benchmarks/search_efficiency.py --first-decision 3   # three times as many epochs

For each of five seeds (of training and of the sampler), on EduSim and a small Edu-EmotionNet, over the ranges of
search_spaces/paper.yaml:

- `grid`: all 27 points of a 3 x 3 x 3 grid, the ends and middles of those ranges, each trained for 27 epochs, the
  textbook way: 729 epochs (nine points in one fused step, which is faster and draws dropout by streams of its own);
- `search`: TPE with successive halving over the ranges: 27 trials, 9, 3 and 1 of which go on after epochs 1, 3 and 9:
  81 epochs;
- `asha`: TPE with asynchronous halving that never pauses a trial, as many trials as 81 epochs allow.

Two validation macro-F1 are compared. `best` is the highest score that each came across. It holds the luck of the one
training that reached it, and the more trainings are finished, the more luck: the grid finishes 27 and the search one,
so that the grid's would be higher even if every configuration were as good as any other. There are two kinds of that
luck: in which weights a training ends with, and in which sessions it is scored on. The second is made small here, by
3,000 validation sessions beside 1,400 to train on. `retrained` is what a search
is asked for, the quality of the configuration that it chose: the mean of three trainings with seeds that no search
used. The claim, for each: a search's mean over the seeds is not below the grid's by more than one standard error of
the paired differences, at no more than a ninth of the grid's epochs. All see the same sessions, and none sees the test
split. Writes JSON, by default benchmarks/results/search_efficiency.json.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # a loopback cluster of this process alone
os.environ["OMP_NUM_THREADS"] = "1"

import optuna
import ray
import torch
import yaml
from measurement import environment, parser_for, write_record

from emolab.cluster import ClusterSettings, connected
from emolab.corpora.corpus import SPLITS, SessionReference
from emolab.corpora.edusim import EduSim
from emolab.sessions.preparation import prepare
from emolab.tracking.tracker import NoTracker
from emolab.training.recipe import TrainSettings
from emolab.training.train import epochs_in_process
from emolab.tuning.search import search
from emolab.tuning.settings import TuneSettings
from emolab.tuning.space import configured

REPOSITORY = Path(__file__).resolve().parents[1]
FACTOR = 3
SHARE = 9
"""The search may spend one epoch for so many of the grid's."""
STEPS = 26
"""Of an epoch."""
RETRAININGS, FRESH = 3, 1000
TRIALS = 27
MANY = 80
"""Trials; more than the epochs allow."""
SPACE = "search_spaces/paper.yaml"
LEVELS: dict[str, list[float]] = {
    "training.learning_rate": [1e-4, 1e-3, 1e-2],
    "training.kl_weight": [1e-3, 0.0316, 1.0],
    "model.dropout": [0.0, 0.25, 0.5],
}
ARMS: dict[str, dict[str, Any]] = {
    "grid": {"sampler": "grid", "scheduler": "none", "trials": TRIALS, "fused": 9},
    "search": {"sampler": "tpe", "scheduler": "halving", "trials": TRIALS},
    "asha": {"sampler": "tpe", "scheduler": "asha", "trials": MANY},
}


def write_grid(folder: Path) -> None:
    """The grid's space as a file."""
    grid = {key: {"distribution": "categorical", "choices": values} for key, values in LEVELS.items()}
    (folder / "grid.yaml").write_text(yaml.safe_dump({"parameters": grid}))


def run(arm: str, seed: int, folder: Path, *, first_decision: int, batch: int) -> dict[str, float]:
    """One search from nothing: the best score it found and the epochs it took."""
    epochs = first_decision * FACTOR**3
    halving = {} if arm == "grid" else {"grace_epochs": first_decision, "reduction_factor": FACTOR}
    budget = {} if arm == "grid" else {"epoch_budget": TRIALS * epochs // SHARE}
    settings = TuneSettings.model_validate(
        {
            "data": str(folder / "data"),
            "output": str(folder / "runs"),
            "name": f"{arm}-{seed}",
            "model": {"d_model": 16, "layers": 1, "heads": 2},
            "training": {
                "epochs": epochs,
                "batch_size": batch,
                "warmup_epochs": 0,
                "decay_epochs": [],
                "patience": epochs,
                "seed": seed,
            },
            "tuning": ARMS[arm]
            | halving
            | budget
            | {
                "space": str(folder / "grid.yaml" if arm == "grid" else REPOSITORY / SPACE),
                "seed": seed,
                "concurrency": 1,
            },
        }
    )
    result = search(settings, NoTracker())
    chosen = configured(settings.base(), result.best.parameters)
    again = [retrained(chosen, FRESH + seed * RETRAININGS + number) for number in range(RETRAININGS)]
    return {
        "best": result.best.value or 0.0,
        "retrained": statistics.fmean(again),
        "epochs": result.study.epochs(),
        "trials": len(result.records),
        **result.best.parameters,
    }


def retrained(chosen: TrainSettings, seed: int) -> float:
    """The score that a configuration keeps with another seed."""
    training = chosen.training.model_copy(update={"seed": seed})
    reports = list(epochs_in_process(chosen.model_copy(update={"training": training})))
    return reports[-1].kept_macro_f1 or 0.0


@dataclass(frozen=True, kw_only=True)
class SomeOfEduSim(EduSim):
    """The first sessions of EduSim's training and validation splits, so many of each."""

    training: int
    validation: int

    def references(self) -> Sequence[SessionReference]:
        wanted = {"train": self.training, "validation": self.validation}
        listed = super().references()
        return [r for split, most in wanted.items() for r in [r for r in listed if r.published_split == split][:most]]


def sessions_for(training: int, validation: int) -> SomeOfEduSim:
    """Sessions of many speakers, of whom EduSim puts 70 and 10 % into these splits."""
    total = math.ceil(1.1 * max(training / 0.7, validation / 0.1))
    return SomeOfEduSim(
        sessions=total, speakers=max(30, total // 10), mean_steps=10, training=training, validation=validation
    )


def measure(seeds: int, folder: Path, *, first_decision: int, training: int, validation: int) -> dict[str, Any]:
    manifest = prepare(
        sessions_for(training, validation), folder / "data", seed=0, shard_sessions=64, report=lambda _: None
    )
    assert [manifest.splits[split].sessions for split in SPLITS] == [training, validation, 0]
    write_grid(folder)
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in range(seeds):
        for arm in ARMS:
            found[arm].append(run(arm, seed, folder, first_decision=first_decision, batch=math.ceil(training / STEPS)))
            print(f"seed {seed} {arm}: {found[arm][-1]}", flush=True)
    return report(found)


def report(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    gains = {
        what: {arm: gain_over(found["grid"], found[arm], what) for arm in ARMS if arm != "grid"}
        for what in ("best", "retrained")
    }
    most = max(mine["epochs"] / theirs["epochs"] for mine, theirs in zip(found["search"], found["grid"], strict=True))
    return {
        "seeds": found,
        "means": {
            what: {arm: statistics.fmean(run[what] for run in runs) for arm, runs in found.items()} for what in gains
        },
        "gain_over_grid": gains,
        "largest_share_of_epochs": most,
        "target": 1 / SHARE,
        "met": {what: not_below(arms["search"]) and most <= 1 / SHARE for what, arms in gains.items()},
    }


def gain_over(grid: list[dict[str, float]], runs: list[dict[str, float]], what: str) -> dict[str, float]:
    """Mean of the paired differences, and its standard error."""
    gains = [mine[what] - theirs[what] for mine, theirs in zip(runs, grid, strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    return {"mean": statistics.fmean(gains), "standard_error": error}


def not_below(gain: dict[str, float]) -> bool:
    return gain["mean"] >= -gain["standard_error"]


def main(given: list[str] | None = None) -> None:
    parser = parser_for("Epochs of a search against the full grid.", "search_efficiency", "one seed")
    parser.add_argument("--first-decision", type=int, default=1, help="epochs before it; a trial has 27 times as many")
    parser.add_argument("--training", type=int, default=1400, help="sessions to train on")
    parser.add_argument("--validation", type=int, default=3000, help="sessions to choose by")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="search-", ignore_cleanup_errors=True) as name:
        os.environ["RAY_TMPDIR"] = name
        with connected(ClusterSettings(address="local", cpus=1)):
            seeds = 1 if options.quick else 5
            sizes = {"training": options.training, "validation": options.validation}
            result = measure(seeds, Path(name), first_decision=options.first_decision, **sizes)
    for what, arms in result["gain_over_grid"].items():
        print(f"{what}: grid {result['means'][what]['grid']:.4f}")
        for arm, gain in arms.items():
            figures = f"{gain['mean']:+.4f} (s.e. {gain['standard_error']:.4f})"
            print(f"{what}: {arm} {result['means'][what][arm]:.4f}, over the grid {figures}")
    share = f"{result['largest_share_of_epochs']:.3f} of the epochs (target {result['target']:.3f})"
    print(f"search took {share}, met: {result['met']}")
    machine = environment(ray=ray.__version__, optuna=optuna.__version__)
    content = {
        "quick": options.quick,
        "first_decision": options.first_decision,
        "sessions": sizes,
        "environment": machine,
        "result": result,
    }
    write_record(options.output, content)


if __name__ == "__main__":
    main()
