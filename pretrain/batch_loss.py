"""Loss and gradients of a global batch on the parallel model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from data_pipelines.code_stream import CodeBatch
from inference.config import ModelConfig
from parallel.context import visible_keys
from parallel.setup import ParallelConfig, ProcessInfo
from parallel.train_step import Microbatch, StepResult, forward_backward
from pretrain.bitwise_loss import bitwise_loss
from pretrain.objective import ObjectiveConfig, prepare
from pretrain.planning.flops import count
from pretrain.stages import StagePlan, layout_for


def microbatches(
    batch: CodeBatch, stage: StagePlan, parallel: ParallelConfig, info: ProcessInfo, training: bool
) -> list[Microbatch]:
    """This rank's part of a global batch as the parallel model takes it.

    Args:
        batch: this rank's part.
        stage: objective, network and sizes.
        parallel, info: the network's layout, this process.
        training: with flips, frame masks and dropped conditions.
    """
    # as many microbatches of every source: with a token budget their clips differ in number
    share = stage.config.global_batch_size // info.data_parallel_size
    micro = len(batch) * stage.config.micro_batch_size // share
    batch = batch.to(info.device)
    parts = [batch.rows(start, start + micro) for start in range(0, len(batch), micro)]
    return [microbatch(part, stage.objective, stage.model, parallel, training) for part in parts]


def batch_loss(
    chunks: Sequence[DistributedDataParallel],
    parts: Sequence[Microbatch],
    stage: StagePlan,
    training: bool,
    factor: float = 1.0,
) -> StepResult:
    """Loss (and gradients, in training) of a global batch.

    Args:
        chunks: of `build_model`.
        parts: this rank's microbatches.
        stage: its objective's weights.
        training: with gradients.
        factor: what the loss is multiplied by: 1 but for a fault on purpose.
    """

    def loss(logits: Tensor, one: Microbatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total, clips, report = bitwise_loss(logits, one.targets, one.layout, stage.objective.token_weight)
        return total if factor == 1 else total * factor, clips, report

    return forward_backward(chunks, parts, loss, training)


def batch_flops(parts: Sequence[Microbatch], model: ModelConfig, info: ProcessInfo) -> float:
    """Model FLOPs of a training step on a global batch, as if the other ranks' clips were like this rank's `parts`."""
    pairs = [visible_keys(one.layout, one.text_lengths, one.frame_mask, model.window).sum() for one in parts]
    lengths = torch.cat([one.text_lengths for one in parts])
    return count(model, parts[0].layout, lengths, int(torch.stack(pairs).sum())).model * info.data_parallel_size


def microbatch(
    batch: CodeBatch, objective: ObjectiveConfig, model: ModelConfig, parallel: ParallelConfig, training: bool
) -> Microbatch:
    """Clips as the parallel model takes them."""
    layout = layout_for(model, batch.tokens.shape[1], batch.schedule.scales, parallel.sequence_multiple)
    ready = prepare(batch, objective, layout, training)
    return Microbatch(
        ready.inputs, layout, ready.text, ready.text_lengths, ready.frame_mask, ready.drop_condition, ready.targets
    )
