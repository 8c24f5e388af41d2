"""Video files through a tokenizer and back: the reading, batching and coding that both reconstruction commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from data_pipelines.clips import read_clip
from data_pipelines.decode import DecodeError, choose_decoder
from data_pipelines.probe import Rejected, VideoInfo, probe
from data_pipelines.sources import Source
from tokenizer import VideoTokenizer
from tokenizer.clip_shape import ClipShape
from tokenizer.codes import Codes
from tokenizer.pixels import from_pixels, to_pixels

T = TypeVar("T")


@dataclass(frozen=True)
class Clip:
    """The middle of a video, ready for a tokenizer.

    Attributes:
        source: the file.
        info: what the whole file holds.
        frames: uint8 [T, H, W, 3].
    """

    source: Source
    info: VideoInfo
    frames: np.ndarray


@dataclass(frozen=True)
class Skipped:
    """A video that gives no clip, and why."""

    source: str
    reason: str


def read_clips(
    sources: Iterable[Source], shape: Callable[[VideoInfo], ClipShape], skipped: list[Skipped], min_frames: int = 1
) -> Iterator[Clip]:
    """Decodes the middle of each video, in order.

    Args:
        sources: the files.
        shape: of the clip that a video is to give.
        skipped: videos that can't be used are added here.
        min_frames: shorter videos can't be used.
    """
    decoder = choose_decoder("pyav")  # the same pixels on every machine
    for source in sources:
        try:
            info = probe(source.path, min_frames)
            wanted = shape(info)
            record = {"video": source.path.read_bytes(), "timestamps": info.timestamps, "rotation": info.rotation}
            frames = read_clip(record, decoder, wanted.frames, wanted.height, wanted.width)
        except (Rejected, DecodeError, OSError) as error:
            skipped.append(Skipped(source.name, str(error)))
            continue
        yield Clip(source, info, frames)


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one of what is left."""
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def round_trip(tokenizer: VideoTokenizer, clips: np.ndarray) -> tuple[Codes, np.ndarray]:
    """The codes of clips, uint8 [B, T, H, W, 3], and the clips that come back, of the same shape and type."""
    codes = tokenizer.encode(from_pixels(clips, next(tokenizer.parameters()).device))
    return codes, to_pixels(tokenizer.decode(codes))


def first_reasons(skipped: list[Skipped]) -> str:
    """Of an error that no video is left."""
    return "; ".join(f"{item.source}: {item.reason}" for item in skipped[:3])
