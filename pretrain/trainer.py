"""The network and its optimizer, and how they go through a stage: step, log, validation, checkpoint."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipelines.code_stream import CodeBatch
from inference.config import ModelConfig
from parallel import checkpoint
from parallel.ema import Ema
from parallel.saving import Saver
from parallel.setup import ParallelConfig, ProcessInfo
from parallel.train_step import Microbatch, StepResult, build_model, build_optimizer, forward_backward, update
from pretrain.bitwise_loss import bitwise_loss
from pretrain.config import PretrainConfig
from pretrain.objective import ObjectiveConfig, prepare
from pretrain.sample_log import SampleLog
from pretrain.schedule import learning_rate
from pretrain.stages import Plan, StagePlan, layout_for
from pretrain.start import Position, check_same_run, exported_weights
from tokenizer import settings
from tokenizer.errors import UserError
from tokenizer.metrics_log import MetricsLog
from tokenizer.progress import Meter
from tokenizer.stop import StopFlag


class Trainer:
    """The network and its optimizer, and how they go through a stage.

    Args:
        config: the run.
        plan: its stages.
        info: this process.
    """

    def __init__(self, config: PretrainConfig, plan: Plan, info: ProcessInfo):
        self.config, self.plan, self.info = config, plan, info
        optimizer = config.optimizer
        self.checkpoints = Path(config.out) / "checkpoints"
        self.newest = checkpoint.latest(self.checkpoints)  # where this start goes on from
        start = None if self.newest or config.from_export is None else exported_weights(config.from_export, plan)
        self.chunks = build_model(plan.model, config.parallel, info, None if self.newest else config.seed, start)
        self.optimizer = build_optimizer(
            self.chunks, optimizer.lr, optimizer.weight_decay, optimizer.betas, optimizer.eps, optimizer.clip_grad
        )
        self.ema = Ema(self.chunks, optimizer.ema_decay) if optimizer.ema_decay else None
        self.saver = Saver(self.checkpoints, config.keep)
        self.log: MetricsLog | None = None
        self.samples: SampleLog | None = None

    def restore(self) -> Position:
        """Loads the newest complete checkpoint, if there is one."""
        if self.newest is None:
            return Position()
        common = checkpoint.load_common(self.newest)
        check_same_run(self.config, self.plan.model, common, self.newest)
        checkpoint.load(self.newest, self.chunks, self.optimizer, self.ema)
        return Position(**common["position"])

    def run_stage(self, stage: StagePlan, position: Position, stop: StopFlag) -> Position:
        """Trains from `position` to the stage's end, or until a stop is asked for; the returned position is saved."""
        config, steps = self.config, stage.config.steps
        stream = stage.stream(config, self.info.data_parallel_rank, self.info.data_parallel_size)
        if position.stream is not None:
            stream.load_state_dict(position.stream)
        step = position.step
        offset = position.global_step - step  # of the stages before
        label = f"pretrain {stage.config.name} ({stage.index + 1}/{len(self.plan.stages)})"
        with Meter(label, steps, done=step) if self.info.rank == 0 else nullcontext() as meter:
            while step < steps:
                started = time.monotonic()
                batch = next(stream)
                values = self._step(stage, batch, step, offset + step)
                step += 1
                if self.samples is not None:
                    self.samples.write(_head(stage, step, offset + step), stream.source_of(batch), batch)
                stopping = stop.agreed()
                self.saver.poll()
                values |= {"seconds": time.monotonic() - started}
                values["tokens_per_second"] = values["tokens"] / values["seconds"]
                if meter is not None:
                    meter.advance(1, f"loss {values['loss']:.4f}, bits {100 * values['bit_accuracy']:.1f}%")
                ends = step == steps
                if self.log is not None and (ends or stopping or step % config.log_every == 0):
                    self.log.write(_head(stage, step, offset + step) | values)
                if config.validate_every and (ends or step % config.validate_every == 0):
                    self._validate(stage, step, offset + step)
                position = Position(stage.index, step, offset + step, stream.state_dict())
                if ends:
                    position = Position(stage.index + 1, 0, offset + step)
                if ends or stopping or step % config.checkpoint_every == 0:
                    self._save(position, stage)
                if stopping:
                    break
        stream.close()
        return position

    def _step(self, stage: StagePlan, batch: CodeBatch, step: int, global_step: int) -> dict[str, Any]:
        """One optimizer step; what is logged of it."""
        optimizer = self.config.optimizer
        lr = learning_rate(
            step,
            stage.config.steps,
            optimizer.lr if stage.config.lr is None else stage.config.lr,
            optimizer.warmup_steps if stage.config.warmup_steps is None else stage.config.warmup_steps,
            optimizer.min_lr_ratio,
        )
        result, tokens = self._loss(stage, batch, training=True)
        norm = update(self.optimizer, lr) if math.isfinite(result.loss) else math.nan
        if not math.isfinite(norm):
            self.saver.wait()  # all ranks have the same loss and norm, so all are here
            newest = checkpoint.latest(self.checkpoints)
            raise UserError(
                f"loss {result.loss} and gradient norm {norm} at step {global_step} of {self.config.out} are not finite: lower the "
                f"learning rate (now {lr:.2e}) and go on from {newest or 'the start'}."
            )
        if self.ema:
            self.ema.update()
        return {
            "loss": result.loss,
            **result.report,
            "lr": lr,
            "grad_norm": norm,
            "clips": result.clips,
            "tokens": tokens,
        }

    def _validate(self, stage: StagePlan, step: int, global_step: int) -> None:
        stream = stage.validation_stream(self.config, self.info.data_parallel_rank, self.info.data_parallel_size)
        if stream is None:
            return
        whole = max(1, len(stream.datasets[0]) // stream.batch_sizes[0])
        count = min(self.config.validation_batches, whole)
        totals: dict[str, float] = {}
        with self.ema.applied() if self.ema else nullcontext():
            for _ in range(count):
                result, _ = self._loss(stage, next(stream), training=False)
                for name, value in {"loss": result.loss, **result.report}.items():
                    totals[name] = totals.get(name, 0.0) + value / count
        if self.log is not None:
            self.log.write(
                _head(stage, step, global_step) | {f"validation/{name}": value for name, value in totals.items()}
            )

    def _loss(self, stage: StagePlan, batch: CodeBatch, training: bool) -> tuple[StepResult, int]:
        """Loss (and gradients) of a global batch, of which `batch` is this rank's part; and its number of predicted tokens."""
        # as many microbatches of every source: with a token budget their clips differ in number
        share = stage.config.global_batch_size // self.info.data_parallel_size
        micro = len(batch) * stage.config.micro_batch_size // share
        batch = batch.to(self.info.device)
        parts = [batch.rows(start, start + micro) for start in range(0, len(batch), micro)]
        microbatches = [
            microbatch(part, stage.objective, self.plan.model, self.config.parallel, training) for part in parts
        ]

        def loss(logits: Tensor, one: Microbatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            return bitwise_loss(logits, one.targets, one.layout, stage.objective.token_weight)

        result = forward_backward(self.chunks, microbatches, loss, training)
        return result, result.clips * batch.tokens.shape[1] * batch.tokens.shape[2]

    def _save(self, position: Position, stage: StagePlan) -> None:
        common = {
            "position": vars(position),
            "model": stage.model.to_dict(),
            "export": self.plan.export_info(stage.index),
            "tokenizer": self.plan.tokenizer,
            "config": settings.to_dict(self.config),
        }
        self.saver.save(
            position.global_step, self.chunks, self.optimizer, common, self.ema, self.config.save_in_background
        )


def microbatch(
    batch: CodeBatch, objective: ObjectiveConfig, model: ModelConfig, parallel: ParallelConfig, training: bool
) -> Microbatch:
    """Clips as the parallel model takes them."""
    layout = layout_for(model, batch.tokens.shape[1], batch.schedule.scales, parallel.sequence_multiple)
    ready = prepare(batch, objective, layout, training)
    return Microbatch(
        ready.inputs, layout, ready.text, ready.text_lengths, ready.frame_mask, ready.drop_condition, ready.targets
    )


def _head(stage: StagePlan, step: int, global_step: int) -> dict[str, Any]:
    return {"stage": stage.config.name, "step": step, "global_step": global_step}
