"""What more sessions, trials and cells cost: seconds, memory and bytes of everything that grows with them.

    python benchmarks/scale.py            # about six minutes
    python benchmarks/scale.py --quick    # about a minute, smaller sizes

Each thing is measured at several sizes, four times apart, in a fresh process each, so that its peak memory is its own.
The record holds the measurements and, for each quantity, the exponent of its growth (the slope of a straight line
through the logarithms): 1 is proportional, 2 is quadratic. docs/scale.md says what follows. Nothing is compared here,
so nothing is interleaved: on a machine that does other work the seconds are upper bounds.

- `sessions`: EduSim sessions prepared by Ray Data on two CPUs, the manifest read, the training splits read, one epoch;
- `trials`: a study with TPE and the median rule, five epochs a trial and nothing trained, in SQLite; the last 20 draws;
  the trials written to an SQLite tracker;
- `cells`: the results of a sweep of one model over 200 sessions, written as units and joined again.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # a loopback cluster of this process alone
os.environ["OMP_NUM_THREADS"] = "1"

from measurement import arguments, environment, write_record

SIZES = {"sessions": (250, 1000, 4000), "trials": (60, 240, 960), "cells": (64, 256, 1024)}
QUICK_SIZES = {"sessions": (100, 400), "trials": (30, 120), "cells": (32, 128)}


def sessions(size: int, folder: Path) -> dict[str, float]:
    from emolab.cluster import ClusterSettings, connected
    from emolab.corpora.edusim import EduSim
    from emolab.sessions.manifest import FILE_NAME, read_manifest
    from emolab.sessions.preparation import prepare
    from emolab.training.recipe import TrainSettings
    from emolab.training.train import epochs_in_process

    data = folder / "data"
    with connected(ClusterSettings(address="local", cpus=2)):
        prepare(EduSim(sessions=10, speakers=5), folder / "warm", seed=0, shard_sessions=256, report=lambda _: None)
        prepared = timed(
            lambda: prepare(EduSim(sessions=size), data, seed=0, shard_sessions=256, report=lambda _: None)
        )
    reading = timed(lambda: read_manifest(data))
    settings = TrainSettings.model_validate(
        {"data": str(data), "model": {"d_model": 32, "layers": 1, "heads": 4}, "training": {"epochs": 2}}
    )
    epochs = epochs_in_process(settings)
    first = timed(lambda: next(epochs))
    second = timed(lambda: next(epochs))
    return {
        "prepare_seconds": prepared,
        "manifest_bytes": float((data / FILE_NAME).stat().st_size),
        "manifest_read_seconds": reading,
        "shard_bytes": float(sum(path.stat().st_size for path in data.rglob("*.parquet"))),
        "read_and_first_epoch_seconds": first,
        "epoch_seconds": second,
        "peak_bytes": peak_memory(),
    }


def trials(size: int, folder: Path) -> dict[str, float]:
    from emolab.tracking.runs import open_tracker
    from emolab.training.recipe import TrainSettings
    from emolab.tuning.methods import make_pruner, make_sampler
    from emolab.tuning.recorder import TrialRecorder
    from emolab.tuning.space import read_space
    from emolab.tuning.study import Study

    space = read_space(Path(__file__).parent.parent / "search_spaces" / "paper.yaml", TrainSettings())
    pruner = make_pruner("median", grace=1, factor=3, epochs=5)
    study = Study(folder / "study.db", "scale", space=space, pruner=pruner)
    study.use_sampler(make_sampler("tpe", seed=0, space=space, earlier=study.history()))
    seconds = []
    for number in range(size):

        def one(number: int = number) -> None:
            draw = study.ask()
            value = math.sin(number) + sum(float(v) for v in draw.parameters.values() if isinstance(v, float))
            for epoch in range(1, 6):
                study.report(draw.number, epoch, value + epoch / 10)
                study.should_prune(draw.number)
            study.tell(draw.number, "COMPLETE", [value], epochs=5)

        seconds.append(timed(one))
    flushed = timed(study.flush)
    tracker = open_tracker(enabled=True, uri=None, experiment="scale", output=folder)
    parent = tracker.start("search")
    recorder = TrialRecorder(tracker, parent.run_id)

    def record() -> None:
        for trial in study.records():
            recorder.began(trial.number, trial.parameters)
            recorder.epochs(trial.number, [{"epoch": e, "validation_macro_f1": 0.5} for e in range(1, 6)])
            recorder.ended(trial)
        recorder.close()

    recorded = timed(record)
    return {
        "seconds_per_trial_at_the_end": sum(seconds[-20:]) / 20,
        "driver_seconds": sum(seconds) + flushed,
        "study_bytes": float((folder / "study.db").stat().st_size),
        "reopen_seconds": timed(lambda: Study(folder / "study.db", "scale", space=space)),
        "tracker_seconds": recorded,
        "tracker_bytes": float((folder / "mlflow.db").stat().st_size),
        "peak_bytes": peak_memory(),
    }


def cells(size: int, folder: Path) -> dict[str, float]:
    import numpy as np

    from emolab.robustness.metrics import CALIBRATION_BINS
    from emolab.robustness.records import read_tally, write_tally
    from emolab.robustness.suites import expand, parse_suite
    from emolab.robustness.sweep_plan import CELLS_PER_UNIT, SESSIONS_PER_UNIT
    from emolab.robustness.tally import Tally, joined

    seeds = list(range(size))
    everything = expand(
        parse_suite({"name": "s", "seeds": seeds, "sweeps": [{"corruption": "frame_missing", "levels": [0.5]}]}),
        ("audio", "visual", "text"),
    )[:size]
    random, total = np.random.default_rng(0), 200

    def unit(start: int, first: int) -> tuple[Path, tuple[Any, ...], int]:
        some, count = everything[start : start + CELLS_PER_UNIT], min(SESSIONS_PER_UNIT, total - first)
        shape = (len(some), count)
        tally = Tally(
            cells=tuple(some),
            session_ids=tuple(f"session-{first + i}" for i in range(count)),
            speaker_ids=("p",) * count,
            confusion=random.integers(0, 9, (*shape, 4, 4)),
            calibration=random.random((*shape, CALIBRATION_BINS, 3)),
            squared_error=random.random(shape),
            weight=random.random((*shape, 3)),
            engine="factorised",
        )
        path = folder / f"{start}-{first}.parquet"
        write_tally(path, tally)
        return path, tuple(some), count

    places = [(s, f) for s in range(0, size, CELLS_PER_UNIT) for f in range(0, total, SESSIONS_PER_UNIT)]
    started = time.perf_counter()
    units = [unit(*place) for place in places]
    written = time.perf_counter() - started
    before = peak_memory()
    parts: dict[tuple[Any, ...], list[Tally]] = {}

    def read() -> None:
        for path, some, count in units:
            parts.setdefault(some, []).append(read_tally(path, some, sessions=count))
        for some, tallies in parts.items():
            parts[some] = [joined(tallies)]

    return {
        "write_seconds": written,
        "unit_bytes": float(sum(path.stat().st_size for path, _, _ in units)),
        "read_seconds": timed(read),
        "read_peak_bytes": peak_memory() - before,
        "peak_bytes": peak_memory(),
    }


FAMILIES: Mapping[str, Callable[[int, Path], dict[str, float]]] = {
    "sessions": sessions,
    "trials": trials,
    "cells": cells,
}


def timed(work: Callable[[], object]) -> float:
    """Wall seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peak_memory() -> float:
    """Largest resident memory of this process so far, in bytes; Linux."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024.0 * int(line.split()[1])


def exponent(points: Mapping[int, float]) -> float | None:
    """Slope of log(quantity) over log(size), by least squares; None where a quantity is not positive."""
    if any(value <= 0 for value in points.values()):
        return None
    x, y = [math.log(size) for size in points], [math.log(value) for value in points.values()]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def in_a_process(family: str, size: int) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", family, str(size)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{family} {size} failed: {result.stderr[-1500:]}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        with tempfile.TemporaryDirectory(prefix="scale-") as folder:
            os.environ.setdefault("RAY_TMPDIR", folder)
            print(json.dumps(FAMILIES[sys.argv[2]](int(sys.argv[3]), Path(folder) / "work")))
        return
    options = arguments(__doc__ or "", "scale", "smaller sizes")
    record: dict[str, Any] = {"environment": environment()}
    for family, sizes in (QUICK_SIZES if options.quick else SIZES).items():
        measured = {}
        for size in sizes:
            measured[size] = in_a_process(family, size)
            print(f"{family} {size}: {measured[size]}", flush=True)
        names = next(iter(measured.values()))
        growth = {name: exponent({size: values[name] for size, values in measured.items()}) for name in names}
        record[family] = {"measured": measured, "exponents": growth}
        print(f"{family}: exponents {growth}", flush=True)
    write_record(options.output, record)


if __name__ == "__main__":
    main()
