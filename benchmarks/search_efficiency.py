"""G7: how many epochs a search needs to find what the full grid finds.

    python benchmarks/search_efficiency.py                      # about half an hour
    python benchmarks/search_efficiency.py --quick              # one seed
    python benchmarks/search_efficiency.py --first-decision 1   # a first rung that says nothing; a third of the time

For each of five seeds (of training and of the sampler), on one small EduSim and a tiny Edu-EmotionNet:

- `grid`: all 27 points of a 3 x 3 x 3 grid over learning rate, lambda and dropout, each trained for 81 epochs, the
  textbook way: 2,187 epochs (nine points in one fused step, which is faster and draws dropout by streams of its own);
- `search`: TPE with successive halving over the same ranges, continuous: 27 trials, 9, 3 and 1 of which go on after
  epochs 3, 9 and 27: 243 epochs;
- `random`: the same with random draws;
- `asha`: TPE with asynchronous halving that never pauses a trial, as many trials as 243 epochs allow.

The first decision falls after 3 epochs, 81 steps: after one, every trial is still at the level of chance, and halving
would draw lots (`--first-decision 1` shows it: 27 epochs, decisions after 1, 3 and 9, a ninth as well).

Compared is the best validation macro-F1 that each found. The claim: the search's mean over the seeds is not below the
grid's by more than one standard error of the paired differences, at no more than a ninth of the grid's epochs. The
space reaches from rates that hardly move the weights to rates that spoil them, so that a wrong choice costs much.
Both sides see the same sessions, and neither sees the test split. Writes JSON, by default
benchmarks/results/search_efficiency.json.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # a loopback cluster of this process alone
os.environ["OMP_NUM_THREADS"] = "1"

import optuna
import ray
import yaml
from measurement import environment, parser_for, write_record

from emolab.cluster import ClusterSettings, connected
from emolab.corpora.edusim import EduSim
from emolab.sessions.preparation import prepare
from emolab.tracking.tracker import NoTracker
from emolab.tuning.search import search
from emolab.tuning.settings import TuneSettings

FACTOR = 3
SHARE = 9
"""The search may spend one epoch for so many of the grid's."""
TRIALS = 27
MANY = 80
"""Trials; more than the epochs allow."""
RANGES: dict[str, tuple[list[float], dict[str, Any]]] = {
    "training.learning_rate": ([3e-4, 3e-3, 3e-2], {"low": 3e-4, "high": 3e-2, "log": True}),
    "training.kl_weight": ([1e-3, 0.0316, 1.0], {"low": 1e-3, "high": 1.0, "log": True}),
    "model.dropout": ([0.0, 0.25, 0.5], {"low": 0.0, "high": 0.5}),
}
ARMS: dict[str, dict[str, Any]] = {
    "grid": {"sampler": "grid", "scheduler": "none", "trials": TRIALS, "fused": 9},
    "search": {"sampler": "tpe", "scheduler": "halving", "trials": TRIALS},
    "random": {"sampler": "random", "scheduler": "halving", "trials": TRIALS},
    "asha": {"sampler": "tpe", "scheduler": "asha", "trials": MANY},
}


def spaces(folder: Path) -> None:
    """The grid's space and the one of the searches, as files."""
    grid = {key: {"distribution": "categorical", "choices": values} for key, (values, _) in RANGES.items()}
    continuous = {key: {"distribution": "float"} | limits for key, (_, limits) in RANGES.items()}
    for arm in ARMS:
        parameters = grid if arm == "grid" else continuous
        (folder / f"{arm}.yaml").write_text(yaml.safe_dump({"parameters": parameters}))


def run(arm: str, seed: int, folder: Path, *, first_decision: int) -> dict[str, float]:
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
                "batch_size": 8,
                "warmup_epochs": 0,
                "decay_epochs": [],
                "patience": epochs,
                "seed": seed,
            },
            "tuning": ARMS[arm]
            | halving
            | budget
            | {"space": str(folder / f"{arm}.yaml"), "seed": seed, "concurrency": 1},
        }
    )
    result = search(settings, NoTracker())
    return {"best": result.best.value or 0.0, "epochs": result.study.epochs(), "trials": len(result.records)}


def measure(seeds: int, folder: Path, *, first_decision: int) -> dict[str, Any]:
    prepare(
        EduSim(sessions=300, speakers=30, mean_steps=20),
        folder / "data",
        seed=0,
        shard_sessions=64,
        report=lambda _: None,
    )
    spaces(folder)
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in range(seeds):
        for arm in ARMS:
            found[arm].append(run(arm, seed, folder, first_decision=first_decision))
            print(f"seed {seed} {arm}: {found[arm][-1]}", flush=True)
    return report(found)


def report(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    gains = {arm: gain_over(found["grid"], found[arm]) for arm in ARMS if arm != "grid"}
    gain, error = gains["search"]
    most = max(mine["epochs"] / theirs["epochs"] for mine, theirs in zip(found["search"], found["grid"], strict=True))
    return {
        "seeds": found,
        "mean_best": {arm: statistics.fmean(run["best"] for run in runs) for arm, runs in found.items()},
        "gain_over_grid": {arm: {"mean": mean, "standard_error": error} for arm, (mean, error) in gains.items()},
        "largest_share_of_epochs": most,
        "target": 1 / SHARE,
        "met": gain >= -error and most <= 1 / SHARE,
    }


def gain_over(grid: list[dict[str, float]], runs: list[dict[str, float]]) -> tuple[float, float]:
    """Mean of the paired differences, and its standard error."""
    gains = [mine["best"] - theirs["best"] for mine, theirs in zip(runs, grid, strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    return statistics.fmean(gains), error


def main(given: list[str] | None = None) -> None:
    parser = parser_for("Epochs of a search against the full grid.", "search_efficiency", "one seed")
    parser.add_argument("--first-decision", type=int, default=3, help="epochs before it; a trial has 27 times as many")
    options = parser.parse_args(given)
    with tempfile.TemporaryDirectory(prefix="search-", ignore_cleanup_errors=True) as name:
        os.environ["RAY_TMPDIR"] = name
        with connected(ClusterSettings(address="local", cpus=1)):
            result = measure(1 if options.quick else 5, Path(name), first_decision=options.first_decision)
    print(f"grid: best validation macro-F1 {result['mean_best']['grid']:.4f}")
    for arm, gain in result["gain_over_grid"].items():
        figures = f"{gain['mean']:+.4f} (s.e. {gain['standard_error']:.4f})"
        print(f"{arm}: best validation macro-F1 {result['mean_best'][arm]:.4f}, over the grid {figures}")
    share = f"{result['largest_share_of_epochs']:.3f} of the epochs (target {result['target']:.3f})"
    print(f"search took {share}, met: {result['met']}")
    machine = environment(ray=ray.__version__, optuna=optuna.__version__)
    content = {
        "quick": options.quick,
        "first_decision": options.first_decision,
        "environment": machine,
        "result": result,
    }
    write_record(options.output, content)


if __name__ == "__main__":
    main()
