"""From files to sessions: alignment on the step grid, missing modalities, refusals, bounded memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import REPOSITORY
from tests.features.media_files import (
    bert_folder,
    plain,
    save_resnet,
    tone,
    write_rows,
    write_video,
    write_wave,
    write_words,
)

from edu_emotionnet.conventions import IGNORED_LABEL
from emolab.corpora.corpus import RefusedSessionError, SessionReference
from emolab.corpora.recordings import Clip, LabelledSpan, RecordedCorpus, Recording, Word
from emolab.corpora.signal_noise import SignalNoise
from emolab.features.audio import AudioSettings
from emolab.features.text import TextSettings
from emolab.features.visual import VisualSettings
from emolab.names import UserError
from emolab.sessions.schema import Session

NO_AUDIO, NO_PICTURE, NO_TEXT = (
    AudioSettings(extractor="none"),
    VisualSettings(extractor="none"),
    TextSettings(extractor="none"),
)


@dataclass(frozen=True, kw_only=True)
class Listed(RecordedCorpus):
    """A corpus of the recordings that a test lists."""

    name = "listed"
    listed: tuple[Recording, ...] = ()

    def recordings(self) -> Sequence[Recording]:
        return self.listed


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options that name models on disk."""
    weights = save_resnet(tmp_path_factory.mktemp("models") / "resnet18.safetensors")
    return {"visual": VisualSettings(weights=str(weights)), "text": TextSettings(model=str(bert_folder()))}


def one(corpus: RecordedCorpus) -> Session:
    (reference,) = corpus.references()
    session = corpus.load(reference)
    session.check(classes=len(corpus.classes))
    return session


def standing_out(features: np.ndarray) -> int:
    """The step that is least like the typical one."""
    return int(np.argmax(np.linalg.norm(features - np.median(features, axis=0), axis=1)))


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
@pytest.mark.parametrize("step_seconds", [0.5, 1.0])
def test_a_beep_a_flash_and_a_word_land_in_their_steps(
    tmp_path: Path, models: dict[str, Any], ending: str, step_seconds: float
) -> None:
    """A beep from 3.2 to 3.4 s, a flash from 5.6 to 5.8 s, a word from 6.1 to 6.4 s, in a clip of 8 s."""
    time = np.arange(8 * 48_000) / 48_000
    samples = np.where((time >= 3.2) & (time < 3.4), 0.5 * np.sin(2 * np.pi * 1000 * time), 0).astype(np.float32)
    samples += np.random.default_rng(0).normal(0, 1e-3, len(samples)).astype(np.float32)
    path = tmp_path / f"clip.{ending}"
    write_video(path, lambda at: plain(250 if 5.6 <= at < 5.8 else 40), 8.0, rate=10, samples=samples)
    recording = Recording(
        session_id="clip",
        speaker_id="p",
        video=(Clip(path=path),),
        audio=(Clip(path=path),),
        words=(Word(6.1, 6.4, "eureka"),),
        spans=(LabelledSpan(3.0, 4.0, "curious"),),
    )
    session = one(Listed(listed=(recording,), step_seconds=step_seconds, **models))
    assert session.num_steps == 8 / step_seconds
    assert standing_out(session.features["audio"]) == int(3.2 / step_seconds)
    assert standing_out(session.features["visual"]) == int(5.6 / step_seconds)
    assert np.flatnonzero(session.present["text"]).tolist() == [int(6.25 / step_seconds)]
    assert session.present["audio"].all() and session.present["visual"].all()
    expected = [int(3 / step_seconds <= step < 4 / step_seconds) for step in range(session.num_steps)]
    assert (session.labels == np.where(expected, 1, IGNORED_LABEL)).all()


def test_sound_that_begins_late_is_absent_until_then(tmp_path: Path, models: dict[str, Any]) -> None:
    video = write_video(tmp_path / "a.mp4", lambda _: plain(90), 4.0)
    beep = np.concatenate([np.zeros(16_000, np.float32), tone(0.5), np.zeros(8_000, np.float32)])
    audio = write_wave(tmp_path / "a.wav", beep)
    recording = Recording(
        session_id="late",
        speaker_id="p",
        video=(Clip(path=video),),
        audio=(Clip(path=audio, offset=2.0),),
    )
    session = one(Listed(listed=(recording,), **models | {"text": NO_TEXT}))
    assert session.present["audio"].tolist() == [False, False, True, True]
    assert standing_out(session.features["audio"][2:]) in (0, 1)
    assert not session.features["audio"][:2].any()


