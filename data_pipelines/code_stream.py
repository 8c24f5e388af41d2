"""Training batches of codes: which clips each step trains on, a pure function of (seed, step).

    stream = CodeStream([Source("codes/64x64x17", 5, 0.8), Source("codes/64x64x17", 1, 0.2)], global_batch_size=32,
                        rank=dp_rank, size=dp_size, seed=0, max_text_length=16, fingerprint=tokenizer.fingerprint)
    for batch in stream: ...          # endless; stream.state_dict() after any batch, load_state_dict() before the next one

Rank and size are those of *data parallelism* and arguments: all ranks of one tensor, pipeline or context parallel group pass
the same ones and read the same clips. Every step takes one source, so that all clips of a global batch have one shape; the
source furthest behind its proportion is next, so proportions are exact to within one batch at every moment. Rank r reads
rows r*b..(r+1)*b-1 of the global batch: with another number of ranks the same global batches follow.

Each source is reshuffled every epoch: its shards are permuted, then the rows within windows of `shards_per_window` shards.
A full permutation would mix better but would touch every shard all the time, which a cache of remote shards can't hold;
with at most `shards_per_window` shards (most local sets) the window is everything and the permutation is full.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data_pipelines.codes import CodeDataset, CodeFolder
from data_pipelines.read_ahead import ReadAhead
from data_pipelines.remote import TIMEOUT, TimeLimit
from tokenizer.codes import Codes
from tokenizer.errors import UserError
from tokenizer.scales import ScaleSchedule


@dataclass(frozen=True)
class Source:
    """One ingredient of a stage.

    Args:
        path: a folder of code shards, or its URL.
        num_latent_frames: the first so many latent frames of each clip (1: images).
        proportion: its share of the steps, relative to the other sources'.
        cache: a local folder for the shards of a URL.
        batch_size: clips of a step over all data-parallel ranks; None: the stream's.
        bucket: which of the folder's shapes; may be left out where there is one only.
    """

    path: str
    num_latent_frames: int
    proportion: float = 1.0
    cache: str | None = None
    batch_size: int | None = None
    bucket: int | None = None


@dataclass(frozen=True)
class CodeBatch:
    """Clips of one shape.

    Args:
        tokens: bool [B, T, N, d], the bits in sequence order.
        latents: float32 [B, T, d, H, W], or None where they were not stored.
        text: float32 [B, L, text_dim], zero past each clip's own length.
        text_lengths: int64 [B].
        class_ids: int64 [B], -1: none.
        sample_index: int64 [B], the clip's number among all clips of all sources.
        epoch: int64 [B], how often its source has been gone through before.
        schedule: the grids of the scales.
    """

    tokens: Tensor
    latents: Tensor | None
    text: Tensor
    text_lengths: Tensor
    class_ids: Tensor
    sample_index: Tensor
    epoch: Tensor
    schedule: ScaleSchedule

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def codes(self) -> Codes:
        """The bits by scale."""
        return Codes.from_tokens(self.tokens, self.schedule)

    def to(self, device: torch.device | str) -> CodeBatch:
        """The same batch on another device."""
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})

    def rows(self, start: int, stop: int) -> CodeBatch:
        """Clips start..stop-1, a microbatch."""
        return replace(self, **{k: v[start:stop] for k, v in vars(self).items() if isinstance(v, Tensor)})


def collate(samples: Sequence[dict[str, Any]], max_text_length: int, schedule: ScaleSchedule) -> CodeBatch:
    """Stacks items of a `CodeDataset` (with "epoch", 0 where it is missing) into a batch.

    Args:
        samples: of one shape.
        max_text_length: L; longer texts lose their end.
        schedule: of the dataset.
    """
    lengths = [min(len(sample["text"]), max_text_length) for sample in samples]
    text = torch.zeros(len(samples), max_text_length, samples[0]["text"].shape[-1])
    for row, (sample, length) in enumerate(zip(samples, lengths)):
        text[row, :length] = sample["text"][:length]
    latents = None if samples[0]["latent"] is None else torch.stack([sample["latent"] for sample in samples])
    return CodeBatch(
        tokens=torch.stack([sample["tokens"] for sample in samples]),
        latents=latents,
        text=text,
        text_lengths=torch.tensor(lengths),
        class_ids=torch.tensor([sample["class_id"] for sample in samples]),
        sample_index=torch.tensor([sample["sample_index"] for sample in samples]),
        epoch=torch.tensor([sample.get("epoch", 0) for sample in samples]),
        schedule=schedule,
    )


class ShuffledRows:
    """The endless order in which the rows of a set of shards are read: position -> (epoch, row).

    Args:
        rows_per_shard: of the set.
        key: numbers that name the random stream (seed, source).
        shards_per_window: rows are permuted within windows of so many shards; 0: no shuffling at all.
    """

    def __init__(self, rows_per_shard: np.ndarray, key: tuple[int, ...], shards_per_window: int):
        self.rows_per_shard, self.key, self.window = rows_per_shard, key, shards_per_window
        self.starts = rows_per_shard.cumsum() - rows_per_shard
        self.rows = int(rows_per_shard.sum())
        self._shards = functools.lru_cache(maxsize=2)(self._permuted_shards)
        self._windows = functools.lru_cache(maxsize=2)(self._permuted_window)

    def __getitem__(self, position: int) -> tuple[int, int]:
        epoch, within = divmod(position, self.rows)
        if not self.window:
            return epoch, within
        _, ends = self._shards(epoch)
        window = int(np.searchsorted(ends, within, side="right"))
        start = int(ends[window - 1]) if window else 0
        return epoch, int(self._windows(epoch, window)[within - start])

    def _permuted_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the shards, and where each window ends in the epoch."""
        order = _permutation(len(self.rows_per_shard), (*self.key, epoch, 0))
        ends = self.rows_per_shard[order].cumsum()
        last = [*range(self.window - 1, len(order) - 1, self.window), len(order) - 1]
        return order, ends[last]

    def _permuted_window(self, epoch: int, window: int) -> np.ndarray:
        order, _ = self._shards(epoch)
        shards = order[window * self.window : (window + 1) * self.window]
        rows = np.concatenate([self.starts[s] + np.arange(int(self.rows_per_shard[s])) for s in shards])
        return rows[_permutation(len(rows), (*self.key, epoch, 1 + window))]

    def __getstate__(self) -> dict[str, Any]:
        return {"rows_per_shard": self.rows_per_shard, "key": self.key, "shards_per_window": self.window}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


