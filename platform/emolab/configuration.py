"""Strict configuration: typed models, presets, YAML files and dotted overrides, one error line for a mistake.

A job's configuration is built in this order, later sources winning: defaults, ``--preset``, ``--config FILE``,
flags (``--corpus mosi``), dotted overrides (``training.epochs=3``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticUndefined

from emolab.job import Parser, heed_interruption
from emolab.limits import YAML_BYTES, RepeatedKeyError, load_yaml, read_bytes
from emolab.mistakes import explain, shown
from emolab.names import UserError, nearest
from emolab.redaction import masked_key, redacted


class Settings(BaseModel):
    """Base of every configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        """Refuse what would be taken for something else: true for the number 1, and text that ends at a zero byte
        wherever it meets the system."""
        if not isinstance(values, Mapping):
            return values
        for name in cls.model_fields:
            value = values.get(name)
            if isinstance(value, str) and "\0" in value:
                raise ValueError(f"{name} must not hold a zero byte, got {shown(value)}")
        return truths_as_text(values, {name: field.annotation for name, field in cls.model_fields.items()})

    def complete(self) -> Self:
        """With all values, also those that are looked up when they are used: what ``--print-config`` prints.

        Raises:
            UserError: a value that is only checked when it is used is refused.
        """
        sections = {name: value.complete() for name, value in self if isinstance(value, Settings)}
        return self.model_copy(update=sections)


def truths_as_text(values: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
    """The values by key, with true and false as the text that they are wherever a number is asked for: pydantic takes
    them for 1 and 0, and refuses the text for being no number."""
    read = dict(values)
    for name, annotation in types.items():
        accepted = _members(annotation)
        if isinstance(values.get(name), bool) and {int, float} & {*accepted} and bool not in accepted:
            read[name] = str(values[name]).lower()
    return read


def _members(annotation: Any) -> tuple[Any, ...]:
    """A type, or the types of a union."""
    return get_args(annotation) or (annotation,)


SettingsType = TypeVar("SettingsType", bound=Settings)


class _JobParser(Parser):
    """Lists the keys below the flags; they are asked for where somebody wants to read them."""

    def __init__(self, keys: Callable[[], str], *, description: str) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self._keys = keys

    def format_help(self) -> str:
        self.epilog = self._keys()
        return super().format_help()


def parse(
    settings: type[SettingsType],
    arguments: Sequence[str],
    *,
    description: str,
    default_preset: Callable[[], tuple[str, str]] | None = None,
) -> tuple[SettingsType, bool]:
    """Read a job's command line.

    Args:
        default_preset: asked for (preset, reason) where neither ``--preset`` nor ``--config`` is given; both are
            printed, so that nobody wonders which experiment is running.

    Returns:
        The configuration, and whether ``--dry-run`` was asked for. ``--help`` and ``--print-config`` print and exit.

    Raises:
        UserError: anything unknown or ill-typed, with the key and the nearest valid one.
    """
    heed_interruption()
    parser = _JobParser(lambda: _help(settings, arguments), description=description)
    defaults = _defaults(settings)
    parser.add_argument("--config", metavar="FILE", help="YAML file with the keys below")
    parser.add_argument("--preset", help=f"a ready set of values: {', '.join(presets())}")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    for name, field in settings.model_fields.items():
        if _section(field.annotation) is None:
            flag = f"--{name.replace('_', '-')}"
            kind: dict[str, Any] = {"metavar": "VALUE"}
            if field.annotation is bool:
                kind = {"action": argparse.BooleanOptionalAction}
            text = " ".join(filter(None, (field.description, _shown_default(defaults[name])))).replace("%", "%%")
            parser.add_argument(flag, dest=name, help=text, default=argparse.SUPPRESS, **kind)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="dotted overrides, see below")
    options = vars(parser.parse_intermixed_args(list(arguments)))
    values: dict[str, Any] = {}
    chosen = ""
    if default_preset is not None and options["preset"] is None and options["config"] is None:
        options["preset"], reason = default_preset()
        chosen = f"preset {options['preset']}: {reason}\n"
    if options["preset"] is not None:
        merge(values, read_preset(options["preset"], settings))
    if options["config"] is not None:
        merge(values, read_yaml(Path(options["config"])))
    for name in settings.model_fields:
        if name in options:
            given = options[name]
            values[name] = _value(given, f"--{name.replace('_', '-')}") if isinstance(given, str) else given
    for override in options["overrides"]:
        merge(values, _dotted(override))
    left_out = masked_key(values)
    if left_out is not None:
        raise UserError(
            f"{left_out}: a secret was left out here when this configuration was written; "
            "give it once more, by environment variable where there is one"
        )
    resolved = validate(settings, values)
    sys.stderr.write(chosen)  # not before: a mistake is one line
    if options["print_config"]:
        sys.stdout.write(to_yaml(resolved.complete()))
        raise SystemExit(0)
    return resolved, options["dry_run"]


