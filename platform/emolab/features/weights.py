"""Where an encoder's weights come from: a local folder or the hub's cache, never the network and never at random.

Importing transformers takes seconds, so the modules of this package do it when a model is loaded, not before.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from pydantic import AfterValidator
from safetensors.torch import load_file
from torch import Tensor

from emolab.names import UserError

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_UNUSED = ("pooler.", "masked_spec_embed", "fc.")
"""Parameters that no feature depends on: a head for another task, a vector used in pre-training only."""


def _absolute(name: str) -> str:
    """A local path in full, since workers have another current folder; a name of the hub as it is."""
    local = Path(name).expanduser()
    return str(local.resolve()) if local.exists() else name


ModelName = Annotated[str, AfterValidator(_absolute)]
"""A local file or folder, or a name of the hub."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Files of a model that are on this machine."""

    folder: Path
    files: tuple[Path, ...]
    """Every file that decides what the model computes."""
    revision: str | None
    """The hub's commit, where the files came through its cache."""
    option: str
    """The option that named them, for messages."""
    name: str
    """The value of that option."""

    def identity(self) -> dict[str, Any]:
        """What they are, wherever they lie: file name -> SHA-256."""
        return {"sha256": {path.name: _sha256(path, path.stat().st_mtime_ns) for path in self.files}}

    def origin(self) -> dict[str, Any]:
        """Where they were found; for a local folder only its name, since the rest says nothing elsewhere."""
        return {"model": self.name if self.revision else Path(self.name).name, "revision": self.revision}


def find_model(name: str, *, option: str, revision: str | None = None) -> Weights:
    """The folder of a transformers model: a local one, or the hub cache's snapshot of ``name``.

    Raises:
        UserError: it is not on this machine; says what to download and where to put it.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        folder, commit = local, None
    else:
        config = _cached(name, "config.json", revision)
        if config is None:
            raise _not_here(name, option, "the model")
        folder, commit = config.parent, config.parent.name
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    weights = shards or [folder / file for file in _WEIGHT_FILES if (folder / file).is_file()][:1]
    if not weights or not (folder / "config.json").is_file():
        raise UserError(
            f"options.{option}={name}: {folder} holds no config.json with {' or '.join(_WEIGHT_FILES)}: "
            "download the whole model there"
        )
    further = [path for path in sorted(folder.glob("*")) if path.suffix in (".json", ".txt") and _matters(path)]
    return Weights(folder=folder, files=(*weights, *further), revision=commit, option=option, name=name)


def find_state(name: str, *, option: str, revision: str | None = None) -> Weights:
    """A state file (.safetensors, .pth): the file itself, a folder's ``model.safetensors``, or the hub cache's.

    Raises:
        UserError: it is not on this machine; says what to download and where to put it.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        local = local / "model.safetensors"
    if local.is_file():
        return Weights(folder=local.parent, files=(local,), revision=None, option=option, name=name)
    cached = _cached(name, "model.safetensors", revision)
    if cached is None:
        raise _not_here(name, option, "model.safetensors")
    return Weights(folder=cached.parent, files=(cached,), revision=cached.parent.name, option=option, name=name)


def load_transformer(kind: Any, weights: Weights) -> Any:
    """A transformers model in evaluation mode on the best device here, with every weight from its files.

    Args:
        kind: a model class of transformers; ``AutoModel`` lets the configuration choose.

    Raises:
        UserError: the files do not hold this model, or not all of it.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(
            weights.folder,
            local_files_only=True,
            weights_only=True,
            output_loading_info=True,
            dtype=torch.float32,
        )
    except Exception as error:  # whatever a damaged or hostile file raises in whichever reader
        raise UserError(f"options.{weights.option}: {weights.folder} cannot be loaded: {said(error)}") from None
    _refuse_random(report["missing_keys"], weights)
    return model.eval().to(device())


def load_state(model: torch.nn.Module, weights: Weights) -> None:
    """Fill a module from a state file; parameters of a classifier are left out on both sides.

    Raises:
        UserError: the file is damaged, or holds another architecture.
    """
    path = weights.files[0]
    try:
        state = _state(path)
        missing, unexpected = model.load_state_dict(
            {name: value for name, value in state.items() if not name.startswith(_UNUSED)}, strict=False
        )
    except Exception as error:  # whatever a damaged or hostile file raises in whichever reader
        raise UserError(f"options.{weights.option}: {path} cannot be loaded: {said(error)}") from None
    _refuse_random([name for name in missing if not name.endswith("num_batches_tracked")], weights)
    if unexpected:
        raise UserError(f"options.{weights.option}: {path} holds another architecture ({unexpected[0]} has no place)")


def hidden_size(weights: Weights) -> int:
    """Width of a transformers model's states, from its configuration alone.

    Raises:
        UserError: the configuration does not say.
    """
    path = weights.folder / "config.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["hidden_size"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"options.{weights.option}: {path} is not the configuration of a known model") from None


def device() -> torch.device:
    """The GPU that this process was given, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def said(error: Exception) -> str:
    """What an error says, in one line of bearable length."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def versions(*libraries: str) -> dict[str, str]:
    """Library -> installed version."""
    return {name: importlib.metadata.version(name) for name in libraries}


def _state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _refuse_random(missing: list[str], weights: Weights) -> None:
    needed = sorted(name for name in missing if not name.startswith(_UNUSED))
    if needed:
        raise UserError(
            f"options.{weights.option}: {weights.files[0]} lacks {len(needed)} of the model's weights "
            f"({needed[0]}, ...): it belongs to another model, and they would be random"
        )


def _cached(name: str, file: str, revision: str | None) -> Path | None:
    try:
        found = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _not_here(name: str, option: str, what: str) -> UserError:
    return UserError(
        f"options.{option}={name}: neither a file or folder here nor in the hub cache {constants.HF_HUB_CACHE}: "
        f"where there is a network, run `hf download {name}` for {what} and copy the cache here, "
        f"or name a local copy with options.{option}=PATH"
    )


def _matters(path: Path) -> bool:
    return path.name in {
        "config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "special_tokens_map.json",
    }


@lru_cache(maxsize=64)
def _sha256(path: Path, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
