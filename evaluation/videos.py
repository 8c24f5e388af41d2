"""Scores of video files that a CSV (path, caption) lists."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.media import read_video
from evaluation.shapes import score
from tokenizer.errors import UserError
from tokenizer.files import write_whole
from tokenizer.progress import track


def read_table(table: Path) -> list[dict[str, str]]:
    """The rows of a CSV with the columns path and caption; paths become absolute.

    Raises:
        UserError: the file is missing, empty, or lacks a column.
    """
    table = Path(table)
    if not table.is_file():
        raise UserError(f"the list of videos {table} does not exist: give a CSV with the columns path,caption.")
    with open(table, newline="") as lines:
        rows = list(csv.DictReader(lines))
    if not rows or not {"path", "caption"} <= set(rows[0]):
        raise UserError(f"the list of videos {table} has no rows with the columns path,caption: write them.")
    return [{**row, "path": str(table.parent / row["path"])} for row in rows]


def frame_range(text: str | None) -> tuple[int, int] | None:
    """FIRST:LAST as numbers; None stays.

    Raises:
        UserError: it is no such range, or an empty one.
    """
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UserError(f"'{text}' is no range of frames: write FIRST:LAST, such as 16:33.")
    return int(first), int(last)


def score_videos(table: Path, out: Path | None = None, frames: tuple[int, int] | None = None) -> dict[str, Any]:
    """Reads colour, shape, direction and speed off every video of a table (see `evaluation.shapes.score`).

    Args:
        table: a CSV with the columns path and caption.
        out: a JSON file for the scores.
        frames: the first frame that counts and the one after the last; None: all. A video that has not so many counts as unreadable.

    Returns:
        the scores, and under "unreadable" one sentence for each video that can't be read, which counts as wrong in everything.

    Raises:
        UserError: no video can be read.
    """
    rows = read_table(table)

    unreadable: list[str] = []

    def clips() -> Iterator[np.ndarray]:
        for row in track(rows, f"scoring {table}"):
            try:
                clip = read_video(Path(row["path"]))[0]
                if frames is not None and len(clip) < frames[1]:
                    raise UserError(f"the video {row['path']} has {len(clip)} frames, not {frames[1]}: score fewer.")
                yield clip if frames is None else clip[slice(*frames)]
            except UserError as error:
                unreadable.append(str(error))
                yield np.zeros((1, 16, 16, 3), np.uint8)  # nothing to read: wrong in everything

    result = score(clips(), [row["caption"] for row in rows]) | {"unreadable": unreadable}
    if len(unreadable) == len(rows):
        raise UserError(f"no video of {table} can be read (the first: {unreadable[0]}).")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, json.dumps(result, indent=2))
    return result
