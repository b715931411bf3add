"""Every reader of what others may have written takes it or refuses it in one line. It never crashes, and runs nothing.

Inputs are valid documents, damaged at places drawn from a fixed seed. Where a digest would stop them at the door, it is
made to fit: these are files that somebody wrote on purpose. Readers run in a child, so that a crash of a library's
compiled code would be counted and not end the tests.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving.parts import make_data

from emolab import checkpoint
from emolab.checkpoint import Checkpoint
from emolab.corpora.media import Media
from emolab.corpora.mmsa import Mmsa
from emolab.features.annotations import read_spans
from emolab.features.decoding import UnusableMediaError
from emolab.features.transcripts import read_words
from emolab.names import UserError
from emolab.robustness.shipped import shipped_suites
from emolab.robustness.suites import load_suite
from emolab.sessions.loading import load_split
from emolab.sessions.manifest import FILE_NAME, Manifest, read_manifest, write_manifest
from emolab.sessions.shards import sha256
from emolab.training.recipe import TrainSettings
from emolab.tuning.space import read_space

pytestmark = pytest.mark.fault
INPUTS = 150
SPACES = Path(__file__).parent.parent.parent / "search_spaces"
TOKENS = [b"1e999", b"-1", b"null", b"NaN", b"true", b'""', b"[]", b"{}", b"\x00", b"\xff\xfe", b"../../x", b"9" * 400]
TOKENS += [b"[" * 3000, b"{a: " * 500, b"&a [*a]", b"!!python/name:os.system", b"\r\n\r\n", "🦆".encode(), b"-->", b","]


@dataclass(frozen=True)
class Reader:
    """One way in."""

    name: str
    file: str
    """That is damaged, below the folder."""
    make: Callable[[Path], None]
    """Writes valid files."""
    read: Callable[[Path], object]
    refusals: tuple[type[Exception], ...] = (UserError,)


def make_transcript(suffix: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / f"t{suffix}").write_text(text) and None


def make_checkpoint(folder: Path) -> None:
    tensors = {"model": {"w": torch.arange(12.0).view(3, 4)}, "optimizer": {"0.step": torch.tensor(2.0)}}
    checkpoint.save(folder / "c", Checkpoint(tensors=tensors, state={"epoch": 1, "reports": [{"a": 1.5}]}))


def read_checkpoint(folder: Path) -> object:
    """With digests that fit whatever stands there."""
    record = folder / "c" / checkpoint.MANIFEST
    names = [path.name for path in (folder / "c").iterdir() if path.name != checkpoint.MANIFEST]
    record.write_text(json.dumps({"sha256": {name: sha256(folder / "c" / name) for name in names}}))
    return checkpoint.load(folder / "c")


def read_shards(folder: Path) -> object:
    """With a manifest that fits whatever stands there."""
    values = json.loads((folder / FILE_NAME).read_text())
    for shard in values["shards"]:
        shard["sha256"] = sha256(folder / shard["path"])
    del values["sha256"]
    write_manifest(Manifest.model_validate(values), folder)
    return load_split(folder, read_manifest(folder), "train")


def first_part(folder: Path) -> None:
    make_data(folder)


WORDS = '[{"word": "hello", "start": 0.1, "end": 0.4}, {"word": "again", "start": 0.5, "end": 0.9}]'
VTT = "WEBVTT\n\n00:00.100 --> 00:00.400\nhello there\n\n00:00.500 --> 00:00.900\n<i>again</i>\n"
SRT = "1\n00:00:00,100 --> 00:00:00,400\nhello\n\n2\n00:00:00,500 --> 00:00:00,900\nagain\n"
TABLE = "session_id,speaker_id,video,audio,transcript,labels\na,p,a.mp4,,a.json,a.csv\nb,q,,b.wav,,\n"
LABELS = "start,end,label\n0,1.5,bored\n1.5,3,curious\n"


def make_pickle(folder: Path) -> None:
    """An MMSA file as it is published."""
    from tests.corpora.test_mmsa import content

    (folder / "unaligned_50.pkl").write_bytes(pickle.dumps(content(), protocol=4))


READERS = [
    Reader("manifest", FILE_NAME, first_part, read_manifest),
    Reader("shard", "train/part-00000.parquet", first_part, read_shards),
    Reader("checkpoint, tensors", "c/model.safetensors", make_checkpoint, read_checkpoint),
    Reader("checkpoint, state", "c/state.json", make_checkpoint, read_checkpoint),
    Reader("checkpoint, manifest", f"c/{checkpoint.MANIFEST}", make_checkpoint, lambda f: checkpoint.load(f / "c")),
    Reader(
        "search space",
        "space.yaml",
        lambda folder: shutil.copy(SPACES / "wide.yaml", folder / "space.yaml") and None,
        lambda folder: read_space(folder / "space.yaml", TrainSettings()),
    ),
    Reader(
        "suite",
        "suite.yaml",
        lambda folder: shutil.copy(shipped_suites()["standard"], folder / "suite.yaml") and None,
        lambda folder: load_suite(folder / "suite.yaml"),
    ),
    *(
        Reader(
            f"transcript, {suffix}",
            f"t{suffix}",
            make_transcript(suffix, text),
            lambda folder, suffix=suffix: read_words(folder / f"t{suffix}"),
            (UnusableMediaError,),
        )
        for suffix, text in ((".json", WORDS), (".vtt", VTT), (".srt", SRT))
    ),
    Reader(
        "labels",
        "labels.csv",
        lambda folder: (folder / "labels.csv").write_text(LABELS) and None,
        lambda folder: read_spans(folder / "labels.csv"),
        (UnusableMediaError,),
    ),
    Reader(
        "table of recordings",
        "sessions.csv",
        lambda folder: (folder / "sessions.csv").write_text(TABLE) and None,
        lambda folder: Media(manifest=str(folder / "sessions.csv")).recordings(),
    ),
    Reader(
        "published pickle",
        "unaligned_50.pkl",
        make_pickle,
        lambda folder: Mmsa(source=str(folder)).references(),
    ),
]
BY_NAME = {reader.name: reader for reader in READERS}


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A copy with one to four things done to it."""
    value = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(value) + 1)
        match draw.randrange(5):
            case 0 if value:
                value[at % len(value)] ^= 1 << draw.randrange(8)
            case 1:
                del value[at : at + draw.choice((1, 4, 40, 4000))]
            case 2:
                value[at:at] = draw.choice(TOKENS)
            case 3:
                value[at : at + draw.choice((1, 3, 9))] = draw.choice(TOKENS)
            case _:
                value[at:at] = value[max(0, at - draw.choice((5, 60))) : at]
    return bytes(value)


