"""What each stage asks of a layout: for every shape of clips a microbatch's tokens, FLOPs, memory and time."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch

from inference.config import ModelConfig
from parallel.memory import Memory, estimate
from parallel.setup import ParallelConfig
from pretrain.config import PretrainConfig, StageConfig
from pretrain.planning.flops import Flops, count
from pretrain.planning.gpus import Gpu
from pretrain.planning.shapes import ExpectedDataset, Shapes
from pretrain.planning.step_time import StepTime, Work, step_time
from pretrain.stages import check_spread, clips_a_step
from tokenizer.errors import UserError
from tokenizer.sequence import SequenceLayout


@dataclass(frozen=True)
class Load:
    """Clips of one shape.

    Args:
        clips: their folder, shape and number.
        share: of the stage's steps.
        layout: their sequence.
        flops: of one clip's forward pass, without padding.
    """

    clips: ExpectedDataset
    share: float
    layout: SequenceLayout
    flops: Flops

    @property
    def tokens(self) -> int:
        """Video tokens of a clip."""
        return self.clips.num_frames * self.clips.schedule.tokens_per_frame


@dataclass(frozen=True)
class StageLoad:
    """One stage.

    Args:
        config: its settings.
        model: the network as it trains.
        loads: its shapes.
        ema: whether a running mean of the weights is kept.
    """

    config: StageConfig
    model: ModelConfig
    loads: tuple[Load, ...]
    ema: bool

    def with_micro_batch(self, size: int) -> StageConfig | None:
        """The stage with another micro batch, and as many tokens more or fewer in each; None where its steps would differ too much."""
        if size == self.config.micro_batch_size:
            return self.config
        budget = self.config.token_budget
        if budget is not None:
            budget = max(1, round(budget * size / self.config.micro_batch_size))
        stage = replace(self.config, micro_batch_size=size, token_budget=budget)
        try:
            check_spread(stage, [load.clips for load in self.loads])
        except UserError:
            return None
        return stage

    def clips(self, load: Load, stage: StageConfig) -> int:
        """Of a step on one shape."""
        return clips_a_step(stage, load.clips)

    def mean(self, values: list[float]) -> float:
        """Over the stage's steps, of one value a shape."""
        return sum(load.share * value for load, value in zip(self.loads, values))

    def tokens_a_step(self, stage: StageConfig) -> float:
        """Video tokens, on average."""
        return self.mean([self.clips(load, stage) * load.tokens for load in self.loads])

    def flops_a_step(self, stage: StageConfig) -> float:
        """Model FLOPs, on average."""
        return self.mean([self.clips(load, stage) * load.flops.model for load in self.loads])

    def time(self, parallel: ParallelConfig, world: int, stage: StageConfig, gpu: Gpu) -> StepTime:
        """Of a step, on average."""
        ranks = world // (
            parallel.tensor_parallel_size * parallel.context_parallel_size * parallel.pipeline_parallel_size
        )
        microbatches = stage.global_batch_size // stage.micro_batch_size // ranks
        times = []
        for load in self.loads:
            clips = self.clips(load, stage) * stage.micro_batch_size // stage.global_batch_size
            length = replace(load.layout, multiple=parallel.sequence_multiple).length
            padded = clips * length / load.layout.length
            flops = Flops(*(padded * getattr(load.flops, field.name) for field in fields(Flops)))
            times.append(step_time(Work(self.model, clips * length, flops), parallel, world, microbatches, gpu))
        return StepTime(*(self.mean([getattr(one, field.name) for one in times]) for field in fields(StepTime)))

    def memory(self, parallel: ParallelConfig, world: int, stage: StageConfig) -> Memory:
        """Of the shape that takes the most."""
        ranks = world // (
            parallel.tensor_parallel_size * parallel.context_parallel_size * parallel.pipeline_parallel_size
        )
        microbatches = stage.global_batch_size // stage.micro_batch_size // ranks

        def of(load: Load) -> Memory:
            clips = self.clips(load, stage) * stage.micro_batch_size // stage.global_batch_size
            return estimate(self.model, parallel, world, load.layout, clips, microbatches, ema=self.ema)

        # memory grows with the tokens of a microbatch
        tokens = [self.clips(load, stage) * load.layout.length for load in self.loads]
        return max(
            (of(load) for load, number in zip(self.loads, tokens) if number >= 0.85 * max(tokens)),
            key=lambda one: one.total,
        )


def stage_loads(run: PretrainConfig, shapes: Shapes) -> list[StageLoad]:
    """All stages of a run."""
    network, found = shapes.plan.model, []
    text = 1 if network.num_classes else min(run.expected.text_tokens, network.max_text_length)
    for stage in shapes.plan.stages:
        model = stage.model
        whole = sum(source.proportion for source in stage.sources)
        loads = []
        for source, manifest in zip(stage.sources, stage.manifests):
            clips = ExpectedDataset(source.path, manifest, source.bucket or 0, source.num_latent_frames)
            layout = model.layout(clips.num_frames, clips.schedule)
            loads.append(Load(clips, source.proportion / whole, layout, _flops(model, layout, text)))
        found.append(StageLoad(stage.config, model, tuple(loads), run.optimizer.ema_decay > 0))
    return found


@lru_cache(maxsize=64)
def _flops(model: ModelConfig, layout: SequenceLayout, text: int) -> Flops:
    return count(model, layout, torch.tensor([text]))
