"""jobs/export.py: the streaming step of a trained model as ONNX, in float32 and with int8 weights, compared.

The folder gets ``model.onnx``, ``model-int8.onnx`` (weights of the matrix products as int8, ONNX Runtime's dynamic
quantisation) and ``model.json``: inputs, outputs, classes, first state, features that a session under way does not have
(``looks_ahead``), and how far each file's answers are from the model's on the same sessions. Those are validation
sessions where a data set is given, else noise with the training split's mean and deviation; the record says which.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor

from edu_emotionnet.export import OPSET, StreamingStep, export_step, graph_names
from edu_emotionnet.network import EduEmotionNet
from emolab.names import UserError
from emolab.serving.models import LoadedModel, find_model, load
from emolab.serving.settings import ExportSettings
from emolab.sessions.manifest import Manifest, read_manifest
from emolab.sessions.selection import load_selection_split

SESSIONS, NOISE_STEPS = 20, 60
"""Compared: at most so many sessions, and steps of a session of noise."""

StepValues = dict[str, Tensor | None]


def export(settings: ExportSettings, *, dry_run: bool, report: Callable[[str], None]) -> dict[str, Any] | None:
    """Write the folder; returns what ``model.json`` says.

    Raises:
        UserError: no such model, one that has no streaming form or cannot follow live sessions, data that does not
            fit, or a folder that exists.
    """
    kept = find_model(settings.model, output=Path(settings.output), tracking=settings.tracking)
    loaded, target = load(kept), Path(settings.to)
    if not isinstance(loaded.model, EduEmotionNet):
        raise UserError(f"model {kept.name!r} has no streaming form to export: edu_emotionnet and its ablations have")
    loaded.live(settings.window)  # a device follows sessions under way: what cannot do that here cannot do it there
    if target.exists():
        raise UserError(f"{target} exists already: choose another --to")
    sessions, compared = _sessions(settings, loaded)
    report(f"{kept.name} ({kept.digest[:16]}), window {settings.window}, opset {OPSET}, into {target}")
    for line in loaded.warnings():
        report(line)
    if dry_run:
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
        folder = Path(name) / "exported"
        folder.mkdir()
        record: dict[str, Any] = _write(folder, loaded, loaded.model, settings.window, sessions)
        record["compared"] = compared
        record["looks_ahead"] = loaded.looks_ahead
        (folder / "model.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        shutil.move(folder, target)
    files: dict[str, dict[str, float]] = record["files"]
    for file, facts in files.items():
        report(
            f"{file}: {facts['bytes'] / 1e6:.1f} MB, same class at {facts['same_class']:.2%} of {facts['steps']} "
            f"steps, probabilities at most {facts['largest_difference']:.1e} apart ({compared})"
        )
    return record


def _write(
    folder: Path, loaded: LoadedModel, model: EduEmotionNet, window: int, sessions: list[list[StepValues]]
) -> dict[str, Any]:
    plain, small = folder / "model.onnx", folder / "model-int8.onnx"
    step = export_step(model, plain, dimensions=loaded.dimensions, window=window)
    graph = onnx.load(plain)
    graph.graph.ClearField("value_info")  # shapes of tensors that the quantiser transposes: it would call them wrong
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the quantiser advises pre-processing, which changes nothing here
    try:
        quantize_dynamic(graph, small, weight_type=QuantType.QInt8)
    finally:
        root.setLevel(level)
    inputs, outputs = graph_names(step, tuple(loaded.dimensions))
    return {
        "model": loaded.kept.name,
        "weights": loaded.kept.digest,
        "run": loaded.kept.run_id,
        "window": window,
        "opset": OPSET,
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxruntime")},
        "classes": list(loaded.classes),
        "dimensions": dict(loaded.dimensions),
        "inputs": inputs,
        "outputs": outputs,
        "shapes": _shapes(plain),
        "first_state": "step 0, belief 1 / classes, every memory 0; feed outputs back, count step up",
        "files": {
            file.name: {"bytes": file.stat().st_size} | agreement(file, step, loaded, window, sessions)
            for file in (plain, small)
        },
    }


def agreement(
    file: Path, step: StreamingStep, loaded: LoadedModel, window: int, sessions: list[list[StepValues]]
) -> dict[str, float]:
    """How far a graph's answers are from the streaming model's, over all steps of the sessions."""
    expected, got = [], []
    live = loaded.live(window)
    for session in sessions:
        stream = live.open()
        expected += [stream.step(values).probabilities.numpy() for values in session]
        got += list(_replay(file, step, loaded, session))
    one, other = np.stack(expected), np.stack(got)
    return {
        "steps": len(one),
        "largest_difference": float(np.abs(one - other).max()),
        "mean_difference": float(np.abs(one - other).mean()),
        "same_class": float((one.argmax(1) == other.argmax(1)).mean()),
    }


def _replay(
    file: Path, step: StreamingStep, loaded: LoadedModel, session: list[StepValues]
) -> Iterator[NDArray[np.float32]]:
    """(K,) probabilities of every step, by ONNX Runtime on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    graph = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    inputs, taken = graph_names(step, tuple(loaded.dimensions))[0], {entry.name for entry in graph.get_inputs()}
    belief, memory = step.first_state()
    state: list[Any] = [belief.numpy(), *(part.numpy() for part in memory)]
    for number, values in enumerate(session):
        given = [values.get(name) for name in loaded.dimensions]
        rows = [
            torch.zeros(size).numpy() if value is None else value.numpy()
            for value, size in zip(given, loaded.dimensions.values(), strict=True)
        ]
        present = np.array([value is not None for value in given])
        arguments = dict(zip(inputs, [np.array(number), state[0], present, *rows, *state[1:]], strict=True))
        said = graph.run(None, {name: value for name, value in arguments.items() if name in taken})
        state = [said[0], *said[2:]]
        yield np.asarray(said[0])[0]


def _shapes(file: Path) -> dict[str, Any]:
    graph = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return {entry.name: {"shape": entry.shape, "type": entry.type} for entry in graph.get_inputs()}


def _sessions(settings: ExportSettings, loaded: LoadedModel) -> tuple[list[list[StepValues]], str]:
    if settings.data is None:
        return [_noise(loaded, number) for number in range(SESSIONS // 4)], "noise with the training statistics"
    folder = Path(settings.data)
    manifest = read_manifest(folder)
    loaded.check_fit(manifest, folder)
    store = load_selection_split(folder, manifest, "validation")
    if not len(store):
        raise UserError(f"{folder} has no validation sessions to compare on")
    chosen = [store.session(index, manifest) for index in range(min(SESSIONS, len(store)))]
    steps = [
        [
            {
                name: torch.from_numpy(values[t].copy()) if session.present[name][t] else None
                for name, values in session.features.items()
            }
            for t in range(session.num_steps)
        ]
        for session in chosen
    ]
    return steps, f"{len(chosen)} validation sessions of {manifest.corpus}"


def _noise(loaded: LoadedModel, number: int) -> list[StepValues]:
    statistics = Manifest.model_validate(loaded.dataset).statistics
    generator = torch.Generator().manual_seed(number)
    return [
        {
            name: torch.tensor(statistics.mean[name])
            + torch.tensor(statistics.std[name]) * torch.randn(size, generator=generator)
            for name, size in loaded.dimensions.items()
        }
        for _ in range(NOISE_STEPS)
    ]