def test_one_file_per_utterance_makes_one_session(tmp_path: Path) -> None:
    files = [write_wave(tmp_path / f"{n}.wav", tone(1.5, hertz=300 * (n + 1))) for n in range(3)]
    recording = Recording(
        session_id="dialogue",
        speaker_id="p",
        audio=tuple(Clip(path=path, offset=2.0 * n) for n, path in enumerate(files)),
        spans=tuple(LabelledSpan(2.0 * n, 2.0 * n + 1.5, ("bored", "curious")[n % 2]) for n in range(3)),
    )
    corpus = Listed(listed=(recording,), visual=NO_PICTURE, text=NO_TEXT)
    session = one(corpus)
    assert corpus.dimensions == {"audio": 40}
    assert session.present["audio"].tolist() == [True] * 6
    assert session.labels.tolist() == [2, 2, 1, 1, 2, 2]


def test_a_modality_without_a_file_or_a_stream_is_absent(tmp_path: Path, models: dict[str, Any]) -> None:
    silent = write_video(tmp_path / "silent.mp4", lambda _: plain(90), 2.0)
    clip = (Clip(path=silent),)
    session = one(Listed(listed=(Recording(session_id="s", speaker_id="p", video=clip, audio=clip),), **models))
    assert session.present["visual"].all()
    for name in ("audio", "text"):
        assert not session.present[name].any()
        assert session.features[name].shape == (2, {"audio": 40, "text": 384}[name])
        assert not session.features[name].any()


def test_the_stages_one_by_one_are_what_load_does(tmp_path: Path, models: dict[str, Any]) -> None:
    path = write_video(tmp_path / "a.mp4", lambda at: plain(int(30 * at)), 3.0, samples=tone(3.0, rate=48_000))
    clip = (Clip(path=path),)
    recording = Recording(session_id="s", speaker_id="p", video=clip, audio=clip, words=(Word(0.2, 0.9, "well"),))
    corpus = Listed(listed=(recording,), **models)
    (reference,) = corpus.references()
    arrays: dict[str, Any] = {}
    for stage in corpus.stages():
        arrays |= stage.build()(reference, arrays)
    assert [stage.name for stage in corpus.stages()] == ["audio", "visual", "text"]
    assert [stage.uses_gpu for stage in corpus.stages()] == [False, True, True]
    staged, loaded = corpus.assemble(reference, arrays), corpus.load(reference)
    for name in corpus.dimensions:
        np.testing.assert_array_equal(staged.features[name], loaded.features[name])
        np.testing.assert_array_equal(staged.present[name], loaded.present[name])
    with pytest.raises(UserError, match="listed has no session 'other'"):
        corpus.load(SessionReference(session_id="other", speaker_id="p"))


def refusal(corpus: RecordedCorpus) -> str:
    with pytest.raises(RefusedSessionError) as refused:
        one(corpus)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_session_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    wav = write_wave(tmp_path / "a.wav", tone(2.0))
    good = Recording(session_id="s", speaker_id="p", audio=(Clip(path=wav),), listed="sessions.csv, row 7")
    alone: dict[str, Any] = {"visual": NO_PICTURE, "text": NO_TEXT}

    def said(recording: Recording, **options: Any) -> str:
        return refusal(Listed(listed=(recording,), **alone | options))

    cut = tmp_path / "cut.wav"
    cut.write_bytes(wav.read_bytes()[:9000])
    assert said(replace(good, audio=(Clip(path=cut),))) == (
        f"session 's' (sessions.csv, row 7): audio: cut.wav is cut off: it has 9000 of {wav.stat().st_size} bytes"
    )
    assert "unknown label 'angry' at 0 s (classes: confused" in said(
        replace(good, spans=(LabelledSpan(0.0, 1.0, "angry"),))
    )
    late = replace(good, spans=write_rows(tmp_path / "late.csv", "start,end,label", "1000,2000,bored"))
    assert "begins at 1000 s, after the recording's end at 2 s: are its times in seconds?" in said(late)
    turned = replace(good, spans=(LabelledSpan(1.0, 0.5, "bored"),))
    assert "'bored' runs from 1 to 0.5 s" in said(turned)
    assert "max_hours" in said(good, max_hours=0.0001)
    assert "it is empty" in said(replace(good, audio=()))
    table = write_rows(tmp_path / "l.csv", "start,end,label", "0,x,bored")
    assert "labels: l.csv, row 2, column end" in said(replace(good, spans=table))


