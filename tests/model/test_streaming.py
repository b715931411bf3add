"""Step by step is the same as all at once, for any length, gaps and window."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.model.random_batches import DIMENSIONS, NAMES, random_batch, small_model
from torch import Tensor

from edu_emotionnet import zoo
from edu_emotionnet.batch import Predictions, SessionBatch
from edu_emotionnet.conventions import FeatureStatistics
from edu_emotionnet.encoder import ModalityEncoder, merge_heads, sinusoidal_positions, split_heads
from edu_emotionnet.network import EduEmotionNet, EduEmotionNetConfig
from edu_emotionnet.streaming import SessionStream, streaming
from edu_emotionnet.streaming_network import FIRST_CAPACITY

NETWORKS = [name for name in NAMES if name.startswith("edu_emotionnet")]
RECOMPUTED = [name for name in NAMES if zoo.entry(name).causal and name not in NETWORKS]
WITHIN = 1e-6


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, span: int) -> Tensor:
    """Multi-head attention over the last `span` steps, written with an explicit mask."""
    steps = torch.arange(q.shape[1])
    age = steps[:, None] - steps[None, :]
    q, k, v = (split_heads(part, heads) for part in (q, k, v))
    return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=(age >= 0) & (age < span)))


def banded_encoder(encoder: ModalityEncoder, features: Tensor, present: Tensor, span: int) -> Tensor:
    projected = encoder.project(encoder.standardise(features.masked_fill(~present[..., None], 0.0)))
    h = torch.where(present[..., None], projected, encoder.absent)
    h = h + sinusoidal_positions(h.shape[1], h.shape[2], h.device).to(h.dtype)
    for block in encoder.blocks:
        q, k, v = block.query_key_value(block.attention_norm(h)).chunk(3, dim=-1)
        h = h + block.output(attention(q, k, v, block.heads, span))
        h = h + block.feedforward(block.feedforward_norm(h))
    return encoder.norm(h)


def banded(model: EduEmotionNet, batch: SessionBatch, window: int) -> Predictions:
    """The definition of a window: the offline network with a band for a mask in the encoders and in equation 4."""
    h = [banded_encoder(model.encoders[m], batch.features[m], batch.present[m], window) for m in model.modalities]
    g = h
    if model.cmaa is not None and model.config.alignment == "step":
        g = model.cmaa(h)
    elif model.cmaa is not None:
        alignment = model.config.alignment
        span = window if alignment == "history" else min(window, int(alignment.removeprefix("window:")))
        cmaa = model.cmaa
        g = []
        for i in range(len(h)):
            others = [j for j in range(len(h)) if j != i] or [i]
            views = [
                attention(cmaa.query(h[i]), cmaa.key(h[j]), cmaa.value(h[j]), model.config.heads, span) for j in others
            ]
            g.append(torch.stack(views).mean(0))
    weights = model.mie(h, g) if model.mie is not None else h[0].new_full((*h[0].shape[:2], len(h)), 1 / len(h))
    z = (weights[..., None] * torch.stack(g, dim=2)).sum(2)
    return Predictions(log_probabilities=model.tfl(z), confidence=weights)


def at(batch: SessionBatch, step: int) -> dict[str, Tensor | None]:
    return {m: batch.features[m][0, step] if batch.present[m][0, step] else None for m in batch.modalities}


def agree(session: SessionStream, batch: SessionBatch, offline: Predictions) -> None:
    for step in range(int(batch.lengths[0])):
        said = session.step(at(batch, step))
        expected = offline.log_probabilities[0, step].exp()
        torch.testing.assert_close(said.probabilities, expected, rtol=0.0, atol=WITHIN)
        assert (said.confidence is None) == (offline.confidence is None)
        if said.confidence is not None and offline.confidence is not None:
            torch.testing.assert_close(said.confidence, offline.confidence[0, step], rtol=0.0, atol=WITHIN)
    assert session.steps == int(batch.lengths[0])


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NETWORKS),
    options=st.fixed_dictionaries(
        {
            "alignment": st.sampled_from(["history", "step", "window:1", "window:3", "window:9"]),
            "confidence": st.sampled_from(["sigmoid", "softmax"]),
            "layers": st.integers(1, 3),
        }
    ),
    modalities=st.sampled_from([tuple(DIMENSIONS), ("audio", "text"), ("visual",)]),
    steps=st.one_of(st.integers(1, 20), st.integers(FIRST_CAPACITY - 1, FIRST_CAPACITY * 2 + 3)),
    window=st.one_of(st.none(), st.integers(1, 12), st.integers(FIRST_CAPACITY - 1, FIRST_CAPACITY + 9)),
    silent=st.sets(st.sampled_from(list(DIMENSIONS))),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10_000),
)
def test_streaming_equals_the_forward_pass(
    name: str,
    options: dict[str, object],
    modalities: tuple[str, ...],
    steps: int,
    window: int | None,
    silent: set[str],
    dtype: torch.dtype,
    seed: int,
) -> None:
    """`silent` modalities are missing throughout; of the others a fifth of the steps is."""
    dimensions = {m: DIMENSIONS[m] for m in modalities}
    statistics = FeatureStatistics(
        mean={m: [3.0] * size for m, size in dimensions.items()},
        std={m: [0.5] * size for m, size in dimensions.items()},
    )
    model = small_model(name, dimensions=dimensions, statistics=statistics, dtype=dtype, seed=seed, **options)
    batch = random_batch(seed=seed, sessions=1, longest=steps, dimensions=dimensions, dtype=dtype)
    for modality in silent & set(modalities):
        batch.present[modality].zero_()
    with torch.no_grad():
        offline = model(batch)
        limited = banded(model, batch, window or steps)
    if window is None or window >= steps:
        torch.testing.assert_close(limited.log_probabilities, offline.log_probabilities, rtol=0.0, atol=WITHIN)
    agree(streaming(name, model, dimensions=dimensions, window=window).open(), batch, limited)


def test_at_the_papers_size_a_session_of_300_steps_agrees() -> None:
    torch.manual_seed(0)
    dimensions = {"audio": 40, "visual": 64, "text": 48}
    model = zoo.build("edu_emotionnet", EduEmotionNetConfig(), dimensions=dimensions, classes=4).eval()
    batch = random_batch(seed=0, sessions=1, longest=300, dimensions=dimensions, dtype=torch.float32)
    with torch.no_grad():
        offline = model(batch)
    agree(streaming("edu_emotionnet", model, dimensions=dimensions).open(), batch, offline)


@pytest.mark.parametrize("name", RECOMPUTED)
def test_other_causal_models_recompute_and_say_so(name: str) -> None:
    model, batch = small_model(name), random_batch(seed=1, sessions=1)
    live = streaming(name, model, dimensions=DIMENSIONS)
    assert live.recomputes
    with torch.no_grad():
        agree(live.open(), batch, model(batch))
    with pytest.raises(ValueError, match=f"{name}.*no window"):
        streaming(name, model, dimensions=DIMENSIONS, window=3)


def test_what_cannot_stream_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cfn_esa.*looks ahead"):
        streaming("cfn_esa", small_model("cfn_esa"), dimensions=DIMENSIONS)
    with pytest.raises(ValueError, match="window must be at least 1 step, got 0"):
        streaming("edu_emotionnet", small_model("edu_emotionnet"), dimensions=DIMENSIONS, window=0)


@pytest.mark.parametrize("name", ["edu_emotionnet", "late_fusion"])
@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"audio": torch.full((6,), float("nan"))}, "audio features are not finite"),
        ({"audio": torch.zeros(6), "text": torch.tensor([0.0, float("-inf"), 0.0, 0.0])}, "text features"),
        ({"audio": torch.zeros(5)}, "audio needs 6 features"),
        ({"video": torch.zeros(5)}, "unknown modality 'video'.*audio, visual, text"),
    ],
)
def test_a_refused_step_leaves_the_session_as_it_was(name: str, features: dict[str, Tensor], message: str) -> None:
    model, batch = small_model(name), random_batch(seed=2, sessions=1, longest=6)
    session = streaming(name, model, dimensions=DIMENSIONS).open()
    with torch.no_grad():
        expected = model(batch).log_probabilities[0].exp()
    for step in range(6):
        with pytest.raises(ValueError, match=message):
            session.step(features)
        assert session.steps == step
        torch.testing.assert_close(session.step(at(batch, step)).probabilities, expected[step], rtol=0.0, atol=WITHIN)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "window"), [("edu_emotionnet", None), ("edu_emotionnet", 3), ("late_fusion", None)])
@pytest.mark.parametrize("value", [1e31, 3e38])  # too large for a LayerNorm; for the features' projection
def test_features_too_large_for_float32_leave_the_session_as_it_was(
    name: str, window: int | None, value: float
) -> None:
    statistics = FeatureStatistics(
        mean={m: [0.0] * n for m, n in DIMENSIONS.items()}, std={m: [0.01] * n for m, n in DIMENSIONS.items()}
    )
    model = small_model(name, dtype=torch.float32, statistics=statistics)
    live = streaming(name, model, dimensions=DIMENSIONS, window=window)
    batch = random_batch(seed=5, sessions=1, longest=8, dtype=torch.float32)
    session, undisturbed = live.open(), live.open()
    for step in range(8):
        with pytest.raises(ValueError, match="too large"):
            session.step({"audio": torch.full((6,), value), "text": None})
        assert session.steps == step
        said, expected = session.step(at(batch, step)), undisturbed.step(at(batch, step))
        torch.testing.assert_close(said.probabilities, expected.probabilities, rtol=0.0, atol=0.0)


def test_sessions_share_weights_and_nothing_else() -> None:
    model = small_model("edu_emotionnet")
    live = streaming("edu_emotionnet", model, dimensions=DIMENSIONS)
    batches = [random_batch(seed=seed, sessions=1, longest=9) for seed in (3, 4)]
    sessions = [live.open() for _ in batches]
    with torch.no_grad():
        expected = [model(batch).log_probabilities[0].exp() for batch in batches]
    for step in range(9):
        for session, batch, probabilities in zip(sessions, batches, expected, strict=True):
            said = session.step(at(batch, step)).probabilities
            torch.testing.assert_close(said, probabilities[step], rtol=0.0, atol=WITHIN)
            with torch.inference_mode():
                said.zero_()  # what a caller does with its answer is its own affair


def held(session: SessionStream) -> int:
    """Bytes of what a session carries from step to step; caches share a piece of memory, which counts once."""
    memory = session._memory  # pyright: ignore[reportAttributeAccessIssue]
    pieces = {id(cache.memory.base): cache.memory.base for cache in memory.caches}
    return sum(piece.nbytes for piece in pieces.values()) + memory._table.nbytes


@pytest.mark.parametrize("window", [1, 5, FIRST_CAPACITY + 6])
def test_memory_is_constant_with_a_window(window: int) -> None:
    live = streaming("edu_emotionnet", small_model("edu_emotionnet"), dimensions=DIMENSIONS, window=window)
    session, unlimited = live.open(), open_unlimited()
    sizes, grown = [], []
    for _ in range(4 * FIRST_CAPACITY):
        session.step({})
        unlimited.step({})
        sizes.append(held(session))
        grown.append(held(unlimited))
    assert len(set(sizes[window:])) == 1
    assert grown[-1] > 2 * grown[0]
    assert len(set(grown)) == 3  # doubled twice, not at every step


def open_unlimited() -> SessionStream:
    return streaming("edu_emotionnet", small_model("edu_emotionnet"), dimensions=DIMENSIONS).open()
