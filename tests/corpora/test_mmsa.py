"""MMSA's pickles: read without running them; utterances as steps; padding and infinities do not count."""

from __future__ import annotations

import collections
import hashlib
import os
import pickle
import pickletools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tests.corpora.published_layouts import MMSA_IDS, mmsa_split, write_mmsa

from emolab.corpora import restricted_pickle
from emolab.corpora.corpus import RefusedSessionError, SessionReference
from emolab.corpora.mmsa import Mmsa
from emolab.corpora.pickled_arrays import PickledArray
from emolab.corpora.restricted_pickle import read_pickle
from emolab.names import UserError

OneLine = Callable[..., None]
Content = dict[str, dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_mmsa(tmp_path / "mmsa")
    return tmp_path / "mmsa"


def content() -> Content:
    return {split: mmsa_split(split) for split in MMSA_IDS}


def write(folder: Path, what: object) -> Mmsa:
    (folder / "unaligned_50.pkl").write_bytes(pickle.dumps(what, protocol=4))
    return Mmsa(source=str(folder))


def reference(video: str) -> SessionReference:
    return SessionReference(session_id=f"mmsa-{video}", speaker_id=f"mmsa-{video}")


# ---- the corpus ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_videos_are_sessions_and_utterances_are_steps(tmp_path: Path, protocol: int) -> None:
    corpus = Mmsa(**write_mmsa(tmp_path / "mmsa", protocol))
    assert {each.session_id: each.published_split for each in corpus.references()} == {
        "mmsa--hyphen": "train",
        "mmsa-under_score": "validation",
        "mmsa-video_9": "test",
        "mmsa-zebra": "train",
    }
    assert corpus.dimensions == {"audio": 5, "visual": 20, "text": 16}
    assert corpus.classes == ("negative", "neutral", "positive")
    session = corpus.load(reference("-hyphen"))
    session.check(classes=3)
    assert session.num_steps == 2
    assert session.labels.tolist() == [1, 0], "clip 2 comes before clip 10"
    assert all(mask.all() for mask in session.present.values())
    # clip 2 is the second utterance, of 7 frames; clip 10 the first, of 4
    second, first = 2 + np.arange(7).mean() / 64, 1 + np.arange(4).mean() / 64
    np.testing.assert_allclose(session.features["text"][:, 3], [second, first], rtol=1e-6)
    np.testing.assert_allclose(session.features["visual"][:, 3], [second, first], rtol=1e-6)
    np.testing.assert_allclose(session.features["audio"][:, 3], [second, first], rtol=1e-6)
    silent = np.mean([1, 1 + 2 / 64, 1 + 3 / 64])
    assert session.features["audio"][1, 0] == pytest.approx(silent), "minus infinity does not count"


def test_what_is_all_padding_is_absent(folder: Path) -> None:
    whole = content()
    whole["train"]["vision"][0] = 0
    corpus = write(folder, whole)
    session = corpus.load(reference("-hyphen"))
    assert session.present["visual"].tolist() == [True, False]
    assert not session.features["visual"][1].any()
    for field in ("text", "audio", "vision"):
        whole["valid"][field][:] = np.nan
    shutil.copytree(folder, folder.parent / "copy")
    with pytest.raises(RefusedSessionError, match="under_score"):
        write(folder.parent / "copy", whole).load(reference("under_score"))


def test_scores_stand_in_for_annotations(folder: Path) -> None:
    whole = content()
    for fields in whole.values():
        del fields["annotations"], fields["text_bert"]
        fields["regression_labels"] = fields["regression_labels"].reshape(-1, 1)
        fields["id"] = fields["id"].tolist()
    corpus = write(folder, collections.OrderedDict(whole))
    assert corpus.load(reference("video_9")).labels.tolist() == [0, 2]
    assert corpus.load(reference("zebra")).features["text"][0, 0] > 50, "without a token mask padding is not known"


def test_splits_that_cut_through_videos_need_a_decision(folder: Path, one_line: OneLine) -> None:
    whole = content()
    whole["test"]["id"] = np.array(["zebra$_$2", "video_9$_$2"])
    corpus = write(folder, whole)
    with pytest.raises(
        UserError, match=r"video 'zebra' has utterances in test and train: .*options.split=speaker"
    ) as e:
        corpus.references()
    one_line(e)
    by_speaker = Mmsa(source=str(folder), split="speaker")
    assert {each.published_split for each in by_speaker.references()} == {None}
    assert by_speaker.load(reference("zebra")).labels.tolist() == [2, 0]


def test_tables_by_utterance(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("utterance,class\n-hyphen$_$10,bored\nzebra$_$1,curious\n")
    corpus = Mmsa(source=str(folder), label_table=str(table))
    assert corpus.load(reference("-hyphen")).labels.tolist() == [-100, 0]
    assert corpus.annotation_summary()["unmapped"] == {"negative": 1, "neutral": 1, "positive": 2}


def test_the_digest_is_compared_before_anything_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256((folder / "unaligned_50.pkl").read_bytes()).hexdigest()
    assert len(Mmsa(source=str(folder), sha256=digest.upper()).references()) == 4
    read: list[object] = []
    monkeypatch.setattr(restricted_pickle._Machine, "run", lambda self, content: read.append(content))
    with pytest.raises(UserError, match="its SHA-256 is not 0000"):
        Mmsa(source=str(folder), sha256="0" * 64).references()
    assert not read


def test_one_of_several_files_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "unaligned_50.pkl", folder / "aligned_50.pkl")
    with pytest.raises(UserError, match=r"holds 2 pickles \(aligned_50.pkl, unaligned_50.pkl\): name one"):
        Mmsa(source=str(folder)).references()
    assert len(Mmsa(source=str(folder), file="aligned_50.pkl").references()) == 4
    shutil.copy(folder / "aligned_50.pkl", tmp_path / "outside.pkl")
    (folder / "link.pkl").symlink_to(tmp_path / "outside.pkl")
    for name in ("../outside.pkl", str(tmp_path / "outside.pkl"), "link.pkl"):
        with pytest.raises(UserError, match="options\\.file"):
            Mmsa(source=str(folder), file=name).references()
    with pytest.raises(UserError, match="does not exist"):
        Mmsa(source=str(folder / "absent"), file="a.pkl").references()


def change(split: str, **fields: Any) -> Callable[[Content], object]:
    return lambda whole: whole[split].update(fields)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda whole: whole.pop("valid"), "expected a dictionary of train, valid, test"),
        (lambda whole: whole.update(valid=[1]), "valid: expected a dictionary of fields"),
        (lambda whole: whole["test"].pop("audio"), "test: audio is missing or not an array"),
        (change("test", audio=np.zeros((2, 5))), r"test: audio has shape \(2, 5\), expected 3 dimensions"),
        (change("test", audio=np.zeros((3, 4, 5))), "test: audio has 3 utterances, id has 2"),
        (change("test", audio=np.zeros((2, 4, 6))), r"audio has \[5, 6\] features"),
        (change("test", id=np.array(["a$_$1", "b1"])), "test: id 'b1' is not <video>"),
        (change("test", id=np.array(["a$_$1", "../b$_$1"])), "session 'mmsa-../b' is not allowed"),
        (change("test", id=np.array(["a$_$1", "a$_$1"])), "utterance 'a.*' is there twice"),
        (change("test", id=np.array([1, 2])), "id is missing or not a list of text"),
        (change("test", annotations=["Positive", "Angry"]), "annotation 'angry' is none of"),
        (change("test", annotations=["Positive"]), "1 labels for 2 utterances"),
        (change("test", text=np.array([["a"]])), "text is missing or not an array of numbers"),
    ],
)
def test_contradictions_are_named_in_one_line(
    folder: Path, spoil: Callable[[Content], object], message: str, one_line: OneLine
) -> None:
    whole = content()
    spoil(whole)
    corpus = write(folder, whole)
    with pytest.raises(UserError, match=message) as refusal:
        corpus.references()
    one_line(refusal)


