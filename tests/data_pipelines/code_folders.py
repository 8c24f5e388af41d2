"""Code shards of random bits, written with the real writer and record format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import MDSWriter

from data_pipelines.codes import MANIFEST, Bucket, Manifest, columns, to_record
from data_pipelines.random_access import HASH
from data_pipelines.shard_index import merge_indexes
from tokenizer import MultiScaleQuantizer, ScaleSchedule

DIM, TEXT_DIM, FRAMES = 8, 4, 3
SCHEDULE = ScaleSchedule.square(2, 2)


def write_code_folder(
    folder: Path, rows_per_shard: list[int], seed: int = 0, latents: bool = True, fingerprint: str = "a"
) -> list[dict[str, Any]]:
    """Writes clips that `MultiScaleQuantizer` has quantised from random latents.

    Returns:
        one {"tokens": bool [T, N, d], "latent": float16 [T, d, H, W], "text": float16 [n, TEXT_DIM], "caption": str} a clip.
    """
    generator = torch.Generator().manual_seed(seed)
    quantizer = MultiScaleQuantizer(DIM)
    clips = []
    for shard, rows in enumerate(rows_per_shard):
        writer = MDSWriter(columns=columns(latents), out=str(folder / f"{shard:05d}"), hashes=[HASH])
        for _ in range(rows):
            number = len(clips)
            latent = torch.randn(FRAMES, DIM, 2, 2, generator=generator).half()  # [T, d, H, W]
            tokens = quantizer.quantize(latent.float().movedim(0, 1)[None], SCHEDULE).tokens()[0]
            text = torch.randn(number % 5, TEXT_DIM, generator=generator).numpy().astype(np.float16)
            raw = {"caption": f"clip {number}", "source": f"{number}.mp4", "class_id": number % 3}
            writer.write(to_record(tokens, latent if latents else None, text, raw))
            clips.append({"tokens": tokens, "latent": latent, "text": text, "caption": raw["caption"]})
        writer.finish()
    merge_indexes(folder, [f"{shard:05d}" for shard in range(len(rows_per_shard))])
    manifest = Manifest(
        fingerprint=fingerprint, buckets=[Bucket(32, 32, 1 + 4 * (FRAMES - 1), SCHEDULE.to_list(), len(clips), len(rows_per_shard))],
        dim=DIM, fps=None, text_encoder="bytes", text_fingerprint="bytes-1-4", text_dim=TEXT_DIM, has_latents=latents, dead=0,
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.to_json())
    return clips
