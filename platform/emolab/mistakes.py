"""A mistake in a configuration as one line in people's words, whatever the library that found it calls it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from emolab.names import nearest

_LONGEST = 80
"""Characters of a value that are shown."""

_KINDS = {
    "a whole number": ("int_type", "int_parsing", "int_from_float", "int_parsing_size"),
    "a number": ("float_type", "float_parsing"),
    "a finite number": ("finite_number",),
    "true or false": ("bool_type", "bool_parsing"),
    "text": ("string_type", "path_type"),
    "a list": ("list_type", "tuple_type"),
    "a section of keys": ("dict_type", "mapping_type", "model_type", "model_attributes_type", "dataclass_type"),
    "null": ("none_required",),
}
_KIND_OF = {kind: words for words, kinds in _KINDS.items() for kind in kinds}
_WORDS = {
    "greater_than_equal": "must be greater than or equal to {ge}",
    "greater_than": "must be greater than {gt}",
    "less_than_equal": "must be less than or equal to {le}",
    "less_than": "must be less than {lt}",
    "too_short": "must have at least {min_length} value(s)",
    "too_long": "must have at most {max_length} value(s)",
    "string_too_short": "must have at least {min_length} character(s)",
    "string_too_long": "must have at most {max_length} character(s)",
    "string_pattern_mismatch": "must match {pattern}",
    "invalid_key": "keys must be text",
}
_ABSENT = ("missing", "missing_argument", "missing_keyword_only_argument")
_FOLLOWING = ("default_factory_not_called",)
"""No mistake of its own: a default that depends on a key that is wrong."""
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def explain(error: ValidationError, settings: type[Any], values: Any = None, *, above: str = "") -> str:
    """The first mistake of a validation error as one line.

    A key that nobody knows comes first: it is usually the very key that is then said to be missing.

    Args:
        settings: what they are values of, a pydantic model or a dataclass.
        values: what was validated. With them the line names keys alone, not the alternatives that were tried.
        above: what stands before every key of theirs, such as ``options.``.
    """
    mistakes = error.errors(include_url=False)
    unknown = next((mistake for mistake in mistakes if mistake["type"] in _UNKNOWN), None)
    if unknown is None:
        line = first_mistake(error, values)
        return above + line if mistakes[0]["loc"] else line
    key, name = above + _key(unknown, values), str(unknown["loc"][-1])
    known = _known_keys(settings, unknown["loc"][:-1])
    below = _keys_below(settings, unknown["loc"][:-1])
    hint = _in_a_section(name, below, key) or nearest(name, known)
    if not hint and (near := difflib.get_close_matches(name, list(below), n=1)):
        hint = _in_a_section(near[0], below, key)
    return f"unknown key {key!r}{hint} (valid here: {', '.join(known)})"


def first_mistake(error: ValidationError, values: Any = None) -> str:
    """As ``explain``, of values whose keys are known."""
    mistakes = [mistake for mistake in error.errors(include_url=False) if mistake["type"] not in _FOLLOWING]
    keys = [_key(mistake, values) for mistake in mistakes]
    key = keys[0]
    line = _described([mistake for mistake, of in zip(mistakes, keys, strict=True) if of == key])
    others = len(set(keys)) - 1
    more = f" (and {others} more)" if others else ""
    return f"{key}: {line}{more}" if key else line + more


def shown(value: Any) -> str:
    """A value as people write it in YAML, cut off where it is long."""
    try:
        text = repr(value) if isinstance(value, str | float) else json.dumps(value, default=str)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _described(mistakes: Sequence[ErrorDetails]) -> str:
    """What is wrong with one key, given what each alternative says of it."""
    first = mistakes[0]
    if first["type"] in _ABSENT:
        return "is missing, a value is needed"
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    given = first["input"]
    if _is_of_a_key(first):
        return f"a key must be text, got {shown(given)}{_hint(given, ['text'])}"
    choices = [choice for mistake in mistakes for choice in _choices(mistake)]
    kinds = [_KIND_OF[mistake["type"]] for mistake in mistakes if mistake["type"] in _KIND_OF]
    wanted = [*dict.fromkeys(kinds)]
    if choices:
        wanted.append(f"one of {', '.join(choices)}" if len(choices) > 1 else repr(choices[0]))
    if not wanted:
        words = _WORDS.get(first["type"], "").format(**first.get("ctx", {}))
        return f"{words or first['msg'].replace('Input should be', 'must be')}, got {shown(given)}"
    hint = nearest(given, choices) if isinstance(given, str) else ""
    return f"must be {' or '.join(wanted)}, got {shown(given)}{hint or _hint(given, kinds)}"


def _hint(given: Any, kinds: Sequence[str]) -> str:
    if given is None:
        return " (give a value, or leave the key out)"
    if isinstance(given, int | float) and "text" in kinds:
        return " (in quotes it is text)"
    if isinstance(given, list | dict):
        return ""
    if "a list" in kinds:
        return " (a list is written [a, b])"
    return " (its keys are set one by one, as section.key=value)" if "a section of keys" in kinds else ""


def _choices(mistake: ErrorDetails) -> list[str]:
    if mistake["type"] not in ("literal_error", "enum"):
        return []
    expected = str(mistake.get("ctx", {}).get("expected", ""))
    return re.findall(r"'([^']*)'", expected) or re.split(r", | or ", expected)


def _key(mistake: ErrorDetails, values: Any) -> str:
    """The dotted key of a mistake. Where several alternatives were tried, the library's path names each of them too."""
    path = mistake["loc"][:-2] if _is_of_a_key(mistake) else mistake["loc"]
    parts: list[str] = []
    here: Any = values
    for place, part in enumerate(path):
        last = place == len(path) - 1
        inside: Any = dict(enumerate(here)) if isinstance(here, list | tuple) else here
        if isinstance(inside, Mapping) and part in inside:
            here = inside[part]
        elif values is not None and not (last and mistake["type"] in (*_ABSENT, *_UNKNOWN)):
            continue
        parts.append(str(part))
    return ".".join(parts)


