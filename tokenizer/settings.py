"""Settings: nested dataclasses <-> YAML files <-> dotted command-line overrides, read by jsonargparse."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from tokenizer.errors import UserError
from tokenizer.files import write_whole

T = TypeVar("T")


def load(kind: type[T], file: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Reads a configuration: the defaults of `kind`, then the YAML `file`, then the overrides, the last one winning.

    Args:
        kind: a dataclass whose fields are plain types or dataclasses.
        file: a YAML file that mirrors the dataclass, or None.
        overrides: words of a command line, such as `["--optimizer.lr", "1e-4", "--seed=3"]`.

    Raises:
        UserError: the file is missing, or a key is unknown or ill-typed (with the nearest known key).
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    parser.add_argument("--config", action="config")
    words = []
    if file is not None:
        words = ["--config", str(_checked_file(kind, Path(file)))]
    overrides = [_underscored(word) for word in overrides]
    for word in overrides:
        if word.startswith("--"):
            check_key(kind, word[2:].split("=", 1)[0], "the command line")
    try:
        namespace = parser.parse_args([*words, *overrides])
        values = parser.instantiate_classes(namespace)
        return kind(**{name: values[name] for name in _fields(kind)})
    except (ArgumentError, TypeError) as error:
        where = f"{file} and the command line" if file else "the command line"
        raise UserError(f"the settings of {where} do not fit {kind.__name__}: {_first_lines(error)}.") from error


def save(config: Any, file: str | Path) -> None:
    """Writes a configuration as YAML that `load` reads back to an equal object; a reader never sees half of it."""
    write_whole(Path(file), yaml.safe_dump(to_dict(config), sort_keys=False))


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain dictionaries and lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [plain(entry) for entry in value]
        return value

    return plain(dataclasses.asdict(config))


def from_dict(kind: type[T], values: dict[str, Any]) -> T:
    """The configuration that `to_dict` writes as `values`.

    Raises:
        UserError: a value is ill-typed.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        instances = parser.instantiate_classes(parser.parse_object(values))
        return kind(**{name: instances[name] for name in _fields(kind)})
    except (ArgumentError, TypeError) as error:
        raise UserError(f"the settings do not fit {kind.__name__}: {_first_lines(error)}.") from error


def known_keys(kind: Any) -> Iterator[str]:
    """All dotted keys of a configuration class."""
    for name, inner in _fields(kind).items():
        yield name
        for part in (inner, *typing.get_args(inner)):  # itself, or the elements of a list
            if dataclasses.is_dataclass(part):
                yield from (f"{name}.{key}" for key in known_keys(part))


def _fields(kind: Any) -> dict[str, Any]:
    """The fields of a dataclass and their types."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _underscored(word: str) -> str:
    """--shard-size is as good as --shard_size."""
    if not word.startswith("--"):
        return word
    key, sign, value = word.partition("=")
    return "--" + key[2:].replace("-", "_") + sign + value


def _checked_file(kind: type, file: Path) -> Path:
    if not file.is_file():
        raise UserError(f"the configuration file {file} does not exist: give the path of a YAML file.")
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"the configuration file {file} is not valid YAML: {_first_lines(error)}.") from error
    if not isinstance(content, dict):
        raise UserError(f"the configuration file {file} must hold a mapping of keys, not a {type(content).__name__}.")
    for key in _keys_in(kind, content):
        check_key(kind, key, str(file))
    return file


def _keys_in(kind: Any, content: dict, prefix: str = "") -> Iterator[str]:
    fields = _fields(kind)
    for key, value in content.items():
        yield f"{prefix}{key}"
        inner = fields.get(key)
        if isinstance(value, dict) and dataclasses.is_dataclass(inner):
            yield from _keys_in(inner, value, f"{prefix}{key}.")
        element = next(iter(typing.get_args(inner)), None)  # of a list or tuple of dataclasses
        if isinstance(value, list) and dataclasses.is_dataclass(element):
            for entry in value:
                if isinstance(entry, dict):
                    yield from _keys_in(element, entry, f"{prefix}{key}.")


def check_key(kind: type, key: str, where: str) -> None:
    """Raises UserError, with the nearest known key, unless `kind` has the dotted `key` of `where` (the sentence's subject)."""
    known = list(known_keys(kind))
    head = re.sub(r"\+$", "", key)
    if head in known:
        return
    near = difflib.get_close_matches(head, known, n=1, cutoff=0.0)
    raise UserError(f"{where} has an unknown key '{key}': the nearest known key is '{near[0] if near else known[0]}'.")


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:400].rstrip(". ")


def describe(kind: type) -> str:
    """All settings of a configuration class with their meanings and defaults, as `--help` shows them."""
    parser = ArgumentParser(
        prog="", usage="settings, in the YAML file or as words of the command line:", add_help=False
    )
    parser.add_class_arguments(kind)
    return parser.format_help()
