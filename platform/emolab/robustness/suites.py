"""Suites: YAML files that say which cells are evaluated. Mistakes are found before anything is computed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edu_emotionnet.conventions import MODALITIES
from emolab.limits import YAML_BYTES, RepeatedKeyError, load_yaml, read_bytes
from emolab.mistakes import explain, shown
from emolab.names import UserError, nearest
from emolab.robustness.cells import Cell, cell_id, clean_cell, grid_cell_id
from emolab.robustness.corruptions.catalog import Corruption, corruption
from emolab.robustness.corruptions.observed import Variant, group_of
from emolab.robustness.shipped import shipped_suites

Level = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=-(2**31), lt=2**31)]
"""Corruptions add it to labels of 64 bits."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Instance(_Strict):
    """A corruption at some of its levels."""

    corruption: str
    levels: list[Level] | None = Field(default=None, min_length=1)
    """All levels of the corruption's protocol where left out. 0 is the clean cell, which is always there."""


class Sweep(Instance):
    """One curve per modality set: the modalities of a set corrupted together at every level, the others clean."""

    modalities: Literal["together", "each", "subsets"] | list[list[str]] = "together"
    """`together`: all of the data; `each`: one at a time; `subsets`: every non-empty proper subset; or sets by name."""


class Grid(_Strict):
    """A joint grid: every combination in which each modality is clean or takes one instance of the list."""

    instances: list[Instance] = Field(min_length=1)
    modalities: list[str] | None = None
    """The modalities that take part; all of the data where left out."""


class Suite(_Strict):
    """What a suite file holds."""

    name: str
    description: str = ""
    purpose: Literal["test", "validation"] = "test"
    """A test suite may not use the corruptions kept for validation, a validation suite only them."""
    seeds: list[Seed] = Field(default=[0], min_length=1)
    sweeps: list[Sweep] = []
    grids: list[Grid] = []


