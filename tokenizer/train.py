"""Training of the tokenizer: a loop over clips that some room above hands in, with exact resume.

videoar tokenizer train --config tokenizer/configs/demo.yaml --shards DIR --out DIR
python -m torch.distributed.run --nproc-per-node 8 -m videoar tokenizer train --device cuda ...     data parallel
"""

from __future__ import annotations

import math
import os
import pickle
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokenizer import settings
from tokenizer.autoencoder import recompute_blocks
from tokenizer.data_parallel import (
    Ranks,
    full,
    full_state,
    gather,
    joined,
    load_optimizer,
    load_state,
    mean_over_ranks,
    reshard,
    unwrap,
    wrap,
)
from tokenizer.ema import Ema
from tokenizer.errors import UserError
from tokenizer.files import sync
from tokenizer.metrics_log import MetricsLog
from tokenizer.objective import Generator, Objective, Reconstruction
from tokenizer.progress import Meter
from tokenizer.quantizer import are_dead
from tokenizer.stop import stop_on_signals
from tokenizer.tokenizer import VideoTokenizer
from tokenizer.train_config import BatchSpec, TokenizerTrainConfig
from tokenizer.validation import ValidationSource, validate, write_picture

CHECKPOINT = "checkpoint.pt"


class ClipSource(Protocol):
    """Gives the batch of a step; a pure function of the step, so that a resumed run sees the same clips.

    Attributes:
        replaced: clips so far, of this process and start, that could not be decoded and had another in their place.
    """

    replaced: int

    def __call__(self, step: int, spec: BatchSpec) -> Tensor:
        """This process's share of the batch, float32 [B, 3, T, H, W] in [-1, 1]."""
        ...

    def names(self, step: int, spec: BatchSpec) -> list[str]:
        """What the clips of the share are called."""
        ...


def train(
    config: TokenizerTrainConfig,
    clips: ClipSource,
    out: str | Path,
    device: str = "cpu",
    validation: ValidationSource | None = None,
) -> VideoTokenizer | None:
    """Trains a tokenizer and writes it to `out`; killed and called again, it goes on from its last checkpoint.

    Under torchrun every process calls it with the same settings. On SIGTERM or SIGUSR1 the step under way is finished and saved.

    Args:
        config: the recipe, with all phases in steps (`resolved`).
        clips: gives the batch of a step.
        out: the folder for config.json, model.safetensors, train.yaml, metrics.jsonl, validation/ and, while training, checkpoint.pt.
        device: "cpu" or "cuda".
        validation: the clips that no step sees; None: nothing is validated.

    Returns:
        the tokenizer, or None if it was stopped before the end.

    Raises:
        UserError: `out` holds another recipe's run, settings do not fit, or a loss is not finite.
    """
    out = Path(out)
    with joined(device) as ranks:
        _claim(config, out, ranks)
        if (out / "config.json").is_file() and not (out / CHECKPOINT).exists():
            return VideoTokenizer.from_pretrained(out, ranks.device)  # finished before
        trainer = Trainer(config, out, ranks)
        done = trainer.run(clips, validation)
        tokenizer = trainer.finish() if done else None
    return tokenizer


