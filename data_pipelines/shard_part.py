"""One part of a packing job: so many input files, in one process, to one folder of shards that is whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streaming import MDSWriter
from streaming.base.util import bytes_to_int

from data_pipelines.probe import Rejected, VideoInfo, probe
from data_pipelines.random_access import HASH
from data_pipelines.sources import Source
from tokenizer.errors import UserError, check_each
from tokenizer.files import sync

COLUMNS = {
    "video": "bytes",
    "caption": "str",
    "class_id": "int",
    "timestamps": "ndarray:float64",
    "fps": "float64",
    "frames": "int",
    "width": "int",
    "height": "int",
    "rotation": "int",
    "codec": "str",
    "size": "int",
    "sha256": "str",
    "source": "str",
}
DONE, AT, FAILED = "part.json", "at", "failed"
"""A whole part's rows and rejected files; the number of the file that is being read; why the part can't be written."""
ADDRESSABLE = 2**32 - 2**20
"""Bytes: MDS keeps 32-bit offsets within a shard."""


@dataclass
class ShardsConfig:
    """How videos are packed.

    Args:
        min_frames: shorter videos are rejected; images are clips of one frame.
        max_size: larger files are rejected unread, such as "2gb".
        shard_size: the largest size of a shard, such as "64mb"; encoding hands out work by the shard.
        part_files: input files of a part. Parts are written by processes of their own, and a run that was cut short goes on with the
            parts that are missing.
        workers: parts that are written at a time; 0: one a core.
        split: UCF-101's own lists, such as ucfTrainTestlist/trainlist01.txt: only the videos that they name; none: all.
    """

    min_frames: int = 17
    max_size: str = "2gb"
    shard_size: str = "64mb"
    part_files: int = 512
    workers: int = 0
    split: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_each(self, ("min_frames", "part_files"), lambda value: value >= 1, "be at least 1")
        check_each(self, ("workers",), lambda value: value >= 0, "be at least 0")
        for name in ("max_size", "shard_size"):
            try:
                fits = 0 < bytes_to_int(getattr(self, name)) < ADDRESSABLE
            except ValueError:
                fits = False
            if not fits:
                raise UserError(
                    f"'{getattr(self, name)}' is no {name}: write a number with a unit, such as 64mb, below 4gb, which is what a "
                    "shard can address."
                )


def write_part(
    sources: Sequence[Source], folder: Path, options: ShardsConfig, crashed: Mapping[int, str], driver: int
) -> None:
    """Packs files into `folder`, which appears when it is whole; meant for a process of its own.

    Args:
        sources: the part's files.
        folder: its name.
        options: of the job.
        crashed: files that have killed earlier processes, by their number in the part, with the reason to be listed.
        driver: the process that waits for this one; without it nothing is finished.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends this process
    # a progress bar's thread may have held its lock at the fork
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    temporary, at = beside(folder), beside(folder, AT)
    shutil.rmtree(temporary, ignore_errors=True)
    beside(folder, FAILED).unlink(missing_ok=True)
    try:
        writer, rejected = None, []
        for number, source in enumerate(sources):
            at.write_text(str(number))
            if os.getppid() != driver:
                return
            reason = crashed.get(number)
            record = None if reason else _record(source, options)
            if isinstance(record, dict):
                if writer is None:
                    writer = MDSWriter(
                        columns=COLUMNS, out=str(temporary), hashes=[HASH], size_limit=options.shard_size
                    )
                writer.write(record)
            else:
                rejected.append({"source": source.name, "reason": reason or record})
        if writer is None:
            temporary.mkdir()
        else:
            # not the writer's context manager: that one would also write an index after an exception
            writer.finish()
        (temporary / DONE).write_text(json.dumps({"rows": len(sources) - len(rejected), "rejected": rejected}))
        for file in (*temporary.iterdir(), temporary):
            sync(file)
        if os.getppid() == driver:
            temporary.rename(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk: room for the reason
        beside(folder, FAILED).write_text(f"{error.strerror or error}")
        raise SystemExit(1) from None
    finally:
        at.unlink(missing_ok=True)


def beside(folder: Path, what: str = "") -> Path:
    """What a part is called until it is whole, or a note on it."""
    return folder.with_name(f".{folder.name}{what and '.'}{what}")


def _record(source: Source, options: ShardsConfig) -> dict[str, Any] | str:
    """A file as a record, or the reason why it can't be used."""
    try:
        if not _is_text(source.name) or not _is_text(source.caption):
            raise Rejected("name or caption is no valid text")
        if not source.path.is_file():
            raise Rejected("missing file")
        size, limit = source.path.stat().st_size, bytes_to_int(options.max_size)
        if size > limit:
            raise Rejected(f"too large ({size} bytes, {limit} allowed)")
        video = source.path.read_bytes()
        info = probe(video, 1 if source.is_image else options.min_frames)
    except Rejected as reason:
        return str(reason)
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return _fields(source, video, info)


def _is_text(value: str) -> bool:
    """A lone half of a character, as a cut emoji leaves, can't be stored."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fields(source: Source, video: bytes, info: VideoInfo) -> dict[str, Any]:
    return {
        "video": video,
        "caption": source.caption,
        "class_id": source.class_id,
        "timestamps": info.timestamps,
        "fps": info.fps,
        "frames": info.frames,
        "width": info.width,
        "height": info.height,
        "rotation": info.rotation,
        "codec": info.codec,
        "size": len(video),
        "sha256": hashlib.sha256(video).hexdigest(),
        "source": source.name,
    }