def load_suite(name_or_file: str | Path) -> Suite:
    """A shipped suite by name, or a YAML file.

    Raises:
        UserError: no such suite or file, or what is wrong in it, and where.
    """
    shipped = shipped_suites()
    path = shipped.get(str(name_or_file), Path(name_or_file))
    if not path.is_file():
        if path.suffix in (".yaml", ".yml"):
            raise UserError(f"{path}: no such file")
        near = nearest(str(name_or_file), shipped)
        raise UserError(f"unknown suite {str(name_or_file)!r}{near} (suites: {', '.join(shipped)}, or a YAML file)")
    try:
        return parse_suite(load_yaml(read_bytes(path, most=YAML_BYTES, what="a suite").decode()), where=path.name)
    except RepeatedKeyError as error:
        raise UserError(f"{path.name}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from None


def parse_suite(values: Any, *, where: str = "suite") -> Suite:
    """A suite from plain values, checked against the catalogue of corruptions.

    Raises:
        UserError: an unknown key (with the nearest known one), a wrong value, an unknown corruption or level.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: the file must be a mapping of keys to values, got {shown(values)}")
    try:
        suite = Suite.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, Suite, values)}") from None
    for instance in _instances(suite):
        _check_instance(instance, suite, where)
    for grid in suite.grids:
        joint = [instance.corruption for instance in grid.instances if corruption(instance.corruption).joint]
        if joint:
            raise UserError(f"{where}: {joint[0]!r} corrupts modalities together: use it in sweeps, not in grids")
    return suite


def _instances(suite: Suite) -> Iterator[Instance]:
    yield from suite.sweeps
    for grid in suite.grids:
        yield from grid.instances


def _check_instance(instance: Instance, suite: Suite, where: str) -> None:
    try:
        chosen = corruption(instance.corruption)
        for level in instance.levels or ():
            chosen.check_level(level)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if chosen.stage != "features":
        raise UserError(f"{where}: {chosen.name!r} works on raw {chosen.stage}: apply it when sessions are prepared")
    if chosen.validation_only != (suite.purpose == "validation"):
        kept = "is kept for validation" if chosen.validation_only else "is not kept for validation"
        raise UserError(f"{where}: {chosen.name!r} {kept}, but the purpose of the suite is {suite.purpose}")


def expand(suite: Suite, modalities: Sequence[str]) -> list[Cell]:
    """Every cell of a suite for data with these modalities: the clean cell first, each cell once.

    Rates that so few modalities cannot have become the highest that they can; see ``lowered``.

    Raises:
        UserError: the suite names a modality that the data lacks, has no condition for it, or two of one name.
    """
    present = group_of(modalities)
    cells = {cell.variants: cell for cell in [clean_cell(present)]}
    for cell in itertools.chain.from_iterable(
        [_sweep_cells(sweep, suite, present) for sweep in suite.sweeps]
        + [_grid_cells(grid, suite, present) for grid in suite.grids]
    ):
        cells.setdefault(cell.variants, cell)
    if len(cells) == 1:
        raise UserError(
            f"suite {suite.name!r} has no condition for data with {', '.join(present)}: it needs a sweep or a grid "
            "with a level above 0"
        )
    for name, count in Counter(cell.id for cell in cells.values()).items():
        if count > 1:
            raise UserError(f"suite {suite.name!r} has {count} conditions named {name}: their levels are too close")
    return list(cells.values())


def lowered(suite: Suite, cells: Sequence[Cell]) -> str:
    """What to say of rates that the suite asks for and no cell has; empty where there are none."""
    told = []
    for name in dict.fromkeys(sweep.corruption for sweep in suite.sweeps if corruption(sweep.corruption).leaves_one):
        asked = {level for sweep in suite.sweeps if sweep.corruption == name for level in _levels(sweep)}
        had = {cell.level for cell in cells if cell.corruption == name}
        highest = f"{max(had, default=0):.3g}"
        if beyond := ", ".join(f"{level:g}" for level in sorted(asked - had)):
            told.append(f"{name} leaves a modality at every step: no cell has rate {beyond}, the highest is {highest}")
    return "; ".join(told)


def _seeds(suite: Suite, corruptions: Sequence[Corruption]) -> list[int]:
    return suite.seeds if any(chosen.random for chosen in corruptions) else [0]


def _levels(instance: Instance, modalities: int | None = None) -> list[float]:
    """Levels above 0, and no higher than there can be with so many modalities corrupted together."""
    chosen = corruption(instance.corruption)
    levels = instance.levels if instance.levels is not None else chosen.levels
    highest = chosen.highest(modalities) if modalities is not None else max(chosen.levels)
    return [float(level) for level in dict.fromkeys(min(level, highest) for level in levels) if level]


def _sweep_cells(sweep: Sweep, suite: Suite, present: tuple[str, ...]) -> Iterator[Cell]:
    chosen = corruption(sweep.corruption)
    sets = _modality_sets(sweep.modalities, present, suite.name)
    for some, seed in itertools.product(sets, _seeds(suite, [chosen])):
        group = some if chosen.joint else ()
        for level in _levels(sweep, len(some)):
            corrupted = {
                name: Variant(modality=name, corruption=chosen.name, level=level, seed=seed, group=group)
                for name in some
            }
            yield Cell(
                id=cell_id(chosen.name, level, some, seed),
                variants=tuple(corrupted.get(name, Variant(modality=name)) for name in present),
                corruption=chosen.name,
                level=level,
                modalities=some,
                seed=seed,
                validation_only=chosen.validation_only,
            )


def _grid_cells(grid: Grid, suite: Suite, present: tuple[str, ...]) -> Iterator[Cell]:
    taking = _checked(grid.modalities if grid.modalities is not None else present, present, suite.name)
    rows = [corruption(instance.corruption) for instance in grid.instances]
    for seed in _seeds(suite, rows):
        columns = [
            [Variant(modality=name), *(_grid_variants(grid, name, seed) if name in taking else ())] for name in present
        ]
        for variants in itertools.product(*columns):
            corrupted = [variant for variant in variants if variant.level]
            if corrupted:
                yield Cell(
                    id=grid_cell_id(variants, seed),
                    variants=variants,
                    corruption="+".join(dict.fromkeys(variant.corruption for variant in corrupted)),
                    level=sum(variant.level for variant in variants) / len(variants),
                    modalities=tuple(variant.modality for variant in corrupted),
                    seed=seed,
                    validation_only=any(row.validation_only for row in rows),
                )


def _grid_variants(grid: Grid, name: str, seed: int) -> Iterator[Variant]:
    for instance in grid.instances:
        of_seed = seed if corruption(instance.corruption).random else 0
        for level in _levels(instance):
            yield Variant(modality=name, corruption=instance.corruption, level=level, seed=of_seed)


def _modality_sets(wanted: str | list[list[str]], present: tuple[str, ...], suite: str) -> list[tuple[str, ...]]:
    if wanted == "together":
        return [present]
    if wanted == "each":
        return [(name,) for name in present]
    if wanted == "subsets":
        return [some for size in range(1, len(present)) for some in itertools.combinations(present, size)]
    if not wanted:
        raise UserError(f"suite {suite!r} has a sweep over no modality: name some, or leave the key out")
    return [_checked(names, present, suite) for names in wanted if not isinstance(names, str)]


def _checked(names: Sequence[str], present: tuple[str, ...], suite: str) -> tuple[str, ...]:
    for name in names:
        if name not in present:
            hint = nearest(name, present) if name not in MODALITIES else ""
            raise UserError(f"suite {suite!r} names the modality {name!r}{hint}, the data has {', '.join(present)}")
    if not names:
        raise UserError(f"suite {suite!r} has an empty set of modalities")
    return group_of(names)
