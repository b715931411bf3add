"""G6: what a tuning trial costs besides its training: packed, with Ray Tune's `reuse_actors`, and cold.

    python benchmarks/packed_trials.py            # about eight minutes
    python benchmarks/packed_trials.py --quick    # about a minute: fewer trials

Every variant runs the same kind of trial, three epochs of the smallest model on a tiny EduSim, drawn by TPE from a
study in SQLite, one at a time on one CPU (small, because what is measured is the difference of two times: the training
itself must not drown it):

- `packed`, the product's own search: a long-lived process, decisions in this one;
- `packed_tracked`, the same with every trial recorded in MLflow, as a search does by default;
- `reuse`, Ray Tune with `OptunaSearch` and `reuse_actors`, data and imports kept in the process as well;
- `cold`, the same without: every trial a fresh process. Timed on a few trials, one after another.

A trial's overhead is the time from the end of one trial to the end of the next, less the time that its training takes
in a bare loop in one process: every trial of a run is trained again that way right after it, and must end with exactly
the same score. The start of the first process is no part of it, except for `cold`, where every trial has one. Wall
time, one thread each, interleaved A B C D D C B A; minimum and median over the runs of each variant. Writes JSON, by
default benchmarks/results/packed_trials.json.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # a loopback cluster of this process alone
os.environ["OMP_NUM_THREADS"] = "1"

import optuna
import ray
import torch
import yaml
from measurement import arguments, environment, minimum_and_median, ratio, write_record
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from emolab.cluster import ClusterSettings, connected
from emolab.corpora.edusim import EduSim
from emolab.sessions.preparation import prepare
from emolab.tracking.runs import open_tracker
from emolab.tracking.tracker import NoTracker
from emolab.training.recipe import TrainSettings
from emolab.training.train import epochs_in_process
from emolab.tuning.search import search
from emolab.tuning.settings import TuneSettings
from emolab.tuning.space import configured
from emolab.tuning.trials import METRIC

TARGETS = {"overhead_ms": 30.0, "over_reuse": 8.0, "over_cold": 150.0}
SPACE = {
    "training.learning_rate": {"distribution": "float", "low": 1e-4, "high": 1e-2, "log": True},
    "training.kl_weight": {"distribution": "float", "low": 1e-3, "high": 1.0, "log": True},
    "model.dropout": {"distribution": "float", "low": 0.0, "high": 0.5},
}
PARAMETERS = {"training.learning_rate": 1e-3, "training.kl_weight": 0.1, "model.dropout": 0.2}
VARIANTS = ("packed", "packed_tracked", "reuse", "cold")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Numbers of trials."""

    trials: int
    cold_trials: int
    rounds: int
    """Each times every variant twice."""


FULL = Case(trials=64, cold_trials=3, rounds=5)
QUICK = Case(trials=16, cold_trials=2, rounds=1)


