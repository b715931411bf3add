"""The exported step is the streaming step, in another runtime; the int8 variant is close."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tests.model.random_batches import DIMENSIONS, random_batch, small_model
from tests.model.test_streaming import at

from edu_emotionnet.export import OPSET, export_step, graph_names
from edu_emotionnet.streaming import streaming

WITHIN = 1e-5


@pytest.mark.parametrize(
    ("name", "options", "window"),
    [
        ("edu_emotionnet", {"layers": 2}, 5),
        ("edu_emotionnet", {"alignment": "window:2", "confidence": "softmax"}, 4),
        ("edu_emotionnet", {"alignment": "step"}, 3),
        ("edu_emotionnet-cmaa", {}, 1),
        ("edu_emotionnet-mie", {}, 3),
        ("edu_emotionnet-tfl", {}, 3),
    ],
)
def test_the_graph_answers_as_the_streaming_model(
    name: str, options: dict[str, object], window: int, tmp_path: Path
) -> None:
    model = small_model(name, dtype=torch.float32, **options)
    file = tmp_path / "model.onnx"
    step = export_step(model, file, dimensions=DIMENSIONS, window=window)
    onnx.checker.check_model(str(file), full_check=True)
    assert [entry.version for entry in onnx.load(file).opset_import if not entry.domain] == [OPSET]
    graph = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    inputs, outputs = graph_names(step, tuple(DIMENSIONS))
    assert [entry.name for entry in graph.get_outputs()] == outputs
    session = streaming(name, model, dimensions=DIMENSIONS, window=window).open()
    batch = random_batch(seed=1, sessions=1, longest=12, dtype=torch.float32)
    belief, memory = step.first_state()
    state = [belief.numpy(), *(part.numpy() for part in memory)]
    taken = {entry.name for entry in graph.get_inputs()}
    for number in range(12):
        features = at(batch, number)
        present = np.array([features[m] is not None for m in DIMENSIONS])
        values = [batch.features[m][0, number].numpy() for m in DIMENSIONS]
        given = dict(zip(inputs, [np.array(number), state[0], present, *values, *state[1:]], strict=True))
        probabilities, confidence, *memory = graph.run(None, {key: v for key, v in given.items() if key in taken})
        state = [probabilities, *memory]
        expected = session.step(features)
        np.testing.assert_allclose(probabilities[0], expected.probabilities.numpy(), atol=WITHIN)
        np.testing.assert_allclose(confidence, expected.confidence.numpy(), atol=WITHIN)


def test_a_window_below_one_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1 step"):
        export_step(small_model("edu_emotionnet"), tmp_path / "x.onnx", dimensions=DIMENSIONS, window=0)
    assert not list(tmp_path.iterdir())
