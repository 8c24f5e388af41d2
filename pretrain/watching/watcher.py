"""All that rank 0 does so that a run can be watched: logs, signs of life, samples, the best checkpoint. No step waits for any of it."""

from __future__ import annotations

import json
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parallel import checkpoint as checkpoints
from parallel.peak import device_peak
from parallel.setup import ProcessInfo
from pretrain.config import PretrainConfig
from pretrain.events import read_events, write_event
from pretrain.stages import Plan
from pretrain.watching.best import Best
from pretrain.watching.facts import write_facts
from pretrain.watching.ledger import Ledger, run_began
from pretrain.watching.meter import StepMeter
from pretrain.watching.sampler import Sampler
from pretrain.watching.samples import RESULT, sampled_steps
from pretrain.watching.tensorboard import choose_tensorboard
from tokenizer import settings
from tokenizer.metrics_log import MetricsLog


class Watcher:
    """One start of a run, from when its network is there until it ends.

    Args:
        config: the run.
        plan: its stages.
        info: this process, rank 0.
        finished: global steps that the run goes on from.
        ledger: where this process's time goes.
    """

    def __init__(self, config: PretrainConfig, plan: Plan, info: ProcessInfo, finished: int, ledger: Ledger):
        self.out, self.ledger, self.step = Path(config.out), ledger, finished
        self.out.mkdir(parents=True, exist_ok=True)
        self.tensorboard = choose_tensorboard(config.watch.tensorboard, self.out, finished)
        settings.save(config, self.out / "config.yaml")
        self.log = MetricsLog(self.out, finished, config.wandb, settings.to_dict(config))
        self.best = Best(self.out, config.watch, [stage.name for stage in config.stages])
        self.sampler = Sampler(self.out, config.samples, plan.model.parameter_count())
        self._at_end = False
        self._sampled: set[int] = set()  # steps whose samples have a line
        self._lines: dict[int, dict[str, Any]] = {}  # validations whose step may become a checkpoint
        peak, source = device_peak(info.device, config.parallel.dtype, config.watch.peak_flops)
        now = time.time()
        ledger.spend("starting")
        write_event(
            self.out, "start", finished, now, world_size=info.world_size, host=platform.node(),
            starting_seconds=round(ledger.seconds["starting"], 3),
        )  # fmt: skip
        began = run_began(read_events(self.out))
        assert began is not None  # the event has just been written
        self.meter = StepMeter(peak * info.world_size, began)
        write_facts(self.out, plan, info, began, peak, source)
        self._catch_up(finished)

    def stepped(self, global_step: int, seconds: float, waited: float, tokens: int, flops: float) -> None:
        """A step is done; see `StepMeter.add`."""
        self.meter.add(seconds, waited, tokens, flops)
        self.poll(global_step)

    def write(self, head: dict[str, Any], values: dict[str, Any], productive_seconds: float) -> None:
        """Logs the newest step, with the speed of all steps since the line before.

        Args:
            head: stage, step and global_step.
            values: of the step.
            productive_seconds: of the whole run.
        """
        self._write(head | values | self.meter.values(productive_seconds))

    def validated(self, head: dict[str, Any], values: dict[str, float]) -> None:
        """Logs a validation.

        Args:
            head: stage, step and global_step.
            values: what was measured, without the prefix.
        """
        line = head | {f"validation/{name}": value for name, value in values.items()}
        self._lines[head["global_step"]] = line
        self._write(line)

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is complete."""
        step = _step_of(checkpoint)
        write_event(self.out, "saved", step)
        with _tolerant(self.out):
            if line := self._lines.get(step):
                self.best.consider(checkpoint, line)
            self._sample(checkpoint)
        self._lines = {number: line for number, line in self._lines.items() if number > step}

    def spared(self) -> set[Path]:
        """Checkpoints that must stay though they are old: the best one, and the one that is being sampled."""
        return {folder.resolve() for folder in (self.best.folder(), self.sampler.checkpoint) if folder is not None}

    def poll(self, step: int) -> None:
        """Looks after the samples; called between two steps, of which `step` are finished."""
        self.step = step
        ended = self.sampler.ended()
        if ended is None:
            return
        done, problem = ended
        if problem is not None:
            write_event(self.out, "samples_failed", done, reason=problem)
        with _tolerant(self.out):
            self._log_samples()

    def rewind(self, finished: int) -> None:
        """The run has gone back to a checkpoint of so many global steps: what came after it has not happened."""
        self.log.rewind(finished)
        if self.tensorboard is not None:
            self.tensorboard.rewind(finished)
        self.meter.clear()
        if self.sampler.step > finished:
            self.sampler.stop()
        self._lines = {number: line for number, line in self._lines.items() if number <= finished}
        self._drop_samples(finished)

    def finishing(self, step: int) -> bool:
        """The run is at its end: whether its last set of samples is still being made. To be asked until it is not.

        Args:
            step: finished global steps.
        """
        self._spend_end()
        self.poll(step)
        newest = checkpoints.latest(self.out / "checkpoints")
        if self.sampler.checkpoint is None and newest is not None:
            self._sample(newest)  # one was in its way when it was due
        return self.sampler.checkpoint is not None

    def ended(self, finished: bool, step: int) -> None:
        """The process is about to end as it should; the last event says where its time went.

        Args:
            finished: whether all stages are done.
            step: finished global steps.
        """
        if finished:
            with _tolerant(self.out):
                self._log_samples()  # of those, too, that somebody else has made
        now = time.time()
        self._spend_end()
        write_event(self.out, "finished" if finished else "stopped", step, now, seconds=self.ledger.rounded())

    def _spend_end(self) -> None:
        self.ledger.spend("samples" if self._at_end else "saving")
        self._at_end = True

    def failed(self, reason: str) -> None:
        """The process is about to end with an error."""
        now = time.time()
        self.ledger.spend("other")
        write_event(self.out, "failed", self.step, now, reason=reason, seconds=self.ledger.rounded())

    def close(self) -> None:
        """Ends logs and sampler, whatever happened."""
        self.sampler.stop()
        self.log.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _write(self, line: dict[str, Any], late: int | None = None) -> None:
        self.log.write(line, late)
        if self.tensorboard is not None:
            self.tensorboard.write(line, line["global_step"])

    def _sample(self, checkpoint: Path) -> None:
        step = _step_of(checkpoint)
        if self.sampler.due(step) and (problem := self.sampler.start(checkpoint, step)):
            write_event(self.out, "samples_left_out", step, reason=problem)

    def _log_samples(self) -> None:
        """Logs the sets that no line tells of."""
        for step, folder in sampled_steps(self.out).items():
            if step in self._sampled:
                continue
            self._sampled.add(step)
            result = json.loads((folder / RESULT).read_text())
            scores = {f"samples/{name}": value for name, value in result["scores"].items()}
            line = {name: result[name] for name in ("stage", "step", "global_step")} | scores
            line["samples/seconds"] = result["seconds"]
            self._write(line, max(self.step, step))
            self.log.wandb.video("samples/videos", folder / "contact.mp4", max(self.step, step))
            checkpoint = self.out / "checkpoints" / result["checkpoint"]
            if checkpoint.is_dir():
                self.best.consider(checkpoint, line)

    def _drop_samples(self, finished: int) -> None:
        for step, folder in sampled_steps(self.out).items():
            if step > finished:
                shutil.rmtree(folder)
                self._sampled.discard(step)

    def _catch_up(self, finished: int) -> None:
        """What an earlier start had no time for: sets without a line, checkpoints that were not compared. Sets of lost steps go."""
        self._drop_samples(finished)
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        self._sampled |= {line["global_step"] for line in lines if "samples/seconds" in line}
        whole = {_step_of(folder): folder for folder in checkpoints.complete(self.out / "checkpoints")}
        for line in lines:
            if folder := whole.get(line["global_step"]):
                self.best.consider(folder, line)
        self._log_samples()
        if whole:
            self._sample(whole[max(whole)])


@contextmanager
def _tolerant(out: Path) -> Iterator[None]:
    """A full disk while this is done must not end a training, least of all on rank 0 alone; the next start catches up."""
    try:
        yield
    except OSError as error:
        print(f"WARNING: best checkpoint or samples of {out}: {error}", file=sys.stderr, flush=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
