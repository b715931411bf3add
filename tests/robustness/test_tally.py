from __future__ import annotations

import numpy as np
import pytest
import torch

from edu_emotionnet.zoo import build
from emolab.robustness.assembly import clean_batch
from emolab.robustness.metrics import CALIBRATION_BINS
from emolab.robustness.suites import expand, parse_suite
from emolab.robustness.tally import evaluate_sessions, joined

SIZES = {"audio": 5, "visual": 7, "text": 3}
SUITE = {"name": "s", "seeds": [0, 1], "sweeps": [{"corruption": "step_missing", "levels": [0.3, 0.6]}]}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build("edu_emotionnet", dimensions=SIZES, classes=4).eval()


@pytest.fixture(scope="module")
def cells():
    return expand(parse_suite(SUITE), tuple(SIZES))


def test_counts_are_those_of_a_direct_evaluation(session, model, cells):
    sessions = [session(number, 6 + number) for number in range(5)]
    tally = evaluate_sessions(model, [sessions], cells)
    batch = clean_batch(sessions)
    with torch.inference_mode():
        predictions = model(batch)
    assert next(cell.id for cell in tally.cells) == "clean" and tally.engine == "factorised"
    probabilities, labels = [], []
    for row, one in enumerate(sessions):
        expected = np.zeros((4, 4), int)
        for step, label in enumerate(one.labels):
            if label >= 0:
                p = predictions.log_probabilities[row, step].exp().numpy()
                expected[label, p.argmax()] += 1
                probabilities.append(p)
                labels.append(label)
        np.testing.assert_array_equal(tally.confusion[0, row], expected)
        weights = predictions.confidence[row, batch.labelled[row]].sum(0)
        np.testing.assert_allclose(tally.weight[0, row], weights, rtol=1e-5)
    p, labels = np.array(probabilities), np.array(labels)
    assert tally.squared_error[0].sum() == pytest.approx(((p - np.eye(4)[labels]) ** 2).sum(), rel=1e-5)
    bins = np.ceil(p.max(1) * CALIBRATION_BINS).astype(int) - 1
    for place, (count, right, top) in enumerate(tally.calibration[0].sum(0)):
        inside = bins == place
        assert (count, right) == (inside.sum(), (p.argmax(1) == labels)[inside].sum())
        assert top == pytest.approx(p.max(1)[inside].sum(), abs=1e-5)


def test_grouping_order_and_sharding_of_sessions_do_not_matter(session, model, cells):
    sessions = [session(number, 4 + 3 * number) for number in range(6)]
    whole = evaluate_sessions(model, [sessions], cells)
    order = [4, 1, 5, 0, 3, 2]
    mixed = [sessions[i] for i in order]
    parts = [evaluate_sessions(model, [mixed[:2], mixed[2:3]], cells), evaluate_sessions(model, [mixed[3:]], cells)]
    again = joined(parts)
    assert again.session_ids == tuple(sessions[i].session_id for i in order)
    np.testing.assert_array_equal(again.confusion, whole.confusion[:, order])
    np.testing.assert_allclose(again.squared_error, whole.squared_error[:, order], rtol=1e-4)


def test_mistakes(session, model, cells):
    with pytest.raises(ValueError, match="no sessions"):
        evaluate_sessions(model, [], cells)
    one, two = (evaluate_sessions(model, [[session(0)]], some) for some in (cells, cells[:1]))
    with pytest.raises(ValueError, match="different cells"):
        joined([one, two])
