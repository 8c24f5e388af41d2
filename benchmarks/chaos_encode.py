"""`videoar encode` under kills: the moving shapes and two images, some of which are too short for a size, at two sizes."""

from __future__ import annotations

from pathlib import Path
from random import Random

import psutil
import torch
from PIL import Image

from benchmarks.chaos_scene import Scene
from benchmarks.kills import END, START, Life, content, difference
from data_pipelines.codes import MANIFEST
from data_pipelines.encode import DEAD_LETTERS, JOB
from data_pipelines.encode_worker import TEMPORARY
from data_pipelines.moving_shapes import write_corpus
from data_pipelines.random_access import ShardFolder
from data_pipelines.shard_index import INDEX
from data_pipelines.shard_part import ShardsConfig
from data_pipelines.shards import write_shards
from tokenizer import VideoTokenizer
from tokenizer.autoencoder import AutoencoderConfig
from tokenizer.receipts import RECEIPT
from tokenizer.tokenizer import TokenizerConfig

VARIANTS = ("32x32x17", "32x48x5")
SHARD = 4
"""Files of a raw shard."""


class EncodeScene(Scene):
    """Encodes so many clips, and two images that are dead letters.

    Args:
        folder: for everything.
        clips: of the corpus.
        workers: actors.
        preloaded: see `Life`.
    """

    name = "encode"
    kinds = ("actor", "driver", "tree")

    def __init__(self, folder: Path, clips: int, workers: int = 2, preloaded: bool = False):
        super().__init__(folder, preloaded)
        self.workers = workers
        self.raw, self.tokenizer = folder / "raw", folder / "tokenizer"
        write_corpus(folder / "corpus", clips=clips, seed=0, size=48, validation=1)
        rows = (folder / "corpus" / "train.csv").read_text().splitlines()
        for number in (2, 7):
            Image.new("RGB", (48, 48), (number, 90, 200)).save(folder / "corpus" / f"{number}.png")
            rows.insert(number, f"{number}.png,an image")
        (folder / "corpus" / "mixed.csv").write_text("".join(f"{row}\n" for row in rows))
        write_shards(folder / "corpus" / "mixed.csv", self.raw, ShardsConfig(part_files=SHARD, workers=1))
        torch.manual_seed(0)
        sizes = AutoencoderConfig(dim=8, base_width=8, multipliers=(1, 2, 2), blocks=1, patch=4)
        VideoTokenizer(TokenizerConfig(sizes, num_scales=2)).save_pretrained(self.tokenizer)
        self.shards = len(VARIANTS) * len(ShardFolder(self.raw).shards)

    @property
    def codes(self) -> Path:
        """Of the undisturbed run."""
        return self.folder / "undisturbed"

    def words(self, out: Path) -> list[str]:
        return [
            "encode", "--shards", str(self.raw), "--tokenizer", str(self.tokenizer), "--out", str(out), "--variants", ",".join(VARIANTS),
            "--latents", "true", "--text_dim", "16", "--batch_size", "3", "--num_workers", str(self.workers),
        ]  # fmt: skip

    def events(self, out: Path) -> list[str]:
        folders = [out / variant for variant in VARIANTS]
        come = ["claimed"] if (folders[-1] / JOB).exists() else []
        shards = self._shards(out)
        if shards or any(out.glob(f"*/{TEMPORARY}/*.row")):
            come.append("row")
        come += [f"shard {number}" for number in range(1, shards + 1)]
        for variant, folder in zip(VARIANTS, folders):
            come += [f"{file} {variant}" for file in (DEAD_LETTERS, INDEX, MANIFEST) if (folder / file).exists()]
        return come

    def _shards(self, out: Path) -> int:
        return sum(1 for _ in out.glob(f"*/[0-9]*/{RECEIPT}"))

    def window(self, kind: str) -> tuple[str, str]:
        return ("claimed", f"shard {self.shards}") if kind == "actor" else (START, END)

    def goes_on(self, kind: str) -> bool:
        return kind == "actor"

    def kill(self, life: Life, kind: str, random: Random) -> bool:
        if kind == "actor":
            return life.kill_one(_is_actor, random)
        return life.kill() if kind == "driver" else life.kill_tree()

    def mark(self, out: Path) -> object:
        return self._shards(out), {file.name for file in out.glob(f"*/{TEMPORARY}/*.row")}

    def where(self, out: Path, mark: object) -> tuple[str, str]:
        shards, come = self._shards(out), set(self.events(out))
        rows = {file.name for file in out.glob(f"*/{TEMPORARY}/*.row")}
        detail = f"{shards} of {self.shards} shards"
        if all(f"{MANIFEST} {variant}" in come for variant in VARIANTS):
            return "after the merge", detail
        if f"{DEAD_LETTERS} {VARIANTS[0]}" in come:
            files = sum(word.split()[0] in (DEAD_LETTERS, INDEX, MANIFEST) for word in come)
            return "in the merge", f"{files} of {3 * len(VARIANTS)} files"
        if shards == self.shards:
            return "before the merge", detail
        begun, before = mark  # type: ignore[misc]
        return "encoding" if shards > begun or rows - before else "starting", detail

    def problems(self, out: Path) -> list[str]:
        return difference(content(self.codes), content(out))


def _is_actor(process: psutil.Process) -> bool:
    return process.cmdline()[:1] != [] and process.cmdline()[0].startswith("ray::EncodeActor")
