"""Training of the tokenizer: a loop over clips that some room above hands in, with exact resume.

videoar tokenizer train --config tokenizer/configs/demo.yaml --shards DIR --out DIR
"""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tokenizer import settings
from tokenizer.clip_shape import check_clip_shape
from tokenizer.errors import UserError
from tokenizer.losses import LossConfig, reconstruction_loss
from tokenizer.precision import Precision, uses_bfloat16
from tokenizer.progress import Meter
from tokenizer.tokenizer import TokenizerConfig, VideoTokenizer


@dataclass(frozen=True)
class BatchSpec:
    """The shape of a batch.

    Args:
        num_frames: 1 (images) or 1+4n.
        size: height and width in pixels, a multiple of 16.
        batch_size: clips.
    """

    num_frames: int
    size: int
    batch_size: int


@dataclass(frozen=True)
class Phase:
    """A part of the training that goes through its batch shapes in turn.

    Args:
        steps: optimizer steps.
        batches: the shapes.
    """

    steps: int
    batches: tuple[BatchSpec, ...]


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """A tokenizer's training.

    Args:
        tokenizer: what is trained.
        loss: weights of the terms.
        phases: short clips first, then longer ones.
        lr: peak learning rate of AdamW; it warms up linearly and falls to zero along a cosine.
        warmup_steps: of the learning rate.
        weight_decay: on convolution kernels.
        grad_clip: largest gradient norm.
        continuous_share: during this first share of the steps, half of the clips bypass the quantiser.
        precision: of the convolutions: "bfloat16", "float32", or "auto" (bfloat16 where the processor computes in it).
        seed: of weights and batches.
        checkpoint_every: steps between two checkpoints.
        log_every: steps between two lines of metrics.jsonl.
    """

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    phases: tuple[Phase, ...] = (Phase(1000, (BatchSpec(17, 128, 8),)),)
    lr: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    continuous_share: float = 0.0
    precision: Precision = "auto"
    seed: int = 0
    checkpoint_every: int = 200
    log_every: int = 10

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(phase.steps for phase in self.phases)

    def batch_spec(self, step: int) -> BatchSpec:
        """The shape of the batch of one step."""
        for phase in self.phases:
            if step < phase.steps:
                return phase.batches[step % len(phase.batches)]
            step -= phase.steps
        raise IndexError(step)


ClipSource = Callable[[int, BatchSpec], Tensor]
"""(step, shape) -> float32 [B, 3, T, H, W] in [-1, 1]; a pure function of the step, so that a resumed run sees the same clips."""


def train(config: TokenizerTrainConfig, clips: ClipSource, out: str | Path, device: str = "cpu") -> VideoTokenizer:
    """Trains a tokenizer and writes it to `out`; killed and called again, it goes on from its last checkpoint.

    Args:
        config: the recipe.
        clips: gives the batch of a step.
        out: the folder for config.json, model.safetensors, train.yaml, metrics.jsonl and, while training, checkpoint.pt.
        device: where to train.

    Raises:
        UserError: `out` holds another recipe's run, a batch shape is impossible, or the loss is not finite.
    """
    out = Path(out)
    _check(config, out)
    if (out / "config.json").is_file() and not (out / "checkpoint.pt").exists():
        return VideoTokenizer.from_pretrained(out, device)  # finished before
    torch.manual_seed(config.seed)
    tokenizer = VideoTokenizer(config.tokenizer).to(device)
    kernels = [p for p in tokenizer.parameters() if p.ndim > 1]
    rest = [p for p in tokenizer.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": kernels, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    start = _restore(out, tokenizer, optimizer)
    tokenizer.train()
    with Meter("tokenizer", config.steps) as meter, open(out / "metrics.jsonl", "a") as metrics:
        meter.advance(start)
        for step in range(start, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * _rate(config, step)
            report = _step(config, tokenizer, optimizer, clips(step, config.batch_spec(step)).to(device), step)
            if not math.isfinite(report["loss"]):
                raise UserError(
                    f"the tokenizer's loss is {report['loss']} at step {step}: lower lr ({config.lr}) and start again in a new folder."
                )
            if step % config.log_every == 0 or step + 1 == config.steps:
                metrics.write(json.dumps({"step": step, **report}) + "\n")
                metrics.flush()
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
                _save(out, tokenizer, optimizer, step + 1)
            meter.advance(1, f"loss {report['loss']:.4f} psnr {report['psnr']:.2f} dB")
    tokenizer.eval().save_pretrained(out)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return tokenizer


def _step(
    config: TokenizerTrainConfig, tokenizer: VideoTokenizer, optimizer: torch.optim.Optimizer, video: Tensor, step: int
) -> dict[str, float]:
    reduced = uses_bfloat16(config.precision, video.device.type)
    with torch.autocast(video.device.type, torch.bfloat16, enabled=reduced):
        latent = tokenizer.encode_latent(video)
    latent = latent.float()
    quantizer = tokenizer.quantizer(latent, tokenizer.schedule_for(*video.shape[-2:]))
    features = quantizer.quantized
    if step < config.continuous_share * config.steps:
        half = video.shape[0] // 2
        features = torch.cat([latent[:half], features[half:]])
    with torch.autocast(video.device.type, torch.bfloat16, enabled=reduced):
        reconstruction = tokenizer.decoder(features)
    reconstruction = reconstruction.float()
    pixel = reconstruction_loss(reconstruction, video, config.loss)
    commitment, entropy = quantizer.losses["commitment"], quantizer.losses["entropy"]
    loss = pixel + config.loss.commitment * commitment + config.loss.entropy * entropy
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), config.grad_clip)
    if torch.isfinite(norm):  # a bad update must not reach the weights; the caller stops on a bad loss
        optimizer.step()
    error = (reconstruction.detach().clamp(-1, 1) - video).square().mean()
    return {
        "loss": loss.item() if torch.isfinite(norm) else math.nan,
        "reconstruction": pixel.item(),
        "commitment": commitment.item(),
        "entropy": entropy.item(),
        "psnr": -10 * math.log10(max(error.item() / 4, 1e-10)),
        "grad_norm": norm.item(),
        "lr": optimizer.param_groups[0]["lr"],
        "bit_usage": quantizer.usage.mean().item(),
        "dead_bits": (quantizer.usage.sub(0.5).abs() > 0.49).float().mean().item(),
    }


def _rate(config: TokenizerTrainConfig, step: int) -> float:
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    return warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def _check(config: TokenizerTrainConfig, out: Path) -> None:
    for phase in config.phases:
        for spec in phase.batches:
            check_clip_shape(spec.num_frames, spec.size, spec.size)
    out.mkdir(parents=True, exist_ok=True)
    recipe = out / "train.yaml"
    if recipe.exists() and settings.load(TokenizerTrainConfig, recipe) != config:
        raise UserError(f"{out} holds a run with another recipe ({recipe}): name a new folder or delete this one.")
    settings.save(config, recipe)


def _save(out: Path, tokenizer: VideoTokenizer, optimizer: torch.optim.Optimizer, step: int) -> None:
    temporary = out / f".checkpoint.{os.getpid()}.pt"
    torch.save({"step": step, "model": tokenizer.state_dict(), "optimizer": optimizer.state_dict()}, temporary)
    os.replace(temporary, out / "checkpoint.pt")


def _restore(out: Path, tokenizer: VideoTokenizer, optimizer: torch.optim.Optimizer) -> int:
    file = out / "checkpoint.pt"
    if not file.exists():
        return 0
    try:
        state = torch.load(file, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"the checkpoint {file} can't be read ({' '.join(str(error).split())[:150]}): delete it to start again."
        ) from error
    tokenizer.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
