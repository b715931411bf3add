"""Noise on a mono waveform, severities 1 to 5 (tables of Speech Robust Bench, Shah et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, resample_poly, sosfilt

from emolab.robustness.corruptions.catalog import register
from emolab.robustness.corruptions.recording import Recording
from emolab.robustness.corruptions.streams import Stream

SIGNAL_TO_NOISE_DB = (40.0, 30.0, 20.0, 10.0, 0.0)
KEPT_RATE = ((1, 1), (3, 4), (1, 2), (1, 4), (1, 8))
CUTOFF_HZ = (8000, 4000, 2000, 1000, 500)
ECHO_SECONDS = (0.0, 0.125, 0.25, 0.5, 1.0)
ECHO_GAIN = 0.5
CLIPPED_AT = (0.5, 0.3, 0.2, 0.1, 0.05)
"""Ceiling, as a share of the loudest sample."""
PACKET_SECONDS = 0.02
PACKETS_LOST = (0.05, 0.1, 0.2, 0.3, 0.5)
TALKERS = 8

Samples = NDArray[np.float32]


def mix(signal: Samples, noise: NDArray[np.floating], decibels: float) -> Samples:
    """signal + noise at a signal-to-noise ratio; silence, for which there is no such ratio, stays silent."""
    power, noise_power = np.mean(np.square(signal, dtype=np.float64)), np.mean(np.square(noise, dtype=np.float64))
    if power == 0 or noise_power == 0:
        return signal
    return (signal + noise * np.sqrt(power / noise_power / 10 ** (decibels / 10))).astype(np.float32)


def white(samples: int, rate: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """(samples,) of equal power at every frequency."""
    return generator.standard_normal(samples)


def babble(samples: int, rate: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """(samples,) of eight talkers: noise with the long-term spectrum of speech, rising and falling with syllables."""
    frequency = np.fft.rfftfreq(samples, 1 / rate)
    spectrum = 1 / (1 + (frequency / 500) ** 1.5)  # flat to 500 Hz, then about -9 dB an octave
    spectrum[frequency < 80] = 0
    carrier = np.fft.irfft(np.fft.rfft(generator.standard_normal((TALKERS, samples))) * spectrum, n=samples)
    syllables = generator.random((TALKERS, int(samples / rate * 8) + 2)) ** 2  # eight a second
    time = np.arange(samples) / rate * 8
    envelope = np.stack([np.interp(time, np.arange(syllables.shape[1]), row) for row in syllables])
    return (carrier * envelope).sum(axis=0)


def music(samples: int, rate: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """(samples,) of major and minor triads, two a second, with five decaying harmonics per note."""
    time = np.arange(samples) / rate
    beat = (time * 2).astype(np.int64)
    beats = int(beat[-1]) + 1 if samples else 0
    root = generator.integers(45, 69, size=beats)  # MIDI notes A2 to A4
    third = generator.integers(3, 5, size=beats)
    decay = np.exp(-3 * (time * 2 - beat))
    total = np.zeros(samples)
    for note in (root, root + third, root + 7):
        pitch = 440 * 2 ** ((note - 69) / 12)[beat]
        for harmonic in range(1, 6):
            audible = pitch * harmonic < rate / 2
            total += audible * decay / harmonic * np.sin(2 * np.pi * pitch * harmonic * time)
    return total


Noise = Callable[[int, int, np.random.Generator], NDArray[np.float64]]


def _add_noise(recording: Recording, stream: Stream, noise: Noise, decibels: float) -> Recording:
    signal = _samples(recording)
    added = noise(len(signal), recording.sample_rate, stream.generator("noise"))
    return replace(recording, waveform=mix(signal, added, decibels)) if len(signal) else recording


def _samples(recording: Recording) -> Samples:
    assert recording.waveform is not None  # corrupt_recording has looked
    return recording.waveform


@register("audio_white_noise", stage="audio", source="SNR 40 to 0 dB")
def audio_white_noise(recording: Recording, severity: int, stream: Stream) -> Recording:
    return _add_noise(recording, stream, white, SIGNAL_TO_NOISE_DB[severity - 1])


@register("audio_babble", stage="audio", source="SNR 40 to 0 dB, synthetic talkers")
def audio_babble(recording: Recording, severity: int, stream: Stream) -> Recording:
    return _add_noise(recording, stream, babble, SIGNAL_TO_NOISE_DB[severity - 1])


@register("audio_music", stage="audio", source="SNR 40 to 0 dB, synthetic chords")
def audio_music(recording: Recording, severity: int, stream: Stream) -> Recording:
    return _add_noise(recording, stream, music, SIGNAL_TO_NOISE_DB[severity - 1])


@register("audio_speech_5_to_10_db", stage="audio", levels=(1.0,), source="MER2023-NOISE")
def audio_speech_5_to_10_db(recording: Recording, severity: int, stream: Stream) -> Recording:
    """Babble at a whole number of decibels from 5 to 10, drawn per session."""
    return _add_noise(recording, stream, babble, float(stream.generator("decibels").integers(5, 11)))


@register("audio_resample", stage="audio", random=False, source="1, 3/4, 1/2, 1/4, 1/8 of the sampling rate")
def audio_resample(recording: Recording, severity: int, stream: Stream) -> Recording:
    """Down to a share of the sampling rate and back; the length stays. Severity 1 is the table's factor 1."""
    up, down = KEPT_RATE[severity - 1]
    signal = _samples(recording)
    if up == down or not len(signal):
        return recording
    back = resample_poly(resample_poly(signal.astype(np.float64), up, down), down, up)[: len(signal)]
    padded = np.zeros(len(signal), dtype=np.float32)
    padded[: len(back)] = back
    return replace(recording, waveform=padded)