def _permutation(count: int, key: tuple[int, ...]) -> np.ndarray:
    # numpy guarantees the raw bits of a generator across its versions, not what `permutation` makes of them
    draws = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(draws, kind="stable")


class _Batches(Dataset):
    """Item (source, first, stop): the clips at these positions of that source's order."""

    def __init__(self, datasets: list[CodeDataset], orders: list[ShuffledRows], max_text_length: int, timeout: float):
        self.datasets, self.orders, self.max_text_length, self.timeout = datasets, orders, max_text_length, timeout
        self.offsets = np.cumsum([0] + [len(dataset) for dataset in datasets])

    def __getitem__(self, item: tuple[int, int, int]) -> CodeBatch:
        source, first, stop = item
        samples, limit = [], TimeLimit(self.timeout)
        for position in range(first, stop):
            epoch, row = self.orders[source][position]
            sample = self.datasets[source].get(row, limit)
            # two sources may share a folder (images and clips): their random draws must differ all the same
            samples.append(sample | {"sample_index": row + int(self.offsets[source]), "epoch": epoch})
        return collate(samples, self.max_text_length, self.datasets[source].schedule)


class CodeStream:
    """An endless iterator of batches of codes; see the head of this file.

    Args:
        sources: the mix.
        global_batch_size: clips a step over all data-parallel ranks, of sources that name no number of their own.
        rank, size: the data-parallel rank and the number of ranks.
        seed: of the order.
        max_text_length: L of the batches.
        fingerprint: of the tokenizer in use: codes of another one are refused; None: any.
        shards_per_window: see the head of this file; 0: in stored order (validation).
        num_workers: processes that read ahead; 0: read in this one.
        timeout: seconds that a batch may take, downloads and their retries included.

    Raises:
        UserError: no source, a batch size that the ranks don't divide, or what `CodeDataset` refuses; while reading, a shard that
            can't be read or had in time, or a worker process that died or hangs.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        global_batch_size: int,
        *,
        rank: int = 0,
        size: int = 1,
        seed: int = 0,
        max_text_length: int = 16,
        fingerprint: str | None = None,
        shards_per_window: int = 32,
        num_workers: int = 0,
        timeout: float = TIMEOUT,
    ):
        if not sources or min(source.proportion for source in sources) <= 0:
            raise UserError(
                "a stage needs at least one source of codes, each with a proportion above 0: mend its `sources`."
            )
        self.batch_sizes = [source.batch_size or global_batch_size for source in sources]
        for clips in self.batch_sizes:
            if clips % size or not 0 <= rank < size:
                raise UserError(
                    f"a global batch of {clips} clips can't be shared by {size} data-parallel ranks: choose a multiple of {size}."
                )
        self.sources, self.rank, self.size = list(sources), rank, size
        self.seed, self.num_workers, self.timeout = seed, num_workers, timeout
        places = {(source.path, source.cache) for source in sources}
        folders = {
            (path, cache): CodeFolder(path, fingerprint, cache, timeout) for path, cache in sorted(places, key=str)
        }
        self.datasets = [
            CodeDataset(folders[s.path, s.cache], num_frames=s.num_latent_frames, bucket=s.bucket) for s in sources
        ]
        widths = {dataset.manifest.text_dim for dataset in self.datasets}
        encoders = {dataset.manifest.text_fingerprint for dataset in self.datasets}
        if len(encoders) > 1 or len(widths) > 1:
            raise UserError(
                f"the sources' texts were encoded by {sorted(encoders)}: encode all of them with one text encoder."
            )
        for source, dataset in zip(sources, self.datasets):
            if not len(dataset):
                raise UserError(f"{source.path} holds no clips: name other codes.")
        orders = [
            ShuffledRows(dataset.rows_per_shard, (seed, number), shards_per_window)
            for number, dataset in enumerate(self.datasets)
        ]
        self._batches = _Batches(self.datasets, orders, max_text_length, timeout)
        self._shares = np.array([source.proportion for source in sources]) / sum(
            source.proportion for source in sources
        )
        self.samples = [0] * len(sources)
        self._iterator: Iterator[CodeBatch] | None = None

    @property
    def step(self) -> int:
        """Batches given so far."""
        return sum(count // clips for count, clips in zip(self.samples, self.batch_sizes))

    def __iter__(self) -> CodeStream:
        return self

    def __next__(self) -> CodeBatch:
        if self._iterator is None:
            self._iterator = self._read()
        try:
            batch = next(self._iterator)
        except Exception:
            self.close()  # whoever goes on all the same gets the batch that could not be read
            raise
        # counted when handed out: what workers have read ahead is read again after a resume
        source = _next_source(self._shares, self.samples, self.batch_sizes)
        self.samples[source] += self.batch_sizes[source]
        return batch

    def source_of(self, batch: CodeBatch) -> int:
        """The number of the source that a batch of this stream was taken from."""
        return int(np.searchsorted(self._batches.offsets, int(batch.sample_index[0]), side="right")) - 1

    def close(self) -> None:
        """Ends the worker processes; the next batch would start them again where this object stands."""
        self._iterator = None

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: clips read of each source by all ranks, and what the order depends on."""
        return {"samples": list(self.samples), **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`, on any number of data-parallel ranks.

        Raises:
            UserError: the order depends on something that has changed since.
        """
        if "global_batch_size" in state:  # as written before sources could have sizes of their own
            state = state | {"batch_sizes": [state["global_batch_size"]] * len(self.sources)}
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UserError(
                    f"the data's '{name}' has changed from {state.get(name)} to {value} since the checkpoint was saved: "
                    "go on with the old value, or start a new run."
                )
        self.samples = [int(count) for count in state["samples"]]
        self.close()

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "shards_per_window": self._batches.orders[0].window,
            "sources": [
                {
                    "frames": source.num_latent_frames,
                    "proportion": source.proportion,
                    "rows": len(dataset),
                    "shards": hashlib.sha256(dataset.rows_per_shard.tobytes()).hexdigest()[:16],
                }
                for source, dataset in zip(self.sources, self.datasets)
            ],
            "batch_sizes": self.batch_sizes,
        }

    def _read(self) -> Iterator[CodeBatch]:
        # a function, not a method: an iterator that refers to this object would be a cycle, and the garbage collector takes
        # many seconds to end the worker processes of such a loader
        plan = _plan(self._shares, self.samples, self.batch_sizes, self.rank, self.size)
        if not self.num_workers:
            return map(self._batches.__getitem__, plan)
        paths = ", ".join(dict.fromkeys(source.path for source in self.sources))
        return ReadAhead(self._batches, plan, self.num_workers, self.timeout, paths)


def _next_source(shares: np.ndarray, samples: Sequence[int], batch_sizes: Sequence[int]) -> int:
    """The source that is furthest behind its share of all batches, the next one included."""
    batches = np.array(samples) // np.array(batch_sizes)
    return int(np.argmax(shares * (batches.sum() + 1) - batches))


def _plan(
    shares: np.ndarray, samples: Sequence[int], batch_sizes: Sequence[int], rank: int, size: int
) -> Iterator[tuple[int, int, int]]:
    """(source, first, stop) for each step from here on: the positions of this rank's part of the global batch."""
    samples = list(samples)
    while True:
        source = _next_source(shares, samples, batch_sizes)
        local = batch_sizes[source] // size
        first = samples[source] + rank * local
        yield source, first, first + local
        samples[source] += batch_sizes[source]
