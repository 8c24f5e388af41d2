"""The moving-shapes corpus as raw shards, made once, for benchmarks that train."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.clips import Clips, load_clips
from data_pipelines.moving_shapes import write_corpus
from data_pipelines.shards import write_shards

RECIPE = Path(__file__).parents[1] / "tokenizer" / "configs" / "shapes-all-terms.yaml"
"""The recipe of the benchmarks that train a tokenizer on it."""


def shapes(out: Path, clips: int = 800, validation: int = 96, frames: int = 17, size: int = 64) -> tuple[Clips, Clips]:
    """Training and validation clips, uint8 [N, frames, size, size, 3]; kept in `out`."""
    write_corpus(out / "corpus", clips, 0, validation=validation)
    splits = []
    for split in ("train", "validation"):
        write_shards(out / "corpus" / f"{split}.csv", out / "shards" / split)
        splits.append(load_clips(out / "shards" / split, frames, size))
    return splits[0], splits[1]
