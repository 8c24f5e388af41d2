"""Video files and images -> raw shards: one MDS record a clip, the encoded bytes as they came (DESIGN section 5).

    video       bytes             the file
    caption     str               "" if there is none; in the UCF-101 layout the name of the class
    class_id    int               -1: no class
    timestamps  ndarray:float64   seconds of every frame, however unevenly they are spaced
    fps         float64           the average rate
    frames, width, height  int    counted and measured by decoding; upright; an image has one frame
    rotation    int               degrees counter-clockwise that turn a decoded frame upright
    codec       str
    size        int               bytes
    sha256      str               of the bytes
    source      str               the path within the input

Parts of `part_files` input files each are packed by processes of their own (`shard_part`) in OUT.unfinished/00000, 00001, ...; when all
are whole, the folder gets its `index.json` (streaming's), `rejected.jsonl` (source and reason of every file that was left out) and
`receipt.json`, without which it is not whole, and becomes OUT. A run that was cut short goes on with the parts that are missing, and ends
with the same bytes.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from data_pipelines.shard_index import merge_indexes
from data_pipelines.shard_part import AT, DONE, FAILED, ShardsConfig, beside, write_part
from data_pipelines.sources import Source, find_sources, fingerprint
from data_pipelines.ucf101 import select
from tokenizer.errors import UserError
from tokenizer.files import sync, write_whole
from tokenizer.progress import Meter
from tokenizer.receipts import RECEIPT, finished, read_receipt

FORMAT = 2
ARGUMENTS = "arguments.json"
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
"""What a fault of a decoder ends with; anything else that kills a process is not a file's doing."""
LOCK_WAIT = 20
"""Seconds: what a driver that was killed has started needs no longer to notice it, but for very long videos."""


def write_shards(videos: Path, out: Path, options: ShardsConfig | None = None) -> dict[str, Any]:
    """Packs videos into shards, or nothing if `out` holds them already.

    Args:
        videos: see `find_sources`.
        out: the folder to make.
        options: the defaults if None.

    Returns:
        the receipt: {"clips", "shards", "rejected": numbers, "reasons": {reason: number}, "classes": names, "arguments"}.

    Raises:
        UserError: nothing is left, an input is missing, `out` holds something else, or another process writes it.
    """
    options = options or ShardsConfig()
    videos, out = Path(videos), Path(out)
    sources, classes = find_sources(videos)
    if options.split:
        sources = select(sources, [Path(file) for file in options.split])
    # workers change no byte, and the files that the lists name are the input
    settings = {key: value for key, value in asdict(options).items() if key not in ("workers", "split")}
    arguments = {"kind": "raw shards", "format": FORMAT, "input": fingerprint(sources), **settings}
    if (receipt := finished(out, arguments)) is not None:
        return receipt
    parts = [sources[start : start + options.part_files] for start in range(0, len(sources), options.part_files)]
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f"{out.name}.unfinished")
    with _alone(out.with_name(f"{folder.name}.lock"), out):
        if (receipt := finished(out, arguments)) is not None:  # by a run that this one has waited for
            return receipt
        _begin(folder, arguments)
        if (receipt := read_receipt(folder)) is None:
            _write_parts(parts, folder, options)
            receipt = {"arguments": arguments, **_merge(videos, folder, len(parts), options), "classes": classes}
            write_whole(folder / RECEIPT, json.dumps(receipt, indent=1))
            sync(folder)
        if out.exists():
            out.rmdir()  # an empty one
        folder.rename(out)
        sync(out.parent)
    return receipt


