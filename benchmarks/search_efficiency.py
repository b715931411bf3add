"""G7: how many epochs a search needs to find what the full grid finds.

    python benchmarks/search_efficiency.py                      # many hours; the same command goes on
    python benchmarks/search_efficiency.py --quick              # one seed
    python benchmarks/search_efficiency.py --validation 300     # fewer sessions to choose by: luck decides more
    python benchmarks/search_efficiency.py --arms halving later --first-seed 100    # two designs, on other seeds

For each of five seeds (of training and of the sampler), on EduSim and a small Edu-EmotionNet, with the paper's schedule
of learning rates (section IV: warm-up, and a tenth of the rate from 60 and 80 % of the epochs on), over the ranges of
search_spaces/paper.yaml:

- `grid`: all 27 points of a 3 x 3 x 3 grid, the ends and middles of those ranges, each trained for 27 epochs, the
  textbook way: 729 epochs (nine points in one fused step, which is faster and draws dropout by streams of its own);
- `averaged`: TPE with successive halving over the ranges, of trainings whose averaged weights are validated and kept
  (`training.ema_decay=0.98`), for 9 epochs at a rate that is not decayed: 16 trials, 5 of which go on after epoch 3:
  78 epochs;
- `small-batches`: the same with batches of 16 sessions instead of 54, so that an epoch is 88 steps instead of 26;
- `grid-averaged`: the grid, with the averages of the same trainings of 27 epochs: what averaging alone would have
  brought it;
- `grid-small-batches`: the grid of 27 epochs that averages and has batches of 16 as well;
- `halving`: TPE with successive halving, of the grid's trainings: 27 trials, 9, 3 and 1 of which go on after epochs 1,
  3 and 9: 81 epochs;
- `later`: the same with fewer trials that are judged later: 12, of which 4 and 1 go on after epochs 3 and 9: 78 epochs;
- `asha`: TPE with asynchronous halving that never pauses a trial, as many trials as 81 epochs allow.

Two validation macro-F1 are compared. `best` is the highest score that each came across. It holds the luck of the one
training that reached it, and the more trainings are finished, the more luck: the grid finishes 27 and a search one to
five, so that the grid's would be higher even if every configuration were as good as any other. There are two kinds of
that luck: in which weights a training ends with, and in which sessions it is scored on. The second is made small here,
by 2,000 validation sessions beside 1,400 to train on. `retrained` is what a search is asked for, the quality of the
configuration that it chose: the mean of three trainings of 27 epochs, averaged where the arm averages, with seeds that
no search used. The claim, for each: a search's mean over the seeds is not below the grid's by more than one standard
error of the paired differences, at no more than a ninth of the grid's epochs. All see the same sessions, and none sees
the test split. How `averaged` and `small-batches` train and are judged was settled on the seeds 100 and 101, which are
not among those measured. Writes JSON, by default benchmarks/results/search_efficiency.json, after every arm; what is
there of the same sizes is not run again.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
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
from emolab.training.recipe import TrainingSettings, TrainSettings
from emolab.training.train import epochs_in_process
from emolab.tuning.search import search
from emolab.tuning.settings import TuneSettings
from emolab.tuning.space import configured

REPOSITORY = Path(__file__).resolve().parents[1]
SHARE = 9
"""A search may spend one epoch for so many of the grid's."""
STEPS = 26
"""Of an epoch."""
EPOCHS = 27
RETRAININGS, FRESH = 3, 1000
SPACE = "search_spaces/paper.yaml"
Found = dict[str, dict[str, dict[str, float]]]
"""Arm -> seed -> what came of it."""
LEVELS: dict[str, list[float]] = {
    "training.learning_rate": [1e-4, 1e-3, 1e-2],
    "training.kl_weight": [1e-3, 0.0316, 1.0],
    "model.dropout": [0.0, 0.25, 0.5],
}
POINTS = math.prod(map(len, LEVELS.values()))
BUDGET = POINTS * EPOCHS // SHARE
_GRID = {"sampler": "grid", "scheduler": "none", "trials": POINTS, "fused": 9}
_HALVING = {"sampler": "tpe", "scheduler": "halving", "reduction_factor": 3, "epoch_budget": BUDGET}
ARMS: dict[str, dict[str, Any]] = {
    "grid": _GRID,
    "averaged": _HALVING | {"trials": 16, "grace_epochs": 3},
    "small-batches": _HALVING | {"trials": 16, "grace_epochs": 3},
    "grid-averaged": _GRID,
    "grid-small-batches": _GRID,
    "halving": _HALVING | {"trials": 27, "grace_epochs": 1},
    "later": _HALVING | {"trials": 12, "grace_epochs": 3},
    "asha": _HALVING | {"trials": 80, "grace_epochs": 1, "scheduler": "asha"},  # more than the epochs allow
}
GRIDS = [arm for arm in ARMS if ARMS[arm] is _GRID]