# ---- pickles that are programs -------------------------------------------------------------------------------


class Payload:
    """What pickling it stores is a call."""

    def __init__(self, called: Callable[..., object], *arguments: object) -> None:
        self.call = (called, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_is_refused_and_its_payload_does_not_run(
    folder: Path, tmp_path: Path, protocol: int, one_line: OneLine
) -> None:
    canary = tmp_path / "canary"
    command = f"touch {canary}"
    for called, arguments in ((os.system, (command,)), (exec, (f"open({str(canary)!r}, 'w')",))):
        whole: dict[str, Any] = content()
        whole["train"]["audio"] = Payload(called, *arguments)
        program = pickle.dumps(whole, protocol=protocol)
        (folder / "unaligned_50.pkl").write_bytes(program)
        with pytest.raises(UserError, match=r"it names '(posix.system|\w*builtin\w*.exec)', which no file") as refusal:
            Mmsa(source=str(folder)).references()
        one_line(refusal, "unaligned_50.pkl", "nothing of it was run")
        assert not canary.exists()
        shutil.move(folder / "unaligned_50.pkl", folder / "unaligned_51.pkl")  # each file is read once per process
        pickle.loads(program)
        assert canary.exists(), "the payload is a real one"
        canary.unlink()
        shutil.move(folder / "unaligned_51.pkl", tmp_path / f"{called.__name__}.pkl")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "'os.system'"),
        (b"(S'true'\nios\nsystem\n.", "it uses INST .'os system'"),
        (b"(cnumpy\ndtype\nS'f4'\no.", "it uses OBJ"),
        (b"\x80\x02cnumpy\ndtype\n)\x81.", "it uses NEWOBJ"),
        (b"\x80\x02\x82\x01.", "it uses EXT1"),
        (b"Psecret\n.", "it uses PERSID .'secret'"),
        (b"\x80\x04\x8c\x05numpy\x8c\x09load.evil\x93.", "'numpy.load.evil'"),
        (b"\x80\x04\x8c\x05numpy\x8c\x04load\x93.", "'numpy.load'"),
        (b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.", "'builtins.getattr'"),
        (b"\x80\x04\x8c\x08builtins\x8c\x05bytes\x93K\x05\x85R.", "not a whole pickle"),
        (b"cnumpy\nndarray\n(I1\ntR.", "class that only ever is an argument"),
        (b"c__builtin__\nbytes\n(I1000000000000\ntR.", "not a whole pickle"),
        (b"c_codecs\nencode\n(Vx\nVrot13\ntR.", "an encoding other than latin1"),
        (b"ccollections\nOrderedDict\n(I1\ntR.", "a dictionary that is not one"),
        (b"cnumpy\ndtype\n}S'code'\nI1\nsb.", "sets the state of a Name"),
        (b"cnumpy\ndtype\n(S'f4'\ntR(I3\nS'<'\nS'x'\nNNI-1\nI-1\nI0\ntb.", "a structured data type"),
        (b"cnumpy\ndtype\n(S'V8'\ntR.", "data type 'V8'"),
        (b"cnumpy\ndtype\n(S'M8[ns]'\ntR.", "data type"),
        (b"I1\nI2\nR.", "calls what is not a name"),
        (b"]I1\nI2\ns.", "what is not a dictionary"),
        (b"}I1\na.", "what is not a list"),
        (b"}]I2\ns.", "keys are not text or numbers"),
        (b"\x80\x04]\x94h\x05.", "not a whole pickle"),
        (b"\x80\x04]", "not a whole pickle"),
        (b"I1\n", "not a whole pickle"),
        (b".", "not a whole pickle"),
        (b"", "0 bytes"),
        (b"\x80\x04B\xff\xff\xff\xffabc.", "not a whole pickle"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "not a whole pickle"),
        (b"I" + b"9" * 100_000 + b"\n.", "not a whole pickle"),
        (b"\x80\x02]r\xff\xff\xff\xff.", None),
    ],
)
def test_only_plain_containers_and_arrays_pass(tmp_path: Path, program: bytes, message: str | None) -> None:
    path = tmp_path / "program.pkl"
    path.write_bytes(program)
    if message is None:
        assert read_pickle(path) == [], "a memo index of four thousand million costs nothing"
        return
    with pytest.raises(UserError, match=message) as refusal:
        read_pickle(path)
    assert "\n" not in str(refusal.value)


