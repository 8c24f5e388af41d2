"""Tiny runs on random code shards, written with the real writer and record format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from streaming import MDSWriter

from data_pipelines.codes import MANIFEST, Bucket, Manifest, columns, to_record
from data_pipelines.random_access import HASH
from data_pipelines.shard_index import merge_indexes
from tokenizer import MultiScaleQuantizer, ScaleSchedule, VideoTokenizer
from tokenizer.autoencoder import AutoencoderConfig
from tokenizer.tokenizer import TokenizerConfig

DIM, TEXT_DIM = 8, 8
ROOT = Path(__file__).parents[2]


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


def write_run(folder: Path, **changes: Any) -> Path:
    """Tokenizer, codes and the settings of a run of one stage with everything on; the YAML file."""
    if not (folder / "codes").exists():
        write_codes(folder / "codes", write_tokenizer(folder / "tokenizer"))
    settings: dict[str, Any] = {
        "out": str(folder / "run"),
        "tokenizer": str(folder / "tokenizer"),
        "network": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "max_text_length": 3},
        "optimizer": {"lr": 0.003, "warmup_steps": 2},
        "wandb": {"mode": "disabled"},
        "log_every": 1,
        "stages": [stage(folder / "codes", 10)],
    }
    file = folder / f"{changes.get('out', 'run').rsplit('/')[-1]}.yaml"
    file.write_text(yaml.safe_dump(settings | changes))
    return file


def stage(codes: Path, steps: int, /, **changes: Any) -> dict[str, Any]:
    """A stage of images and clips with flips, frame masks and condition dropout."""
    return {
        "name": "one",
        "codes": [{"dir": str(codes), "proportion": 0.75}, {"dir": str(codes), "num_frames": 1, "proportion": 0.25}],
        "steps": steps,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "p_mask": 0.3,
        "condition_dropout": 0.2,
    } | changes


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


PROGRAM = """
import sys
from pretrain.config import PretrainConfig
from pretrain.train import main_entry
from tokenizer import settings
if __name__ == "__main__":
    main_entry(settings.load(PretrainConfig, sys.argv[1], sys.argv[2:]))
"""


def launch(folder: Path, settings: Path, processes: int, *overrides: str) -> subprocess.Popen:
    """Starts a run under torchrun."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        [*command, str(program), str(settings), *overrides],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    """Waits for a run that must succeed; its output."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-4000:]
    return output
