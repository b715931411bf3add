"""Small copies of published corpora, laid out as their authors document the files, oddities included.

``FIXTURES`` writes each into a folder and returns the options that read it; the values say where they came from.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

SEED = 7

# ---- CMU-MOSEI -----------------------------------------------------------------------------------------------

MOSEI_WIDTHS = {"COVAREP": 74, "VisualFacet42": 35, "VisualOpenFace2": 713, "TimestampedWordVectors": 300}
_MOSEI_ROOTS = {
    "COVAREP": "COVAREP",
    "VisualFacet42": "FACET 4.2",
    "VisualOpenFace2": "OpenFace_2",
    "TimestampedWordVectors": "glove_vectors",
    "Labels": "All Labels",
}
_METADATA = (
    "root name", "computational sequence description", "dimension names", "computational sequence version",
    "alignment compatible", "dataset name", "dataset version", "creator", "contact", "featureset bib citation",
    "dataset bib citation", "md5", "uuid",
)  # fmt: skip

MOSEI_LABELS: dict[str, list[tuple[tuple[float, float], tuple[float, ...]]]] = {
    # sentiment, happy, sad, anger, surprise, disgust, fear; segments overlap and are not in the order of time
    "-hyphen_video": [
        ((6.0, 9.0), (-1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0)),
        ((0.0, 4.0), (2.0, 2 / 3, 0.0, 1 / 3, 0.0, 0.0, 0.0)),
        ((3.0, 6.0), (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)),
    ],
    "0_clip": [((1.0, 2.0), (-3.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)), ((2.0, 5.0), (1.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0))],
    "zebra": [((0.5, 2.5), (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1 / 3))],
}


def write_csd(path: Path, root: str, videos: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """A computational sequence as the SDK's ``deploy`` writes it."""
    with h5py.File(path, "w") as file:
        data = file.create_group(root).create_group("data")
        for video, (features, intervals) in videos.items():
            group = data.create_group(video)
            for name, values in (("features", features), ("intervals", intervals)):
                group.create_dataset(name, data=values, compression="gzip")
        metadata = file[root].create_group("metadata")  # pyright: ignore[reportAttributeAccessIssue]
        for key in _METADATA:
            text = metadata.create_dataset(key, (1,), dtype=h5py.string_dtype())
            text[0] = json.dumps(root if key == "root name" else f"about {key}")


def mosei_sequence(name: str, video: str) -> tuple[np.ndarray, np.ndarray]:
    """Half-second intervals from 0 to 10 s, shuffled; the features of one are its start, plus the column / 1024."""
    starts = np.arange(20) / 2
    generator = np.random.default_rng([SEED, len(name), len(video)])
    order = generator.permutation(len(starts))
    features = starts[:, None] + np.arange(MOSEI_WIDTHS[name]) / 1024
    if name == "COVAREP":
        features[4, 0], features[5, 0], features[6] = -np.inf, np.nan, -np.inf
    intervals = np.stack([starts, starts + 0.5], axis=1)
    if name == "TimestampedWordVectors":
        features, intervals, order = features[:8], intervals[:8], order[order < 8]  # nothing is said after 4 s
    return features[order].astype(np.float32), intervals[order]


def write_mosei(folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True)
    for name in MOSEI_WIDTHS:
        videos = {
            video: mosei_sequence(name, video)
            for video in [*MOSEI_LABELS, "unlabelled"]
            if not (video == "zebra" and name.startswith("Visual"))
        }
        write_csd(folder / f"CMU_MOSEI_{name}.csd", _MOSEI_ROOTS[name], videos)
    labels = {
        video: (np.array([row for _, row in rows], dtype=np.float32), np.array([span for span, _ in rows]))
        for video, rows in MOSEI_LABELS.items()
    }
    write_csd(folder / "CMU_MOSEI_Labels.csd", _MOSEI_ROOTS["Labels"], labels)
    words = np.array([[b"sp"], [b"hello"]])
    write_csd(folder / "CMU_MOSEI_TimestampedWords.csd", "words", {"zebra": (words, np.array([[0, 1], [1, 2]]))})
    return {"source": str(folder)}


# ---- MMSA ----------------------------------------------------------------------------------------------------

MMSA_LENGTHS = {"text": 50, "audio": 60, "vision": 40}
MMSA_WIDTHS = {"text": 16, "audio": 5, "vision": 20}
MMSA_IDS = {
    "train": [("-hyphen", 10), ("-hyphen", 2), ("zebra", 1)],
    "valid": [("under_score", 4)],
    "test": [("video_9", 1), ("video_9", 2)],
}
MMSA_SCORES = {"train": [-1.8, 0.0, 2.4], "valid": [0.6], "test": [-0.2, 3.0]}
_NAMES = {-1: "Negative", 0: "Neutral", 1: "Positive"}


def mmsa_split(split: str) -> dict[str, Any]:
    """One split as MMSA's unaligned files have it; frame f of utterance n has the values n + 1 + f/64."""
    utterances = MMSA_IDS[split]
    lengths = {field: [4 + 3 * n for n in range(len(utterances))] for field in MMSA_LENGTHS}
    fields: dict[str, Any] = {}
    for field, length in MMSA_LENGTHS.items():
        values = np.zeros((len(utterances), length, MMSA_WIDTHS[field]), dtype=np.float32)
        for n, used in enumerate(lengths[field]):
            values[n, :used] = (n + 1 + np.arange(used) / 64)[:, None]
        fields[field] = values
    fields["audio"][0, 1, 0] = -np.inf  # the logarithm of silence
    bert = np.zeros((len(utterances), 3, MMSA_LENGTHS["text"]), dtype=np.int64)
    for n, used in enumerate(lengths["text"]):
        bert[n, 0, :used], bert[n, 1, :used] = 101 + np.arange(used), 1
        fields["text"][n, used:] = 99.0  # an encoder gives padding a vector too
    scores = np.array(MMSA_SCORES[split], dtype=np.float32)
    return fields | {
        "raw_text": np.array([f"SAID IN {video}" for video, _ in utterances]),
        "id": np.array([f"{video}$_${clip}" for video, clip in utterances]),
        "text_bert": bert,
        "audio_lengths": lengths["audio"],
        "vision_lengths": np.array(lengths["vision"]),
        "annotations": [_NAMES[int(np.sign(score))] for score in scores],
        "classification_labels": np.sign(scores) + 1,
        "regression_labels": scores,
    }


def write_mmsa(folder: Path, protocol: int = 4) -> dict[str, Any]:
    folder.mkdir(parents=True)
    content = {split: mmsa_split(split) for split in MMSA_IDS}
    (folder / "unaligned_50.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    return {"source": str(folder)}


FIXTURES: dict[str, Callable[[Path], dict[str, Any]]] = {"mosei": write_mosei, "mmsa": write_mmsa}
