"""How many bytes raw and code shards take, and how long encoding takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipelines.codes import Manifest
from pretrain.config import PretrainConfig
from pretrain.planning.shapes import Shapes
from tokenizer.autoencoder import AutoencoderConfig, Encoder

RECORD = 50
"""Bytes of a record beside bits, latents and text: measured as 790 bytes a latent frame where the bits are 780 (five frames a clip,
benchmarks/results/data.json)."""


@dataclass(frozen=True)
class Folder:
    """One folder of codes.

    Args:
        path: where it is or will be.
        there: it is there already.
        clips: all of its shapes.
        hours: of video, images not counted.
        raw_bytes: of the raw shards that it comes from, as far as `raw_megabytes` says.
        code_bytes: of packed bits, text features and records.
        text_bytes: of these, the text features.
        latent_bytes: of stored latents.
        encode_flops: of the tokenizer's encoder.
    """

    path: str
    there: bool
    clips: int
    hours: float
    raw_bytes: float
    code_bytes: float
    text_bytes: float
    latent_bytes: float
    encode_flops: float


def folders(run: PretrainConfig, shapes: Shapes) -> list[Folder]:
    """Every folder of codes that the run reads, once, in the order of the stages."""
    raw = {
        source.dir: sum(1e6 * one.raw_megabytes * one.clips for one in source.expected)
        for stage in run.stages
        for source in stage.codes
    }
    text = 0 if run.network.condition == "class" else run.expected.text_tokens
    return [
        _folder(path, manifest, path in shapes.found, raw.get(path, 0.0), text, shapes.tokenizer.autoencoder)
        for path, manifest in shapes.folders.items()
    ]


def _folder(path: str, manifest: Manifest, there: bool, raw: float, text: int, sizes: AutoencoderConfig) -> Folder:
    bits = latents = seconds = flops = 0.0
    for bucket in manifest.buckets:
        schedule = bucket.scale_schedule
        bits += bucket.rows * (bucket.num_frames * schedule.tokens_per_frame * manifest.dim / 8 + RECORD)
        height, width = schedule.grid
        latents += bucket.rows * 2 * bucket.num_frames * manifest.dim * height * width
        seconds += bucket.rows * bucket.clip_frames / (manifest.fps or 8.0) if bucket.clip_frames > 1 else 0
        flops += bucket.rows * encoder_flops(sizes, bucket.height, bucket.width, bucket.clip_frames)
    text_bytes = float(manifest.rows * text * manifest.text_dim * 2)
    return Folder(
        path=path,
        there=there,
        clips=manifest.rows,
        hours=seconds / 3600,
        raw_bytes=raw,
        code_bytes=bits + text_bytes,
        text_bytes=text_bytes,
        latent_bytes=latents if manifest.has_latents else 0.0,
        encode_flops=flops,
    )


def encoder_flops(sizes: AutoencoderConfig, height: int, width: int, frames: int) -> float:
    """Of the encoder on one clip: counted on shapes at a few small sizes, and put together from them.

    Convolutions cost in proportion to the pixels and, from the second latent frame on, to the frames (a single frame takes a shorter
    way); attention within a frame to the square of its latent pixels.
    """

    def at(count: int) -> float:
        small, large = _cost(sizes, 32, count), _cost(sizes, 64, count)
        pixels = height * width / 32**2
        square = (large - 4 * small) / 12  # from small = a + b, large = 4 a + 16 b
        return (small - square) * pixels + square * pixels**2

    if frames == 1:
        return at(1)
    five = at(5)
    return five + (at(9) - five) * (frames - 5) / 4


@lru_cache(maxsize=64)
def _cost(sizes: AutoencoderConfig, side: int, frames: int) -> float:
    with torch.device("meta"):
        encoder = Encoder(sizes)
        with FlopCounterMode(display=False) as counter:
            encoder(torch.empty(1, 3, frames, side, side))
    return float(counter.get_total_flops())
