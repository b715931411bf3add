"""Weights are found, or asked for in one line; never random, never fetched, never run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.features.media_files import resnet, save_resnet, save_wav2vec2

from emolab.features.audio import AudioSettings
from emolab.features.text import TextSettings
from emolab.features.visual import VisualSettings
from emolab.names import UserError


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub cache of a machine that has downloaded nothing."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("settings", "download", "option"),
    [
        (AudioSettings(extractor="wav2vec2"), "facebook/wav2vec2-base", "options.audio.model"),
        (VisualSettings(depth=50), "timm/resnet50.tv_in1k", "options.visual.weights"),
        (TextSettings(), "google-bert/bert-base-uncased", "options.text.model"),
        (TextSettings(model="no such/model!"), "no such/model!", "options.text.model"),
    ],
)
def test_missing_weights_say_what_to_download_and_where_to_put_it(
    settings: AudioSettings | VisualSettings | TextSettings, download: str, option: str, empty_cache: Path
) -> None:
    with pytest.raises(UserError) as refusal:
        settings.build()
    said = str(refusal.value)
    assert "\n" not in said
    assert f"hf download {download}" in said
    assert f"{option}=PATH" in said
    assert str(empty_cache) in said
    assert not empty_cache.exists(), "nothing was fetched"


def cached(cache: Path, name: str, folder: Path, commit: str = "0123456789abcdef0123456789abcdef01234567") -> None:
    """A hub cache as `hf download` leaves it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


def test_weights_in_the_hub_cache_are_found_by_name_and_their_revision_is_told(
    tmp_path: Path, empty_cache: Path
) -> None:
    cached(empty_cache, "facebook/wav2vec2-base", save_wav2vec2(tmp_path / "model"))
    settings = AudioSettings(extractor="wav2vec2")
    assert settings.build().width == 32
    said = settings.provenance()
    assert (said["model"], said["revision"][:8]) == ("facebook/wav2vec2-base", "01234567")
    local = AudioSettings(extractor="wav2vec2", model=str(tmp_path / "model"))
    assert local.identity() == settings.identity(), "the same bytes in another place"
    (tmp_path / "resnet").mkdir()
    save_resnet(tmp_path / "resnet" / "model.safetensors")
    cached(empty_cache, "timm/resnet18.tv_in1k", tmp_path / "resnet")
    assert VisualSettings().provenance()["revision"] is not None
    VisualSettings().build()
    with pytest.raises(UserError, match="hf download"):
        VisualSettings(revision="other").build()


def test_weights_of_an_older_format_are_read_without_running_anything(tmp_path: Path) -> None:
    folder = save_wav2vec2(tmp_path / "model")
    new = AudioSettings(extractor="wav2vec2", model=str(folder)).build()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    old = AudioSettings(extractor="wav2vec2", model=str(folder)).build()
    for name, value in new.model.state_dict().items():  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.equal(value, old.model.state_dict()[name])  # pyright: ignore[reportAttributeAccessIssue]


class Payload:
    """Runs a command when it is unpickled freely."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def test_a_malicious_file_is_refused_and_does_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save({"conv1.weight": Payload(canary)}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"options\.visual\.weights: .*evil\.pth cannot be loaded"):
        VisualSettings(weights=str(tmp_path / "evil.pth")).build()
    folder = save_wav2vec2(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"conv1.weight": Payload(canary)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"options\.audio\.model: .*cannot be loaded"):
        AudioSettings(extractor="wav2vec2", model=str(folder)).build()
    assert not canary.exists()


def test_weights_that_lack_something_are_refused_not_filled_at_random(tmp_path: Path) -> None:
    state = resnet().state_dict()
    del state["layer3.0.conv1.weight"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"part\.safetensors lacks 1 .*layer3\.0\.conv1\.weight.*random"):
        VisualSettings(weights=str(tmp_path / "part.safetensors")).build()
    folder = save_wav2vec2(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if "attention.q_proj.weight" in key)
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks 1 of the model's weights .*q_proj.*random"):
        AudioSettings(extractor="wav2vec2", model=str(folder)).build()


def test_another_architecture_or_damage_is_refused(tmp_path: Path) -> None:
    path = save_resnet(tmp_path / "resnet18.safetensors")
    for depth in (34, 50):
        with pytest.raises(UserError, match=r"options\.visual\.weights"):
            VisualSettings(weights=str(path), depth=depth).build()  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"options\.audio\.model: .*cannot be loaded|holds no"):
        AudioSettings(extractor="wav2vec2", model=str(tmp_path)).build()
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"cut\.safetensors cannot be loaded"):
        VisualSettings(weights=str(tmp_path / "cut.safetensors")).build()


def test_a_model_without_its_tokenizer_or_preprocessor_is_refused(tmp_path: Path) -> None:
    folder = save_wav2vec2(tmp_path / "model")
    for spoilt, message in {"[]": "lacks a usable", '{"sampling_rate": 8000}': "hears 8000 samples a second"}.items():
        (folder / "preprocessor_config.json").write_text(spoilt)
        with pytest.raises(UserError, match=rf"options\.audio\.model: .*{message}"):
            AudioSettings(extractor="wav2vec2", model=str(folder)).build()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        AudioSettings(extractor="wav2vec2", model=str(folder)).build()
    with pytest.raises(UserError, match=r"options\.text\.model: .*tokenizer"):
        TextSettings(model=str(folder)).build()
