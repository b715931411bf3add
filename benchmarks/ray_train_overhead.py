"""Ray Train against torchrun: the same loop, the same two workers, the same batches; throughput and loss curve.

    python benchmarks/ray_train_overhead.py            # about two minutes
    python benchmarks/ray_train_overhead.py --quick    # a minute, says nothing certain

Both sides run gloo on the CPU with one thread per worker, interleaved A B B A. Start-up is left out on both sides:
throughput is that of every epoch after the first, as each side's own loop reports it. The loss curves must agree
before a ratio is written. Writes benchmarks/results/ray_train_overhead.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import ray
import torch
import torch.distributed
from measurement import Parser, environment, write_record
from torch.nn.parallel import DistributedDataParallel

from emolab.checkpoint import CheckpointFolder
from emolab.cluster import ClusterSettings, connected
from emolab.sessions.preparation import PrepareSettings, prepare
from emolab.training.data import load_training_data
from emolab.training.distributed import fit_distributed
from emolab.training.loop import fit, run_to_end
from emolab.training.processes import Workers
from emolab.training.recipe import TrainSettings

WORKERS = 2
CURVE_TOLERANCE = 1e-6


def settings_for(data: Path, epochs: int) -> TrainSettings:
    """A run whose epochs are long enough to be timed."""
    training = {"epochs": epochs, "patience": epochs, "batch_size": 32, "learning_rate": 1e-3, "warmup_epochs": 1}
    return TrainSettings.model_validate(
        {
            "data": str(data),
            "model": {"d_model": 64, "layers": 2, "heads": 4, "dropout": 0.1},
            "training": training,
            "workers": {"count": WORKERS},
        }
    )


def torchrun_worker(data: Path, folder: Path, epochs: int) -> None:
    """What torchrun starts: the library's loop with plain DDP and no Ray."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    settings = settings_for(data, epochs)
    sessions = load_training_data(data)
    torch.manual_seed(settings.training.seed)
    model = settings.model.build(sessions.manifest)
    workers = Workers(rank=torch.distributed.get_rank(), count=torch.distributed.get_world_size())
    checkpoints = CheckpointFolder(folder / "checkpoints")
    wrapped = DistributedDataParallel(model)
    run_to_end(
        fit(model, wrapped, sessions, settings.training, workers=workers, checkpoints=checkpoints), lambda _: None
    )
    torch.distributed.destroy_process_group()


def with_torchrun(data: Path, folder: Path, epochs: int) -> list[dict[str, float]]:
    """Reports of the epochs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}"]
    arguments = [__file__, "--worker", str(data), str(folder), str(epochs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *arguments], check=True, env=environment, capture_output=True)
    return reports_in(folder)


def with_ray_train(data: Path, folder: Path, epochs: int) -> list[dict[str, float]]:
    """Reports of the epochs."""
    fit_distributed(settings_for(data, epochs), folder)
    return reports_in(folder)


def reports_in(folder: Path) -> list[dict[str, float]]:
    """What the loop wrote into its newest checkpoint."""
    newest = CheckpointFolder(folder / "checkpoints").newest()
    assert newest is not None
    return newest.state["reports"]


def throughput(reports: list[dict[str, float]]) -> list[float]:
    """Sessions per second of each epoch after the first."""
    return [report["sessions_per_second"] for report in reports[1:]]


def largest_difference(one: list[dict[str, float]], two: list[dict[str, float]]) -> float:
    """Largest relative difference between two loss curves."""
    pairs = zip(one, two, strict=True)
    return max(abs(a["train_loss"] - b["train_loss"]) / abs(b["train_loss"]) for a, b in pairs)


def measure(data: Path, root: Path, *, rounds: int, epochs: int) -> dict[str, object]:
    """Both sides, interleaved; the parity of the curves first."""
    sides = {"ray_train": with_ray_train, "torchrun": with_torchrun}
    order = ["ray_train", "torchrun", "torchrun", "ray_train"] * rounds
    found: dict[str, list[float]] = {"ray_train": [], "torchrun": []}
    curves: dict[str, list[dict[str, float]]] = {}
    for number, side in enumerate(order):
        reports = sides[side](data, root / f"{number}-{side}", epochs)
        curves.setdefault(side, reports)
        found[side] += throughput(reports)
        if len(curves) == 2 and largest_difference(curves["ray_train"], curves["torchrun"]) > CURVE_TOLERANCE:
            raise SystemExit("the loss curves differ: nothing was compared")
    medians = {side: statistics.median(values) for side, values in found.items()}
    return {
        "sessions_per_second": found,
        "median": medians,
        "ratio": medians["ray_train"] / medians["torchrun"],
        "ratio_of_the_best": max(found["ray_train"]) / max(found["torchrun"]),
        "largest_relative_difference_of_the_loss_curves": largest_difference(curves["ray_train"], curves["torchrun"]),
        "epochs": epochs,
        "workers": WORKERS,
    }


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "ray_train_overhead.json")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        data, folder, epochs = options.worker
        torchrun_worker(Path(data), Path(folder), int(epochs))
        return
    with tempfile.TemporaryDirectory() as name, connected(ClusterSettings(address="local", cpus=WORKERS)):
        root = Path(name)
        plan = PrepareSettings(output=str(root / "data"), options={"sessions": 200 if options.quick else 400})
        prepare(plan.build(), root / "data", seed=0, shard_sessions=256)
        results = measure(root / "data", root, rounds=1, epochs=3 if options.quick else 6)
    write_record(options.output, {"environment": environment(ray=ray.__version__), **results})
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
