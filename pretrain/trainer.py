"""The network and its optimizer, and how they go through a stage: step, log, validation, checkpoint."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_pipelines.code_stream import CodeBatch, CodeStream
from parallel import checkpoint
from parallel.ema import Ema
from parallel.integrity import newest_sound
from parallel.model import unwrap
from parallel.saving import SaveError, Saver
from parallel.setup import ProcessInfo
from parallel.train_step import (
    StepResult,
    apply_gradients,
    build_model,
    build_optimizer,
    gradient_norm,
)
from pretrain.batch_loss import batch_flops, batch_loss, microbatches
from pretrain.config import PretrainConfig
from pretrain.events import read_events, write_event
from pretrain.faults import Faults
from pretrain.sample_log import SampleLog
from pretrain.schedule import learning_rate
from pretrain.skips import EVENT, Skip, Skips
from pretrain.spikes import Spikes
from pretrain.stages import Plan, StagePlan
from pretrain.start import Position, check_same_run, exported_weights
from pretrain.watchdog import Watchdog
from pretrain.watching.ledger import Ledger
from pretrain.watching.watcher import Watcher
from tokenizer import settings
from tokenizer.errors import UserError
from tokenizer.progress import Meter
from tokenizer.stop import StopFlag

SIGNAL_DELAY = 1.0
"""Seconds that a signal to this process may come later than one to the processes that it has started."""


class BadStep(Exception):
    """A step that must not be taken; all ranks raise it alike.

    Args:
        reason: why.
        lr: its learning rate.
    """

    def __init__(self, reason: str, lr: float):
        super().__init__(reason)
        self.reason, self.lr = reason, lr


class Trainer:
    """The network and its optimizer, and how they go through a stage.

    Args:
        config: the run.
        plan: its stages.
        info: this process.
        stop: set by signals.
        watchdog: is told of all progress.
        ledger: where its time goes.
    """

    def __init__(
        self, config: PretrainConfig, plan: Plan, info: ProcessInfo, stop: StopFlag, watchdog: Watchdog, ledger: Ledger
    ):
        self.config, self.plan, self.info, self.stop = config, plan, info, stop
        self.watchdog, self.ledger = watchdog, ledger
        optimizer, resilience = config.optimizer, config.resilience
        self.out = Path(config.out)
        self.checkpoints = self.out / "checkpoints"
        self.newest, self.damaged = newest_sound(self.checkpoints)  # where this start goes on from
        start = None if self.newest or config.from_export is None else exported_weights(config.from_export, plan)
        self.chunks = build_model(plan.model, config.parallel, info, None if self.newest else config.seed, start)
        self.optimizer = build_optimizer(
            self.chunks, optimizer.lr, optimizer.weight_decay, optimizer.betas, optimizer.eps, optimizer.clip_grad
        )
        self.ema = Ema(self.chunks, optimizer.ema_decay) if optimizer.ema_decay else None
        self.saver = Saver(self.checkpoints, config.keep)
        self.spikes = Spikes(resilience.spike_factor, resilience.spike_window)
        self.skips = Skips()
        # from rank 0: all ranks must leave out the same batches
        events = [read_events(self.out)]
        dist.broadcast_object_list(events, src=0)
        self.history = events[0]
        self.faults = Faults(info.rank, self.out, self.history)
        self.watcher: Watcher | None = None
        self.flops = 0.0  # model FLOPs of the newest global batch, where they are watched
        self.samples: SampleLog | None = None

    def restore(self) -> Position:
        """Loads the newest sound checkpoint, if there is one."""
        self.skips.read((), self.history)
        position = Position() if self.newest is None else self._load(self.newest)
        self._tell_damaged(self.damaged, position.global_step)
        return position

    def watch_with(self, watcher: Watcher) -> None:
        """On rank 0: everything is told to `watcher` from now on."""
        self.watcher = watcher
        self.saver.spared, self.saver.completed = watcher.spared, watcher.saved

    def run_stage(self, stage: StagePlan, position: Position) -> Position:
        """Trains from `position` to the stage's end, or until a stop is asked for; the returned position is saved.

        After a rollback it returns the position that it rolled back to, which may be in an earlier stage.
        """
        config, steps = self.config, stage.config.steps
        stream = stage.stream(config, self.info.data_parallel_rank, self.info.data_parallel_size)
        if position.stream is not None:
            stream.load_state_dict(position.stream)
        self.spikes.load_state_dict(position.spikes)
        for chunk in self.chunks:
            unwrap(chunk).model_config = stage.model
        step, productive = position.step, position.productive_seconds
        offset = position.global_step - step  # of the stages before
        label = f"pretrain {stage.config.name} ({stage.index + 1}/{len(self.plan.stages)})"
        with Meter(label, steps, done=step) if self.info.rank == 0 else nullcontext() as meter:
            while step < steps:
                self.ledger.spend("other")
                self.watchdog.beat("beginning a step", offset + step)
                self.faults.strike(offset + step + 1)
                batch = self._next_batch(stage, stream)
                waited = self.ledger.spend("steps")
                try:
                    values = self._step(stage, batch, step, offset + step)
                except BadStep as bad:
                    self.ledger.leave_out(waited + self.ledger.spend("steps"))
                    back = self._leave_out(stage, stream, bad, offset + step)
                    if back is not None:
                        stream.close()
                        return back
                    if self.stop.stopping:
                        position = self._position(stage, step, offset + step, stream, productive)
                        self._save(position, stage, last=True)
                        break
                    continue
                seconds = waited + self.ledger.spend("steps")
                productive += seconds
                step += 1
                if self.watcher is not None:
                    self.watcher.stepped(offset + step, seconds, waited, values["tokens"], self.flops)
                stopping, ends = self.stop.stopping, step == steps
                if self.samples is not None:
                    self.samples.write(_head(stage, step, offset + step), stream.source_of(batch), batch)
                self._poll()
                if meter is not None:
                    meter.advance(1, f"loss {values['loss']:.4f}, bits {100 * values['bit_accuracy']:.1f}%")
                if self.watcher is not None and (ends or stopping or step % config.log_every == 0):
                    self.watcher.write(_head(stage, step, offset + step), values, productive)
                if config.validate_every and (ends or step % config.validate_every == 0):
                    self._validate(stage, step, offset + step)
                position = self._position(stage, step, offset + step, stream, productive)
                if ends or stopping or step % config.checkpoint_every == 0:
                    self._save(position, stage, last=stopping or position.stage == config.stages_to_go)
                if stopping:
                    break
        stream.close()
        return position

    def wait_for_samples(self, global_step: int) -> None:
        """The run is at its end: until its last set of samples is made, or a signal comes.

        All ranks wait: launchers end what has not ended some minutes after the first process.
        """
        while True:
            self.watchdog.beat("waiting for the last samples", global_step)
            _, waiting = self.stop.agreed_with(self.watcher is not None and self.watcher.finishing(global_step))
            if self.stop.stopping or not waiting:
                return
            time.sleep(0.2)

    def _position(
        self, stage: StagePlan, step: int, global_step: int, stream: CodeStream, productive: float
    ) -> Position:
        common = {"skips": self.skips.to_list(), "productive_seconds": productive}
        if step == stage.config.steps:
            return Position(stage.index + 1, 0, global_step, **common)
        spikes = self.spikes.state_dict()
        return Position(stage.index, step, global_step, stream.state_dict(), stream.step, spikes=spikes, **common)

    def _next_batch(self, stage: StagePlan, stream: CodeStream) -> CodeBatch:
        """The next batch that is not left out."""
        while True:
            self.watchdog.beat("waiting for data")
            number = stream.step
            try:
                batch = next(stream)
            except UserError:
                # a scheduler that ends a job sends its signal to the processes that read data, too, which die of it, maybe first
                if not self.stop.requested:
                    time.sleep(SIGNAL_DELAY)
                if not self.stop.requested:
                    raise
                batch = next(stream)  # by new ones: the step under way is finished
            if not self.skips.covers(stage.index, number):
                return batch

    def _step(self, stage: StagePlan, batch: CodeBatch, step: int, global_step: int) -> dict[str, Any]:
        """One optimizer step; what is logged of it.

        Raises:
            BadStep: it is not taken: weights, moments and running means are as they were.
        """
        optimizer = self.config.optimizer
        lr = learning_rate(
            step,
            stage.config.steps,
            optimizer.lr if stage.config.lr is None else stage.config.lr,
            optimizer.warmup_steps if stage.config.warmup_steps is None else stage.config.warmup_steps,
            optimizer.min_lr_ratio,
        )
        result, tokens = self._loss(stage, batch, training=True, factor=self.faults.loss_factor(global_step + 1))
        norm = gradient_norm(self.optimizer)
        reason = self.spikes.reason(result.loss, norm)
        # loss and norm are the same on all ranks, unless one of them computes wrongly
        _, bad = self.stop.agreed_with(reason is not None)
        if bad:
            reason = reason or f"loss {result.loss} and gradient norm {norm} are bad on another process"
            raise BadStep(reason, lr)
        self.spikes.add(result.loss, norm)
        apply_gradients(self.optimizer, lr, norm)
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

    def _leave_out(self, stage: StagePlan, stream: CodeStream, bad: BadStep, global_step: int) -> Position | None:
        """Notes that the batch just read is left out, or with a rollback all since the newest checkpoint, whose position is returned.

        Raises:
            UserError: the settings say stop, or there were too many.
        """
        resilience, last = self.config.resilience, stream.step - 1
        count = self.skips.count(stage.index)
        if resilience.on_bad_step == "stop" or count >= resilience.max_bad_steps:
            self._finish_save()
            before = f", after {count} such steps that were left out (resilience.max_bad_steps)" if count else ""
            raise UserError(
                f"step {global_step + 1} of {self.config.out}: {bad.reason}: lower the learning rate (now {bad.lr:.2e}) and go on from "
                f"{checkpoint.latest(self.checkpoints) or 'the start'}, or set resilience.on_bad_step{before}."
            )
        newest = None
        if resilience.on_bad_step == "rollback":
            self._finish_save()
            newest, damaged = newest_sound(self.checkpoints)
            self._tell_damaged(damaged, global_step)
        action, first = "skip", last
        if newest is not None:
            action, target = "rollback", Position.of(checkpoint.load_common(newest))
            first = target.batches if target.stage == stage.index else 0
        skip = Skip(stage.index, first, last, global_step, action, bad.reason)
        self.skips.add(skip)
        text = f"step {global_step + 1}: {bad.reason}; {action}: batches {first} to {last} of the stage's data are left out"
        self._tell(EVENT, text, **asdict(skip))
        if newest is None:
            return None
        position = self._load(newest)
        for each in (self.watcher, self.samples):
            if each is not None:
                each.rewind(position.global_step)
        return position

    def _load(self, folder: Path) -> Position:
        self.watchdog.beat("loading")
        common = checkpoint.load_common(folder)
        check_same_run(self.config, self.plan.model, common, folder)
        checkpoint.load(folder, self.chunks, self.optimizer, self.ema)
        position = Position.of(common)
        self.skips.read(position.skips, ())
        return position

    def _tell(self, event: str, text: str, **details: Any) -> None:
        """On rank 0: a warning in the log and an event, with its details."""
        if self.info.rank == 0:
            print(f"WARNING: {text} ({self.out})", file=sys.stderr, flush=True)
            write_event(self.out, event, **details)

    def _tell_damaged(self, damaged: list[tuple[Path, str]], global_step: int) -> None:
        for folder, reason in damaged:
            text = f"a checkpoint is damaged ({reason}), put aside as {folder.name}, and the one before is taken"
            self._tell("damaged_checkpoint", text, global_step=global_step, folder=folder.name, reason=reason)

    def _validate(self, stage: StagePlan, step: int, global_step: int) -> None:
        stream = stage.validation_stream(self.config, self.info.data_parallel_rank, self.info.data_parallel_size)
        if stream is None:
            return
        self.ledger.spend("other")
        whole = max(1, len(stream.datasets[0]) // stream.batch_sizes[0])
        count = min(self.config.validation_batches, whole)
        totals: dict[str, float] = {}
        with self.ema.applied() if self.ema else nullcontext():
            for _ in range(count):
                result, _ = self._loss(stage, next(stream), training=False)
                for name, value in {"loss": result.loss, **result.report}.items():
                    totals[name] = totals.get(name, 0.0) + value / count
        if self.watcher is not None:
            self.watcher.validated(_head(stage, step, global_step), totals)
        self.ledger.spend("validation")

    def _loss(self, stage: StagePlan, batch: CodeBatch, training: bool, factor: float = 1.0) -> tuple[StepResult, int]:
        self.watchdog.beat("computing" if training else "validating")
        parts = microbatches(batch, stage, self.config.parallel, self.info, training)
        result = batch_loss(self.chunks, parts, stage, training, factor)
        if training and self.watcher is not None:
            self.flops = batch_flops(parts, stage.model, self.info)
        return result, result.clips * batch.tokens.shape[1] * batch.tokens.shape[2]

    def _save(self, position: Position, stage: StagePlan, last: bool = False) -> None:
        """Saves a position; one that can't be written is warned of, and the training goes on.

        Raises:
            UserError: it is the last save of this process, and the last try has failed, too.
        """
        # each process has a clock of its own, and what is common is the same on all
        seconds = [position.productive_seconds]
        dist.broadcast_object_list(seconds, src=0)
        common = {
            "position": vars(position) | {"productive_seconds": seconds[0]},
            "model": stage.model.to_dict(),
            "export": self.plan.export_info(stage.index),
            "tokenizer": self.plan.tokenizer,
            "config": settings.to_dict(self.config),
        }
        self.ledger.spend("other")
        self.watchdog.beat("saving")
        self._finish_save()
        background = self.config.save_in_background and not last
        tries = self.config.resilience.save_tries if last else 1
        for number in range(1, tries + 1):
            try:
                self.saver.save(position.global_step, self.chunks, self.optimizer, common, self.ema, background)
                self.ledger.spend("saving")
                return
            except SaveError as error:
                self._save_failed(error)
                self.watchdog.beat("saving again")
                if last and number == tries:
                    raise
                if last:
                    time.sleep(self.config.resilience.save_pause)

    def _poll(self) -> None:
        """Completes the checkpoint that is being written, if it is written by now."""
        self.ledger.spend("other")
        try:
            self.saver.poll()
        except SaveError as error:
            self._save_failed(error)
        self.ledger.spend("saving")

    def _finish_save(self) -> None:
        """Waits for the checkpoint that is being written."""
        try:
            self.saver.wait()
        except SaveError as error:
            self._save_failed(error)

    def _save_failed(self, error: SaveError) -> None:
        self._tell("save_failed", f"WITHOUT A CHECKPOINT: {error}", global_step=error.step, reason=str(error))


def _head(stage: StagePlan, step: int, global_step: int) -> dict[str, Any]:
    return {"stage": stage.config.name, "step": step, "global_step": global_step}
