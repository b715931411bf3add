"""G7: how many epochs a search needs to find what the full grid finds.

    python benchmarks/search_efficiency.py            # some minutes
    python benchmarks/search_efficiency.py --quick    # one seed

For each of five seeds (of training and of the sampler), on one small EduSim and a tiny Edu-EmotionNet:

- `grid`: all 27 points of a 3 x 3 x 3 grid over learning rate, lambda and dropout, each trained for 27 epochs, the
  textbook way: 729 epochs;
- `search`: TPE with ASHA over the same ranges, continuous, trials of at most 27 epochs, decisions after 1, 3 and 9.

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
from measurement import arguments, environment, write_record

from emolab.cluster import ClusterSettings, connected
from emolab.corpora.edusim import EduSim
from emolab.sessions.preparation import prepare
from emolab.tracking.tracker import NoTracker
from emolab.tuning.search import search
from emolab.tuning.settings import TuneSettings

EPOCHS = 27
SHARE = 9
"""The search may spend one epoch for so many of the grid's."""
SEARCH_TRIALS = 40
"""More than the epochs allow."""
RANGES: dict[str, tuple[list[float], dict[str, Any]]] = {
    "training.learning_rate": ([3e-4, 3e-3, 3e-2], {"low": 3e-4, "high": 3e-2, "log": True}),
    "training.kl_weight": ([1e-3, 0.0316, 1.0], {"low": 1e-3, "high": 1.0, "log": True}),
    "model.dropout": ([0.0, 0.25, 0.5], {"low": 0.0, "high": 0.5}),
}
ARMS: dict[str, dict[str, Any]] = {
    "grid": {"sampler": "grid", "scheduler": "none", "trials": 27},
    "search": {
        "sampler": "tpe",
        "scheduler": "asha",
        "trials": SEARCH_TRIALS,
        "epoch_budget": 27 * EPOCHS // SHARE,
        "grace_epochs": 1,
        "reduction_factor": 3,
    },
}


def spaces(folder: Path) -> None:
    """The grid's space and the search's, as files."""
    grid = {key: {"distribution": "categorical", "choices": values} for key, (values, _) in RANGES.items()}
    continuous = {key: {"distribution": "float"} | limits for key, (_, limits) in RANGES.items()}
    for name, parameters in (("grid", grid), ("search", continuous)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"parameters": parameters}))


def run(arm: str, seed: int, folder: Path) -> dict[str, float]:
    """One search from nothing: the best score it found and the epochs it took."""
    settings = TuneSettings.model_validate(
        {
            "data": str(folder / "data"),
            "output": str(folder / "runs"),
            "name": f"{arm}-{seed}",
            "model": {"d_model": 16, "layers": 1, "heads": 2},
            "training": {
                "epochs": EPOCHS,
                "batch_size": 64,
                "warmup_epochs": 0,
                "decay_epochs": [],
                "patience": EPOCHS,
                "seed": seed,
            },
            "tuning": ARMS[arm] | {"space": str(folder / f"{arm}.yaml"), "seed": seed, "concurrency": 1},
        }
    )
    result = search(settings, NoTracker())
    return {"best": result.best.value or 0.0, "epochs": result.study.epochs(), "trials": len(result.records)}


def measure(seeds: int, folder: Path) -> dict[str, Any]:
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
            found[arm].append(run(arm, seed, folder))
            print(f"seed {seed} {arm}: {found[arm][-1]}", flush=True)
    return report(found)


def report(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    gains = [mine["best"] - theirs["best"] for mine, theirs in zip(found["search"], found["grid"], strict=True)]
    gain = statistics.fmean(gains)
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    most = max(mine["epochs"] / theirs["epochs"] for mine, theirs in zip(found["search"], found["grid"], strict=True))
    return {
        "seeds": found,
        "mean_best": {arm: statistics.fmean(run["best"] for run in runs) for arm, runs in found.items()},
        "gain_of_search": gain,
        "standard_error": error,
        "largest_share_of_epochs": most,
        "target": 1 / SHARE,
        "met": gain >= -error and most <= 1 / SHARE,
    }


def main(given: list[str] | None = None) -> None:
    options = arguments("Epochs of a search against the full grid.", "search_efficiency", "one seed", given)
    with tempfile.TemporaryDirectory(prefix="search-", ignore_cleanup_errors=True) as name:
        os.environ["RAY_TMPDIR"] = name
        with connected(ClusterSettings(address="local", cpus=1)):
            result = measure(1 if options.quick else 5, Path(name))
    means = result["mean_best"]
    print(
        f"best validation macro-F1: search {means['search']:.4f}, grid {means['grid']:.4f}, difference "
        f"{result['gain_of_search']:+.4f} (s.e. {result['standard_error']:.4f}) at "
        f"{result['largest_share_of_epochs']:.3f} of the epochs (target {result['target']:.3f}), met: {result['met']}"
    )
    machine = environment(ray=ray.__version__, optuna=optuna.__version__)
    write_record(options.output, {"quick": options.quick, "environment": machine, "result": result})


if __name__ == "__main__":
    main()
