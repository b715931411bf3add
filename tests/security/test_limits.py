"""Files that others wrote are refused before they fill the memory or the stack, in one line that names them."""

import os
import re
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.corpora.test_labels import Dialogues

from emolab.configuration import parse, read_yaml
from emolab.corpora.media import Media
from emolab.features.annotations import read_spans
from emolab.features.transcripts import read_words
from emolab.limits import TABLE_BYTES, YAML_BYTES, RepeatedKeyError, load_yaml, read_bytes
from emolab.names import UserError
from emolab.robustness.suites import load_suite
from emolab.sessions.manifest import read_manifest
from emolab.training.recipe import TrainSettings
from emolab.tuning.settings import TuneSettings

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n" for before, after in pairwise("abcdefghi")
)
"""Nine lines that stand for a billion values."""
BOMBS = {
    "aliases of aliases": LAUGHS,
    "merged keys": "a: &a {k: 1}\n" + "".join(f"b{i}: &b{i} {{<<: [{', '.join(['*a'] * 1000)}]}}\n" for i in range(40)),
    "depth": "[" * 600,
    "depth of mappings": "{a: " * 600,
    "an alias of itself": "a: &a [*a]\n",
    "no date": "a: !!timestamp 2024-99-99\n",
    "no number": "a: " + "9" * 5000 + "\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_yaml_bomb_is_refused_at_once(name: str, tmp_path: Path) -> None:
    file = tmp_path / "bomb.yaml"
    file.write_text(BOMBS[name])
    started = time.process_time()  # however long others hold the processor
    for reader in (read_yaml, load_suite):
        with pytest.raises(UserError, match=r"bomb\.yaml") as error:
            reader(file)
        assert "\n" not in str(error.value)
    assert time.process_time() - started < 10


def test_aliases_in_reason_are_read() -> None:
    assert load_yaml("a: &a [1, 2]\nb: *a\nc: {<<: {d: *a}}\n") == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}
    assert load_yaml("") is None


TWICE = {
    "side by side": ("epochs: 1\nseed: 2\nepochs: 3\n", "'epochs' is there 2 times, in lines 1 and 3"),
    "three times": ("a: 1\na: 2\na: 3\n", "'a' is there 3 times, in lines 1, 2 and 3"),
    "deep in it": ("a:\n  - b: {c: 1}\n  - {low: 1, high: 2, low: 3}\n", "'low' is there 2 times, in line 3"),
    "in what an alias stands for": ("a: &a\n  b: 1\n  b: 2\nc: *a\n", "'b' is there 2 times, in lines 2 and 3"),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_key_that_is_there_twice_is_refused_with_its_file_and_lines(name: str, tmp_path: Path) -> None:
    text, message = TWICE[name]
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    for reader in (read_yaml, load_suite):
        with pytest.raises(UserError, match=rf"mine\.yaml: {message}: keep one"):
            reader(file)
    with pytest.raises(UserError, match="'corpus' is there 2 times, in line 1"):
        parse(TuneSettings, ["prepare={corpus: a, corpus: b}"], description="")


def test_the_same_key_of_two_mappings_or_of_another_kind_is_no_repetition() -> None:
    assert load_yaml("a: {k: 1}\nb: {k: 2}\n") == {"a": {"k": 1}, "b": {"k": 2}}
    assert load_yaml("1: a\n'1': b\n") == {1: "a", "1": "b"}
    assert load_yaml("a: &a {k: 1}\nb: {<<: *a, k: 2}\n")["b"] == {"k": 2}


def has_a_key_twice(node: yaml.Node | None) -> bool:
    if isinstance(node, yaml.SequenceNode):
        return any(has_a_key_twice(part) for part in node.value)
    if not isinstance(node, yaml.MappingNode):
        return False
    keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    return len(set(keys)) < len(keys) or any(has_a_key_twice(part) for pair in node.value for part in pair)


NOT_OF_1_2 = re.compile(r"[0-9][0-9_]*:|0[0-9]|[0-9]{4}-")
"""What PyYAML may read as a number to the base 60, an octal number or a date, none of which version 1.2 knows."""


@given(st.text(max_size=60))
def test_whatever_a_text_holds_it_is_read_as_pyyaml_would_or_refused(text: str) -> None:
    try:
        expected = yaml.safe_load(text)
    except Exception:
        with pytest.raises(yaml.YAMLError):
            load_yaml(text)
        return
    assume(NOT_OF_1_2.search(text) is None)
    if has_a_key_twice(yaml.compose(text)):
        with pytest.raises(RepeatedKeyError):
            load_yaml(text)
    else:
        assert repr(load_yaml(text)) == repr(expected)


@pytest.mark.parametrize(
    "override", ["name=!!timestamp 2024-99-99", "training.epochs=" + "9" * 5000, "name=" + "[" * 600]
)
def test_an_override_cannot_break_the_parser(override: str) -> None:
    with pytest.raises(UserError, match="cannot read the value"):
        parse(TrainSettings, [override], description="")


def a_list_of_sessions(path: Path) -> object:
    return Media(manifest=str(path)).recordings()


def a_table_of_labels(path: Path) -> object:
    return Dialogues(label_table=str(path)).table


@pytest.mark.parametrize(
    ("name", "bytes_", "reader"),
    [
        ("dataset.json", TABLE_BYTES, lambda path: read_manifest(path.parent)),
        ("sessions.csv", TABLE_BYTES, a_list_of_sessions),
        ("labels.csv", TABLE_BYTES, a_table_of_labels),
        ("labels.yaml", YAML_BYTES, a_table_of_labels),
        ("space.yaml", YAML_BYTES, read_yaml),
        ("suite.yaml", YAML_BYTES, load_suite),
        ("spans.csv", 64 * 2**20, read_spans),
        ("words.json", 64 * 2**20, read_words),
        ("words.vtt", 64 * 2**20, read_words),
    ],
)
def test_a_file_larger_than_its_kind_is_refused(
    name: str, bytes_: int, reader: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.touch()
    os.truncate(path, bytes_ + 1)  # takes no room on the disk
    with pytest.raises(UserError, match=f"larger than {bytes_ >> 20} MB") as error:
        reader(path)
    assert name in str(error.value)


def test_a_pipe_that_never_ends_is_cut_off(tmp_path: Path) -> None:
    endless = tmp_path / "endless"
    endless.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="larger than 1 MB"):
        read_bytes(endless, most=YAML_BYTES, what="a configuration")
