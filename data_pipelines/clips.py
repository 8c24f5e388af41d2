"""Raw shards -> decoded clips, and batches of them for the tokenizer."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data_pipelines.decode import DecodeError, Decoder, choose_decoder
from data_pipelines.random_access import ShardFolder
from data_pipelines.remote import TIMEOUT
from data_pipelines.sampling import Start, sample_times
from tokenizer.clip_shape import check_clip_shape
from tokenizer.errors import UserError
from tokenizer.pixels import from_pixels
from tokenizer.progress import track
from tokenizer.train_config import BatchSpec


def read_clip(
    record: dict[str, Any],
    decoder: Decoder,
    num_frames: int,
    height: int,
    width: int,
    fps: float | None = None,
    start: Start = "centre",
    generator: np.random.Generator | None = None,
) -> np.ndarray:
    """Decodes one clip of a raw record; arguments as in `sample_times` and `Decoder.decode`.

    Returns:
        uint8 [num_frames, height, width, 3].

    Raises:
        UserError: an impossible shape.
        DecodeError: this record can't give such a clip.
    """
    check_clip_shape(num_frames, height, width)
    times = sample_times(record["timestamps"], fps, num_frames, start, generator)
    return decoder.decode(record["video"], times, height, width, record["rotation"])


class ClipDataset(torch.utils.data.Dataset):
    """The clips of a folder of raw shards, decoded as they are asked for.

    Item i is {"video": uint8 [3, T, H, W], "caption": str, "source": str, "class_id": int, "sample_index": i,
    "replaced": int}, a pure function of (seed, epoch, i). A record that can't be decoded is replaced by the next one, so
    that counts of samples stay true; `replaced` says how many were passed over, which a training loop adds up.

    Args:
        path: the folder, or a URL that streaming can download from.
        num_frames: 1+4n.
        size: height and width, multiples of 16; one number for a square.
        fps: frames a second of the clips; None: every frame of the video.
        start: where in its video a clip starts.
        seed: of random starts.
        decoder: see `choose_decoder`.
        cache: a local folder for a remote folder's shards.
        timeout: seconds that a clip may take, the download of its shard included.

    Raises:
        UserError: an impossible shape, or no shards; while reading, a shard that is missing or damaged, or no record that
            can be decoded.
    """

    def __init__(
        self,
        path: str | Path,
        num_frames: int,
        size: int | tuple[int, int],
        fps: float | None = None,
        start: Start = "random",
        seed: int = 0,
        decoder: str = "auto",
        cache: str | Path | None = None,
        timeout: float = TIMEOUT,
    ):
        self.num_frames, self.fps, self.seed = num_frames, fps, seed
        self.start: Start = start
        self.height, self.width = (size, size) if isinstance(size, int) else size
        check_clip_shape(num_frames, self.height, self.width)
        self.epoch = 0
        self.shards = ShardFolder(path, cache, timeout)
        self.decoder = choose_decoder(decoder)

    def set_epoch(self, epoch: int) -> None:
        """Other random starts from now on; with worker processes call it before they start."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        shape = BatchSpec(self.num_frames, self.height, 1)
        frames, record, replaced = self.read(index, (self.seed, self.epoch, index), shape, self.width)
        return {
            "video": torch.from_numpy(frames).permute(3, 0, 1, 2).contiguous(),  # [3, T, H, W]
            "caption": record["caption"],
            "source": record["source"],
            "class_id": int(record["class_id"]),
            "sample_index": index,
            "replaced": replaced,
        }

    def read(
        self,
        index: int,
        key: Sequence[int],
        shape: BatchSpec,
        width: int | None = None,
        among: np.ndarray | None = None,
    ) -> tuple[np.ndarray, dict[str, Any], int]:
        """Record `index`, or the first after it that can be decoded.

        Args:
            index: of the record.
            key: of the random start.
            shape: frames and height of the clip.
            width: the height if None.
            among: ascending indices of the records that may take its place, itself among them; None: all.

        Returns:
            uint8 [T, H, W, 3], the record, and how many records were passed over.
        """
        reason = ""
        others = np.arange(len(self)) if among is None else among
        place = int(np.searchsorted(others, index))
        for replaced in range(len(others)):
            record = self.shards[int(others[(place + replaced) % len(others)])]
            generator = np.random.default_rng([*key, replaced])
            try:
                frames = read_clip(
                    record,
                    self.decoder,
                    shape.num_frames,
                    shape.size,
                    width or shape.size,
                    self.fps,
                    self.start,
                    generator,
                )
            except DecodeError as error:
                reason = f"{record['source']}: {error}"
                continue
            return frames, record, replaced
        raise UserError(
            f"no clip of {self.shards.path} gives {shape.num_frames} frames (the last one, {reason}): "
            "ask for fewer frames or a higher rate, or give longer videos."
        )


