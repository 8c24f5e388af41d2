"""The inference format: config.json and model.safetensors in one directory."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from inference.config import ModelConfig
from inference.model import VideoARTransformer
from tokenizer.errors import UserError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def save_model(model: VideoARTransformer, directory: str | Path, extra: Mapping[str, Any] | None = None) -> None:
    """Writes a model; see `save_weights`."""
    save_weights(model.config, model.state_dict(), directory, extra)


def save_weights(
    config: ModelConfig, state: Mapping[str, Tensor], directory: str | Path, extra: Mapping[str, Any] | None = None
) -> None:
    """Writes `model.safetensors`, then `config.json`; each appears whole or not at all.

    Args:
        config: the network.
        state: its weights under `VideoARTransformer.state_dict`'s names.
        directory: is made if it is missing.
        extra: further entries of config.json (text encoder, tokenizer fingerprint, class names).

    Raises:
        UserError: the weights are not those of the configuration.
    """
    directory = Path(directory)
    _check_weights(config, {name: tuple(value.shape) for name, value in state.items()}, "the weights to be saved")
    directory.mkdir(parents=True, exist_ok=True)
    # a directory whose configuration is gone can't be taken for a whole model between the two renames
    (directory / CONFIG_FILE).unlink(missing_ok=True)
    contiguous = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    _write(directory / WEIGHTS_FILE, lambda path: save_file(contiguous, path, metadata={"format": "pt"}))
    content = json.dumps({"model": config.to_dict(), **(extra or {})}, indent=2)
    _write(directory / CONFIG_FILE, lambda path: path.write_text(content + "\n"))


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json as a dictionary with the key "model".

    Raises:
        UserError: there is none, or it is not a model's.
    """
    file = Path(directory) / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{directory} holds no {CONFIG_FILE}: give what `videoar export` wrote to its end.")
    try:
        content = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON ({error}): export the checkpoint again.") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{file} describes no transformer (no key 'model'): give what `videoar export` wrote.")
    return content


def load_model(
    directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> VideoARTransformer:
    """Reads a model in evaluation mode.

    Args:
        directory: what `save_model` wrote.
        device: where the weights go.
        dtype: of the weights; None: as stored.

    Raises:
        UserError: a file is missing or damaged, or names or shapes are not those of the configuration.
    """
    stored = StoredWeights(directory, device)
    model = VideoARTransformer.empty(stored.config)
    model.load_state_dict({name: stored[name].to(dtype) for name in stored}, assign=True)
    return model.requires_grad_(False).eval()


class StoredWeights(Mapping[str, Tensor]):
    """A model's weights, each read when it is asked for; `content` is its config.json, `config` the network.

    Args:
        directory: what `save_model` wrote.
        device: where the weights go.

    Raises:
        UserError: a file is missing or damaged, or names or shapes are not those of the configuration.
    """

    def __init__(self, directory: str | Path, device: str | torch.device = "cpu"):
        self.content = read_config(directory)
        self.config = ModelConfig.from_dict(self.content["model"])
        self._file = Path(directory) / WEIGHTS_FILE
        if not self._file.is_file():
            raise UserError(f"{directory} holds no {WEIGHTS_FILE}: give what `videoar export` wrote to its end.")
        try:
            self._stored = safe_open(self._file, framework="pt", device=str(device)).__enter__()
            self._names = list(self._stored.keys())
            shapes = {name: tuple(self._stored.get_slice(name).get_shape()) for name in self._names}
        except SafetensorError as error:
            raise self._damaged(error) from error
        _check_weights(self.config, shapes, str(self._file))

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._stored.get_tensor(name)
        except SafetensorError as error:
            raise self._damaged(error) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _damaged(self, error: SafetensorError) -> UserError:
        return UserError(f"{self._file} is damaged ({error}): export the checkpoint again.")


def fingerprint(model: VideoARTransformer) -> str:
    """A hash of a model's configuration and weights."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _check_weights(config: ModelConfig, shapes: dict[str, tuple[int, ...]], where: str) -> None:
    expected = {name: tuple(shape) for name, shape in VideoARTransformer.shapes(config).items()}
    missing, surplus = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    again = "export the checkpoint again."
    if missing:
        raise UserError(f"{where} lacks {len(missing)} weights of the configuration, such as '{missing[0]}': {again}")
    if surplus:
        raise UserError(
            f"{where} has {len(surplus)} weights beyond the configuration's, such as '{surplus[0]}': {again}"
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise UserError(f"'{name}' in {where} has shape {shapes[name]}, the configuration says {shape}: {again}")


def _write(target: Path, write) -> None:
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
