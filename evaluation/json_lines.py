"""Files of JSON lines that somebody may be writing to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines; one that is still being written, or was cut short, is left out."""
    for line in file.read_text(errors="replace").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
