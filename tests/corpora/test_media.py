"""Own recordings: the manifest, real media, and the way from files to a trained epoch."""

from __future__ import annotations

import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from tests.features.media_files import (
    bert_folder,
    real_media,
    render_sessions,
    save_resnet,
    save_wav2vec2,
    tone,
    write_rows,
    write_wave,
)

from emolab.configuration import parse
from emolab.corpora.corpus import RefusedSessionError, SessionReference
from emolab.corpora.media import Media
from emolab.features.text import TextSettings
from emolab.features.visual import VisualSettings
from emolab.names import UserError
from emolab.registry.lookup import kept_model
from emolab.serving.batch import PredictSettings, predict
from emolab.serving.models import load as load_kept
from emolab.sessions.loading import load_split
from emolab.sessions.manifest import read_manifest
from emolab.sessions.preparation import make_data_set
from emolab.sessions.settings import PrepareSettings
from emolab.tracking.tracker import NoTracker
from emolab.training.recipe import TrainSettings
from emolab.training.train import train

SPEECH = "sense_and_sensibility_01_austen_64kb-0870"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_resnet(tmp_path_factory.mktemp("models") / "resnet18.safetensors")


def manifest(folder: Path, *rows: str) -> Path:
    return write_rows(folder / "sessions.csv", *rows)


def references(folder: Path, *rows: str) -> list[SessionReference]:
    return list(Media(manifest=str(manifest(folder, *rows))).references())


def test_every_cell_may_be_empty_but_the_ids_and_one_file(tmp_path: Path) -> None:
    corpus = Media(
        manifest=str(
            manifest(
                tmp_path,
                "speaker_id,session_id,video,audio,transcript,labels",
                "p1,a,a.mp4,,,",
                'p2,b,,"b, take 2.wav",,b.csv',
                "",
                " p1 , c ,c.mp4,sub/c.wav,c.vtt,",
            )
        )
    )
    a, b, c = corpus.recordings()
    assert a.audio == a.video
    assert (a.words, a.spans, a.speaker_id) == (None, (), "p1")
    assert b.video == ()
    assert b.audio[0].path == tmp_path / "b, take 2.wav"
    assert (c.session_id, c.speaker_id, c.audio[0].path) == ("c", "p1", tmp_path / "sub" / "c.wav")
    assert c.audio != c.video
    assert c.listed == "sessions.csv, row 5"
    assert [each.published_split for each in corpus.references()] == [None] * 3


def test_only_the_columns_that_are_used_need_to_be_there(tmp_path: Path) -> None:
    (only,) = Media(manifest=str(manifest(tmp_path, "session_id,speaker_id,audio", "a,p,a.wav"))).recordings()
    assert (only.video, only.words, only.listed) == ((), None, "sessions.csv, row 2")