class Trainer:
    """Tokenizer, objective and optimizers of a run.

    Args:
        config: the recipe.
        out: its folder.
        ranks: this process.
    """

    def __init__(self, config: TokenizerTrainConfig, out: Path, ranks: Ranks):
        self.config, self.out, self.ranks = config, out, ranks
        torch.manual_seed(config.seed)
        going_on = (out / CHECKPOINT).exists()
        tokenizer = VideoTokenizer(config.tokenizer) if going_on else _start(config)
        if config.loss.entropy_beta is not None:
            tokenizer.quantizer.entropy_beta = config.loss.entropy_beta
        tokenizer = tokenizer.to(ranks.device).train()
        recompute_blocks(tokenizer, config.recompute)
        if config.compile:
            tokenizer.encoder.compile()
            tokenizer.decoder.compile()
        self.objective = Objective(config.loss, config.discriminator, ranks)
        self.generator = wrap(Generator(tokenizer, config.precision), ranks, config.strategy)
        self.optimizer = _adamw(self.generator, config.lr, config)
        self.judge_lr = config.lr if config.discriminator_lr is None else config.discriminator_lr
        self.judge_optimizer = None
        if self.objective.discriminator is not None:
            self.judge_optimizer = _adamw(self.objective.discriminator, self.judge_lr, config)
        self.ema = Ema(self.inner, config.ema_decay) if config.ema_decay else None
        self.step = self._restore()
        self.log: MetricsLog | None = None

    @property
    def inner(self) -> Generator:
        """The generator without its wrapper."""
        inner = unwrap(self.generator)
        assert isinstance(inner, Generator)
        return inner

    def run(self, clips: ClipSource, validation: ValidationSource | None) -> bool:
        """Trains to the end; False if it was stopped before."""
        config, main = self.config, self.ranks.rank == 0
        if main:
            self.log = MetricsLog(self.out, self.step, config.wandb, settings.to_dict(config), key="step")
        try:
            bar = Meter("tokenizer", config.steps, done=self.step) if main else nullcontext()
            with stop_on_signals() as stop, bar as meter:
                while self.step < config.steps:
                    report = self._step(clips)
                    self.step += 1
                    ends, stopping = self.step == config.steps, stop.agreed()
                    if self.log is not None and (ends or stopping or self.step % config.log_every == 0):
                        self.log.write({"step": self.step, **report, "replaced": clips.replaced})
                    if not ends and (stopping or self.step % config.checkpoint_every == 0):
                        self._save()
                    if meter is not None:
                        meter.advance(1, f"loss {report['loss']:.4f} psnr {report['psnr']:.2f} dB")
                    if stopping and not ends:
                        return False
                    if (
                        validation is not None
                        and config.validate_every
                        and (ends or self.step % config.validate_every == 0)
                    ):
                        self._validate(validation)
        finally:
            if self.log is not None:
                self.log.close()
        return True

    def finish(self) -> VideoTokenizer:
        """Writes the trained tokenizer; every rank must call it."""
        with self._averaged():
            weights = full_state(self.inner.tokenizer.state_dict())
        tokenizer = VideoTokenizer(self.config.tokenizer)
        tokenizer.load_state_dict(weights)
        if self.ranks.rank == 0:
            tokenizer.eval().save_pretrained(self.out)
            sync(self.out)
            (self.out / CHECKPOINT).unlink(missing_ok=True)
        _wait()
        return tokenizer.to(self.ranks.device).eval()

    def _step(self, clips: ClipSource) -> dict[str, float]:
        """One update of tokenizer and discriminator; what is logged of it, the mean over all ranks."""
        config, step, spec = self.config, self.step, self.config.batch_spec(self.step)
        rate = _rate(config, step)
        video = clips(step, spec).to(self.ranks.device)
        uses_gan = self.objective.uses_gan(step)
        features = uses_gan and config.loss.gan_adaptive
        result = Reconstruction(**self.generator(video, self._bypass(video), features))
        loss, terms = self.objective.generator_loss(result, video, step, self.inner)
        result = replace(result, features=None)  # large, and done with
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        terms["grad_norm"] = _clip(self.generator, config.grad_clip)
        if uses_gan:
            assert self.objective.discriminator is not None and self.judge_optimizer is not None
            judge_loss, judge_terms = self.objective.discriminator_loss(result, video, self.inner)
            self.judge_optimizer.zero_grad(set_to_none=True)
            judge_loss.backward()
            terms |= judge_terms | {"grad_norm_discriminator": _clip(self.objective.discriminator, config.grad_clip)}
        error = (result.video.detach().clamp(-1, 1) - video).square().mean()
        terms |= {
            "loss": loss,
            "mean_squared_error": error,
            "bit_usage": result.usage.mean(),
            "dead_bits": are_dead(mean_over_ranks(result.usage)).float().mean(),
        }
        names = sorted(terms)
        values = mean_over_ranks(torch.stack([terms[name].detach().float() for name in names])).tolist()
        report = dict(zip(names, values))
        if not all(map(math.isfinite, values)):
            self._stop_at_bad_numbers(report, video, result, clips.names(step, spec))
        _update(self.optimizer, rate)
        if uses_gan and self.judge_optimizer is not None:
            _update(self.judge_optimizer, rate)
        if self.ema:
            self.ema.update()
        report["psnr"] = -10 * math.log10(max(report.pop("mean_squared_error") / 4, 1e-10))
        return report | {"lr": config.lr * rate}

    def _bypass(self, video: Tensor) -> Tensor | None:
        """Which clips bypass the quantiser: every other one of the whole batch, on any number of ranks."""
        if self.step >= self.config.continuous_share * self.config.steps:
            return None
        first = self.ranks.rank * len(video)
        return torch.arange(first, first + len(video), device=video.device) % 2 == 0

    def _stop_at_bad_numbers(
        self, report: dict[str, float], video: Tensor, result: Reconstruction, names: list[str]
    ) -> None:
        """Raises before the update, on all ranks alike, and says at which clips it happened."""
        fine = (video + result.video).isfinite().flatten(1).all(dim=1).tolist()
        mine = [name for name, good in zip(names, fine) if not good]
        bad = gather(mine)
        terms = ", ".join(f"{name} {value}" for name, value in report.items() if not math.isfinite(value))
        where = (
            f"clips {', '.join(bad[:8])}"
            if bad
            else f"none of the clips by itself; the batch is {', '.join(gather(names)[:8])}"
        )
        raise UserError(
            f"the tokenizer's training is not finite at step {self.step} ({terms}; {where}): go on from the last checkpoint with a lower "
            f"lr than {self.config.lr}, or take these clips out and begin a new run with start_from."
        )

    def _validate(self, batches: ValidationSource) -> None:
        with self._averaged():
            self.generator.eval()
            report, picture = validate(self.generator, batches, self.config.loss, self.objective.perceptual, self.ranks)
            self.generator.train()
            reshard(self.generator)
        if self.log is not None:
            file = self.out / "validation" / f"step_{self.step:07d}.png"
            write_picture(picture, file)
            self.log.write({"step": self.step, **report})
            self.log.wandb.picture("validation", file, self.step)

    def _averaged(self) -> AbstractContextManager[None]:
        """In it the weights are the running averages, where there are any."""
        return self.ema.applied() if self.ema else nullcontext()

    def _save(self) -> None:
        keep = self.ranks.rank == 0
        state: dict[str, Any] = {
            "step": self.step,
            "model": full_state(self.inner.tokenizer.state_dict(), keep),
            "optimizer": full_state(self.optimizer.state_dict(), keep),
            "lecam": self.objective.lecam.state_dict(),
            "perceptual": self.objective.perceptual_term,
        }
        if self.ema:
            state["ema"] = full_state(self.ema.state_dict(), keep)
        if self.objective.discriminator is not None and self.judge_optimizer is not None:
            state["discriminator"] = full_state(unwrap(self.objective.discriminator).state_dict(), keep)
            state["discriminator_optimizer"] = full_state(self.judge_optimizer.state_dict(), keep)
        if self.ranks.rank == 0:
            temporary = self.out / f".checkpoint.{os.getpid()}.pt"
            torch.save(state, temporary)
            sync(temporary)
            os.replace(temporary, self.out / CHECKPOINT)
            sync(self.out)
        _wait()

    def _restore(self) -> int:
        """Loads the checkpoint, if there is one; the number of finished steps."""
        file = self.out / CHECKPOINT
        if not file.exists():
            return 0
        try:
            state = torch.load(file, weights_only=True, map_location="cpu")
            if state["perceptual"] != self.objective.perceptual_term:
                raise UserError(
                    f"{self.out} was trained with the perceptual term {state['perceptual']}, this machine gives "
                    f"{self.objective.perceptual_term}: bring the backbone's weights back to where they were."
                )
            load_state(self.inner.tokenizer, state["model"])
            load_optimizer(self.optimizer, state["optimizer"], self.config.lr)
            self.objective.lecam.load_state_dict(state["lecam"])
            if self.ema:
                self.ema.load(state["ema"])
            if self.objective.discriminator is not None and self.judge_optimizer is not None:
                load_state(unwrap(self.objective.discriminator), state["discriminator"])
                load_optimizer(self.judge_optimizer, state["discriminator_optimizer"], self.judge_lr)
        except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(
                f"the checkpoint {file} can't be read ({' '.join(str(error).split())[:150]}): delete it to start again."
            ) from error
        return state["step"]


