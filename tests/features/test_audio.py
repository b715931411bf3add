"""MFCC and Wav2Vec2 against torchaudio and transformers called directly."""

from __future__ import annotations

import wave
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.features.media_files import Samples, real_media, save_wav2vec2, tone

from emolab.features.audio import AudioSettings
from emolab.features.decoding import Clip, Limits
from emolab.features.mfcc import Mfcc
from emolab.features.signals import SAMPLE_RATE, Sound, SoundChunk
from emolab.features.wav2vec2 import Wav2Vec2, readings


def speech() -> Samples:
    """A recording read without our decoder."""
    path = real_media() / "speech" / "sense_and_sensibility_01_austen_64kb-0870.wav"
    with wave.open(str(path)) as file:
        assert file.getframerate() == SAMPLE_RATE
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768


def noise(seconds: float, seed: int = 0) -> Samples:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * SAMPLE_RATE)).astype(np.float32)


def in_chunks(samples: Samples, sizes: Sequence[int], *, start: float = 0.0) -> Iterator[SoundChunk]:
    """The samples in pieces of these sizes, over and over."""
    done, turn = 0, 0
    while done < len(samples):
        piece = samples[done : done + sizes[turn % len(sizes)]]
        yield SoundChunk(start + done / SAMPLE_RATE, piece, continues=done > 0)
        done, turn = done + len(piece), turn + 1


def torchaudio_steps(samples: Samples, step_seconds: float) -> np.ndarray:
    """The same features by torchaudio on the whole signal and plain numpy."""
    from torchaudio.transforms import MFCC

    library = MFCC(
        sample_rate=16_000,
        n_mfcc=40,
        log_mels=True,
        melkwargs={"n_fft": 400, "win_length": 400, "hop_length": 160, "n_mels": 40, "center": False},
    )
    windows = library(torch.from_numpy(samples)).numpy().T.astype(np.float64)
    windows = (windows - windows.mean(axis=0)) / windows.std(axis=0)
    middle = (160 * np.arange(len(windows)) + 200) / 16_000
    steps = np.floor(middle / step_seconds).astype(int)
    return np.stack([windows[steps == step].mean(axis=0) for step in range(steps.max() + 1)])


@pytest.mark.parametrize("step_seconds", [1.0, 0.3])
def test_mfcc_of_real_speech_is_torchaudios(step_seconds: float) -> None:
    path = real_media() / "speech" / "sense_and_sensibility_01_austen_64kb-0870.wav"
    features, present = Mfcc()(Sound([Clip(path=path)], Limits()), step_seconds)
    assert present.all()
    np.testing.assert_allclose(features, torchaudio_steps(speech(), step_seconds), atol=1e-5)


@given(st.lists(st.integers(1, 30_000), min_size=1, max_size=5), st.sampled_from([0.4, 1.0]))
@settings(max_examples=25, deadline=None)
def test_mfcc_does_not_depend_on_the_pieces_the_sound_comes_in(sizes: list[int], step_seconds: float) -> None:
    samples = np.concatenate([noise(1.3), tone(0.9), noise(0.5, 1)])
    sizes = [max(size, 200) for size in sizes]
    features, _ = Mfcc()(in_chunks(samples, sizes), step_seconds)
    np.testing.assert_allclose(features, torchaudio_steps(samples, step_seconds), atol=1e-5)


def test_mfcc_is_normalised_over_the_whole_session() -> None:
    features, present = Mfcc()(in_chunks(noise(4.0), [7000]), 0.025)  # two or three windows in a step
    assert features.shape[1] == 40
    np.testing.assert_allclose(features[present].mean(axis=0), 0, atol=0.05)
    constant, _ = Mfcc()(in_chunks(np.zeros(16_000, np.float32), [16_000]), 1.0)
    np.testing.assert_allclose(constant, 0, atol=1e-6)


def test_a_gap_in_the_sound_is_absent_and_no_window_spans_it() -> None:
    first, second = noise(1.0), noise(1.0, 1)
    chunks = [SoundChunk(0.0, first, continues=False), SoundChunk(3.0, second, continues=False)]
    features, present = Mfcc()(chunks, 1.0)
    assert present.tolist() == [True, False, False, True]
    windows = np.concatenate([_plain(first), _plain(second)])
    expected = (_plain(second).mean(axis=0) - windows.mean(axis=0)) / windows.std(axis=0)
    np.testing.assert_allclose(features[3], expected, atol=1e-5)