def test_arrays_are_as_large_as_they_say(tmp_path: Path) -> None:
    intact = pickle.dumps(np.arange(3, dtype=np.float32), protocol=4)
    assert intact.count(b"K\x03\x85") == 1, "the shape"
    path = tmp_path / "array.pkl"
    path.write_bytes(intact.replace(b"K\x03\x85", b"K\x04\x85"))
    with pytest.raises(UserError, match="an array of 12 bytes that says it has another size"):
        read_pickle(path)


def test_instructions_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.pkl"
    path.write_bytes(pickle.dumps(list(range(100))))
    assert read_pickle(path) == list(range(100))
    monkeypatch.setattr(restricted_pickle, "MAXIMUM_INSTRUCTIONS", 50)
    with pytest.raises(UserError, match="more than 50 instructions"):
        read_pickle(path)
    monkeypatch.setattr(restricted_pickle, "MAXIMUM_BYTES", 50)
    with pytest.raises(UserError, match="expected 1 to 50"):
        read_pickle(path)


@given(
    values=arrays.arrays(
        dtype=st.sampled_from(["f4", ">f4", "f8", "f2", "i8", "i4", "u1", "?", "U3", "S2"]),
        shape=arrays.array_shapes(min_dims=0, max_dims=3, min_side=0),
    ),
    protocol=st.integers(2, 5),
    fortran=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_arrays_arrive_as_they_were_pickled(
    tmp_path_factory: pytest.TempPathFactory, values: np.ndarray, protocol: int, fortran: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "array.pkl"
    path.write_bytes(pickle.dumps([np.asfortranarray(values) if fortran else values], protocol=protocol))
    found = read_pickle(path)[0]
    assert isinstance(found, PickledArray)
    if values.dtype.kind in "US":
        assert sorted(map(str, found.values)) == sorted(map(str, values.reshape(-1).tolist()))
    else:
        np.testing.assert_array_equal(found.values, values)
        assert found.values.dtype == values.dtype
        with pytest.raises(ValueError, match="read-only"):
            found.values[...] = 0


def test_large_arrays_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "large.pkl"
    path.write_bytes(pickle.dumps(np.arange(5000.0), protocol=4))
    owner: Any = read_pickle(path).values
    while getattr(owner, "base", None) is not None:
        owner = owner.base
    assert isinstance(owner, memoryview)
    assert type(owner.obj).__name__ == "mmap"


INTACT = pickle.dumps(content(), protocol=4)


@given(
    keep=st.floats(0, 1),
    flips=st.lists(st.tuples(st.integers(0, len(INTACT) - 1), st.integers(1, 255)), max_size=6),
    header=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_truncated_and_flipped_bytes_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, keep: float, flips: list[tuple[int, int]], header: bool
) -> None:
    damaged = bytearray(INTACT)
    for place, mask in flips:
        damaged[place % 400 if header else place] ^= mask
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "a.pkl").write_bytes(damaged if flips else damaged[: round(keep * len(damaged))])
    _outcome(folder)


@given(program=st.binary(max_size=60))
@settings(max_examples=60, deadline=None)
def test_no_bytes_break_the_reader(tmp_path_factory: pytest.TempPathFactory, program: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.pkl"
    path.write_bytes(program)
    try:
        read_pickle(path)
    except UserError as error:
        assert "\n" not in str(error)


@given(
    program=st.lists(st.sampled_from([op.code.encode("latin1") for op in pickletools.opcodes]), max_size=30),
    tail=st.binary(max_size=10),
)
@settings(max_examples=60, deadline=None)
def test_no_instructions_break_the_reader(
    tmp_path_factory: pytest.TempPathFactory, program: list[bytes], tail: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "program.pkl"
    path.write_bytes(b"".join(program) + tail + b".")
    try:
        read_pickle(path)
    except UserError as error:
        assert "\n" not in str(error)


def _outcome(folder: Path) -> None:
    try:
        corpus = Mmsa(source=str(folder), split="speaker")
        for each in corpus.references():
            corpus.load(each).check(classes=3)
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        shutil.rmtree(folder)
