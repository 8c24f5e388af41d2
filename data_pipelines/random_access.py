"""Any row of a folder of MDS shards by its number, with every failure loud.

Built on streaming's `Stream` and shard readers, not on `StreamingDataset`: that one takes rank and world size from the
environment (the ranks of one tensor- or pipeline-parallel group must read the same rows, which the environment does not
tell), ends an epoch early without an error when a shard is missing or damaged, calls collectives in its constructor, and
keeps its state in /dev/shm segments which a killed run leaves behind; `clean_stale_shared_memory` would also remove those
of other jobs that are alive on the machine. Here nothing is shared between processes but the files themselves.
"""

from __future__ import annotations

import struct
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from streaming import Stream
from streaming.base.format import Reader
from streaming.base.format.base.reader import FileInfo
from streaming.base.hashing import get_hash
from streaming.base.world import World

from data_pipelines.remote import TIMEOUT, Remote, TimeLimit, locked, short, storing
from tokenizer.errors import UserError

ALONE = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)  # each process opens its files on its own
HASH = "xxh64"  # what our writers store with each shard
INDEX = "index.json"
MISSING = "it is missing"


class ShardFolder:
    """Random access to MDS shards.

    A shard's size and, where its index holds one, its hash are checked when a process first touches it and when it has changed since;
    in a cache a shard that fails is fetched again. Threads and processes may share a cache.

    Args:
        path: a local folder, or a URL that streaming can download from (then `cache` is needed).
        cache: a local folder that keeps what was downloaded. Nothing is ever removed from it.
        timeout: seconds that a record may take, the download of its shard with all retries included.

    Raises:
        UserError: there is no index, or it can't be had or read.
    """

    def __init__(self, path: str | Path, cache: str | Path | None = None, timeout: float = TIMEOUT):
        self.path, self.timeout = str(path).rstrip("/") or "/", timeout
        if "://" in self.path and cache is None:
            raise UserError(f"{self.path} is remote: name a local folder as its cache.")
        self.cache = None if cache is None else Path(cache)
        local = Path(self.path) if self.cache is None else self.cache
        self._remote = Remote(self.path)
        if self.cache is not None:
            self._remote.fetch_index(INDEX, self.cache, TimeLimit(timeout))
        elif not (local / INDEX).is_file():
            raise UserError(
                f"{local} holds no shards: its index.json is missing; finish writing it or name another folder."
            )
        try:
            self._stream = Stream(remote=None if self.cache is None else self.path, local=str(local), keep_zip=False)
            self.shards: list[Reader] = self._stream.get_shards(ALONE, allow_unsafe_types=False)
        except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
            raise UserError(
                f"the index of {self.path} can't be read ({short(error)}): write or copy the shards again."
            ) from error
        self.rows_per_shard = np.array([len(shard) for shard in self.shards], dtype=np.int64)
        self._ends = self.rows_per_shard.cumsum()
        self._checked: dict[int, tuple[int, ...] | None] = {}  # shard -> its file when it was checked

    def __len__(self) -> int:
        """The number of rows in all shards."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One record.

        Raises:
            UserError: its shard is missing or damaged, or can't be had in time (it names the shard).
        """
        return self.get(row)

    def get(self, row: int, limit: TimeLimit | None = None) -> dict[str, Any]:
        """The same within what is left of a time that several records share."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in {self.path}")
        shard_id = int(np.searchsorted(self._ends, row, side="right"))
        within = row - int(self._ends[shard_id] - self.rows_per_shard[shard_id])
        return self.read(shard_id, within, limit)

    def read(self, shard_id: int, row: int, limit: TimeLimit | None = None) -> dict[str, Any]:
        """Record `row` of one shard; errors as in `__getitem__`."""
        limit, file = limit or TimeLimit(self.timeout), self.shard_file(shard_id)
        for _ in range(2):
            self._prepare(shard_id, limit)
            record, why = None, ""
            try:
                record = self.shards[shard_id][row]
            except (ValueError, IndexError, OSError, struct.error) as error:
                why = short(error)
            if _stamp(file) != self._checked.get(shard_id):
                # it went or was written to after it was checked: fetch it again, or say what is wrong with it
                self._checked.pop(shard_id, None)
            elif record is None:
                raise self._damaged(shard_id, why)
            else:
                return record
        raise self._damaged(shard_id, "it changes while it is read")

    def shard_file(self, shard_id: int) -> Path:
        """The local file of a shard."""
        shard = self.shards[shard_id]
        return Path(shard.dirname, shard.split, shard.file_pairs[0][0].basename)

    def _prepare(self, shard_id: int, limit: TimeLimit) -> None:
        if shard_id in self._checked:
            return
        shard, file = self.shards[shard_id], self.shard_file(shard_id)
        stamp, fault = _stamp(file), _fault(file, shard.file_pairs[0][0])
        if fault is not None and (self.cache is not None or shard.compression):
            with storing(f"{self.path}/{shard.file_pairs[0][0].basename}", file.parent), locked(file, limit):
                # another process may have been at it meanwhile
                if (fault := _fault(file, shard.file_pairs[0][0])) is not None:
                    if fault != MISSING:
                        print(f"the shard {file} is made anew: {fault}", file=sys.stderr, flush=True)
                    self._restore(shard_id, limit)
                stamp, fault = _stamp(file), _fault(file, shard.file_pairs[0][0])
        if fault is not None:
            raise self._damaged(shard_id, fault)
        self._checked[shard_id] = stamp

    def _restore(self, shard_id: int, limit: TimeLimit) -> None:
        """Fetches a shard, unpacks it, or both."""
        shard, file = self.shards[shard_id], self.shard_file(shard_id)
        raw, packed = shard.file_pairs[0]
        if self.cache is not None:
            info = packed or raw
            target = file.with_name(Path(info.basename).name)
            self._remote.fetch(info.basename, target, limit, partial(_fault, info=info))
        if packed is not None:
            file.unlink(missing_ok=True)
            try:
                self._stream.prepare_shard(shard)
            except (ValueError, RuntimeError, FileNotFoundError) as error:
                raise self._damaged(shard_id, short(error)) from error

    def _damaged(self, shard_id: int, why: str) -> UserError:
        return UserError(f"the shard {self.shard_file(shard_id)} can't be read ({why}): copy or write it again.")


def _stamp(file: Path) -> tuple[int, ...] | None:
    """Changes when the file does; None if there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _fault(file: Path, info: FileInfo) -> str | None:
    """What is wrong with a file that the index describes."""
    try:
        size = file.stat().st_size
        if size != info.bytes:
            return f"it has {size} bytes where the index says {info.bytes}"
        if HASH in info.hashes and get_hash(HASH, file.read_bytes()) != info.hashes[HASH]:
            return "its content does not have the hash that the index holds"
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        return short(error)
    return None
