"""From a corpus's own labels to classes, by a table that the user gives.

A table is a CSV file with one of these headers, or a YAML file::

    label,class                  what the corpus calls it -> class
    utterance,class              one utterance (clip) of the corpus -> class
    utterance,annotator,class    the same by several annotators: majority vote, ties stay unlabelled

    classes: [confused, curious, bored, frustrated]     # optional: names and order
    labels: {fru: frustrated}
    utterances: {Ses01F_impro01_F000: curious}          # wins over `labels`

Classes of a CSV file stand in the order of their first appearance. What the table does not map stays unlabelled.
"""

from __future__ import annotations

import csv
import hashlib
import io
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field

from edu_emotionnet.conventions import IGNORED_LABEL
from emolab.configuration import Settings, read_yaml, validate
from emolab.corpora.annotators import agreement, judgement_matrix, majority
from emolab.corpora.corpus import Corpus
from emolab.limits import TABLE_BYTES, read_bytes
from emolab.names import UserError, checked_name, nearest

OWN = "own"
"""The corpus's own labels are the classes."""
EDUCATION = "education"
"""The table that is shipped for a corpus, where part of its labels are classes of learning sessions as they stand."""


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """What a label or an utterance means. Maps hold class names."""

    classes: tuple[str, ...]
    by_label: Mapping[str, str] = field(default_factory=dict)
    by_utterance: Mapping[str, str | None] = field(default_factory=dict)
    """None where the annotators' vote is tied."""
    votes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Utterance -> annotator -> class, where the table names annotators."""

    def class_name(self, utterance: str, label: str | None) -> str | None:
        """The class of an utterance that the corpus labels so; None where it stays unlabelled."""
        if utterance in self.by_utterance:
            return self.by_utterance[utterance]
        return None if label is None else self.by_label.get(label)

    def index(self, utterance: str, label: str | None) -> int:
        """As ``class_name``, as a label value: the class's position, or -100."""
        name = self.class_name(utterance, label)
        return IGNORED_LABEL if name is None else self.classes.index(name)


class LabelledCorpus(Corpus):
    """A corpus whose utterances carry labels of its own, which a table turns into classes."""

    source: str
    """The folder of the corpus."""
    label_table: str
    """``own``, ``education`` or a file. An option of every such corpus."""

    def __post_init__(self) -> None:
        # workers have another current folder than the job that built this
        object.__setattr__(self, "source", str(Path(self.source).expanduser().resolve()))
        if self.label_table not in (OWN, EDUCATION):
            object.__setattr__(self, "label_table", str(Path(self.label_table).expanduser().resolve()))
        following = getattr(super(), "__post_init__", None)
        if following is not None:
            following()

    @property
    @abstractmethod
    def own_labels(self) -> tuple[str, ...]:
        """Every label that the corpus documents and that says what somebody felt."""

    @property
    def tabled_labels(self) -> tuple[str, ...]:
        """Every label that a table may name: also those that stand for no state of mind."""
        return self.own_labels

    @abstractmethod
    def utterance_labels(self) -> Iterable[tuple[str, str | None]]:
        """Every utterance's id, as a table names it, and the corpus's own label; None where it gives none."""

    @property
    def table(self) -> LabelTable:
        """The table in use, read once per process.

        Raises:
            UserError: it is missing, malformed, or names labels that the corpus does not have.
        """
        return _table(self.label_table, self.name, self.own_labels, self.tabled_labels)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.table.classes

    def options(self) -> dict[str, Any]:
        """A table counts by what it says, not by where it lies."""
        values = super().options()
        if self.label_table not in (OWN, EDUCATION):
            content = _read(Path(self.label_table))
            values["label_table"] = f"sha256:{hashlib.sha256(content).hexdigest()}"
        return values

    def annotation_summary(self) -> Mapping[str, Any]:
        """Utterances labelled, unmapped (per label of the corpus), tied; the annotators' agreement, if known."""
        return summary(self.table, self.utterance_labels())

    def check_table(self) -> None:
        """Refuse a table by utterances that has nothing to do with this corpus.

        Raises:
            UserError: no utterance of the table is one of the corpus.
        """
        named = self.table.by_utterance
        if named and not any(utterance in named for utterance, _ in self.utterance_labels()):
            example = next((utterance for utterance, _ in self.utterance_labels()), "none")
            raise UserError(
                f"{self.label_table}: no utterance of it, e.g. {next(iter(named))[:60]!r}, is one of {self.name}, "
                f"e.g. {example!r}"
            )


