"""The training loop: through the stages, with exact resume.

videoar pretrain --config pretrain/configs/demo/pretrain.yaml                                         one process
python -m torch.distributed.run --nproc-per-node 2 -m videoar pretrain --config FILE                  tensor parallel 2
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipelines.code_stream import CodeBatch
from inference.checkpoint import StoredWeights
from inference.config import ModelConfig
from parallel import checkpoint
from parallel.ema import Ema
from parallel.saving import Saver
from parallel.setup import ParallelConfig, ProcessInfo, destroy, initialize
from parallel.train_step import Microbatch, StepResult, build_model, build_optimizer, forward_backward, update
from pretrain.bitwise_loss import bitwise_loss
from pretrain.config import PretrainConfig
from pretrain.events import write_event
from pretrain.objective import ObjectiveConfig, prepare
from pretrain.sample_log import SampleLog
from pretrain.schedule import learning_rate
from pretrain.stages import Plan, StagePlan, layout_for, make_plan
from tokenizer import settings
from tokenizer.errors import UserError
from tokenizer.metrics_log import MetricsLog
from tokenizer.progress import Meter
from tokenizer.stop import StopFlag, stop_on_sigterm

LATER = ("scales", "num_frames", "fps")
"""What a later run or stage may change of a network: no weight depends on it."""


@dataclass
class Position:
    """How far a run is.

    Args:
        stage: the stage that is next or under way.
        step: its finished steps.
        global_step: finished steps of all stages.
        stream: where its data stands; None: at its beginning.
    """

    stage: int = 0
    step: int = 0
    global_step: int = 0
    stream: dict[str, Any] | None = None


def main_entry(config: PretrainConfig) -> bool:
    """`videoar pretrain`: `pretrain`, then the process groups are left. Returns whether all stages are done."""
    try:
        return pretrain(config).stage == len(config.stages)
    finally:
        destroy()


def pretrain(config: PretrainConfig) -> Position:
    """Trains through all stages; called again with the same output folder, it goes on from the newest complete checkpoint.

    Every process of a run calls it with the same settings. On SIGTERM the step under way is finished and saved, and the
    function returns.

    Returns:
        How far the run is: `stage` is the number of stages where all of them are done.

    Raises:
        UserError: settings, codes, layout or checkpoint do not fit together, or the loss is not finite.
    """
    config = config.rooted()
    plan = make_plan(config)
    info = initialize(config.parallel, config.seed)
    check_batches(config, info)
    out = Path(config.out)
    trainer = Trainer(config, plan, info)
    position = trainer.restore()
    if info.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        settings.save(config, out / "config.yaml")
        trainer.log = MetricsLog(out, position.global_step, config.wandb, settings.to_dict(config))
        write_event(out, "start", position.global_step, world_size=info.world_size, host=platform.node())
    if config.log_samples and info.first_of_its_clips:
        trainer.samples = SampleLog(out, info.data_parallel_rank, info.data_parallel_size, position.global_step)
    try:
        with stop_on_sigterm() as stop:
            while position.stage < len(plan.stages):
                position = trainer.run_stage(plan.stages[position.stage], position, stop)
                if stop.stopping:
                    break
            trainer.saver.wait()
        if info.rank == 0:
            finished = position.stage == len(plan.stages)
            write_event(out, "finished" if finished else "stopped", position.global_step)
    finally:
        if trainer.log is not None:
            trainer.log.close()
        if trainer.samples is not None:
            trainer.samples.close()
    return position


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
        _check_same_run(self.config, self.plan.model, common, self.newest)
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


def exported_weights(folder: str, plan: Plan) -> StoredWeights:
    """An exported model's weights, for a warm start.

    Args:
        folder: what `videoar export` wrote.
        plan: the run that starts from them.

    Raises:
        UserError: it is no exported model, is another network, or was trained on another tokenizer's codes.
    """
    weights = StoredWeights(folder)
    stored, now = weights.content["model"], plan.model.to_dict()
    theirs, mine = weights.content.get("tokenizer_fingerprint"), plan.fingerprint
    for name, old, new in [("tokenizer", theirs, mine), *((name, stored.get(name), now[name]) for name in now)]:
        if name not in LATER and old != new:
            raise UserError(
                f"from_export: {folder} has {name} {old}, this run has {new}: start from a model that fits."
            )
    return weights


def _head(stage: StagePlan, step: int, global_step: int) -> dict[str, Any]:
    return {"stage": stage.config.name, "step": step, "global_step": global_step}


def check_batches(config: PretrainConfig, info: ProcessInfo) -> None:
    """Raises UserError, with a size that works, if a global batch does not divide into microbatches on all ranks."""
    for stage in config.stages:
        multiple = config.parallel.microbatch_multiple
        share = stage.micro_batch_size * info.data_parallel_size * multiple
        if stage.global_batch_size % share:
            stages = f" x {multiple} interleaved pipeline stages" if multiple > 1 else ""
            raise UserError(
                f"stage '{stage.name}': global_batch_size {stage.global_batch_size} is no multiple of micro_batch_size "
                f"{stage.micro_batch_size} x {info.data_parallel_size} data-parallel ranks{stages}: choose a multiple of {share}."
            )


def _check_same_run(config: PretrainConfig, model: ModelConfig, common: dict[str, Any], folder: Path) -> None:
    """A checkpoint may go on with other settings, but not with another network or other stages than those it has seen."""
    stored, now = common["model"], model.to_dict()
    for name, value in stored.items():
        if name not in LATER and value != now.get(name):
            raise UserError(
                f"{folder} was trained with {name} = {value}, the settings say {now.get(name)}: name another `out` for a new run."
            )
    names: Sequence[str] = [stage["name"] for stage in common["config"]["stages"]]
    mine = [stage.name for stage in config.stages]
    seen = common["position"]["stage"] + (common["position"]["step"] > 0)
    if mine[:seen] != list(names[:seen]):
        raise UserError(
            f"{folder} went through the stages {names[:seen]}, the settings begin with {mine[:seen]}: name another `out`."
        )
