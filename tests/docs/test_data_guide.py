"""docs/data.md: its files are read, its commands run, its refusals are what is said, its tables name every option."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq
import pytest
from tests.docs.guides import blocks, files, guide, quoted, rows, write
from tests.features.media_files import bert_folder, plain, save_resnet, tone, write_video, write_wave
from tests.jobs.test_jobs import run_here

from emolab.configuration import Settings, parse
from emolab.corpora.catalog import corpora, corpus_class
from emolab.corpora.corpus import RefusedSessionError
from emolab.corpora.iemocap import Iemocap
from emolab.corpora.labels import LabelledCorpus
from emolab.corpora.media import Media
from emolab.corpora.recordings import PAPER_CLASSES, RecordedCorpus
from emolab.corpora.signal_noise import SignalNoise
from emolab.features.audio import AudioSettings
from emolab.features.text import TextSettings
from emolab.features.transcripts import read_words
from emolab.features.visual import VisualSettings
from emolab.names import UserError
from emolab.sessions.manifest import read_manifest
from emolab.sessions.settings import PrepareSettings

TEXT = guide("data.md")
FILES = files(TEXT)
SECONDS = 6.0
LISTS = ("sessions.csv", "new.csv")
"""Their first column names a session, the others its files."""


def media_named(content: str) -> set[str]:
    """Files that a list of sessions names."""
    return {cell for row in content.splitlines()[1:] for cell in row.split(",")[2:] if cell}


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the guide describes it: the files it shows, media of six seconds, weights."""
    root = tmp_path_factory.mktemp("guide")
    recordings = root / "recordings"
    write(recordings, FILES)
    for name in sorted(set().union(*(media_named(FILES[each]) for each in LISTS))):
        path = recordings / name
        if path.suffix == ".mp4":
            sound = None if name == "algebra-2.mp4" else tone(SECONDS, rate=48_000)
            write_video(path, lambda time: plain(40 + 10 * int(time)), SECONDS, samples=sound)
        elif path.suffix == ".wav":
            write_wave(path, tone(SECONDS))
        elif name.endswith(".labels.csv"):
            path.write_text(FILES["algebra-1.labels.csv"])
    (root / "weights").mkdir()
    save_resnet(root / "weights" / "resnet18.safetensors")
    (root / "weights" / "bert-base-uncased").symlink_to(bert_folder())
    return root


def test_every_example_has_three_rows() -> None:
    assert set(FILES) >= {"sessions.csv", "new.csv", "algebra-1.labels.csv", "algebra-1.json", "spoken.json"}
    for name in (name for name in FILES if name.endswith(".csv")):
        assert len(FILES[name].splitlines()) == 4, name


