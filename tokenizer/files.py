"""What more than one room does with files."""

from __future__ import annotations

import glob
import os
import re
import socket
import uuid
from pathlib import Path

import psutil


def sync(path: Path) -> None:
    """Makes a file's or folder's content survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(file: Path, content: str) -> None:
    """Writes a text file that appears whole or not at all, also after a power loss.

    What a process of this machine that was killed while it wrote the same file has left beside it goes.
    """
    prefix = f".{file.name}.{socket.gethostname()}."
    for left in file.parent.glob(f"{glob.escape(prefix)}*"):
        match = re.fullmatch(r"(\d+)\.[0-9a-f]{32}", left.name[len(prefix) :])
        if match and not psutil.pid_exists(int(match.group(1))):
            left.unlink(missing_ok=True)
    temporary = file.with_name(f"{prefix}{os.getpid()}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(content, encoding="utf-8")
        sync(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