@dataclass(frozen=True)
class Clips:
    """A whole split in memory.

    Attributes:
        frames: uint8 [N, T, H, W, 3].
        captions, sources: one a clip.
        class_ids: -1: no class.
        dropped: (source, reason) of records that gave no clip.
    """

    frames: np.ndarray
    captions: list[str]
    sources: list[str]
    class_ids: list[int]
    dropped: list[tuple[str, str]]


def load_clips(
    shards: str | Path,
    num_frames: int,
    size: int | tuple[int, int],
    fps: float | None = None,
    limit: int | None = None,
    decoder: str = "auto",
) -> Clips:
    """Decodes a split once, the middle of each video.

    Args:
        shards: a folder of raw shards.
        num_frames, size, fps, decoder: as in `ClipDataset`.
        limit: the first so many records only.

    Raises:
        UserError: as in `ClipDataset`.
    """
    height, width = (size, size) if isinstance(size, int) else size
    check_clip_shape(num_frames, height, width)
    folder, back_end = ShardFolder(shards), choose_decoder(decoder)
    count = len(folder) if limit is None else min(limit, len(folder))
    frames = np.empty((count, num_frames, height, width, 3), dtype=np.uint8)
    kept: list[dict[str, Any]] = []
    dropped: list[tuple[str, str]] = []
    for row in track(range(count), f"decoding {Path(shards).name}"):
        record = folder[row]
        try:
            frames[len(kept)] = read_clip(record, back_end, num_frames, height, width, fps)
            kept.append({key: record[key] for key in ("caption", "source", "class_id")})
        except DecodeError as error:
            dropped.append((record["source"], str(error)))
    if not kept:
        raise UserError(
            f"no clip of {shards} gives {num_frames} frames ({': '.join(dropped[0]) if dropped else 'it is empty'}): "
            "ask for fewer frames or a higher rate, or give longer videos."
        )
    return Clips(
        frames[: len(kept)],
        [record["caption"] for record in kept],
        [record["source"] for record in kept],
        [int(record["class_id"]) for record in kept],
        dropped,
    )


def open_clips(
    shards: str | Path, num_frames: int, size: int, decoder: str = "auto", limit: float = 4e9
) -> Clips | ClipDataset:
    """The clips for a training: decoded once into memory where that loses nothing, else decoded as they are asked for.

    In memory are the middle `num_frames` of each video; where a video has more, other windows of it are worth training on, too.

    Args:
        shards: a folder of raw shards.
        num_frames, size: of the longest and largest clips wanted; videos that can't give them are skipped and listed.
        decoder: see `choose_decoder`.
        limit: bytes of memory for decoded clips.

    Raises:
        UserError: as in `ClipDataset`.
    """
    check_clip_shape(num_frames, size, size)
    folder = ShardFolder(shards)
    too_large = len(folder) * num_frames * size * size * 3 > limit
    if too_large or any(folder[row]["frames"] > num_frames for row in range(len(folder))):
        return ClipDataset(shards, num_frames, size, decoder=decoder)
    clips = load_clips(shards, num_frames, size, decoder=decoder)
    for source, reason in clips.dropped:
        print(f"skipped {source}: {reason}", file=sys.stderr)
    print(f"{len(clips.sources)} clips, {len(clips.dropped)} skipped", file=sys.stderr)
    return clips