def outcome(reader: Reader, folder: Path) -> str:
    """ "" for a reader that did as it should: an answer, or a refusal in one line."""
    try:
        reader.read(folder)
    except reader.refusals as refusal:
        return "a refusal of several lines" if "\n" in str(refusal) else ""
    except BaseException as error:  # the finding
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def fuzz(name: str, folder: Path, answer: Connection) -> None:
    """In the child: every input's outcome."""
    reader = BY_NAME[name]
    reader.make(folder)
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    victim = folder / reader.file
    assert outcome(reader, folder) == "", outcome(reader, folder)
    for number in range(INPUTS):
        for path, content in whole.items():
            path.write_bytes(content)
        place = folder
        if name == "published pickle":  # read once per process and path
            place = folder / str(number)
            place.mkdir()
            victim = place / reader.file
        victim.write_bytes(damaged(whole[folder / reader.file], random.Random(f"{name} {number}")))
        answer.send((number, outcome(reader, place)))
    answer.close()


@pytest.mark.parametrize("name", BY_NAME)
def test_damaged_input_is_taken_or_refused_and_never_crashes(
    name: str, tmp_path: Path, record_faults: Callable[..., None]
) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=fuzz, args=(name, tmp_path, theirs))
    child.start()
    theirs.close()
    outcomes: dict[int, str] = {}
    while True:
        if not ours.poll(60):
            child.kill()
            break
        try:
            number, said = ours.recv()
        except EOFError:
            break
        outcomes[number] = said
    child.join()
    wrong = {number: said for number, said in outcomes.items() if said}
    record_faults("input", f"{name}: damaged", tried=INPUTS, survived=len(outcomes) - len(wrong))
    assert not wrong
    assert len(outcomes) == INPUTS, f"input {len(outcomes)} ended the process: {child.exitcode}"


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def attacks(canary: Path) -> dict[str, bytes]:
    """Files that run a command in readers that trust them."""
    command = f"touch {canary}"
    return {
        **{f"pickle, protocol {n}": pickle.dumps(Payload(command), protocol=n) for n in range(6)},
        "yaml, apply": f'!!python/object/apply:os.system ["{command}"]\n'.encode(),
        "yaml, new": f'parameters: !!python/object/new:os.system ["{command}"]\n'.encode(),
        "yaml, exec": f"a: !!python/object/apply:exec [\"import os; os.system('{command}')\"]\n".encode(),
        "json": json.dumps({"py/object": "os.system", "py/reduce": [{"py/function": "os.system"}, [command]]}).encode(),
        "shell": f"$({command})`{command}`;{command}|{command}\n".encode(),
        "formula": f"session_id,speaker_id,audio\n=cmd|'/c {command}'!A1,{{{{7*7}}}},$({command})\n".encode(),
        "template": f"{{{{ cycler.__init__.__globals__.os.system('{command}') }}}}".encode(),
    }


def test_no_payload_runs_in_any_reader(tmp_path: Path, record_faults: Callable[..., None]) -> None:
    canary = tmp_path / "canary"
    tried, crashed, ran = 0, [], 0
    for reader in READERS:
        for number, (attack, content) in enumerate(attacks(canary).items()):
            folder = tmp_path / reader.name.replace(", ", "-").replace(" ", "-") / str(number)
            folder.mkdir(parents=True)
            reader.make(folder)
            (folder / reader.file).write_bytes(content)
            said = outcome(reader, folder)
            tried += 1
            crashed += [f"{reader.name}, {attack}: {said}"] if said else []
            ran += canary.exists()
            canary.unlink(missing_ok=True)
    record_faults("input", "payloads in every reader", tried=tried, survived=tried - max(ran, len(crashed)))
    assert not crashed
    assert ran == 0
    pickle.loads(attacks(canary)["pickle, protocol 4"])
    assert canary.exists(), "the payload is a real one"