def _start(config: TokenizerTrainConfig) -> VideoTokenizer:
    """The tokenizer before the first step."""
    if config.start_from is None:
        tokenizer = VideoTokenizer(config.tokenizer)
    else:
        tokenizer = VideoTokenizer.from_pretrained(config.start_from)
        mine, theirs = settings.to_dict(config.tokenizer), settings.to_dict(tokenizer.config)
        differing = sorted(key for key in mine["autoencoder"] if mine["autoencoder"][key] != theirs["autoencoder"][key])
        if differing:
            what = ", ".join(
                f"{key} {theirs['autoencoder'][key]} instead of {mine['autoencoder'][key]}" for key in differing
            )
            raise UserError(
                f"the tokenizer in {config.start_from} has {what}: set tokenizer.autoencoder to its sizes, or start from another one."
            )
        weights = tokenizer.state_dict()
        tokenizer = VideoTokenizer(config.tokenizer)  # num_scales and residual_down are the recipe's
        tokenizer.load_state_dict(weights)
    return tokenizer


def _adamw(module: nn.Module, lr: float, config: TokenizerTrainConfig) -> torch.optim.AdamW:
    kernels = [p for p in module.parameters() if p.ndim > 1]
    rest = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=config.betas, fused=True)
    for group in optimizer.param_groups:
        group["peak"] = lr
    return optimizer


