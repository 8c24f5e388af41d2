"""What `videoar shards` packs: the files of a folder, a table, or the UCF-101 layout, in a fixed order."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizer.errors import UserError

IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
SUFFIXES = IMAGES | {
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".ogv", ".gif"
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One input file.

    Attributes:
        path: where it lies.
        name: its path within the input, which records and the list of rejected files carry.
        caption: what it shows.
        class_id: -1: no class.
    """

    path: Path
    name: str
    caption: str
    class_id: int = -1

    @property
    def is_image(self) -> bool:
        """Whether it is a clip of one frame."""
        return self.path.suffix.lower() in IMAGES


def find_sources(videos: Path) -> tuple[list[Source], list[str]]:
    """Lists the input in one of its layouts.

    Args:
        videos: a table with `path` (relative to the table's folder, or absolute) and `caption`: a CSV file with these columns, or
            a JSONL file with these keys; or a folder with exactly one such table; or a folder `Class/v_*.avi` (UCF-101); or any
            folder of videos and images, or one such file, without captions.

    Returns:
        the files in a fixed order, and the names of the classes ([] if there are none), in the order of `class_id`.

    Raises:
        UserError: the path is missing, holds no videos, or the table lacks a column or key.
    """
    if not videos.exists():
        raise UserError(
            f"{videos} does not exist: give a video or image, a folder of them, or a table (CSV or JSONL) of path and caption."
        )
    if videos.is_file():
        return ([Source(videos, videos.name, "")] if videos.suffix.lower() in SUFFIXES else _from_table(videos)), []
    tables = sorted(p for p in videos.glob("*.csv") if "path" in _columns(p))
    tables += sorted(p for p in videos.glob("*.jsonl") if _starts_a_table(p))
    if len(tables) == 1:
        return _from_table(tables[0]), []
    if tables:
        raise UserError(f"{videos} holds {len(tables)} tables of videos: name one of them, such as {tables[0]}.")
    clips = sorted(videos.glob("*/v_*.avi"))
    if clips:
        classes = sorted({p.parent.name for p in clips})
        number = {name: i for i, name in enumerate(classes)}
        found = [Source(p, f"{p.parent.name}/{p.name}", p.parent.name, number[p.parent.name]) for p in clips]
        return found, classes
    files = sorted(p for p in videos.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise UserError(
            f"{videos} holds no videos: give a folder of videos or a CSV with the columns path and caption."
        )
    return [Source(p, p.relative_to(videos).as_posix(), "") for p in files], []


def _from_table(table: Path) -> list[Source]:
    try:
        rows = list(_jsonl_rows(table) if table.suffix.lower() == ".jsonl" else _csv_rows(table))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} can't be read as a table in UTF-8 ({error}): mend or convert it.") from error
    if not rows:
        raise UserError(f"{table} lists no videos: give at least one line with path and caption.")
    return [Source(table.parent / path, path, caption) for path, caption in rows]


def _jsonl_rows(table: Path) -> Iterator[tuple[str, str]]:
    with open(table, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                path, caption = row["path"], row["caption"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"line {number} of {table} is no object with the keys path and caption ({error!r}): mend it."
                ) from error
            if not isinstance(path, str) or not path or not isinstance(caption, str | None):
                raise UserError(f"line {number} of {table} has a path or caption that is no text: mend it.")
            yield path, caption or ""


def _starts_a_table(table: Path) -> bool:
    """Whether the first line of a JSONL file is one of videos; lists of rejected files, for one, are not."""
    with open(table, encoding="utf-8-sig", errors="replace") as file:
        line = next((line for line in file if line.strip()), "")
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and "path" in row


def _columns(table: Path) -> list[str]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            return next(csv.reader(file), [])
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not a CSV file in UTF-8: give one with the columns path and caption.") from error


def _csv_rows(table: Path) -> Iterator[tuple[str, str]]:
    if missing := [name for name in ("path", "caption") if name not in _columns(table)]:
        raise UserError(
            f"{table} has no column {' and no column '.join(missing)}: its first line must name path and caption."
        )
    with open(table, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if not row["path"] or None in row:
                what = "more values than columns (a comma outside quotes?)" if row["path"] else "no path"
                raise UserError(f"line {reader.line_num} of {table} has {what}: mend it.")
            yield row["path"], row["caption"] or ""


def fingerprint(sources: list[Source]) -> str:
    """Names, captions, sizes and times of change: another input is never taken for this one."""
    digest = hashlib.sha256()
    for source in sources:
        try:
            state = source.path.stat()
            seen = (state.st_size, state.st_mtime_ns)
        except (OSError, ValueError):  # missing, or no path at all: it will be rejected
            seen = None
        digest.update(repr((source.name, source.caption, source.class_id, seen)).encode(errors="backslashreplace"))
    return digest.hexdigest()[:32]
