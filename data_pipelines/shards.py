"""Video files -> raw shards: one MDS record a clip, the encoded bytes as they came (DESIGN section 5).

    video       bytes             the file
    caption     str               "" if there is none; in the UCF-101 layout the name of the class
    class_id    int               -1: no class
    timestamps  ndarray:float64   seconds of every frame
    fps         float64           the average rate
    frames, width, height  int    counted and measured by decoding; upright
    codec       str
    source      str               the path within the input

Beside the shards lie `index.json` (streaming's), `rejected.jsonl` (source and reason of every file that was left out) and
`receipt.json`, without which a folder is not whole.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streaming import MDSWriter

from data_pipelines.probe import Rejected, VideoInfo, probe
from data_pipelines.random_access import HASH
from tokenizer.errors import UserError
from tokenizer.progress import Meter
from tokenizer.receipts import finished, new_folder, read_receipt

FORMAT = 1
COLUMNS = {
    "video": "bytes",
    "caption": "str",
    "class_id": "int",
    "timestamps": "ndarray:float64",
    "fps": "float64",
    "frames": "int",
    "width": "int",
    "height": "int",
    "codec": "str",
    "source": "str",
}
SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".ogv", ".gif"}


@dataclass
class ShardsConfig:
    """How videos are packed.

    Args:
        min_frames: shorter videos are rejected.
        shard_size: the largest size of a shard, such as "64mb"; encoding hands out work by the shard.
        workers: threads that decode; 0: one a core.
    """

    min_frames: int = 17
    shard_size: str = "64mb"
    workers: int = 0


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


def find_sources(videos: Path) -> tuple[list[Source], list[str]]:
    """Lists the input in one of its layouts.

    Args:
        videos: a CSV file with the columns `path` (relative to the CSV's folder, or absolute) and `caption`; or a folder
            with exactly one such CSV; or a folder `Class/v_*.avi` (UCF-101); or any folder of videos, or one video file, without
            captions.

    Returns:
        the files in a fixed order, and the names of the classes ([] if there are none), in the order of `class_id`.

    Raises:
        UserError: the path is missing, holds no videos, or the CSV lacks a column.
    """
    if not videos.exists():
        raise UserError(
            f"{videos} does not exist: give a video file, a folder of videos, or a CSV with the columns path and caption."
        )
    if videos.is_file():
        return ([Source(videos, videos.name, "")] if videos.suffix.lower() in SUFFIXES else _from_csv(videos)), []
    tables = sorted(p for p in videos.glob("*.csv") if "path" in _columns(p))
    if len(tables) == 1:
        return _from_csv(tables[0]), []
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


def _columns(table: Path) -> list[str]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            return next(csv.reader(file), [])
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not a CSV file in UTF-8: give one with the columns path and caption.") from error


def _from_csv(table: Path) -> list[Source]:
    if missing := [name for name in ("path", "caption") if name not in _columns(table)]:
        raise UserError(
            f"{table} has no column {' and no column '.join(missing)}: its first line must name path and caption."
        )
    with open(table, newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.DictReader(file) if row["path"]]
    if not rows:
        raise UserError(f"{table} lists no videos: give at least one line with path and caption.")
    return [Source(table.parent / row["path"], row["path"], row["caption"] or "") for row in rows]


def write_shards(videos: Path, out: Path, options: ShardsConfig | None = None) -> dict[str, Any]:
    """Packs videos into shards, or nothing if `out` holds them already.

    Args:
        videos: see `find_sources`.
        out: the folder to make; it is renamed into place when it is whole.
        options: the defaults if None.

    Returns:
        the receipt: {"clips", "shards", "rejected": numbers, "reasons": {reason: number}, "classes": names, "arguments"}.

    Raises:
        UserError: nothing is left, an input is missing, or `out` holds something else.
    """
    options = options or ShardsConfig()
    videos, out = Path(videos), Path(out)
    sources, classes = find_sources(videos)
    settings = {key: value for key, value in asdict(options).items() if key != "workers"}  # they change no byte
    arguments = {"kind": "raw shards", "format": FORMAT, "input": fingerprint(sources), **settings}
    if (receipt := finished(out, arguments)) is not None:
        return receipt
    with new_folder(out, arguments) as (folder, receipt):
        reasons: Counter[str] = Counter()
        writer = _writer(folder, options)
        with open(folder / "rejected.jsonl", "w") as rejected, Meter("shards", len(sources)) as meter:
            for source, video, result in _probed(sources, options):
                if isinstance(result, VideoInfo):
                    writer.write(_record(source, video, result))
                else:
                    reasons[result.split(" (")[0]] += 1
                    rejected.write(json.dumps({"source": source.name, "reason": result}) + "\n")
                meter.advance(note=f"{reasons.total()} rejected" if reasons else "")
        clips = len(sources) - reasons.total()
        if not clips:
            listing = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            raise UserError(
                f"no video of {videos} can be used ({listing}): give videos of {options.min_frames} frames or more."
            )
        # Not the writer's context manager: that one would also write an index after an exception.
        writer.finish()
        shards = len(json.loads((folder / "index.json").read_text())["shards"])
        receipt.update(clips=clips, shards=shards, rejected=reasons.total(), reasons=dict(reasons), classes=classes)
    return {"arguments": arguments, **receipt}


def read_shards_receipt(shards: Path) -> dict[str, Any]:
    """The receipt of a finished folder of raw shards.

    Raises:
        UserError: the folder is not one.
    """
    receipt = read_receipt(shards)
    if receipt is None or receipt["arguments"].get("kind") != "raw shards":
        raise UserError(f"{shards} holds no finished raw shards: write them with `videoar shards`.")
    return receipt


def _writer(folder: Path, options: ShardsConfig) -> MDSWriter:
    try:
        return MDSWriter(columns=COLUMNS, out=str(folder), hashes=[HASH], size_limit=options.shard_size, exist_ok=True)
    except ValueError as error:
        raise UserError(
            f"'{options.shard_size}' is no shard_size: write a number with a unit, such as 64mb."
        ) from error


def _probed(sources: list[Source], options: ShardsConfig) -> Iterator[tuple[Source, bytes, VideoInfo | str]]:
    """Every source with its bytes and what they hold, or the reason why they can't be used; in order."""

    def look(source: Source) -> tuple[Source, bytes, VideoInfo | str]:
        try:
            if not source.path.is_file():
                raise Rejected("missing file")
            video = source.path.read_bytes()
            return source, video, probe(video, options.min_frames)
        except Rejected as reason:
            return source, b"", str(reason)
        except OSError as error:
            return source, b"", f"unreadable ({error.strerror})"

    workers = options.workers or os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:  # decoding releases the interpreter
        for start in range(0, len(sources), 8 * workers):  # few files at a time in memory
            yield from pool.map(look, sources[start : start + 8 * workers])


def _record(source: Source, video: bytes, info: VideoInfo) -> dict[str, Any]:
    return {
        "video": video,
        "caption": source.caption,
        "class_id": source.class_id,
        "timestamps": info.timestamps,
        "fps": info.fps,
        "frames": info.frames,
        "width": info.width,
        "height": info.height,
        "codec": info.codec,
        "source": source.name,
    }


def fingerprint(sources: list[Source]) -> str:
    """Names, captions, sizes and times of change: another input is never taken for this one."""
    digest = hashlib.sha256()
    for source in sources:
        state = source.path.stat() if source.path.is_file() else None
        seen = None if state is None else (state.st_size, state.st_mtime_ns)
        digest.update(repr((source.name, source.caption, source.class_id, seen)).encode())
    return digest.hexdigest()[:32]
