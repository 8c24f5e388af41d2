"""Files of prompts, and which file each of their videos becomes."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizer.errors import UserError

LONGEST = 20_000
"""Characters of a prompt: more is a mistake, such as a whole file in one cell."""
LONGEST_NAME = 200
"""Bytes; file systems take 255, and an ending and a temporary name are added."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: what to show.
        name: of the video's file, without its ending; None: its number.
    """

    text: str
    name: str | None = None


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts of a CSV with a column caption, and a column name if it likes; or of a text file with one a line.

    Raises:
        UserError: the file is missing, is no UTF-8 text, has no column caption, holds no prompt, one that is too long, or names that are
            no plain file names or repeat themselves.
    """
    if not file.is_file():
        raise UserError(f"the prompt file {file} does not exist: give a CSV with a column caption, or a text file.")
    try:
        listed = list(_csv(file) if file.suffix.lower() == ".csv" else _lines(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"the prompt file {file} can't be read as text in UTF-8 ({error}): mend or convert it."
        ) from error
    listed = [(number, prompt) for number, prompt in listed if prompt.text]
    if not listed:
        raise UserError(f"the prompt file {file} holds no prompt: write at least one.")
    seen: dict[str, int] = {}
    for number, prompt in listed:
        where = f"line {number} of {file}"
        check_length(prompt.text, f"the prompt in {where}")
        if prompt.name is not None:
            check_name(prompt.name, where)
            # some file systems know no capitals
            if (before := seen.setdefault(prompt.name.casefold(), number)) != number:
                raise UserError(f"{where} has the name '{prompt.name}' of line {before}: give each prompt its own.")
    return [prompt for _, prompt in listed]


def check_length(text: str, what: str) -> None:
    """Raises UserError for an empty prompt or one of more than `LONGEST` characters."""
    if not text.strip():
        raise UserError(f"{what} is empty: say what to show.")
    if len(text) > LONGEST:
        raise UserError(f"{what} has {len(text)} characters: give at most {LONGEST}.")


def check_name(name: str, where: str) -> None:
    """Raises UserError if a file of this name would lie elsewhere than in its folder, be hidden, or be no file name."""
    plain = re.fullmatch(r"[^/\\\x00-\x1f\x7f]+", name) and not name.startswith((".", "~")) and name == name.strip()
    if not plain or len(name.encode(errors="replace")) > LONGEST_NAME or (len(name) > 1 and name[1] == ":"):
        raise UserError(
            f"{where} has the name {name[:60]!r}, which is no plain file name: use up to {LONGEST_NAME} letters, digits, spaces, - or _."
        )


def _csv(file: Path) -> Iterator[tuple[int, Prompt]]:
    with open(file, newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines)
        if "caption" not in (reader.fieldnames or []):
            raise UserError(f"the prompt file {file} has no column caption but {reader.fieldnames}: add one.")
        for row in reader:
            if None in row:
                raise UserError(
                    f"line {reader.line_num} of {file} has more values than columns (a comma outside quotes?): mend it."
                )
            yield reader.line_num, Prompt((row["caption"] or "").strip(), row.get("name") or None)


def _lines(file: Path) -> Iterator[tuple[int, Prompt]]:
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        yield number, Prompt(line.strip())
