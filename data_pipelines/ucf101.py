"""The official split lists of UCF-101: ucfTrainTestlist/trainlist01.txt, testlist01.txt, and so on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from data_pipelines.sources import Source
from tokenizer.errors import UserError


def read_split(file: Path) -> list[str]:
    """The videos that a list names, such as "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01", without their endings.

    Raises:
        UserError: the file is missing, empty, or is no such list.
    """
    if not file.is_file():
        raise UserError(f"the split list {file} does not exist: name a file such as ucfTrainTestlist/trainlist01.txt.")
    names = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        # a training list has the class's number behind the name
        name, *label = line.split()
        path = PurePosixPath(name)
        if len(path.parts) != 2 or ".." in path.parts or len(label) > 1 or not all(word.isdigit() for word in label):
            raise UserError(
                f"line {number} of {file} is no line 'Class/video.avi [number]': give one of UCF-101's lists."
            )
        names.append(path.with_suffix("").as_posix())
    if not names:
        raise UserError(f"the split list {file} names no videos: give one of UCF-101's lists.")
    return names


def select(sources: Sequence[Source], files: Sequence[Path]) -> list[Source]:
    """The videos that split lists name, in the order of `sources`.

    Args:
        sources: with names "Class/video.avi", or of another ending where they were encoded anew.
        files: one list or several.

    Raises:
        UserError: a list is none, or names a video that is not there.
    """
    wanted = {name for file in files for name in read_split(file)}
    chosen = [source for source in sources if _key(source) in wanted]
    missing = sorted(wanted - {_key(source) for source in chosen})
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(wanted)} videos of {', '.join(file.name for file in files)} are not there, such as "
            f"{missing[0]}: give the whole of UCF-101."
        )
    return chosen


def describe(files: Sequence[Path]) -> list[dict[str, str]]:
    """Names and hashes of the lists, for a result."""
    return [{"list": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()} for file in files]


def _key(source: Source) -> str:
    return PurePosixPath(source.name).with_suffix("").as_posix()
