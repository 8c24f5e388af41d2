"""The inference format: config.json and model.safetensors (or several files with an index) in one directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.config import ModelConfig
from inference.model import VideoARTransformer
from inference.weight_files import WeightFiles, write_file, write_weights
from tokenizer.errors import UserError

CONFIG_FILE = "config.json"


def save_model(model: VideoARTransformer, directory: str | Path, extra: Mapping[str, Any] | None = None) -> None:
    """Writes a model; see `save_weights`."""
    save_weights(model.config, model.state_dict(), directory, extra)


def save_weights(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    directory: str | Path,
    extra: Mapping[str, Any] | None = None,
    max_shard_size: int | None = None,
) -> None:
    """Writes the weights, then `config.json`; each file appears whole or not at all.

    Args:
        config: the network.
        state: its weights under `VideoARTransformer.state_dict`'s names.
        directory: is made if it is missing.
        extra: further entries of config.json (text encoder, tokenizer fingerprint, class names).
        max_shard_size: bytes of a weight file (see `inference.weight_files`); None: one file.

    Raises:
        UserError: the weights are not those of the configuration.
    """
    directory = Path(directory)
    _check_weights(config, {name: tuple(value.shape) for name, value in state.items()}, "the weights to be saved")
    directory.mkdir(parents=True, exist_ok=True)
    # a directory whose configuration is gone can't be taken for a whole model between the two renames
    (directory / CONFIG_FILE).unlink(missing_ok=True)
    write_weights(state, directory, max_shard_size)
    content = json.dumps({"model": config.to_dict(), **(extra or {})}, indent=2)
    write_file(directory / CONFIG_FILE, lambda path: path.write_text(content + "\n"))


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
        self._files = WeightFiles(directory, device)
        _check_weights(self.config, self._files.shapes, str(self._files.source))

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files.shapes)

    def __len__(self) -> int:
        return len(self._files.shapes)


def fingerprint(config: ModelConfig, weights: Mapping[str, Tensor]) -> str:
    """A hash of a model's configuration and weights, such as its `state_dict()` or `StoredWeights`."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
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
