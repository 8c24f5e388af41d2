"""Any row of a folder of MDS shards by its number, with every failure loud.

Built on streaming's `Stream` and shard readers, not on `StreamingDataset`: that one takes rank and world size from the
environment (the ranks of one tensor- or pipeline-parallel group must read the same rows, which the environment does not
tell), ends an epoch early without an error when a shard is missing or damaged, calls collectives in its constructor, and
keeps its state in /dev/shm segments which a killed run leaves behind; `clean_stale_shared_memory` would also remove those
of other jobs that are alive on the machine. Here nothing is shared between processes but the files themselves.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from streaming import Stream
from streaming.base.format import Reader
from streaming.base.hashing import get_hash
from streaming.base.world import World

from tokenizer.errors import UserError

ALONE = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)  # each process opens its files on its own
HASH = "xxh64"  # what our writers store with each shard


class ShardFolder:
    """Random access to MDS shards.

    A shard's size and, where its index holds one, its hash are checked when a process first touches it.

    Args:
        path: a local folder, or a URL that streaming can download from (then `cache` is needed).
        cache: a local folder that keeps what was downloaded; processes of one machine may share it.

    Raises:
        UserError: there is no index, or it can't be read.
    """

    def __init__(self, path: str | Path, cache: str | Path | None = None):
        self.path = str(path)
        if "://" in self.path and cache is None:
            raise UserError(f"{self.path} is remote: name a local folder as its cache.")
        self.cache = None if cache is None else Path(cache)
        local = self.path if self.cache is None else str(self.cache)
        if self.cache is None and not Path(local, "index.json").is_file():
            raise UserError(
                f"{local} holds no shards: its index.json is missing; finish writing it or name another folder."
            )
        if self.cache is not None:
            self.cache.mkdir(parents=True, exist_ok=True)
        self._stream = Stream(
            remote=None if self.cache is None else self.path,
            local=local,
            download_retry=2,
            download_timeout=300,
            keep_zip=False,
        )
        try:
            with self._lock():
                self.shards: list[Reader] = self._stream.get_shards(ALONE, allow_unsafe_types=False)
        except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
            raise UserError(
                f"the index of {self.path} can't be read ({_short(error)}): write or copy the shards again."
            ) from error
        self.rows_per_shard = np.array([len(shard) for shard in self.shards], dtype=np.int64)
        self._ends = self.rows_per_shard.cumsum()
        self._checked: set[int] = set()

    def __len__(self) -> int:
        """The number of rows in all shards."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, row: int) -> dict[str, Any]:
        """One record.

        Raises:
            UserError: its shard is missing or damaged (it names the shard).
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in {self.path}")
        shard_id = int(np.searchsorted(self._ends, row, side="right"))
        within = row - int(self._ends[shard_id] - self.rows_per_shard[shard_id])
        return self.read(shard_id, within)

    def read(self, shard_id: int, row: int) -> dict[str, Any]:
        """Record `row` of one shard; errors as in `__getitem__`."""
        for _ in range(2):
            self._prepare(shard_id)
            try:
                return self.shards[shard_id][row]
            except FileNotFoundError:
                # it went after it was checked: fetch it again, or say that it is missing
                self._checked.discard(shard_id)
            except (ValueError, IndexError, OSError) as error:
                raise self._damaged(shard_id, _short(error)) from error
        raise self._damaged(shard_id, "it is missing")

    def shard_file(self, shard_id: int) -> Path:
        """The local file of a shard."""
        shard = self.shards[shard_id]
        return Path(shard.dirname, shard.split, shard.file_pairs[0][0].basename)

    def _prepare(self, shard_id: int) -> None:
        if shard_id in self._checked:
            return
        shard, file = self.shards[shard_id], self.shard_file(shard_id)
        if self.cache is not None or shard.compression:
            try:
                with self._lock():
                    self._stream.prepare_shard(shard)
            except (ValueError, OSError, RuntimeError) as error:
                raise self._damaged(shard_id, _short(error)) from error
        info = shard.file_pairs[0][0]
        if not file.is_file():
            raise self._damaged(shard_id, "it is missing")
        if (size := os.path.getsize(file)) != info.bytes:
            raise self._damaged(shard_id, f"it has {size} bytes where the index says {info.bytes}")
        if HASH in info.hashes and get_hash(HASH, file.read_bytes()) != info.hashes[HASH]:
            raise self._damaged(shard_id, "its content does not have the hash that the index holds")
        self._checked.add(shard_id)

    def _lock(self) -> AbstractContextManager:
        # one download at a time a machine and cache; nothing is ever written to a local folder but by an atomic rename
        return nullcontext() if self.cache is None else FileLock(self.cache / ".download.lock")

    def _damaged(self, shard_id: int, why: str) -> UserError:
        return UserError(f"the shard {self.shard_file(shard_id)} can't be read ({why}): copy or write it again.")


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(". ")
