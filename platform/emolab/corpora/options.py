"""The options of a corpus as people give them: checked, filled in, listed. They are the fields of its dataclass."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError

from emolab.configuration import truths_as_text
from emolab.corpora.corpus import Corpus
from emolab.mistakes import explain
from emolab.names import UserError, nearest


def options_of(corpus: type[Corpus]) -> dict[str, Field[Any]]:
    """Name -> field of every option."""
    kind: Any = corpus
    return {field.name: field for field in fields(kind) if field.init}


def is_required(option: Field[Any]) -> bool:
    """Whether it has no default."""
    return option.default is MISSING and option.default_factory is MISSING


def check_options(corpus: type[Corpus], values: Mapping[str, Any]) -> None:
    """Refuse a key that is no option of the corpus.

    Raises:
        UserError: there is one; names the nearest that is.
    """
    known = options_of(corpus)
    for key in values:
        if key not in known:
            raise UserError(
                f"options.{key}: unknown option of {corpus.name}{nearest(key, known)} (options: {', '.join(known)})"
            )


def with_options(corpus: type[Corpus], values: Mapping[str, Any]) -> Corpus:
    """The corpus with these options.

    Raises:
        UserError: an unknown option, at any depth, or a value that it refuses.
    """
    check_options(corpus, values)
    given = truths_as_text(values, get_type_hints(corpus))
    try:
        return TypeAdapter(corpus).validate_python(given)
    except ValidationError as error:
        line = explain(error, corpus, given, above="options.")
        whole = re.split(r"[.:=]", line, maxsplit=1)[0] in options_of(corpus)  # what a corpus says of its own options
        raise UserError(f"options.{line}" if whole else line) from None


def resolved(corpus: Corpus, *, without: Collection[str]) -> dict[str, Any]:
    """Every option of a corpus with its value, as YAML would hold them and as ``with_options`` takes them back."""
    return {name: _plain(getattr(corpus, name)) for name in options_of(type(corpus)) if name not in without}


def described(corpus: type[Corpus], *, without: Collection[str]) -> Iterator[str]:
    """A line for each option, those of sections one by one: its name, default and meaning."""
    meanings = _meanings(corpus)
    for name, option in options_of(corpus).items():
        if name in without:
            continue
        default = option.default if option.default_factory is MISSING else option.default_factory()
        if not isinstance(default, BaseModel):
            yield f"{name} = {default!r}  {meanings.get(name, '')}"
            continue
        for key, field in type(default).model_fields.items():
            yield f"{name}.{key} = {getattr(default, key)!r}  {field.description or ''}"


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value


def _meanings(corpus: type[Corpus]) -> dict[str, str]:
    """Option -> the first sentence of what stands below it in the source."""
    found: dict[str, str] = {}
    for kind in reversed(corpus.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(field.target, ast.Name):
                text = " ".join(str(getattr(below.value, "value", "")).split())
                found[field.target.id] = text.partition(". ")[0].rstrip(".")
    return found