@register("audio_low_pass", stage="audio", random=False, source="cut-off 8 kHz to 500 Hz")
def audio_low_pass(recording: Recording, severity: int, stream: Stream) -> Recording:
    """Butterworth filter of order 8; a cut-off at or above half the sampling rate changes nothing."""
    cutoff = CUTOFF_HZ[severity - 1]
    if cutoff >= recording.sample_rate / 2:
        return recording
    sections = butter(8, cutoff, fs=recording.sample_rate, output="sos")
    return replace(recording, waveform=np.asarray(sosfilt(sections, _samples(recording)), dtype=np.float32))


@register("audio_echo", stage="audio", random=False, source="delay 0 to 1000 ms")
def audio_echo(recording: Recording, severity: int, stream: Stream) -> Recording:
    """One echo at half the amplitude. Severity 1 is the table's delay 0, which is no echo."""
    delay = round(ECHO_SECONDS[severity - 1] * recording.sample_rate)
    echoed = _samples(recording).copy()
    if delay:
        echoed[delay:] += np.float32(ECHO_GAIN) * _samples(recording)[:-delay]
    return replace(recording, waveform=echoed)


@register("audio_clipping", stage="audio", random=False, source="ceiling at 50 to 5 % of the peak")
def audio_clipping(recording: Recording, severity: int, stream: Stream) -> Recording:
    signal = _samples(recording)
    ceiling = np.float32(CLIPPED_AT[severity - 1] * np.abs(signal).max(initial=0.0))
    return replace(recording, waveform=np.clip(signal, -ceiling, ceiling))


@register("audio_packet_loss", stage="audio", source="5 to 50 % of the packets of 20 ms")
def audio_packet_loss(recording: Recording, severity: int, stream: Stream) -> Recording:
    """Lost packets are silent; those lost at one severity are lost at every higher one."""
    return replace(recording, waveform=drop_packets(recording, stream, PACKETS_LOST[severity - 1]))


def drop_packets(recording: Recording, stream: Stream, share: float, steps: NDArray[np.bool_] | None = None) -> Samples:
    """The waveform with a share of its packets silent, everywhere or only inside the steps of a mask."""
    signal = _samples(recording)
    packet = np.arange(len(signal)) // max(1, round(PACKET_SECONDS * recording.sample_rate))
    lost = stream.uniform("packets", int(packet.max(initial=0)) + 1)[packet] < share
    if steps is not None:
        step = (np.arange(len(signal)) / (recording.sample_rate * recording.step_seconds)).astype(np.int64)
        lost &= steps[np.minimum(step, len(steps) - 1)]
    return np.where(lost, np.float32(0), signal)
