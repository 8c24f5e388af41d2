"""What more than one room does with files."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def sync(path: Path) -> None:
    """Makes a file's or folder's content survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(file: Path, content: str) -> None:
    """Writes a text file that appears whole or not at all, also after a power loss."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(content, encoding="utf-8")
        sync(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
