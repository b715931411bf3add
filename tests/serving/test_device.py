"""jobs/export.py from the registry: files, their record, and how far they are from the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.serving.parts import LATE_FUSION, World, keep_model

from emolab.names import UserError
from emolab.registry.lookup import kept_model
from emolab.serving import device
from emolab.serving.device import ExportSettings, export
from emolab.serving.models import load


def settings(world: World, to: Path, **options: object) -> ExportSettings:
    given = {"model": world.uri, "output": str(world.runs), "to": str(to), "window": 6} | options
    return ExportSettings.model_validate(given)


@pytest.mark.parametrize("with_data", [True, False])
def test_an_alias_becomes_two_files_and_their_record(world: World, tmp_path: Path, with_data: bool) -> None:
    to, lines = tmp_path / "out" / "exported", []
    data = str(world.data) if with_data else None
    assert export(settings(world, to, data=data), dry_run=True, report=lines.append) is None
    assert not list(tmp_path.iterdir())
    record = export(settings(world, to, data=data), dry_run=False, report=lines.append)
    assert sorted(path.name for path in to.iterdir()) == ["model-int8.onnx", "model.json", "model.onnx"]
    assert sorted(path.name for path in to.parent.iterdir()) == ["exported"]
    assert json.loads((to / "model.json").read_text()) == record
    assert record is not None
    assert record["classes"] == world.manifest.classes and record["dimensions"] == world.manifest.dimensions
    assert ("validation" in record["compared"]) == with_data
    assert record["looks_ahead"] == {}
    plain, small = record["files"]["model.onnx"], record["files"]["model-int8.onnx"]
    assert plain["largest_difference"] <= 1e-5 and plain["same_class"] == 1.0
    assert 1e-6 < small["largest_difference"] < 0.2
    for name, facts in record["files"].items():
        assert facts["bytes"] == (to / name).stat().st_size


def test_mistakes_are_one_line(world: World, tmp_path: Path, one_line: Callable[..., None]) -> None:
    with pytest.raises(UserError) as error:
        export(settings(world, world.runs), dry_run=False, report=lambda _: None)
    one_line(error, "exists already", "--to")
    late = keep_model(tmp_path / "late", world.manifest, LATE_FUSION, run_id="late")
    with pytest.raises(UserError) as error:
        export(settings(world, tmp_path / "x", model=str(late)), dry_run=False, report=lambda _: None)
    one_line(error, "late_fusion", "no streaming form")


def test_what_a_device_cannot_compute_in_time_is_said(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(kept_model(world.model))
    heard = {"options": {"audio": {"extractor": "mfcc"}}}
    monkeypatch.setattr(device, "load", lambda _: replace(loaded, dataset={**loaded.dataset, **heard}))
    lines: list[str] = []
    export(settings(world, tmp_path / "x"), dry_run=True, report=lines.append)
    assert [line for line in lines if line.startswith("warning: ") and "mfcc" in line]


def test_a_model_of_standardised_sessions_is_not_exported(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line: Callable[..., None]
) -> None:
    loaded = load(kept_model(world.model))
    scaled = replace(loaded, dataset={**loaded.dataset, "protocol": {"normalise": "session"}})
    monkeypatch.setattr(device, "load", lambda _: scaled)
    with pytest.raises(UserError) as error:
        export(settings(world, tmp_path / "x"), dry_run=True, report=lambda _: None)
    one_line(error, "protocol.normalise=session")