def validate(settings: type[SettingsType], values: Mapping[str, Any], *, where: str = "") -> SettingsType:
    """Values -> typed settings.

    Raises:
        UserError: the first mistake, as ``where: key: what is wrong``.
    """
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise UserError(where + explain(error, settings, values)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        UserError: missing, unreadable, too large, not YAML, with a key twice, or not a mapping.
    """
    try:
        values = load_yaml(read_bytes(path, most=YAML_BYTES, what="written by hand").decode())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, a YAML file is needed") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text in UTF-8, a YAML file is needed") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except RepeatedKeyError as error:
        raise UserError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if values is None:
        raise UserError(f"{path}: is empty, expected a mapping of keys to values")
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {shown(values)}")
    return values


def presets() -> list[str]:
    """Names of the presets shipped with the package."""
    folder = resources.files("emolab.presets")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def check_preset(name: str) -> None:
    """Refuse what is no preset.

    Raises:
        UserError: no such preset.
    """
    if name not in presets():
        raise UserError(f"unknown preset {name!r}{nearest(name, presets())} (presets: {', '.join(presets())})")


def read_preset(name: str, settings: type[BaseModel]) -> dict[str, Any]:
    """Values of a preset, reduced to the sections that a job has.

    Raises:
        UserError: no such preset.
    """
    check_preset(name)
    text = resources.files("emolab.presets").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    values = load_yaml(text)
    section = getattr(settings, "preset_section", None)
    return values[section] if section else {key: values[key] for key in values if key in settings.model_fields}


def merge(base: dict[str, Any], update: Mapping[str, Any]) -> None:
    """Lay ``update`` over ``base``, section by section, in place."""
    for key, value in update.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = dict(value) if isinstance(value, Mapping) else value


def nested(key: str, value: Any) -> dict[str, Any]:
    """``nested("a.b", 1)`` is ``{"a": {"b": 1}}``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def to_yaml(settings: BaseModel) -> str:
    """The resolved configuration as YAML that ``--config`` takes back, without the secrets in it."""
    return yaml.safe_dump(redacted(settings.model_dump(mode="json")), sort_keys=False)


def _dotted(override: str) -> dict[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"cannot read {override!r}: overrides are written section.key=value")
    return nested(key, _value(value, override))


def _value(text: str, where: str) -> Any:
    """A value of the command line, read as YAML; but a plain word is all that was typed, since a ` #` in it, where YAML
    begins a comment, is part of a name."""
    try:
        value = load_yaml(text)
    except RepeatedKeyError as error:
        raise UserError(f"cannot read the value of {where!r}: {error}") from None
    except yaml.YAMLError:
        raise UserError(f"cannot read the value of {where!r}") from None
    typed = text.strip()
    plain = isinstance(value, str) and typed.startswith(value)
    return typed if plain or typed.startswith("#") else value


def _section(annotation: Any) -> type[BaseModel] | None:
    """The settings class of a nested section, also of an optional one; None for a plain value."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _help(settings: type[BaseModel], arguments: Sequence[str], prefix: str = "") -> str:
    lines = [] if prefix else ["keys and defaults (set them as section.key=value or in a YAML file):"]
    defaults = _defaults(settings)
    for name, field in settings.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            lines.append(_help(section, arguments, f"{prefix}{name}."))
        elif prefix:
            lines.append(f"  {prefix}{name} = {defaults[name]!r}  {field.description or ''}")
    further: Callable[[Sequence[str]], Sequence[str]] = getattr(settings, "further_keys", lambda _: ())
    lines += [f"  {prefix}{line}" for line in further(arguments)]
    return "\n".join(line.rstrip() for line in lines if line)


def _defaults(settings: type[BaseModel]) -> dict[str, Any]:
    """Key -> default; ``PydanticUndefined`` where a value is needed."""
    found: dict[str, Any] = {}
    for name, field in settings.model_fields.items():  # a default may depend on those before it
        found[name] = field.get_default(call_default_factory=True, validated_data=found)
    return found


def _shown_default(value: Any) -> str:
    """For a flag's help."""
    return (
        "(needed)" if value is PydanticUndefined else f"(default: {value if isinstance(value, str) else shown(value)})"
    )