_DECAYED = {
    "epochs": EPOCHS,
    "patience": EPOCHS,
    "warmup_epochs": EPOCHS // 10,
    "decay_epochs": [EPOCHS * 6 // 10, EPOCHS * 8 // 10],
}
"""The paper's schedule of 50 epochs, scaled."""
AVERAGING = {"ema_decay": 0.98}
SMALL_BATCHES = {"ema_decay": 0.99, "batch_size": 16}
_SHORT = AVERAGING | {"epochs": 9, "patience": 9, "warmup_epochs": 2, "decay_epochs": []}
TRAININGS: dict[str, dict[str, Any]] = {
    "averaged": _SHORT,
    "small-batches": _SHORT | SMALL_BATCHES,
    "grid-averaged": _DECAYED | AVERAGING,
    "grid-small-batches": _DECAYED | SMALL_BATCHES,
}
"""How an arm trains, where not as the paper does."""


def write_grid(folder: Path) -> None:
    """The grid's space as a file."""
    grid = {key: {"distribution": "categorical", "choices": values} for key, values in LEVELS.items()}
    (folder / "grid.yaml").write_text(yaml.safe_dump({"parameters": grid}))


def run(arm: str, seed: int, folder: Path, *, batch: int) -> dict[str, float]:
    """One search from nothing: the best score it found and the epochs it took."""
    settings = TuneSettings.model_validate(
        {
            "data": str(folder / "data"),
            "output": str(folder / "runs"),
            "name": f"{arm}-{seed}",
            "model": {"d_model": 16, "layers": 1, "heads": 2},
            "training": {"batch_size": batch} | TRAININGS.get(arm, _DECAYED) | {"seed": seed},
            "tuning": ARMS[arm]
            | {
                "space": str(folder / "grid.yaml" if arm in GRIDS else REPOSITORY / SPACE),
                "seed": seed,
                "concurrency": 1,
            },
        }
    )
    result = search(settings, NoTracker())
    whole = TrainingSettings.model_validate(settings.training.model_dump() | _DECAYED)
    chosen = configured(settings.base().model_copy(update={"training": whole}), result.best.parameters)
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


def measure(arms: Sequence[str], seeds: Sequence[int], sizes: Mapping[str, int], output: Path, folder: Path) -> None:
    """Run what the record does not hold yet, and write it down after every arm."""
    found = earlier(output, sizes)
    manifest = prepare(sessions_for(**sizes), folder / "data", seed=0, shard_sessions=64, report=lambda _: None)
    assert [manifest.splits[split].sessions for split in SPLITS] == [sizes["training"], sizes["validation"], 0]
    write_grid(folder)
    for seed in seeds:
        for arm in arms:
            runs = found.setdefault(arm, {})
            if str(seed) not in runs:
                runs[str(seed)] = run(arm, seed, folder, batch=math.ceil(sizes["training"] / STEPS))
                write_record(output, {"sessions": sizes, "found": found, "result": report(found), **where()})
            print(f"seed {seed} {arm}: {runs[str(seed)]}", flush=True)


def earlier(output: Path, sizes: Mapping[str, int]) -> Found:
    """What a record of the same sizes holds, by arm and seed."""
    if not output.exists():
        return {}
    known = json.loads(output.read_text())
    return known["found"] if known.get("sessions") == sizes else {}


def where() -> dict[str, Any]:
    return {"environment": environment(ray=ray.__version__, optuna=optuna.__version__)}


def report(found: Found) -> dict[str, Any]:
    """Every arm against the grid, and what trains better against the grids that do; over the seeds that both have."""
    compared = {
        "grid": [arm for arm in found if arm != "grid"],
        "grid-averaged": ["averaged", "small-batches"],
        "grid-small-batches": ["small-batches"],
    }
    return {
        grid: {
            arm: against(found[grid], found[arm])
            for arm in arms
            if found.get(grid, {}).keys() & found.get(arm, {}).keys()
        }
        for grid, arms in compared.items()
    }


def against(grid: Mapping[str, dict[str, float]], runs: Mapping[str, dict[str, float]]) -> dict[str, Any]:
    """An arm's runs against a grid's, seed by seed."""
    seeds = sorted(grid.keys() & runs.keys(), key=int)
    pairs = [(runs[seed], grid[seed]) for seed in seeds]
    share = max(mine["epochs"] / theirs["epochs"] for mine, theirs in pairs)
    compared: dict[str, Any] = {"seeds": seeds, "largest_share_of_epochs": share, "target": 1 / SHARE}
    for what in ("best", "retrained"):
        gain = gain_over([theirs for _, theirs in pairs], [mine for mine, _ in pairs], what)
        compared[what] = gain | {
            "grid": statistics.fmean(theirs[what] for _, theirs in pairs),
            "search": statistics.fmean(mine[what] for mine, _ in pairs),
            "met": not_below(gain) and share <= 1 / SHARE,
        }
    return compared


def gain_over(grid: list[dict[str, float]], runs: list[dict[str, float]], what: str) -> dict[str, float]:
    """Mean of the paired differences, and its standard error."""
    gains = [mine[what] - theirs[what] for mine, theirs in zip(runs, grid, strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    return {"mean": statistics.fmean(gains), "standard_error": error}


def not_below(gain: dict[str, float]) -> bool:
    return gain["mean"] >= -gain["standard_error"]


def main(given: list[str] | None = None) -> None:
    parser = parser_for("Epochs of a search against the full grid.", "search_efficiency", "one seed")
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help=", ".join(ARMS)
    )
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--training", type=int, default=1400, help="sessions to train on")
    parser.add_argument("--validation", type=int, default=2000, help="sessions to choose by")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    seeds = range(options.first_seed, options.first_seed + (1 if options.quick else options.seeds))
    sizes = {"training": options.training, "validation": options.validation}
    with tempfile.TemporaryDirectory(prefix="search-", ignore_cleanup_errors=True) as name:
        os.environ["RAY_TMPDIR"] = name
        with connected(ClusterSettings(address="local", cpus=1)):
            measure(options.arms, seeds, sizes, options.output, Path(name))
    for grid, arms in report(earlier(options.output, sizes)).items():
        for arm, compared in arms.items():
            for what in ("best", "retrained"):
                gain = compared[what]
                print(
                    f"{arm}, {what}: {gain['search']:.4f} against {gain['grid']:.4f} of {grid}, {gain['mean']:+.4f} "
                    f"(s.e. {gain['standard_error']:.4f}) over {len(compared['seeds'])} seeds, "
                    f"{compared['largest_share_of_epochs']:.3f} of the epochs, met: {gain['met']}"
                )


if __name__ == "__main__":
    main()
