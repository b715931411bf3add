"""What tuning brings over the paper's own values, and what TPE with ASHA brings over random search.

    python benchmarks/tuning_gain.py --output runs/tuning-gain       # about 40 minutes on one core; resumes
    python benchmarks/tuning_gain.py --output runs/tuning-gain --quick

Over EduSim, with the space of search_spaces/paper.yaml (lambda, learning rate, dropout), three repetitions, each with
its own seeds of training and of the sampler:

- `paper`: no search; learning rate 1e-4 and dropout 0.2 as printed, lambda 0.1 (the paper gives none), as many epochs
  as a trial of the searches has at most;
- `paper_steps`: the same with about as many optimizer steps as the paper's recipe takes on its 5,000 sessions (50
  epochs of batches of 128, 1,400 steps), warm-up and decays at the same shares of the way;
- `tpe_asha`: 40 trials of TPE, stopped early by ASHA;
- `random`: random search without early stopping, for as many epochs as `tpe_asha` took in the same repetition.

Everything is chosen by validation macro-F1. What is compared is the winner of each arm trained again with three seeds
that its search did not use: the mean over repetitions and seeds, with the 95 % interval (Student's t) over the means
of the repetitions. The same sessions rank the trials and score the winners, so an optimism that does not depend on
the seed remains in the tuned arms; the test split is not opened. Run the same command again after an interruption: it
goes on. Writes tuning_gain.json, .csv and .md into the output folder.
"""

from __future__ import annotations

import csv
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # a loopback cluster of this process alone
os.environ["OMP_NUM_THREADS"] = "1"

import optuna
import ray
import yaml
from measurement import environment, parser_for, write_record
from scipy.stats import t as student

from emolab.cluster import ClusterSettings, connected
from emolab.corpora.edusim import EduSim
from emolab.sessions.manifest import read_manifest
from emolab.sessions.preparation import prepare
from emolab.tracking.tracker import NoTracker
from emolab.tuning.search import SearchResult, search
from emolab.tuning.settings import TuneSettings

SPACE = Path(__file__).parent.parent / "search_spaces" / "paper.yaml"
PAPER = {"training.kl_weight": 0.1, "training.learning_rate": 1e-4, "model.dropout": 0.2}
EPOCHS = 18
SEEDS = 3
"""Trainings of each winner."""
FULL = {"repetitions": 3, "trials": 40, "sessions": 400}
QUICK = {"repetitions": 2, "trials": 4, "sessions": 60}
RECIPE = {"epochs": EPOCHS, "batch_size": 32, "warmup_epochs": 1, "decay_epochs": [14], "patience": 6}
STEPS = {"epochs": 150, "batch_size": 32, "warmup_epochs": 15, "decay_epochs": [90, 120], "patience": 150}
ARMS = ("paper", "paper_steps", "tpe_asha", "random")


class Comparison:
    """The arms, each a study of its own below the output folder."""

    def __init__(self, folder: Path, sizes: dict[str, int]) -> None:
        self.folder, self.sizes, self.began = folder, sizes, time.monotonic()
        prepare(
            EduSim(sessions=sizes["sessions"], speakers=40),
            folder / "data",
            seed=0,
            shard_sessions=128,
            report=lambda _: None,
        )
        fixed = {key: {"distribution": "categorical", "choices": [value]} for key, value in PAPER.items()}
        (folder / "paper.yaml").write_text(yaml.safe_dump({"parameters": fixed}))

    def run(self, arm: str, repetition: int) -> dict[str, Any]:
        """One arm of one repetition, or what an earlier call left of it."""
        if arm.startswith("paper"):
            tuning = {"space": str(self.folder / "paper.yaml"), "trials": 1, "scheduler": "none", "sampler": "random"}
        elif arm == "tpe_asha":
            tuning = {"space": str(SPACE), "trials": self.sizes["trials"], "sampler": "tpe", "scheduler": "asha"}
        else:
            paid = self.run("tpe_asha", repetition)["epochs"]
            tuning = {"space": str(SPACE), "trials": 1000, "sampler": "random", "scheduler": "none"}
            tuning["epoch_budget"] = paid
        result = search(self._settings(arm, repetition, tuning), NoTracker(), report=self._say(arm, repetition))
        return _row(arm, repetition, result)

    def _settings(self, arm: str, repetition: int, tuning: dict[str, Any]) -> TuneSettings:
        recipe = STEPS if arm == "paper_steps" else RECIPE
        shared = {"seed": repetition, "concurrency": 1, "grace_epochs": 2, "final": {"top": 1, "seeds": SEEDS}}
        return TuneSettings.model_validate(
            {
                "data": str(self.folder / "data"),
                "output": str(self.folder / "runs"),
                "name": f"{arm}-{repetition}",
                "model": {"d_model": 32, "layers": 1, "heads": 2},
                "training": recipe | {"seed": 100 * repetition},
                "tuning": shared | tuning,
            }
        )

    def _say(self, arm: str, repetition: int) -> Any:
        def say(line: str) -> None:
            minutes = (time.monotonic() - self.began) / 60
            print(f"{minutes:5.1f} min  {arm} {repetition}: {line}", flush=True)

        return say