def _update(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    optimizer.step()


def _clip(module: nn.Module, largest: float) -> Tensor:
    """Clips the gradients; their norm before."""
    return full(torch.nn.utils.clip_grad_norm_(module.parameters(), largest))


def _rate(config: TokenizerTrainConfig, step: int) -> float:
    """The share of the peak learning rate."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    return warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def _claim(config: TokenizerTrainConfig, out: Path, ranks: Ranks) -> None:
    """Makes the folder this recipe's own."""
    for phase in config.phases:
        if phase.steps is None:
            raise ValueError("phases in epochs must be resolved")
        for spec in phase.batches:
            ranks.share(spec.batch_size)
    recipe = out / "train.yaml"
    if recipe.exists():
        if _lasting(settings.load(TokenizerTrainConfig, recipe)) != _lasting(config):
            raise UserError(f"{out} holds a run with another recipe ({recipe}): name a new folder or delete this one.")
    elif (out / "config.json").exists():
        raise UserError(f"{out} holds a tokenizer that this command did not train: name another folder with --out.")
    _wait()
    if ranks.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob(".checkpoint.*.pt"):  # of a kill in the middle of a save
            left.unlink()
        settings.save(config, recipe)
    _wait()


def _lasting(config: TokenizerTrainConfig) -> TokenizerTrainConfig:
    """The recipe without what may change from one start of a run to the next: rates, memory, speed, and how it is watched."""
    default = TokenizerTrainConfig()
    names = (
        "lr", "discriminator_lr", "grad_clip", "start_from", "precision", "recompute", "compile", "strategy",
        "validation_clips", "validate_every", "checkpoint_every", "log_every", "wandb",
    )  # fmt: skip
    return replace(config, **{name: getattr(default, name) for name in names})