def summary(table: LabelTable, utterances: Iterable[tuple[str, str | None]]) -> dict[str, Any]:
    """What became of each utterance (id, own label), as JSON values."""
    unmapped: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    seen: set[str] = set()
    for utterance, label in utterances:
        seen.add(utterance)
        if table.class_name(utterance, label) is not None:
            outcomes["labelled"] += 1
        elif utterance in table.by_utterance:
            outcomes["ties"] += 1
        elif label is None:
            outcomes["without_label"] += 1
        else:
            unmapped[label] += 1
    found: dict[str, Any] = {"utterances": len(seen)}
    found |= {name: outcomes[name] for name in ("labelled", "ties", "without_label")}
    found |= {"unmapped": dict(sorted(unmapped.items())), "unknown_utterances": len(set(table.by_utterance) - seen)}
    votes = {utterance: given for utterance, given in table.votes.items() if utterance in seen}
    agreed = agreement(judgement_matrix(votes, table.classes), table.classes) if votes else None
    return found if agreed is None else found | {"kappa": agreed.kappa, "agreement": agreed.to_json()}


class _File(Settings):
    classes: list[str] | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    utterances: dict[str, str] = Field(default_factory=dict)


@lru_cache(maxsize=8)
def _table(option: str, corpus: str, own: tuple[str, ...], tabled: tuple[str, ...]) -> LabelTable:
    if option == OWN:
        return LabelTable(classes=own, by_label={label: label for label in own})
    path = _shipped(corpus) if option == EDUCATION else Path(option)
    table = _from_csv(path) if path.suffix.lower() == ".csv" else _from_yaml(path)
    for label in table.by_label:
        if label not in tabled:
            raise UserError(
                f"{path}: {corpus} has no label {label[:60]!r}{nearest(label, tabled)} (labels: {', '.join(tabled)})"
            )
    for name in table.classes:
        checked_name(name, what=f"{path}: class")
    if len(table.classes) < 2 or len(set(table.classes)) < len(table.classes):
        raise UserError(f"{path}: expected two or more different classes, got {', '.join(table.classes) or 'none'}")
    return table


def _shipped(corpus: str) -> Path:
    folder = Path(str(resources.files("emolab.corpora"))) / "label_tables"
    path = folder / f"{corpus}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(each.stem for each in folder.glob("*.yaml")))
        raise UserError(
            f"label_table={EDUCATION}: none of {corpus}'s labels is a class of learning sessions as it stands "
            f"(shipped for {shipped}): pass a table of your own, label_table=FILE"
        )
    return path


def _from_yaml(path: Path) -> LabelTable:
    given = validate(_File, read_yaml(path), where=f"{path}: ")
    named = {**given.labels, **given.utterances}
    classes = tuple(given.classes) if given.classes is not None else tuple(dict.fromkeys(named.values()))
    for key, name in named.items():
        if name not in classes:
            raise UserError(f"{path}: {key[:60]!r} has class {name[:60]!r}, which is not in classes")
    return LabelTable(classes=classes, by_label=given.labels, by_utterance=given.utterances)


def _from_csv(path: Path) -> LabelTable:
    readers: dict[tuple[str, ...], Callable[[Path, _Rows], LabelTable]] = {
        ("label", "class"): lambda path, rows: LabelTable(classes=_classes(rows), by_label=_pairs(path, rows)),
        ("utterance", "class"): lambda path, rows: LabelTable(classes=_classes(rows), by_utterance=_pairs(path, rows)),
        ("utterance", "annotator", "class"): _voted,
    }
    rows = _rows(path)
    header = tuple(rows[0][1]) if rows else ()
    if header not in readers:
        known = " or ".join(",".join(columns) for columns in readers)
        raise UserError(f"{path}, line 1: expected the columns {known}, got {','.join(header)[:80]!r}")
    for line, row in rows[1:]:
        if len(row) != len(header) or not all(row):
            raise UserError(f"{path}, line {line}: expected {len(header)} filled columns ({','.join(header)})")
    return readers[header](path, rows[1:])


_Rows = list[tuple[int, list[str]]]
"""(line, cells) of a CSV file."""


def _rows(path: Path) -> _Rows:
    try:
        table = csv.reader(io.StringIO(_read(path).decode("utf-8-sig"), newline=""), strict=True)
        return [(table.line_num, [cell.strip() for cell in row]) for row in table if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({error})") from None


def _classes(rows: _Rows) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row[-1] for _, row in rows))


def _pairs(path: Path, rows: _Rows) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for line, (key, name) in rows:
        if key in pairs:
            raise UserError(f"{path}, line {line}: {key[:60]!r} was there before")
        pairs[key] = name
    return pairs


def _voted(path: Path, rows: _Rows) -> LabelTable:
    votes: dict[str, dict[str, str]] = {}
    for line, (utterance, annotator, name) in rows:
        given = votes.setdefault(utterance, {})
        if annotator in given:
            raise UserError(f"{path}, line {line}: {annotator[:60]!r} judged {utterance[:60]!r} before")
        given[annotator] = name
    classes = _classes(rows)
    labels, _ = majority(judgement_matrix(votes, classes), len(classes))
    chosen = [None if place == IGNORED_LABEL else classes[place] for place in labels.tolist()]
    return LabelTable(classes=classes, by_utterance=dict(zip(votes, chosen, strict=True)), votes=votes)


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, most=TABLE_BYTES, what="a label table")
    except OSError as error:
        raise UserError(f"label table {path} cannot be read: {error.strerror}") from None
