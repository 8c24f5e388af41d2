"""Whether a checkpoint's files are what was written: sizes and checksums stand in its marker, and all ranks read their share of the files.

The checksum finds what disks, networks and interrupted copies do to files; it is no protection from people.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import TypedDict

import torch.distributed as dist
import xxhash

from parallel.checkpoint import MARKER, complete
from tokenizer.errors import Fault, UserError

CHUNK = 16 << 20
"""Bytes that are read at a time."""
PAUSES = (1.0, 5.0)
"""Seconds after which what can't be read is tried again."""
MISSING = "is missing"
ASIDE = "corrupt-"
"""What the name of a damaged checkpoint is put behind; nobody loads, counts or removes it then."""


class FileSum(TypedDict):
    """What the marker says of a file."""

    size: int
    xxh3: str


def sum_of(file: Path) -> FileSum:
    """Size and checksum of a file."""
    digest, size = xxhash.xxh3_64(), 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "xxh3": digest.hexdigest()}


def damage(checkpoint: Path, rank: int = 0, size: int = 1) -> str | None:
    """What is wrong with the files of a checkpoint that this rank of `size` looks at; None: nothing.

    One that was written before markers had checksums is taken as it is.

    Raises:
        Fault: this machine can't read it now, which says nothing about the files.
    """
    for pause in (*PAUSES, None):
        try:
            reason = _look(checkpoint, rank, size)
        except OSError as error:
            if pause is None:
                raise Fault(
                    f"{checkpoint} can't be read on {platform.node()} ({error}): look at that machine and its disks, then start again."
                ) from error
        else:
            # a network's folder may not show yet what another machine has written
            if pause is None or reason is None or not reason.endswith(MISSING):
                return reason
        time.sleep(pause)
    raise AssertionError


def _look(checkpoint: Path, rank: int, size: int) -> str | None:
    try:
        files: dict[str, FileSum] = json.loads((checkpoint / MARKER).read_text()).get("files", {})
        # the largest ones first, so that every rank gets about as many bytes
        for name in sorted(files, key=lambda name: (-files[name]["size"], name))[rank::size]:
            file = checkpoint / name
            if not file.is_file():
                return f"{name} {MISSING}"
            if (length := file.stat().st_size) != files[name]["size"]:
                return f"{name} has {length} bytes instead of {files[name]['size']}"
            if sum_of(file) != files[name]:
                return f"{name} has another checksum than was written"
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def newest_sound(directory: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest complete checkpoint whose files are what was written, the same one on all ranks; every rank must call it.

    Those that are newer and damaged are renamed to `corrupt-step-N`.

    Returns:
        The checkpoint, None if there was none at all, and the damaged ones under their new names, each with what is wrong.

    Raises:
        UserError: all are damaged: nothing is renamed then.
        Fault: a rank can't read one now, likewise.
    """
    found = [complete(directory)]
    dist.broadcast_object_list(found, src=0)  # a network's folder may not look alike everywhere
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(found[0]):
        reasons: list[str | Fault | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, _damage_or_fault(folder))
        if fault := next((one for one in reasons if isinstance(one, Fault)), None):
            raise fault
        reason = next((one for one in reasons if isinstance(one, str)), None)
        if reason is None:
            return folder, [(_put_aside(one), why) for one, why in damaged]
        damaged.append((folder, reason))
    if damaged:
        folder, reason = damaged[0]
        raise UserError(
            f"every checkpoint in {directory} is damaged (the newest, {folder.name}: {reason}): bring one back, or name another `out` "
            "to begin anew."
        )
    return None, []


def _damage_or_fault(folder: Path) -> str | Fault | None:
    try:
        return damage(folder, dist.get_rank(), dist.get_world_size())
    except Fault as fault:
        return fault


def _put_aside(folder: Path) -> Path:
    """Renames a checkpoint, on rank 0; its new name."""
    aside, number = folder.with_name(ASIDE + folder.name), 1
    taken = [aside]
    if dist.get_rank() == 0:
        while taken[0].exists():
            number += 1
            taken[0] = aside.with_name(f"{aside.name}-{number}")
        folder.rename(taken[0])
    dist.broadcast_object_list(taken, src=0)
    return taken[0]