def _row(arm: str, repetition: int, result: SearchResult) -> dict[str, Any]:
    winner = result.finalists[0]
    return {
        "arm": arm,
        "repetition": repetition,
        "trials": len(result.records),
        "epochs": result.study.epochs(),
        "best_in_search": result.best.value,
        "winner_mean": winner.mean,
        "winner_runs": list(winner.values),
        **result.best.parameters,
    }


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half-width of its 95 % interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("nan")
    return mean, float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Each arm's winners, and the paired differences to the arms it is compared with."""
    means = {arm: [row["winner_mean"] for row in rows if row["arm"] == arm] for arm in ARMS}
    pairs = [("tpe_asha", "random"), ("tpe_asha", "paper"), ("tpe_asha", "paper_steps"), ("random", "paper")]
    return {
        "arms": {
            arm: dict(zip(("mean", "half_width"), interval(values), strict=True)) for arm, values in means.items()
        },
        "differences": {
            f"{a} - {b}": dict(
                zip(
                    ("mean", "half_width"),
                    interval([x - y for x, y in zip(means[a], means[b], strict=True)]),
                    strict=True,
                )
            )
            for a, b in pairs
        },
    }


def markdown(rows: list[dict[str, Any]], found: dict[str, Any], command: str, reference: dict[str, float]) -> str:
    """For the documentation."""
    lines = [
        f"`{command}`",
        "",
        "| arm | epochs of the search | winner, validation macro-F1 | learning rate | lambda | dropout |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        numbers = {key: ", ".join(f"{row[key]:.2g}" for row in mine) for key in PAPER}
        epochs = ", ".join(str(row["epochs"]) for row in mine) if not arm.startswith("paper") else "-"
        stats = found["arms"][arm]
        if arm.startswith("paper"):
            numbers = {key: f"{value:g}" for key, value in PAPER.items()}
        lines.append(
            f"| {arm} | {epochs} | {stats['mean']:.4f} ± {stats['half_width']:.4f} | "
            f"{numbers['training.learning_rate']} | {numbers['training.kl_weight']} | {numbers['model.dropout']} |"
        )
    lines += ["", "| paired difference over the repetitions | mean ± 95 % |", "|---|---|"]
    lines += [f"| {name} | {s['mean']:+.4f} ± {s['half_width']:.4f} |" for name, s in found["differences"].items()]
    lines += ["", "Exact filter on the same sessions: macro-F1 " + f"{reference.get('ceiling_macro_f1', 0.0):.4f}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = parser_for("Tuning against random search and the paper's values.", "", "two repetitions, few trials")
    parser.set_defaults(output=Path("runs/tuning-gain"))
    options = parser.parse_args()
    folder, sizes = options.output, QUICK if options.quick else FULL
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gain-", ignore_cleanup_errors=True) as name:
        os.environ["RAY_TMPDIR"] = name
        with connected(ClusterSettings(address="local", cpus=1)):
            comparison = Comparison(folder, sizes)
            rows = [comparison.run(arm, repetition) for repetition in range(sizes["repetitions"]) for arm in ARMS]
    found = summary(rows)
    reference = read_manifest(folder / "data").splits["validation"].reference_scores
    command = " ".join(["python", "benchmarks/tuning_gain.py", *sys.argv[1:]])
    text = markdown(rows, found, command, reference)
    with (folder / "tuning_gain.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "tuning_gain.md").write_text(text)
    machine = environment(ray=ray.__version__, optuna=optuna.__version__)
    record = {"quick": options.quick, "environment": machine, "sizes": sizes, "rows": rows, **found}
    write_record(folder / "tuning_gain.json", record)
    print(text)


if __name__ == "__main__":
    main()
