"""Any file becomes sound at one rate and pictures of one size, or is refused with a reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.features.media_files import plain, real_media, tone, write_video, write_wave

from emolab.features.decoding import Clip, Limits, UnusableMediaError
from emolab.features.signals import PICTURE_SIZE, SAMPLE_RATE, Picture, Pictures, Sound, SoundChunk

LIMITS = Limits(seconds=60.0)


def hear(*paths: Path, limits: Limits = LIMITS) -> list[SoundChunk]:
    return list(Sound([Clip(path=path) for path in paths], limits))


def see(*paths: Path, rate: float = 5.0, limits: Limits = LIMITS) -> list[Picture]:
    return list(Pictures([Clip(path=path) for path in paths], rate, limits))


def test_sound_at_its_own_rate_comes_out_as_it_went_in(tmp_path: Path) -> None:
    samples = tone(25.0)
    chunks = hear(write_wave(tmp_path / "tone.wav", samples))
    assert [round(chunk.seconds) for chunk in chunks] == [0, 10, 20]
    assert [chunk.continues for chunk in chunks] == [False, True, True]
    np.testing.assert_allclose(np.concatenate([chunk.samples for chunk in chunks]), samples, atol=1 / 32767)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_and_channels_keep_pitch_and_length(tmp_path: Path, rate: int) -> None:
    both = np.stack([tone(2.0, hertz=500, rate=rate), tone(2.0, hertz=500, rate=rate)], axis=1)
    (chunk,) = hear(write_wave(tmp_path / "stereo.wav", both, rate=rate))
    assert len(chunk.samples) == pytest.approx(2 * SAMPLE_RATE, abs=2)
    spectrum = np.abs(np.fft.rfft(chunk.samples))
    assert np.argmax(spectrum) / 2 == pytest.approx(500, abs=1)


def test_the_first_picture_of_every_interval_is_taken(tmp_path: Path) -> None:
    path = write_video(tmp_path / "ten.mp4", lambda time: plain(round(20 * time)), 3.0, rate=10)
    assert [picture.seconds for picture in see(path, rate=2.0)] == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    assert len(see(path, rate=120.0)) == 30, "a picture is not looked at twice"
    pictures = see(path, rate=1.0)
    assert [round(float(picture.pixels.mean()) / 20) for picture in pictures] == [0, 1, 2]
    assert {picture.pixels.shape for picture in pictures} == {(PICTURE_SIZE, PICTURE_SIZE, 3)}


def test_uneven_frame_times_are_kept(tmp_path: Path) -> None:
    path = write_video(tmp_path / "gaps.mkv", lambda time: plain(90), 0.0, times=[0.0, 0.1, 2.3, 2.4, 5.0])
    assert [picture.seconds for picture in see(path, rate=1.0)] == pytest.approx([0.0, 2.3, 5.0])


def test_the_middle_of_a_wide_picture_is_kept_whole(tmp_path: Path) -> None:
    def draw(_: float) -> np.ndarray:
        picture = np.zeros((60, 120, 3), np.uint8)
        picture[:, :30], picture[:, 30:60], picture[:, 60:90], picture[:, 90:] = 255, 60, 180, 255
        return picture

    (first, *_) = see(write_video(tmp_path / "wide.mp4", draw, 1.0))
    columns = first.pixels.mean(axis=(0, 2))
    assert columns[5:105] == pytest.approx(60, abs=8)
    assert columns[120:219] == pytest.approx(180, abs=8)


def test_a_file_without_the_stream_yields_nothing(tmp_path: Path) -> None:
    silent = write_video(tmp_path / "silent.mp4", lambda _: plain(90), 1.0)
    assert hear(silent) == []
    assert see(write_wave(tmp_path / "blind.wav", tone(1.0))) == []


def test_consecutive_files_lie_where_their_offsets_say(tmp_path: Path) -> None:
    path = write_wave(tmp_path / "tone.wav", tone(1.0))
    sound = Sound([Clip(path=path, offset=2.0), Clip(path=path, offset=5.0)], LIMITS)
    assert [(chunk.seconds, chunk.continues) for chunk in sound] == [(2.0, False), (5.0, False)]
    assert sound.seconds == pytest.approx(6.0)


@pytest.mark.parametrize("name", ["a.wav", "a.mp4"])
def test_a_clip_ends_where_it_says_although_its_file_goes_on(tmp_path: Path, name: str) -> None:
    """Or what follows an utterance would be heard and seen in the steps of the next one."""
    path = tmp_path / name
    if name == "a.wav":
        write_wave(path, tone(2.0))
    else:
        write_video(path, lambda _: plain(90), 2.0, rate=10, samples=tone(2.0, rate=48_000))
    clips = [Clip(path=path, offset=start, seconds=1.25) for start in (0.0, 1.25)]
    sound, pictures = Sound(clips, LIMITS), Pictures(clips, 10.0, LIMITS)
    assert [(chunk.seconds, len(chunk.samples)) for chunk in sound] == [(0.0, 20_000), (1.25, 20_000)]
    assert sound.seconds == 2.5
    if name == "a.mp4":
        times = [round(picture.seconds, 2) for picture in pictures]
        assert times == [round(start + n / 10, 2) for start in (0.0, 1.25) for n in range(13)]
        assert pictures.seconds == 2.5
    assert len(list(Sound([Clip(path=path, seconds=9.0)], LIMITS))) == 1, "a shorter file ends by itself"


def test_sound_that_pauses_goes_on_at_its_own_time(tmp_path: Path) -> None:
    """A recorder that writes nothing while the microphone is off leaves a hole in the times."""
    path = tmp_path / "muted.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for start in (0, 1, 4):
            frame = av.AudioFrame.from_ndarray((tone(1.0)[None] * 32767).astype(np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16_000, start * 16_000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    chunks = hear(path)
    assert [(round(chunk.seconds, 2), len(chunk.samples)) for chunk in chunks] == [(0.0, 32_000), (4.0, 16_000)]
    assert not any(chunk.continues for chunk in chunks)


def test_real_recordings_have_their_known_lengths() -> None:
    folder = real_media()
    (speech,) = hear(folder / "speech" / "sense_and_sensibility_01_austen_64kb-0870.wav")
    assert len(speech.samples) == 113_600
    (bunny,) = hear(folder / "video" / "bigbuckbunny.mp4")
    assert len(bunny.samples) / SAMPLE_RATE == pytest.approx(5.31, abs=0.03)
    assert len(see(folder / "video" / "bigbuckbunny.mp4", rate=25)) == 132
    assert len(see(folder / "video" / "carphone_pristine.mp4", rate=60)) == 120
    assert hear(folder / "video" / "carphone_pristine.mp4") == []


def test_the_malformed_recordings_are_refused() -> None:
    folder = real_media() / "broken"
    with pytest.raises(UnusableMediaError, match=r"bad\.wav cannot be decoded"):
        hear(folder / "bad.wav")
    with pytest.raises(UnusableMediaError, match="a sample rate of 1092676 Hz"):
        hear(folder / "awful.wav")


def faststart(path: Path) -> Path:
    return write_video(
        path, lambda _: plain(90), 6.0, samples=tone(6.0, rate=48_000), options={"movflags": "faststart"}
    )


def matroska(path: Path) -> Path:
    return write_video(path, lambda _: plain(90), 6.0, samples=tone(6.0, rate=48_000))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "write"),
    [("a.mp4", faststart), ("a.mkv", matroska), ("a.wav", lambda path: write_wave(path, tone(6.0)))],
)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.8])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, name: str, write, share: float) -> None:
    whole = write(tmp_path / name)
    cut = tmp_path / f"cut-{name}"
    cut.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    assert len(hear(whole)) == 1
    with pytest.raises(UnusableMediaError, match=r"cut-a.*(cut off|cannot be decoded|empty)"):
        hear(cut)
    if name != "a.wav":
        with pytest.raises(UnusableMediaError, match=r"cut-a.*(cut off|cannot be decoded|empty)"):
            see(cut)


def test_what_is_too_long_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    limits = Limits(seconds=2.0)
    with pytest.raises(UnusableMediaError, match=r"long\.wav goes on after the 0\.000555556 hours of max_hours"):
        hear(write_wave(tmp_path / "long.wav", tone(3.0)), limits=limits)
    with pytest.raises(UnusableMediaError, match="max_hours"):
        see(write_video(tmp_path / "long.mp4", lambda _: plain(90), 3.0), limits=limits)
    with pytest.raises(UnusableMediaError, match="max_hours"):
        list(Sound([Clip(path=write_wave(tmp_path / "late.wav", tone(1.0)), offset=1.5)], limits))


def test_gigantic_pictures_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "small.mp4", lambda _: plain(90, (480, 640)), 0.2)
    assert see(path)
    monkeypatch.setattr("emolab.features.decoding._MOST_PIXELS", 640 * 400)
    with pytest.raises(UnusableMediaError, match="pictures of 640 x 480 pixels"):
        see(path)


def test_a_codec_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    path = write_wave(tmp_path / "a.wav", tone(0.5))
    content = bytearray(path.read_bytes())
    content[20:22] = b"\xee\xee"  # the format code of the header
    path.write_bytes(bytes(content))
    with pytest.raises(UnusableMediaError, match=r"a\.wav: its audio stream is in no known format"):
        hear(path)


def test_no_file_makes_the_decoder_open_another(tmp_path: Path) -> None:
    target = write_video(tmp_path / "other.mp4", lambda _: plain(90), 1.0)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target.as_posix()}\n#EXT-X-ENDLIST\n"
    listing = f"ffconcat version 1.0\nfile '{target.name}'\n"
    for name, content in (("a.m3u8", playlist), ("a.mp4", playlist), ("b.mp4", listing), ("c.ffconcat", listing)):
        (tmp_path / name).write_text(content)
        with pytest.raises(UnusableMediaError, match="cannot be decoded"):
            see(tmp_path / name)


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnusableMediaError, match=r"nowhere\.mp4 cannot be read: No such file"):
        see(tmp_path / "nowhere.mp4")
    with pytest.raises(UnusableMediaError, match="cannot be read"):
        hear(tmp_path)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(UnusableMediaError, match=r"empty\.mp4 is empty"):
        see(tmp_path / "empty.mp4")


@pytest.fixture(scope="module")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("small")
    return [
        write_wave(folder / "a.wav", tone(0.5)),
        write_video(folder / "a.mp4", lambda time: plain(round(200 * time)), 1.0, samples=tone(1.0, rate=48_000)),
        write_video(folder / "a.mkv", lambda time: plain(round(200 * time)), 1.0, samples=tone(1.0, rate=48_000)),
    ]


def test_channels_that_cannot_be_mixed_are_a_refusal(small_files: list[Path], tmp_path: Path) -> None:
    """A header that says nine channels: the decoder takes them, and there is no way to mix them."""
    content = bytearray(small_files[0].read_bytes())
    content[22] = 9
    (tmp_path / "nine.wav").write_bytes(bytes(content))
    with pytest.raises(UnusableMediaError, match=r"^nine\.wav cannot be decoded: Invalid argument$"):
        hear(tmp_path / "nine.wav")


@pytest.mark.fault
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_a_refusal_or_harmless_never_a_crash(
    small_files: list[Path], tmp_path: Path, data: st.DataObject
) -> None:
    source = data.draw(st.sampled_from(small_files))
    content = bytearray(source.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / f"damaged{source.suffix}"
    path.write_bytes(bytes(content))
    for use in (hear, see):
        try:
            for piece in use(path):
                assert np.isfinite(piece[0])
        except UnusableMediaError as error:
            assert "\n" not in str(error)
    shutil.copyfile(source, path)
    hear(path), see(path)