class ClipBatches:
    """The batches of a tokenizer's training; batch i is a pure function of (seed, i, its shape), on any number of processes.

    Args:
        source: clips in memory, uint8 [N, T, H, W, 3], or a dataset that decodes them.
        seed: of clips and starts.
        rank, world_size: this process among those that divide each batch.
        workers: threads that decode, for a dataset.
        indices: the clips to draw from; None: all.
    """

    def __init__(
        self,
        source: np.ndarray | Clips | ClipDataset,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 1,
        indices: np.ndarray | None = None,
    ):
        self.source, self.seed, self.rank, self.world_size = source, seed, rank, world_size
        self.indices = np.arange(_count(source)) if indices is None else indices
        self.replaced = 0  # records that were passed over so far
        self._pool = ThreadPoolExecutor(max(1, workers))

    def __len__(self) -> int:
        return len(self.indices)

    def __call__(self, step: int, spec: BatchSpec) -> Tensor:
        """This process's share of the batch of one step, float32 [B, 3, T, H, W] in [-1, 1].

        Raises:
            UserError: clips that are shorter.
        """
        places, chosen = self._draw(step, spec)
        keys = [(self.seed, step, place) for place in places]
        return to_batch(self._read(chosen, keys, spec), spec.size)

    def names(self, step: int, spec: BatchSpec) -> list[str]:
        """The sources of these clips; of a record that was passed over, not of the one in its place."""
        chosen = self._draw(step, spec)[1]
        if isinstance(self.source, ClipDataset):
            return [str(self.source.shards[int(index)]["source"]) for index in chosen]
        if isinstance(self.source, Clips):
            return [self.source.sources[index] for index in chosen]
        return [f"clip {index}" for index in chosen]

    def in_order(self, spec: BatchSpec, limit: int) -> Iterator[Tensor]:
        """The first `limit` clips, from a fixed start each, in batches; the same for every process.

        Args:
            spec: their shape.
            limit: the most clips.
        """
        chosen = self.indices[:limit]
        for start in range(0, len(chosen), spec.batch_size):
            part = chosen[start : start + spec.batch_size]
            yield to_batch(self._read(part, [(self.seed, int(index)) for index in part], spec), spec.size)

    def _draw(self, step: int, spec: BatchSpec) -> tuple[range, np.ndarray]:
        """This process's places in the batch, and the clips there."""
        generator = np.random.default_rng([self.seed, step])
        # all different where there are enough; every process draws the whole batch and takes its part
        chosen = generator.choice(self.indices, spec.batch_size, replace=spec.batch_size > len(self.indices))
        share = spec.batch_size // self.world_size
        places = range(self.rank * share, (self.rank + 1) * share)
        return places, chosen[places.start : places.stop]

    def _read(self, chosen: np.ndarray, keys: Sequence[Sequence[int]], spec: BatchSpec) -> np.ndarray:
        """The chosen clips from random starts, uint8 [B, T, H, W, 3]; those in memory keep their own size."""
        if isinstance(dataset := self.source, ClipDataset):
            read = list(
                self._pool.map(lambda index, key: dataset.read(int(index), key, spec, None, self.indices), chosen, keys)
            )
            self.replaced += sum(replaced for _, _, replaced in read)
            return np.stack([frames for frames, _, _ in read])
        clips = self.source.frames if isinstance(self.source, Clips) else self.source
        spare = clips.shape[1] - spec.num_frames
        if spare < 0:
            raise UserError(
                f"batches of {spec.num_frames} frames can't be cut from clips of {clips.shape[1]}: ask for fewer."
            )
        starts = [int(np.random.default_rng(key).integers(spare + 1)) for key in keys]
        return np.stack([clips[index, first : first + spec.num_frames] for index, first in zip(chosen, starts)])


def split_clips(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and of validation clips: a fixed split by the seed, each in ascending order.

    Args:
        count: clips in all.
        share: of the validation clips; above 0 there is at least one.
    """
    order = np.random.default_rng([seed, count]).permutation(count)
    held_out = min(count - 1, math.ceil(share * count))
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def to_batch(clips: np.ndarray, size: int) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float32 [B, 3, T, size, size] in [-1, 1], with antialiasing."""
    return _resize(from_pixels(clips), size).contiguous()


def _count(source: np.ndarray | Clips | ClipDataset) -> int:
    return len(source.frames) if isinstance(source, Clips) else len(source)


def _resize(video: Tensor, size: int) -> Tensor:
    """[B, 3, T, H, W] to H = W = size, with antialiasing."""
    if video.shape[-2:] == (size, size):
        return video
    batch, _, frames = video.shape[:3]
    flat = video.transpose(1, 2).flatten(0, 1)  # [B * T, 3, H, W]
    flat = functional.interpolate(flat, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return flat.unflatten(0, (batch, frames)).transpose(1, 2).clamp(-1, 1)