def _plain(samples: Samples) -> np.ndarray:
    from torchaudio.transforms import MFCC

    options = {"n_fft": 400, "hop_length": 160, "n_mels": 40, "center": False}
    library = MFCC(sample_rate=16_000, n_mfcc=40, log_mels=True, melkwargs=options)
    return library(torch.from_numpy(samples)).numpy().T.astype(np.float64)


def test_sound_shorter_than_a_window_gives_nothing() -> None:
    features, present = Mfcc()(in_chunks(noise(0.02), [1000]), 1.0)
    assert features.shape == (0, 40)
    assert present.shape == (0,)


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory: pytest.TempPathFactory) -> AudioSettings:
    """Settings as a user gives them: a folder on disk."""
    folder = save_wav2vec2(tmp_path_factory.mktemp("models") / "wav2vec2")
    return AudioSettings(extractor="wav2vec2", model=str(folder), window_seconds=2.0, context_seconds=0.5)


def transformers_states(settings: AudioSettings, samples: Samples) -> np.ndarray:
    """(frames, D) by the library alone."""
    from transformers import AutoFeatureExtractor, AutoModel

    model = AutoModel.from_pretrained(settings.model).eval()
    inputs = AutoFeatureExtractor.from_pretrained(settings.model)(samples, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).last_hidden_state[0].numpy()


def test_wav2vec2_of_a_short_recording_is_the_librarys(wav2vec2: AudioSettings) -> None:
    samples = noise(1.9)
    features, present = wav2vec2.build()(in_chunks(samples, [3000]), 0.5)
    states = transformers_states(wav2vec2, samples)
    steps = np.floor((320 * np.arange(len(states)) + 200) / 16_000 / 0.5).astype(int)
    assert present.all()
    assert features.shape == (4, wav2vec2.width)
    for step in range(4):
        np.testing.assert_allclose(features[step], states[steps == step].mean(axis=0), atol=1e-5)


def test_wav2vec2_of_a_long_recording_reads_windows_with_context(wav2vec2: AudioSettings) -> None:
    samples = noise(7.0)
    features, present = wav2vec2.build()(in_chunks(samples, [50_000]), 1.0)
    assert present.tolist() == [True] * 7
    # the window from 2 to 4 s is read from 1.5 to 4.5 s
    states = transformers_states(wav2vec2, samples[24_000:72_000])
    steps = np.floor(1.5 + (320 * np.arange(len(states)) + 200) / 16_000).astype(int)
    np.testing.assert_allclose(features[2], states[steps == 2].mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(features[3], states[steps == 3].mean(axis=0), atol=1e-5)


@given(
    st.integers(1, 9000),
    st.lists(st.integers(1, 2500), min_size=1, max_size=4),
    st.integers(1, 8).map(lambda n: 100 * n),
    st.integers(0, 9).map(lambda n: 100 * n),
)
@settings(max_examples=100, deadline=None)
def test_readings_cover_every_sample_once_and_know_their_place(
    length: int, sizes: list[int], window: int, context: int
) -> None:
    samples = np.arange(length, dtype=np.float32)
    covered: list[float] = []
    for start, held, first, last in readings(in_chunks(samples, sizes), window, context):
        assert held[0] == pytest.approx(start * SAMPLE_RATE, abs=0.01)
        assert first <= context and len(held) - last <= context
        covered += held[first:last].tolist()
        assert len(held) <= window + 2 * context or last == len(held)
    assert covered == samples.tolist()


def test_wav2vec2_says_what_it_was_made_with(wav2vec2: AudioSettings) -> None:
    said = wav2vec2.provenance()
    assert said["extractor"] == "wav2vec2"
    assert said["model"] == "wav2vec2"
    assert set(said["sha256"]) >= {"model.safetensors", "config.json", "preprocessor_config.json"}
    assert {"av", "torch", "transformers"} == set(said["libraries"])
    assert isinstance(wav2vec2.build(), Wav2Vec2)
    assert wav2vec2.build().width == wav2vec2.width == 32
