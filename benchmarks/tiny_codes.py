"""A random tokenizer and random code shards, written with the real writer and record format, for runs whose data does not matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import MDSWriter

from data_pipelines.codes import MANIFEST, Bucket, Manifest, columns, to_record
from data_pipelines.random_access import HASH
from data_pipelines.shard_index import merge_indexes
from tokenizer import MultiScaleQuantizer, ScaleSchedule, VideoTokenizer
from tokenizer.autoencoder import AutoencoderConfig
from tokenizer.tokenizer import TokenizerConfig

DIM, TEXT_DIM = 8, 8


def write_tokenizer(folder: Path) -> str:
    """A random tokenizer of the smallest sizes; its fingerprint."""
    torch.manual_seed(0)
    sizes = AutoencoderConfig(dim=DIM, base_width=32, multipliers=(1, 1, 1, 1, 1))
    tokenizer = VideoTokenizer(TokenizerConfig(sizes, num_scales=2)).eval()
    tokenizer.save_pretrained(folder)
    return tokenizer.fingerprint


def write_codes(
    folder: Path,
    fingerprint: str,
    side: int = 2,
    frames: int = 3,
    clips: int = 24,
    scales: int = 2,
    others: tuple[tuple[int, int, int], ...] = (),
    **changes: Any,
) -> None:
    """Code shards of clips whose bits and latents belong together, on the square schedule up to side x side.

    Args:
        others: (side, frames, clips) of more shapes in the same folder.
    """
    latents, buckets, parts = changes.get("has_latents", True), [], []
    for size, length, rows in ((side, frames, clips), *others):
        schedule = ScaleSchedule.square(size, scales)
        generator = torch.Generator().manual_seed(size)
        parts.append(f"00000/{size}x{length}")
        writer = MDSWriter(columns=columns(latents), out=str(folder / parts[-1]), hashes=[HASH])
        for number in range(rows):
            latent = torch.randn(length, DIM, size, size, generator=generator).half()
            # something to learn: the text decides the latent's mean
            text = np.random.default_rng(number % 4).standard_normal((1 + number % 3, TEXT_DIM)).astype(np.float16)
            latent += torch.from_numpy(text[0, :DIM])[None, :, None, None]
            tokens = MultiScaleQuantizer(DIM).quantize(latent.float().movedim(0, 1)[None], schedule).tokens()[0]
            raw = {"caption": f"clip {number}", "source": f"{number}.mp4", "class_id": number % 4}
            writer.write(to_record(tokens, latent if latents else None, text, raw))
        writer.finish()
        buckets.append(Bucket(16 * size, 16 * size, 1 + 4 * (length - 1), schedule.to_list(), rows, 1))
    merge_indexes(folder, parts)
    values: dict[str, Any] = dict(
        fingerprint=fingerprint, buckets=buckets, dim=DIM, fps=8.0, text_encoder="bytes", text_fingerprint=f"bytes-1-{TEXT_DIM}",
        text_dim=TEXT_DIM, has_latents=True, dead=0, classes=["a", "b", "c", "d"],
    )  # fmt: skip
    (folder / MANIFEST).write_text(Manifest(**(values | changes)).to_json())