def _is_of_a_key(mistake: ErrorDetails) -> bool:
    """Whether what is wrong is a key itself."""
    return mistake["loc"][-1:] == ("[key]",)


def _known_keys(settings: type[Any], path: Iterable[int | str]) -> list[str]:
    """The keys of the section at a path, which may name alternatives."""
    here = _alternatives(settings)
    for part in path:
        here = _below(here, part)
    return [*dict.fromkeys(name for each in here if _is_section(each) for name in _fields(each))]


def _keys_below(settings: type[Any], path: Sequence[int | str]) -> dict[str, list[str]]:
    """A key of a section inside the one at a path -> the sections that have it."""
    found: dict[str, list[str]] = {}
    for section in _known_keys(settings, path):
        for name in _known_keys(settings, [*path, section]) if _has_sections(settings, [*path, section]) else []:
            found.setdefault(name, []).append(section)
    return found


def _has_sections(settings: type[Any], path: Iterable[int | str]) -> bool:
    here = _alternatives(settings)
    for part in path:
        here = _below(here, part)
    return any(_is_section(each) for each in here)


def _in_a_section(name: str, below: Mapping[str, Sequence[str]], key: str) -> str:
    """The hint at a key that stands one section further down than it was looked for; "" where none has it."""
    above = key.rpartition(".")[0]
    names = [".".join(filter(None, (above, section, name))) for section in below.get(name, [])]
    return f", did you mean {' or '.join(map(repr, names))}?" if names else ""


def _below(alternatives: Sequence[Any], part: int | str) -> list[Any]:
    found: list[Any] = []
    for each in alternatives:
        if _is_section(each):
            if part in _fields(each):
                found += _alternatives(_fields(each)[str(part)])
        elif issubclass(get_origin(each) or object, Mapping):
            found += _alternatives(get_args(each)[1])
        elif issubclass(get_origin(each) or object, Sequence):
            found += _alternatives(get_args(each)[0])
    if found:
        return found
    named = [each for each in alternatives if _is_section(each) and part in (each.__name__, *_constants(each))]
    return named or list(alternatives)


def _constants(section: type[Any]) -> list[Any]:
    """What a section's own keys must be, by which one of several sections is chosen."""
    return [value for annotation in _fields(section).values() for value in get_args(annotation)]


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        return [each for member in get_args(annotation) for each in _alternatives(member)]
    return [annotation]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and (issubclass(annotation, BaseModel) or is_dataclass(annotation))


def _fields(section: type[Any]) -> dict[str, Any]:
    """Key -> type of a section."""
    if issubclass(section, BaseModel):
        return {name: field.annotation for name, field in section.model_fields.items()}
    types = get_type_hints(section)
    return {field.name: types[field.name] for field in fields(section) if field.init}