def test_words_out_of_order_refuse_the_session(tmp_path: Path, models: dict[str, Any]) -> None:
    words = write_words(tmp_path / "w.json", [(2.0, 2.5, "b"), (0.0, 0.5, "a")])
    recording = Recording(session_id="s", speaker_id="p", words=words)
    corpus = Listed(listed=(recording,), audio=NO_AUDIO, visual=NO_PICTURE, text=models["text"])
    assert "text: transcript, word 2 ('a'): times run backwards" in refusal(corpus)


def test_a_transcript_on_another_clock_refuses_the_session(tmp_path: Path, models: dict[str, Any]) -> None:
    """One in milliseconds would make eight seconds a session of an hour."""
    words = write_words(tmp_path / "w.json", [(0.5, 0.9, "hello"), (1.9, 2.2, "there"), (500, 900, "world")])
    wav = (Clip(path=write_wave(tmp_path / "a.wav", tone(1.0))),)
    recording = Recording(session_id="s", speaker_id="p", words=words, audio=wav)
    corpus = Listed(listed=(recording,), visual=NO_PICTURE, text=models["text"])
    assert "'world' begins at 500 s, after the recording's end at 1 s: are its times in seconds?" in refusal(corpus)
    write_words(words, [(0.5, 0.9, "hello"), (1.9, 2.2, "there")])
    assert one(corpus).num_steps == 3, "a second is not another clock"
    write_words(words, [(0.5, 0.9, "hello"), (100, 101, "world")])
    assert one(replace(corpus, listed=(replace(recording, audio=()),))).num_steps == 101
    assert one(replace(corpus, text=NO_TEXT)).num_steps == 1