def _merge(videos: Path, folder: Path, parts: int, options: ShardsConfig) -> dict[str, Any]:
    """Writes what is common to all parts, index and list of rejected files, and returns their counts."""
    done = [json.loads((folder / _name(part) / DONE).read_text()) for part in range(parts)]
    rejected = [entry for part in done for entry in part["rejected"]]
    reasons = Counter(entry["reason"].split(" (")[0] for entry in rejected)
    clips = sum(part["rows"] for part in done)
    if not clips:
        shutil.rmtree(folder)  # whoever mends the files wants them read again
        listing = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise UserError(
            f"no video of {videos} can be used ({listing}): give videos of {options.min_frames} frames or more."
        )
    for left in folder.glob(".*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    write_whole(folder / "rejected.jsonl", "".join(json.dumps(entry) + "\n" for entry in rejected))
    shards = merge_indexes(folder, [_name(part) for part, found in enumerate(done) if found["rows"]])
    assert sum(shard["samples"] for shard in shards) == clips
    return {"clips": clips, "shards": len(shards), "rejected": len(rejected), "reasons": dict(reasons)}


def read_shards_receipt(shards: Path) -> dict[str, Any]:
    """The receipt of a finished folder of raw shards.

    Raises:
        UserError: the folder is not one.
    """
    receipt = read_receipt(shards)
    if receipt is None or receipt["arguments"].get("kind") != "raw shards":
        raise UserError(f"{shards} holds no finished raw shards: write them with `videoar shards`.")
    return receipt


def _begin(folder: Path, arguments: dict[str, Any]) -> None:
    """Takes the folder that an earlier run with these arguments has left, or makes a new one."""
    file, wanted = folder / ARGUMENTS, json.dumps(arguments, sort_keys=True)
    if folder.exists() and not file.is_file():
        raise UserError(f"{folder} exists and was not written by this command: move it away.")
    if folder.exists() and file.read_text() != wanted:
        print(f"{folder} was begun with other files or settings: all parts are packed again", file=sys.stderr)
        shutil.rmtree(folder)
    if not folder.exists():
        new = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        (new / ARGUMENTS).write_text(wanted)
        new.rename(folder)


@contextmanager
def _alone(lock: Path, out: Path) -> Iterator[None]:
    """Holds a lock that the parts' processes inherit: while one that lost its driver still writes, no other run begins."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        for waited in range(LOCK_WAIT + 1):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if waited == LOCK_WAIT:
                    raise UserError(
                        f"another process is writing {out}: wait for it, or name another output folder."
                    ) from error
                time.sleep(1)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _name(part: int) -> str:
    return f"{part:05d}"


def _write_parts(parts: Sequence[Sequence[Source]], folder: Path, options: ShardsConfig) -> None:
    """Starts a process for each part that is missing, so many at a time; a file that crashes two of them is left out."""
    context = multiprocessing.get_context("fork")
    waiting = deque(part for part in range(len(parts)) if not (folder / _name(part)).exists())
    ready = sum(len(sources) for sources in parts) - sum(len(parts[part]) for part in waiting)
    crashed: dict[int, dict[int, str]] = {part: {} for part in waiting}
    deaths: Counter[tuple[int, int]] = Counter()
    running: dict[int, BaseProcess] = {}
    workers = options.workers or os.cpu_count() or 1
    try:
        with Meter("shards", sum(map(len, parts)), done=ready) as meter:
            while waiting or running:
                while waiting and len(running) < workers:
                    part = waiting.popleft()
                    arguments = (parts[part], folder / _name(part), options, crashed[part], os.getpid())
                    process = context.Process(target=write_part, args=arguments)
                    process.start()
                    running[part] = process
                connection.wait([process.sentinel for process in running.values()], timeout=0.5)
                for part in [part for part, process in running.items() if process.exitcode is not None]:
                    code = running.pop(part).exitcode
                    if code == 0 and (folder / _name(part)).exists():
                        ready += len(parts[part])
                        continue
                    number = _died_at(folder / _name(part), parts[part], code)
                    deaths[part, number] += 1
                    if deaths[part, number] == 2:
                        crashed[part][number] = f"crashed the decoder ({signal.Signals(-(code or 0)).name})"
                    waiting.appendleft(part)
                at = sum(_at(folder / _name(part)) or 0 for part in running)
                lost = sum(map(len, crashed.values()))
                meter.advance(max(0, ready + at - meter.done), f"{lost} files crashed the decoder" if lost else "")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


def _died_at(folder: Path, sources: Sequence[Source], code: int | None) -> int:
    """The number of the file that a part's process was reading when it crashed.

    Raises:
        UserError: it did not crash, but failed or was killed.
    """
    reason, number = beside(folder, FAILED), _at(folder)
    if reason.is_file():
        said = reason.read_text()
        raise UserError(f"{folder} could not be written ({said}): mend that and start again; finished parts are kept.")
    if code is not None and -code in CRASHES and number is not None:
        return number
    at = f" at {sources[number].name}" if number is not None else ""
    if code is not None and code < 0:
        raise UserError(
            f"the process that wrote {folder} was killed by {signal.Signals(-code).name}{at}: if memory ran out, start again with fewer "
            "--workers; finished parts are kept."
        )
    raise UserError(f"the process that wrote {folder} ended with status {code}{at}: see what it printed above.")


def _at(folder: Path) -> int | None:
    """The number of the file that a part's process is reading."""
    try:
        return int(beside(folder, AT).read_text())
    except (FileNotFoundError, ValueError):
        return None