def run_commands(
    jobs: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some of the commands of the guide, as they stand there."""
    commands = next(block for block in blocks(TEXT) if "jobs/prepare.py" in block.text).commands
    assert [words[:2] for words in commands] == [
        ["python", f"jobs/{job}.py"] for job in ("prepare", "train", "predict")
    ]
    for words in commands:
        job = Path(words[1]).stem
        if job in jobs:
            ended = run_here(job, *words[2:], cwd=folder, monkeypatch=monkeypatch, capsys=capsys)
            assert ended.status == 0, ended.errors


@pytest.mark.scenario
@pytest.mark.ray
@pytest.mark.slow
def test_the_recordings_of_the_guide_become_a_data_set(
    laid_out: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_commands(["prepare"], laid_out, monkeypatch, capsys)
    manifest = read_manifest(laid_out / "data" / "mine")
    assert {name: split.sessions for name, split in manifest.splits.items()} == dict.fromkeys(manifest.splits, 1)
    assert manifest.classes == list(PAPER_CLASSES)
    assert manifest.dimensions == {"audio": 40, "visual": 512, "text": 384}
    assert sum(sum(split.label_counts) for split in manifest.splits.values()) == 3 * 5


@pytest.mark.scenario
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_lead_from_media_to_predictions(
    laid_out: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_commands(["prepare", "train", "predict"], laid_out, monkeypatch, capsys)
    table = pq.read_table(sorted((laid_out / "runs" / "new").glob("*.parquet")))
    assert set(table["session_id"].to_pylist()) == {"geometry-1", "geometry-2", "geometry-3"}
    assert table.num_rows == 3 * SECONDS


def heard(recordings: Path) -> Media:
    """The sessions of a folder as the job reads them; what is heard is enough here."""
    return Media(
        manifest=str(recordings / "sessions.csv"),
        visual=VisualSettings(extractor="none"),
        text=TextSettings(extractor="none"),
    )


def test_labels_become_the_steps_that_the_guide_says(laid_out: Path) -> None:
    corpus = heard(laid_out / "recordings")
    session = corpus.load(corpus.references()[0])
    names = [None if label < 0 else corpus.classes[label] for label in session.labels.tolist()]
    assert names == ["curious", "curious", "confused", "confused", None, "bored"]


def test_the_transcripts_say_what_they_seem_to(laid_out: Path) -> None:
    spoken = {
        name: read_words(laid_out / "recordings" / name) for name in FILES if name.endswith((".json", ".vtt", ".srt"))
    }
    assert len(spoken) == 4
    for name, words in spoken.items():
        assert [word.text for word in words][:3] == ["what", "is", "this"], name
        assert words[0].start == pytest.approx(0.2)
        assert words[2].end == pytest.approx(1.5), name
    assert spoken["algebra-2.vtt"] == spoken["algebra-3.srt"]


@pytest.mark.parametrize(("file", "line", "said"), rows(TEXT, "file"))
def test_what_the_guide_says_is_refused_is_refused_so(
    file: str, line: str, said: str, laid_out: Path, tmp_path: Path
) -> None:
    (name,), (row,), (message,) = quoted(file), quoted(line), quoted(said)
    corpus = heard(shutil.copytree(laid_out / "recordings", tmp_path / "recordings"))
    with (tmp_path / "recordings" / name).open("a") as target:
        target.write(f"{row}\n")
    listed = name == "sessions.csv"
    if listed and "session alone" not in said:
        with pytest.raises(UserError) as refusal:
            corpus.references()
    else:
        with pytest.raises(RefusedSessionError) as refusal:
            corpus.load(corpus.references()[-1 if listed else 0])
        corpus.load(corpus.references()[1])
    assert message in str(refusal.value)


def test_the_class_names_that_the_guide_gives_are_taken() -> None:
    given = next(each for each in quoted(TEXT) if "class_names=[" in each).strip('"')
    settings, _ = parse(PrepareSettings, ["--corpus", "media", "--manifest", "sessions.csv", given], description="")
    assert settings.build().classes == ("calm", "lost")


@pytest.mark.parametrize("name", ["by-label.csv", "by-utterance.csv", "by-annotator.csv", "table.yaml"])
def test_a_label_table_of_the_guide_is_read(name: str, laid_out: Path) -> None:
    table = Iemocap(source=str(laid_out), label_table=str(laid_out / "recordings" / name)).table
    assert set(table.classes) <= set(PAPER_CLASSES)
    assert table.class_name("Ses01F_impro01_F000", "fru") == ("frustrated" if name == "by-label.csv" else "curious")


def test_the_table_of_corpora_names_every_option_of_every_corpus() -> None:
    listed = {quoted(first)[0]: set(quoted(options)) for first, _, options in rows(TEXT, "corpus")}
    assert set(listed) == set(corpora())
    shared = {"step_seconds", "max_hours", "audio", "visual", "text", "corruption"}
    for name, options in listed.items():
        corpus: Any = corpus_class(name)
        known = {each.name for each in fields(corpus) if each.init} - {"source", "manifest"}
        if issubclass(corpus, RecordedCorpus):
            known -= shared if name == "media" else {*shared, "class_names"}
        assert known <= options, name
        mentioned = options - known - {"DIALOGUE"}
        values = {value for each in fields(corpus) for value in get_args(each.type)} | {"emotion", "sentiment"}
        assert all(name_is_value(each, values) for each in mentioned), (name, mentioned)


def name_is_value(word: str, values: set[Any]) -> bool:
    """Whether a word of the last column is one of an option's values, or shows how utterances are called."""
    return word in values | {"published", "speaker", "episode", "sentences", "dialog"} or any(c.isupper() for c in word)


@pytest.mark.parametrize(
    ("prefix", "settings"),
    [("audio", AudioSettings), ("visual", VisualSettings), ("text", TextSettings), ("corruption", SignalNoise)],
)
def test_every_setting_of_an_extractor_is_named(prefix: str, settings: type[Settings]) -> None:
    named = {word.removeprefix(f"{prefix}.") for word in quoted(TEXT) if word.startswith(f"{prefix}.")} - {"*"}
    assert named == set(settings.model_fields)


def test_which_corpora_have_label_tables_is_as_the_guide_says() -> None:
    sentence = TEXT[TEXT.index("## Label tables") :].split("`own`")[0]
    labelled = {name for name, each in corpora().items() if issubclass(each, LabelledCorpus)}
    assert {word for word in quoted(sentence) if word in corpora()} == labelled


def test_the_default_weights_are_those_that_the_guide_names() -> None:
    for name in (AudioSettings().model, TextSettings().model, f"timm/resnet{VisualSettings().depth}.tv_in1k"):
        assert f"`{name}`" in TEXT
    for settings in (TextSettings(model="nowhere/such"), VisualSettings(weights="nowhere/such")):
        with pytest.raises(UserError, match="hf download nowhere/such"):
            settings.identity()