def test_a_file_name_that_no_file_can_have_is_that_session_s_trouble(tmp_path: Path) -> None:
    recording = Recording(session_id="s", speaker_id="p", audio=(Clip(path=tmp_path / ("a" * 256 + ".wav")),))
    corpus = Listed(listed=(recording,), visual=NO_PICTURE, text=NO_TEXT)
    assert corpus.input_key(corpus.references()[0])
    assert "File name too long" in refusal(corpus)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": ("a", "a")}, "two different names"),
        ({"step_seconds": 0.0}, "step_seconds=0"),
        ({"max_hours": -1.0}, "max_hours=-1"),
        ({"audio": NO_AUDIO, "visual": NO_PICTURE, "text": NO_TEXT}, "keep at least one"),
        ({"visual": VisualSettings(frames_per_second=0.5)}, "without a picture"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Listed(**options)


def test_another_model_is_another_data_set_and_another_folder_is_not(tmp_path: Path) -> None:
    first, copy, other = (tmp_path / name / "resnet18.safetensors" for name in ("a", "b", "c"))
    for path in (first, copy, other):
        path.parent.mkdir()
        save_resnet(path)
    content = bytearray(other.read_bytes())
    content[-1] ^= 1
    other.write_bytes(bytes(content))
    options = [
        Listed(visual=VisualSettings(weights=str(path)), audio=NO_AUDIO, text=NO_TEXT).options()
        for path in (first, copy, other)
    ]
    assert options[0] == options[1] != options[2]
    assert json.loads(json.dumps(options[0])) == options[0]


@pytest.mark.parametrize(
    ("signal", "name", "modality"),
    [
        ("audio", "audio_white_noise", "audio"),
        ("frames", "frame_gaussian_noise", "visual"),
        ("transcript", "text_unknown_words", "text"),
    ],
)
def test_noise_changes_its_own_modality_and_is_drawn_by_session_name_severity_and_seed(
    tmp_path: Path, models: dict[str, Any], signal: str, name: str, modality: str
) -> None:
    path = write_video(tmp_path / "a.mp4", lambda at: plain(int(60 * at)), 1.5, samples=tone(1.5, rate=48_000))
    clip = (Clip(path=path),)
    words = tuple(Word(0.1 * n, 0.1 * n + 0.1, f"word{n}") for n in range(15))
    recording = Recording(session_id="s", speaker_id="p", video=clip, audio=clip, words=words)

    def loaded(recording: Recording = recording, **noise: Any) -> Session:
        return one(Listed(listed=(recording,), corruption=SignalNoise(**noise), **models))

    clean, noisy, again = loaded(), loaded(**{signal: {name: 5}}), loaded(**{signal: {name: 5}})
    for each in clean.features:
        np.testing.assert_array_equal(noisy.features[each], again.features[each])
        np.testing.assert_array_equal(noisy.present[each], clean.present[each])
        changed = np.abs(noisy.features[each] - clean.features[each]).max() > 1e-3
        assert changed == (each == modality)
    others = [
        loaded(**{signal: {name: 5}, "seed": 1}),
        loaded(replace(recording, session_id="t"), **{signal: {name: 5}}),
        loaded(**{signal: {name: 1}}),
    ]
    for other in others:
        assert np.abs(other.features[modality] - noisy.features[modality]).max() > 1e-3


def test_noise_is_what_the_robustness_suites_put_on_the_same_signal(tmp_path: Path) -> None:
    """MFCC of a corrupted file equal those of a file of the corrupted signal."""
    from emolab.robustness.corruptions.recording import Recording as Signals
    from emolab.robustness.corruptions.recording import corrupt_recording

    samples = (np.round(tone(2.0) * 32767) / 32768).astype(np.float32)
    path = write_wave(tmp_path / "a.wav", tone(2.0))
    recording = Recording(session_id="s", speaker_id="p", audio=(Clip(path=path),))
    noise = SignalNoise(audio={"audio_packet_loss": 3}, seed=4)
    corpus = Listed(listed=(recording,), visual=NO_PICTURE, text=NO_TEXT, corruption=noise)
    expected = corrupt_recording(Signals(session_id="s", waveform=samples), "audio_packet_loss", 3, seed=4).waveform
    assert expected is not None
    by_hand = write_wave(tmp_path / "b.wav", expected * 32768 / 32767)
    other = replace(corpus, listed=(replace(recording, audio=(Clip(path=by_hand),)),), corruption=SignalNoise())
    np.testing.assert_allclose(one(corpus).features["audio"], one(other).features["audio"], atol=1e-4)


def test_unknown_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'audio_babble'"):
        SignalNoise(audio={"audio_bable": 1})
    with pytest.raises(ValueError, match="works on audio, not on frames"):
        SignalNoise(frames={"audio_babble": 1})
    with pytest.raises(ValueError, match="no severity 9"):
        SignalNoise(audio={"audio_babble": 9})


MEASURE = """
import json, re, sys
from pathlib import Path
from tests.corpora.test_recordings import Clip, Listed, NO_TEXT, Recording, VisualSettings

def peak():  # of this program; the resource module would count the one that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

folder = Path(sys.argv[1])
def load(name, step):
    recording = Recording(
        session_id=name, speaker_id="p", video=(Clip(path=folder / f"{name}.mp4"),),
        audio=(Clip(path=folder / f"{name}.wav"),),
    )
    visual = VisualSettings(weights=str(folder / "resnet18.safetensors"), frames_per_second=1 / step)
    corpus = Listed(listed=(recording,), step_seconds=step, visual=visual, text=NO_TEXT)
    return corpus.load(corpus.references()[0]).num_steps

load("short", 5.0)  # several batches of pictures go through the network
before = peak()
steps = load("long", 120.0)
print(json.dumps({"steps": steps, "grown": peak() - before}))
"""


@pytest.mark.scenario
@pytest.mark.slow
def test_two_hours_take_no_more_memory_than_two_minutes(tmp_path: Path) -> None:
    """Two hours of sound are 460 MB as one array, and their pictures at one a second over 1 GB."""
    save_resnet(tmp_path / "resnet18.safetensors")
    for name, seconds in (("short", 240), ("long", 7200)):
        write_wave(tmp_path / f"{name}.wav", tone(seconds, rate=4_000), rate=4_000)
        write_video(tmp_path / f"{name}.mp4", lambda at: plain(int(at) % 200, (32, 32)), seconds, rate=1)
    environment = {"PYTHONPATH": ":".join(str(REPOSITORY / part) for part in ("platform", "model", "."))}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        env={**environment, "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["steps"] == 60
    assert measured["grown"] < 60 * 2**20, f"{measured['grown'] / 2**20:.0f} MiB"


def test_malformed_files_are_refused_within_a_bounded_memory(tmp_path: Path) -> None:
    """A header may promise a day of sound or a gigantic rate; nothing is set aside for it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    content = bytearray(write_wave(tmp_path / "a.wav", tone(0.5)).read_bytes())
    for name, at, value in (
        ("rate", 24, 2**31 - 1),
        ("size", 40, 2**31 - 1),
        ("riff", 4, 2**31),
        ("format", 16, 2**30),
    ):
        changed = content.copy()
        changed[at : at + 4] = value.to_bytes(4, "little")
        path = tmp_path / f"{name}.wav"
        path.write_bytes(bytes(changed))
        recording = Recording(session_id="s", speaker_id="p", audio=(Clip(path=path),))
        corpus = Listed(listed=(recording,), visual=NO_PICTURE, text=NO_TEXT)
        try:
            assert one(corpus).num_steps == 1
        except RefusedSessionError as error:
            assert path.name in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