class Trial(tune.Trainable):
    """An epoch a step, as in any tutorial; data and imports stay where the process does."""

    def setup(self, config: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        drawn = {key: value for key, value in new_config.items() if key != "base"}
        self.epochs = epochs_in_process(configured(TrainSettings.model_validate(new_config["base"]), drawn))
        return True

    def step(self) -> dict[str, Any]:
        report = next(self.epochs)
        return {METRIC: report.kept_macro_f1, "done": report.finished}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        del checkpoint_dir


class Experiment:
    """The variants, each a call that returns (when each trial ended, its parameters, its score)."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder, self.runs = case, folder, 0
        prepare(
            EduSim(sessions=40, speakers=12, mean_steps=8),
            folder / "data",
            seed=0,
            shard_sessions=64,
            report=lambda _: None,
        )
        (folder / "space.yaml").write_text(yaml.safe_dump({"parameters": SPACE}))
        self.base = self.settings(1).base()

    def settings(self, trials: int) -> TuneSettings:
        self.runs += 1
        return TuneSettings.model_validate(
            {
                "data": str(self.folder / "data"),
                "output": str(self.folder / "runs"),
                "name": f"packed-{self.runs}",
                "model": {"name": "text_only", "d_model": 8, "layers": 1, "heads": 2},
                "training": {"epochs": 3, "batch_size": 32, "warmup_epochs": 0, "patience": 3, "decay_epochs": []},
                "tuning": {
                    "space": str(self.folder / "space.yaml"),
                    "trials": trials,
                    "scheduler": "none",
                    "concurrency": 1,
                    "seed": self.runs,
                },
            }
        )

    def bare(self, parameters: dict[str, Any]) -> tuple[float, float]:
        """Seconds and score of a trial's training, in this process and with nothing around it."""
        started = time.perf_counter()
        reports = list(epochs_in_process(configured(self.base, parameters)))
        return time.perf_counter() - started, reports[-1].kept_macro_f1 or 0.0

    def packed(self, *, tracked: bool = False) -> list[optuna.trial.FrozenTrial]:
        settings = self.settings(self.case.trials)
        tracker = open_tracker(**settings.tracking.model_dump(), output=self.folder / "runs")
        result = search(settings, tracker if tracked else NoTracker())
        return list(result.study.history())

    def packed_tracked(self) -> list[optuna.trial.FrozenTrial]:
        return self.packed(tracked=True)

    def reuse(self) -> list[optuna.trial.FrozenTrial]:
        return self._by_tune(self.case.trials, reuse=True)

    def cold(self) -> list[optuna.trial.FrozenTrial]:
        return self._by_tune(self.case.cold_trials + 1, reuse=False)

    def _by_tune(self, trials: int, *, reuse: bool) -> list[optuna.trial.FrozenTrial]:
        self.runs += 1
        name = f"tune-{self.runs}"
        storage = optuna.storages.RDBStorage(f"sqlite:///{self.folder / name}.db")
        space = {
            key: optuna.distributions.FloatDistribution(p["low"], p["high"], log=p.get("log", False))
            for key, p in SPACE.items()
        }
        searcher = OptunaSearch(
            space,
            metric=METRIC,
            mode="max",
            sampler=optuna.samplers.TPESampler(seed=self.runs, multivariate=True, constant_liar=True),
            study_name=name,
            storage=storage,
        )
        tune.Tuner(
            tune.with_resources(Trial, {"CPU": 1}),
            param_space={"base": self.base.model_dump(mode="json")},
            tune_config=tune.TuneConfig(
                search_alg=searcher, num_samples=trials, max_concurrent_trials=1, reuse_actors=reuse
            ),
            run_config=tune.RunConfig(storage_path=str(self.folder / "tune"), name=name, verbose=0),
        ).fit()
        return optuna.load_study(study_name=name, storage=storage).trials


def per_trial(trials: list[optuna.trial.FrozenTrial]) -> float:
    """Seconds from the end of one trial to the end of the next, on average."""
    ends = sorted(trial.datetime_complete.timestamp() for trial in trials if trial.datetime_complete)
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def measure(case: Case, folder: Path) -> dict[str, Any]:
    experiment = Experiment(case, folder)
    variants: dict[str, Callable[[], list[optuna.trial.FrozenTrial]]] = {
        name: getattr(experiment, name) for name in VARIANTS
    }
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    training: dict[str, list[float]] = {name: [] for name in VARIANTS}
    experiment.bare(PARAMETERS)  # the first training of a process pays for what all others find ready
    for _ in range(case.rounds):
        for name in (*VARIANTS, *reversed(VARIANTS)):
            trials = variants[name]()
            alone = [experiment.bare(trial.params) for trial in trials]
            assert [score for _, score in alone] == [trial.value for trial in trials], name
            seconds[name].append(per_trial(trials))
            training[name].append(statistics.fmean(duration for duration, _ in alone[1:]))
            print(f"{name}: {1000 * seconds[name][-1]:.1f} ms a trial", flush=True)
    return report(case, seconds, training)


def report(case: Case, seconds: dict[str, list[float]], training: dict[str, list[float]]) -> dict[str, Any]:
    overheads = {
        name: [1000 * (whole - alone) for whole, alone in zip(seconds[name], training[name], strict=True)]
        for name in VARIANTS
    }
    overhead = minimum_and_median(overheads)
    ratios = {f"over_{name}": ratio(overheads, name, "packed") for name in ("reuse", "cold")}
    return {
        **asdict(case),
        "training_ms": 1000 * statistics.median(value for values in training.values() for value in values),
        "overhead_ms": overhead,
        "overhead_ms_of_runs": overheads,
        "ratios": ratios,
        "targets": TARGETS,
        "met": overhead["packed"]["median"] <= TARGETS["overhead_ms"]
        and all(min(found.values()) >= TARGETS[name] for name, found in ratios.items()),
    }


def main(given: list[str] | None = None) -> None:
    options = arguments("Time packed tuning trials against Ray Tune's.", "packed_trials", "fewer trials", given)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="packed-", ignore_cleanup_errors=True) as name:
        os.environ["RAY_TMPDIR"] = name
        with connected(ClusterSettings(address="local", cpus=1)):
            result = measure(QUICK if options.quick else FULL, Path(name))
    for variant, value in result["overhead_ms"].items():
        figures = f"{value['min']:.1f} ms (median {value['median']:.1f} ms)"
        print(f"{variant}: {figures} over the {result['training_ms']:.0f} ms of training")
    for name, found in result["ratios"].items():
        print(f"{name} {found['min']:.1f}x (median {found['median']:.1f}x)")
    print("met:", result["met"])
    machine = environment(ray=ray.__version__, optuna=optuna.__version__)
    write_record(options.output, {"quick": options.quick, "environment": machine, "result": result})


if __name__ == "__main__":
    main()