HEADER = "session_id,speaker_id,video,audio,transcript,labels"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([HEADER], "lists no session"),
        ([], "row 1: column 'session_id' is missing"),
        (["session_id,speaker,video", "a,p,a.mp4"], "row 1: column 'speaker' is unknown, did you mean 'speaker_id'"),
        (["session_id,video,video,speaker_id", "a,b,c,d"], "row 1: column 'video' stands twice"),
        (["session_id,video", "a,a.mp4"], "row 1: column 'speaker_id' is missing"),
        ([HEADER, "a,p,a.mp4,,,", "b,p,b.mp4"], "row 3 has 3 cells, the header has 6"),
        ([HEADER, "a,p,a.mp4,,,", ",p,b.mp4,,,"], "row 3, column session_id: is empty"),
        ([HEADER, "a,,a.mp4,,,"], "row 2, column speaker_id: is empty"),
        ([HEADER, "a,p,,,,a.csv"], "row 2: names no video, audio or transcript"),
        ([HEADER, "a,p,../a.mp4,,,"], "row 2, column video: '../a.mp4' leaves the manifest's folder"),
        ([HEADER, "a,p,,/etc/passwd,,"], "row 2, column audio: '/etc/passwd' leaves the manifest's folder"),
        ([HEADER, "a,p,,,x\x00y,"], r"(row 2, column transcript: .* is not a path|not a CSV table)"),
    ],
)
def test_a_mistake_in_the_manifest_is_one_line_with_row_and_column(
    tmp_path: Path, rows: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        references(tmp_path, *rows)
    assert "\n" not in str(refusal.value)
    assert "sessions.csv" in str(refusal.value)


def test_a_link_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    outside = write_wave(tmp_path / "outside.wav", tone(1.0))
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.wav").symlink_to(outside)
    with pytest.raises(UserError, match=r"row 2, column audio: 'a\.wav' leaves the manifest's folder"):
        references(folder, "session_id,speaker_id,audio", "a,p,a.wav")


def test_an_unreadable_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.csv cannot be read"):
        Media(manifest=str(tmp_path / "nowhere.csv")).references()
    (tmp_path / "sessions.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a CSV table of UTF-8 text"):
        Media(manifest=str(tmp_path / "sessions.csv")).references()


def test_another_list_is_another_data_set_and_another_place_is_not(tmp_path: Path) -> None:
    alone: dict[str, Any] = {
        "visual": VisualSettings(extractor="none"),
        "text": TextSettings(extractor="none"),
    }
    first = Media(manifest=str(manifest(tmp_path, HEADER, "a,p,a.mp4,,,")), **alone).options()
    (tmp_path / "moved").mkdir()
    moved = Media(manifest=str(manifest(tmp_path / "moved", HEADER, "a,p,a.mp4,,,")), **alone).options()
    other = Media(manifest=str(manifest(tmp_path, HEADER, "b,p,a.mp4,,,")), **alone).options()
    assert first == moved != other


def test_a_file_that_is_missing_or_broken_refuses_its_session_with_row_and_column(
    tmp_path: Path, weights: Path
) -> None:
    write_wave(tmp_path / "good.wav", tone(1.0))
    write_rows(tmp_path / "bad.csv", "start,end,label", "0,1,happy")
    corpus = Media(
        manifest=str(
            manifest(
                tmp_path,
                HEADER,
                "good,p,,good.wav,,",
                "missing,p,missing.mp4,good.wav,,",
                "label,p,,good.wav,,bad.csv",
                "text,p,,good.wav,good.wav,",
            )
        ),
        visual=VisualSettings(weights=str(weights)),
        text=TextSettings(model=str(bert_folder())),
    )
    good, *others = corpus.references()
    corpus.load(good).check(classes=4)
    said = []
    for reference in others:
        with pytest.raises(RefusedSessionError) as refusal:
            corpus.load(reference)
        said.append(str(refusal.value))
    assert "'missing' (sessions.csv, row 3): visual: " in said[0] and "missing.mp4 cannot be read" in said[0]
    assert "'label' (sessions.csv, row 4): unknown label 'happy'" in said[1]
    assert "'text' (sessions.csv, row 5): text: good.wav: transcripts end in" in said[2]


def test_real_speech_with_a_talking_face_is_one_session_of_three_modalities(tmp_path: Path, weights: Path) -> None:
    folder = real_media()
    shutil.copyfile(folder / "video" / "carphone_pristine.mp4", tmp_path / "face.mp4")
    shutil.copyfile(folder / "video" / "bigbuckbunny.mp4", tmp_path / "bunny.mp4")
    for ending in ("wav", "json"):
        shutil.copyfile(folder / "speech" / f"{SPEECH}.{ending}", tmp_path / f"speech.{ending}")
    write_rows(tmp_path / "labels.csv", "start,end,label", "0,2.2,curious", "2.2,4,bored")
    corpus = Media(
        manifest=str(
            manifest(tmp_path, HEADER, "talk,a,face.mp4,speech.wav,speech.json,labels.csv", "bunny,b,bunny.mp4,,,")
        ),
        visual=VisualSettings(weights=str(weights)),
        text=TextSettings(model=str(bert_folder())),
    )
    talk, bunny = (corpus.load(reference) for reference in corpus.references())
    talk.check(classes=4)
    bunny.check(classes=4)
    assert (talk.num_steps, bunny.num_steps) == (8, 6)
    assert talk.labels.tolist() == [1, 1, 2, 2, -100, -100, -100, -100]
    assert talk.present["audio"].all()
    assert talk.present["visual"].tolist() == [True] * 4 + [False] * 4
    assert talk.present["text"].tolist() == [True] * 7 + [False]
    assert bunny.present["audio"].all() and bunny.present["visual"].all() and not bunny.present["text"].any()
    assert (bunny.labels == -100).all()


def command(folder: Path, output: Path, *more: str) -> list[str]:
    """What a user types after jobs/prepare.py."""
    return [
        "--corpus", "media", "--manifest", str(folder / "sessions.csv"), "--output", str(output),
        f"options.visual.weights={folder / 'resnet18.safetensors'}", f"options.text.model={bert_folder()}",
        "options.visual.frames_per_second=2", *more,
    ]  # fmt: skip


@pytest.mark.scenario
@pytest.mark.ray
@pytest.mark.slow
def test_rendered_recordings_become_shards_train_an_epoch_and_are_predicted(ray_cluster: None, tmp_path: Path) -> None:
    folder, output = tmp_path / "recordings", tmp_path / "data"
    folder.mkdir()
    render_sessions(folder, sessions=6, speakers=3, seconds=4.0)
    save_resnet(folder / "resnet18.safetensors")
    settings, _ = parse(PrepareSettings, command(folder, output), description="")
    made = make_data_set(settings, report=lambda _: None)
    assert made == read_manifest(output)
    assert made.dimensions == {"audio": 40, "visual": 512, "text": 384}
    assert sum(split.sessions for split in made.splits.values()) == 6
    features = made.provenance["features"]
    assert len(features["visual"]["sha256"]["resnet18.safetensors"]) == 64
    assert {"model.safetensors", "tokenizer.json"} <= set(features["text"]["sha256"])

    corpus = settings.build()
    by_id = {reference.session_id: reference for reference in corpus.references()}
    for split in made.splits:
        store = load_split(output, made, split)
        for index, session_id in enumerate(store.session_ids):
            stored, loaded = store.session(index, made), corpus.load(by_id[session_id])
            np.testing.assert_array_equal(stored.labels, loaded.labels)
            for name in made.dimensions:
                np.testing.assert_array_equal(stored.present[name], loaded.present[name])
                np.testing.assert_allclose(stored.features[name], loaded.features[name], atol=1e-5)
            if (folder / f"{session_id}.wav").exists():
                np.testing.assert_allclose(
                    stored.features["audio"], by_torchaudio(folder / f"{session_id}.wav"), atol=1e-5
                )

    settings_of_training = TrainSettings.model_validate(
        {
            "data": str(output),
            "output": str(tmp_path / "runs"),
            "model": {"d_model": 16, "layers": 1, "heads": 2},
            "training": {"epochs": 1, "batch_size": 4, "warmup_epochs": 0, "decay_epochs": []},
        }
    )
    outcome = train(settings_of_training, tracker=NoTracker())
    assert outcome.progress.epoch == 1
    assert np.isfinite(outcome.progress.reports[0]["train_loss"])
    recordings_are_predicted_as_the_data_set(folder, output, outcome.folder, tmp_path)


def recordings_are_predicted_as_the_data_set(folder: Path, data: Path, run: Path, tmp_path: Path) -> None:
    """The same files once more, without labels and in another order: what comes out is what the data set gives."""
    lines = (folder / "sessions.csv").read_text().splitlines()
    unlabelled = [",".join(line.split(",")[:-1]) for line in lines]
    assert lines[0].endswith(",labels")
    write_rows(folder / "new.csv", unlabelled[0], *reversed(unlabelled[1:]), "broken,x,broken.mp4,,")
    (folder / "broken.mp4").write_bytes(b"no film")
    options = {"visual": {"weights": str(folder / "resnet18.safetensors"), "frames_per_second": 2}}
    values: dict[str, Any] = {
        "model": str(run),
        "manifest": str(folder / "new.csv"),
        "output": str(tmp_path / "predicted"),
        "options": options | {"text": {"model": str(bert_folder())}},
        "max_refused": 0.2,
    }
    with pytest.raises(UserError, match=r"visual features: the model was trained with .*frames_per_second"):
        wrong = {"visual": options["visual"] | {"frames_per_second": 1}, "text": values["options"]["text"]}
        predict(PredictSettings.model_validate(values | {"options": wrong}), dry_run=True, report=lambda _: None)
    told: list[str] = []
    result = predict(PredictSettings.model_validate(values), dry_run=False, report=told.append)
    assert any("6 of 7 recordings" in line for line in told)
    rows = pa.concat_tables(pq.read_table(path) for path in result.glob("*.parquet"))
    loaded, made = load_kept(kept_model(run / "model")), read_manifest(data)
    for split in ("train", "validation"):
        store = load_split(data, made, split)
        for index, session_id in enumerate(store.session_ids):
            with torch.no_grad():
                said = loaded.model(store.batch([index])).log_probabilities[0].exp().numpy()
            mine = rows.filter(pc.equal(rows["session_id"], session_id))
            columns = [mine[f"probability.{name}"].to_numpy() for name in made.classes]
            np.testing.assert_allclose(np.stack(columns, axis=1), said, atol=1e-5)
    again: list[str] = []
    assert predict(PredictSettings.model_validate(values), dry_run=False, report=again.append) == result
    assert "1 shards, 1 done" in again[0]


def by_torchaudio(path: Path) -> np.ndarray:
    """(steps of 1 s, 40) by torchaudio on the whole file."""
    from torchaudio.transforms import MFCC

    with wave.open(str(path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
    options = {"n_fft": 400, "hop_length": 160, "n_mels": 40, "center": False}
    library = MFCC(sample_rate=16_000, n_mfcc=40, log_mels=True, melkwargs=options)
    windows = library(torch.from_numpy(samples)).numpy().T.astype(np.float64)
    windows = (windows - windows.mean(axis=0)) / windows.std(axis=0)
    steps = (160 * np.arange(len(windows)) + 200) // 16_000
    return np.stack([windows[steps == step].mean(axis=0) for step in range(steps.max() + 1)])


def test_each_extractor_is_chosen_by_its_option(tmp_path: Path, weights: Path) -> None:
    render_sessions(tmp_path, sessions=1, speakers=1, seconds=2.0)
    shutil.copyfile(weights, tmp_path / "resnet18.safetensors")
    chosen = f"options.audio.model={save_wav2vec2(tmp_path / 'wav2vec2')}"
    more = ("options.audio.extractor=wav2vec2", chosen, "options.step_seconds=0.5")
    settings, _ = parse(PrepareSettings, command(tmp_path, tmp_path / "data", *more), description="")
    corpus = settings.build()
    session = corpus.load(corpus.references()[0])
    assert session.features["audio"].shape == (4, 32)
    assert session.step_seconds == 0.5
    sound_alone = (
        *("--corpus", "media", "--manifest", str(tmp_path / "sessions.csv")),
        *("options.visual.extractor=none", "options.text.extractor=none"),
        "options.class_names=[bored, curious, confused, frustrated]",
    )
    only, _ = parse(PrepareSettings, sound_alone, description="")
    assert only.build().dimensions == {"audio": 40}
    assert only.build().classes[0] == "bored"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("options.visual.depht=18", "visual.depht"),
        ("options.audio.extractor=mfc", "audio.extractor"),
        ("options.steps=2", "unknown option of media"),
        ("options.corruption.audio={audio_bable: 3}", "did you mean 'audio_babble'"),
        ("options.text.model=nowhere/bert", "hf download nowhere/bert"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path: Path, option: str, message: str) -> None:
    write_rows(tmp_path / "sessions.csv", "session_id,speaker_id,audio", "a,p,a.wav")
    arguments = ["--corpus", "media", "--manifest", str(tmp_path / "sessions.csv"), option]
    with pytest.raises(UserError, match=message) as refusal:
        settings, _ = parse(PrepareSettings, arguments, description="")
        settings.build().provenance()
    assert "\n" not in str(refusal.value)
