"""A model's weights in one safetensors file, or in several with an index, in the layout that Hugging Face's libraries use."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenizer.errors import UserError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
AGAIN = "export the checkpoint again."


def parse_size(text: str) -> int:
    """A number of bytes from a text such as "5gb" (decimal units) or "700000".

    Raises:
        UserError: it is no size above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]b)?", text.strip().lower())
    size = int(float(match[1]) * UNITS.get(match[2], 1)) if match else 0
    if size < 1:
        raise UserError(f"the size '{text}' is none: give a number and kb, mb, gb or tb, such as 5gb.")
    return size


def split(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """Names in files of at most `limit` bytes, in their order; a tensor that is larger has a file of its own.

    Args:
        sizes: bytes of each tensor.
        limit: None: one file.
    """
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if limit is not None and files[-1] and filled + size > limit:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files


def write_weights(state: Mapping[str, Tensor], directory: Path, max_shard_size: int | None = None) -> None:
    """Writes `model.safetensors`, or `model-00001-of-0000N.safetensors` and so on with their index; each file appears whole.

    Weight files of an earlier save that do not belong to this one go.

    Args:
        state: names and tensors.
        directory: is there.
        max_shard_size: bytes of a file; None: no limit.
    """
    files = split({name: value.numel() * value.element_size() for name, value in state.items()}, max_shard_size)
    count = len(files)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    names = [WEIGHTS_FILE] if count == 1 else names
    for file, tensors in zip(names, files):
        part = {name: state[name].detach().cpu().contiguous() for name in tensors}
        write_file(directory / file, lambda path, part=part: save_file(part, path, metadata={"format": "pt"}))
    kept = set(names)
    if count > 1:
        total = sum(value.numel() * value.element_size() for value in state.values())
        where = {name: file for file, tensors in zip(names, files) for name in tensors}
        content = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n"
        write_file(directory / INDEX_FILE, lambda path: path.write_text(content))
        kept.add(INDEX_FILE)
    for old in weight_files(directory):
        if old.name not in kept:
            old.unlink()


def weight_files(directory: Path) -> list[Path]:
    """The files in a folder that have names of weight files."""
    named = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(INDEX_FILE))
    return sorted(path for path in directory.iterdir() if named.fullmatch(path.name))


class WeightFiles:
    """Opened weight files; a tensor is read when it is asked for.

    Args:
        directory: what `write_weights` wrote to.
        device: where tensors go.

    Raises:
        UserError: a file is missing or damaged, an index names files outside the folder, or a tensor is not there exactly once.
    """

    def __init__(self, directory: str | Path, device: str | torch.device = "cpu"):
        self.directory = Path(directory)
        single, index = self.directory / WEIGHTS_FILE, self.directory / INDEX_FILE
        if single.is_file() and index.is_file():
            raise UserError(
                f"{directory} holds both {WEIGHTS_FILE} and {INDEX_FILE}: remove the one that is not meant."
            )
        if not single.is_file() and not index.is_file():
            raise UserError(f"{directory} holds no {WEIGHTS_FILE}: give what `videoar export` wrote to its end.")
        self.source = single if single.is_file() else index
        where = None if single.is_file() else _read_index(index)
        files = [WEIGHTS_FILE] if where is None else sorted(set(where.values()))
        self._opened: dict[str, tuple[Path, Any]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in files:
            self._open(self.directory / name, str(device))
        if where is not None:
            self._check(where)

    def __getitem__(self, name: str) -> Tensor:
        file, opened = self._opened[name]
        try:
            return opened.get_tensor(name)
        except SafetensorError as error:
            raise _damaged(file, error) from error

    def _open(self, file: Path, device: str) -> None:
        if not file.is_file():
            raise UserError(f"{self.source} names {file.name}, which is missing: copy it, or {AGAIN}")
        try:
            opened = safe_open(file, framework="pt", device=device).__enter__()
            for name in opened.keys():  # noqa: SIM118 (it is no dictionary)
                if name in self._opened:
                    raise UserError(
                        f"'{name}' is in {self._opened[name][0].name} and in {file.name} of {self.directory}: {AGAIN}"
                    )
                self._opened[name] = file, opened
                self.shapes[name] = tuple(opened.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error

    def _check(self, where: Mapping[str, str]) -> None:
        for name, file in where.items():
            found = self._opened.get(name)
            if found is None or found[0].name != file:
                raise UserError(f"{self.source} puts '{name}' into {file}, which does not hold it: {AGAIN}")
        surplus = sorted(self._opened.keys() - where.keys())
        if surplus:
            raise UserError(
                f"{self.source} does not list '{surplus[0]}' of {self._opened[surplus[0]][0].name}: {AGAIN}"
            )


def _read_index(file: Path) -> dict[str, str]:
    """Tensor name -> file name, checked to be a plain name in the index's own folder."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{file} lists '{twice}' twice: {AGAIN}")
        return content

    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
        where = content["weight_map"]
        pairs = list(where.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is no index of weights ({' '.join(str(error).split())[:100]}): {AGAIN}") from error
    for name, target in pairs:
        if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.safetensors", target):
            raise UserError(f"{file} puts '{name}' into {target!r}, which is no file name of its own folder: {AGAIN}")
    if not pairs:
        raise UserError(f"{file} lists no weights: {AGAIN}")
    return where


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} is damaged ({error}): {AGAIN}")


def write_file(target: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary path and renames what it wrote to `target`; on failure nothing is left."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
