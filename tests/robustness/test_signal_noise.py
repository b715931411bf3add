from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from emolab.names import UserError
from emolab.robustness.corruptions.bad_network import pixelated
from emolab.robustness.corruptions.catalog import corruptions
from emolab.robustness.corruptions.recording import Recording, Word, corrupt_recording

SIGNAL_LEVEL = [row for row in corruptions().values() if row.stage != "features"]
UNCHANGED = {("audio_resample", 1), ("audio_low_pass", 1), ("audio_echo", 1)}
"""Severities at which the table itself, or a sampling rate of 16 kHz, leaves the signal as it is."""


@pytest.fixture(scope="module")
def recording() -> Recording:
    generator = np.random.default_rng(0)
    time = np.arange(16_000 * 4) / 16_000
    tone = 0.3 * np.sin(2 * np.pi * 220 * time) + 0.1 * np.sin(2 * np.pi * 5000 * time)
    words = tuple(Word(f"word{i % 9}", 0.1 * i, 0.1 * i + 0.08) for i in range(40))
    frames = generator.integers(0, 255, (32, 33, 47, 3)).astype(np.uint8)
    return Recording(
        session_id="r", waveform=tone.astype(np.float32), frames=frames, frame_rate=8.0, words=words, step_seconds=0.25
    )


def content(recording: Recording):
    return recording.waveform.tobytes(), recording.frames.tobytes(), recording.words


@pytest.mark.parametrize("row", SIGNAL_LEVEL, ids=[row.name for row in SIGNAL_LEVEL])
def test_every_severity_is_pure_repeatable_and_changes_its_own_signal(recording, row):
    before = content(recording)
    assert corrupt_recording(recording, row.name, 0) is recording
    place = {"audio": 0, "frames": 1, "transcript": 2}.get(row.stage)
    for severity in map(int, row.levels):
        after = corrupt_recording(recording, row.name, severity, seed=1)
        assert content(recording) == before
        assert content(corrupt_recording(recording, row.name, severity, seed=1)) == content(after)
        assert after.waveform.shape == recording.waveform.shape and after.waveform.dtype == np.float32
        assert after.frames.shape == recording.frames.shape and after.frames.dtype == np.uint8
        assert np.isfinite(after.waveform).all()
        different = [a != b for a, b in zip(content(after), before, strict=True)]
        if (row.name, severity) in UNCHANGED:
            assert not any(different)
        else:
            assert different == [place in (None, part) for part in range(3)], severity
        if row.random and severity == 3:
            assert content(corrupt_recording(recording, row.name, severity, seed=2)) != content(after)


@pytest.mark.parametrize("name", ["audio_white_noise", "audio_babble", "audio_music"])
def test_noise_meets_its_signal_to_noise_ratio(recording, name):
    for severity, decibels in enumerate((40, 30, 20, 10, 0), start=1):
        noise = corrupt_recording(recording, name, severity).waveform.astype(float) - recording.waveform
        measured = 10 * np.log10(np.mean(recording.waveform.astype(float) ** 2) / np.mean(noise**2))
        assert measured == pytest.approx(decibels, abs=0.05)


def test_silence_stays_silent_and_missing_signals_stay_missing(recording):
    silent = replace(recording, waveform=np.zeros(1000, np.float32))
    assert not corrupt_recording(silent, "audio_babble", 5).waveform.any()
    bare = Recording(session_id="r", words=recording.words)
    for row in SIGNAL_LEVEL:
        after = corrupt_recording(bare, row.name, 1)
        assert after.waveform is None and after.frames is None


def test_low_pass_removes_the_high_tone_and_keeps_the_low_one(recording):
    spectrum = np.abs(np.fft.rfft(corrupt_recording(recording, "audio_low_pass", 3).waveform))
    original = np.abs(np.fft.rfft(recording.waveform))
    assert spectrum[220 * 4] > 0.95 * original[220 * 4]
    assert spectrum[5000 * 4] < 0.01 * original[5000 * 4]


def test_packets_lost_are_nested_and_near_the_rate(recording):
    constant = replace(recording, waveform=np.ones(16_000 * 60, np.float32))
    lost = [corrupt_recording(constant, "audio_packet_loss", s).waveform == 0 for s in range(1, 6)]
    assert all(not (a & ~b).any() for a, b in itertools.pairwise(lost))
    for silent, share in zip(lost, (0.05, 0.1, 0.2, 0.3, 0.5), strict=True):
        assert silent.mean() == pytest.approx(share, abs=0.03)


def test_word_error_rate_is_near_the_request():
    words = tuple(Word(f"w{i % 50}", i, i + 1) for i in range(4000))
    many = Recording(session_id="r", words=words)
    for severity, share in enumerate((0.1, 0.2, 0.3, 0.4, 0.5), start=1):
        heard = corrupt_recording(many, "text_word_errors", severity).words
        kept = set(heard) & set(words)
        inserted = sum(1 for word in heard if word.end - word.start < 0.75 and word.start % 1)
        errors = len(words) - len(kept)
        assert errors / len(words) == pytest.approx(share, abs=0.03)
        assert inserted / errors == pytest.approx(0.15, abs=0.05)
        assert all(a.start <= b.start for a, b in itertools.pairwise(heard))


def test_one_edit_changes_a_word_by_one_character():
    many = Recording(session_id="r", words=tuple(Word("classroom", i, i + 1) for i in range(500)))
    texts = [word.text for word in corrupt_recording(many, "text_character_edits", 5).words]
    assert {len(text) for text in texts} == {8, 9, 10}
    assert 0.4 < sum(text != "classroom" for text in texts) / 500 < 0.55


def test_brightness_keeps_hue_and_raises_the_value(recording):
    flat = replace(recording, frames=np.full((1, 4, 4, 3), (100, 50, 0), np.uint8))
    after = corrupt_recording(flat, "frame_brightness", 2).frames[0, 0, 0]
    assert after.tolist() == [151, 76, 0]  # 100 + 0.2 * 255, channels in the same proportion


def test_bad_network_hits_all_signals_in_the_same_steps(recording):
    constant = replace(recording, waveform=np.ones(16_000 * 4, np.float32), step_seconds=1.0)
    for seed in range(5):
        after = corrupt_recording(constant, "bad_network", 5, seed=seed)
        second_of_sample = np.arange(16_000 * 4) // 16_000
        bad = {int(s) for s in second_of_sample[after.waveform == 0]}
        frames = np.flatnonzero((after.frames != recording.frames).any(axis=(1, 2, 3)))
        assert {int(frame / 8) for frame in frames} == bad and len(bad) == 2
        changed = {word for word in recording.words if word not in after.words}
        assert {int(word.start + 1e-9) for word in changed} <= bad


def test_pixelation_keeps_the_mean_and_flattens_blocks():
    frames = np.random.default_rng(0).integers(0, 255, (2, 10, 7, 3)).astype(np.uint8)
    coarse = pixelated(frames, 4)
    assert (coarse[:, :4, :4] == coarse[:, :1, :1]).all() and (coarse[:, 8:, 4:] == coarse[:, 8:9, 4:5]).all()
    np.testing.assert_allclose(coarse[:, :4, :4].mean((1, 2)), frames[:, :4, :4].mean((1, 2)), atol=0.5)


def test_mistakes(recording):
    with pytest.raises(UserError, match="prepared features"):
        corrupt_recording(recording, "gaussian", 1)
    with pytest.raises(UserError, match="no severity 6"):
        corrupt_recording(recording, "frame_jpeg", 6)
    with pytest.raises(UserError, match="did you mean 'audio_babble'"):
        corrupt_recording(recording, "audio_bable", 1)
