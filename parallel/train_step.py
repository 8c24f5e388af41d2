"""The building blocks of a training step: model, optimizer, forward and backward over microbatches, update.

chunks = build_model(model_config, parallel_config, info, seed)
optimizer = build_optimizer(chunks, lr=1e-4)
result = forward_backward(chunks, microbatches, loss_function)
gradient_norm = update(optimizer, lr)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    Adam,  # type: ignore[attr-defined]
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from inference.config import ModelConfig
from inference.initial import InitialWeights
from inference.model import VideoARTransformer
from parallel.convert import load_reference
from parallel.cpu import cuda_redirected
from parallel.model import VideoARMegatron, unwrap
from parallel.setup import ParallelConfig, ProcessInfo, check_layout, data_group, pipeline_group
from tokenizer.errors import UserError
from tokenizer.sequence import SequenceLayout

log = logging.getLogger(__name__)


@dataclass
class Microbatch:
    """One forward pass's worth of clips, the same on all ranks that share a data-parallel rank (every stage needs its mask).

    Args:
        inputs, layout, text, text_lengths, frame_mask, drop_condition: see `VideoARMegatron.forward`.
        targets: whatever the loss function needs besides.
    """

    inputs: Tensor
    layout: SequenceLayout
    text: Tensor
    text_lengths: Tensor
    frame_mask: Tensor | None = None
    drop_condition: Tensor | None = None
    targets: Any = None

    def to(self, device: torch.device | str) -> Microbatch:
        """The same clips on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


LossFunction = Callable[[Tensor, Microbatch], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""(logits float32 [B, V, d], microbatch) -> (loss summed over clips, number of clips as int, further sums over clips to report)."""


@dataclass(frozen=True)
class StepResult:
    """Of one global batch, the same on every rank.

    Args:
        loss: mean over its clips.
        clips: how many.
        report: the loss function's further sums, each divided by the number of clips.
    """

    loss: float
    clips: int
    report: dict[str, float]


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    info: ProcessInfo,
    seed: int | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> list[DistributedDataParallel]:
    """This process's part of the network, wrapped for data parallelism: one chunk, or one for each virtual stage.

    Args:
        model: the network.
        parallel: its layout.
        info: what `parallel.setup.initialize` returned.
        seed: of random weights, the same on every layout; None leaves them empty for `load_reference` or a checkpoint.
        weights: to start from in their place, under the reference's names.

    Raises:
        UserError: heads, feed-forward or layers do not divide by the layout.
    """
    check_layout(model, parallel, info.world_size)
    virtual = [None] if parallel.virtual_stages is None else range(parallel.virtual_stages)
    with cuda_redirected():
        stages = [VideoARMegatron(model, parallel, stage).to(info.device) for stage in virtual]
        if weights is None and seed is not None:
            weights = InitialWeights(VideoARTransformer.shapes(model), model.num_layers, seed)
        if weights is not None:
            load_reference(stages, weights)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=parallel.overlaps,
            overlap_param_gather=parallel.overlaps,
        )
        chunks = [DistributedDataParallel(stage.config, ddp, stage) for stage in stages]
    for stage in stages:
        stage.config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlaps:  # the schedules read the first chunk's configuration
        waits: Any = [chunk.no_sync for chunk in chunks]
        stages[0].config.no_sync_func = waits if len(chunks) > 1 else waits[0]
    return chunks


def build_optimizer(
    chunks: Sequence[torch.nn.Module],
    lr: float,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    clip_grad: float = 1.0,
) -> MegatronOptimizer:
    """AdamW with float32 states sharded over the data-parallel ranks; only matrices decay.

    Args:
        chunks: of `build_model`, with their weights loaded.
        lr: the first learning rate; `update` sets it anew each step.
        weight_decay: of matrices and embedding tables; vectors (norms, biases, the start token) do not decay.
        betas: of the moments.
        eps: of the denominator.
        clip_grad: the global gradient norm is clipped to this; it must be above 0 for the norm to be measured.
    """
    if clip_grad <= 0:
        raise UserError(f"clip_grad is {clip_grad}: choose a norm above 0 (a large one, such as 1e9, never clips).")
    dtype = unwrap(chunks[0]).parallel.dtype
    config = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=0.0,
        weight_decay=weight_decay,
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        adam_eps=eps,
        clip_grad=clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=unwrap(chunks[0]).parallel.overlaps,
    )
    no_decay = ParamKey(predicate=ParamPredicate(name="no_matrix", fn=lambda parameter: parameter.dim() < 2))
    with cuda_redirected():
        optimizer = get_megatron_optimizer(
            config,
            list(chunks),  # type: ignore[arg-type]
            config_overrides={no_decay: ParamGroupOverride(wd_mult=0.0)},  # type: ignore[call-overload]
            use_gloo_process_groups=torch.cuda.is_available(),
        )
    # megatron takes Transformer Engine's fused AdamW, else Apex's, else torch's: whichever is installed
    log.info("optimizer: %s of %s", Adam.__name__, Adam.__module__.split(".")[0])
    return optimizer


def forward_backward(
    chunks: Sequence[torch.nn.Module],
    microbatches: Sequence[Microbatch],
    loss_function: LossFunction,
    training: bool = True,
) -> StepResult:
    """Loss and, in training, gradients of a global batch: the mean over all its clips on all ranks.

    Args:
        chunks: of `build_model`.
        microbatches: this data-parallel rank's part, on its device; all of one layout and number of clips.
        loss_function: called on the last pipeline stage.
        training: False computes the loss only.

    Raises:
        ValueError: the microbatches differ in layout or size, or their number does not fit an interleaved pipeline.
    """
    first = microbatches[0]
    if any(m.layout != first.layout or m.inputs.shape != first.inputs.shape for m in microbatches):
        raise ValueError("the microbatches of one step must have one layout and one number of clips")
    if len(microbatches) % (multiple := unwrap(chunks[0]).parallel.microbatch_multiple):
        raise ValueError(
            f"{len(microbatches)} microbatches are no multiple of the {multiple} interleaved pipeline stages"
        )

    def forward_step(iterator: Iterator[Microbatch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)
        output = chunk(
            batch.inputs, batch.layout, batch.text, batch.text_lengths, batch.frame_mask, batch.drop_condition
        )

        def loss(logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            total, clips, report = loss_function(logits, batch)
            clips = clips.to(torch.int)
            # all context-parallel ranks have the whole loss and their own tokens' gradients: one of them counts the clips
            counted = clips if counts else torch.zeros_like(clips)
            return total, counted, {"loss": total.detach(), "clips": clips, **report}

        return output, loss

    counts = parallel_state.get_context_parallel_rank() == 0
    for chunk in chunks:
        chunk.train(training)
        if training:
            chunk.zero_grad_buffer()  # type: ignore[operator]
    with cuda_redirected(), torch.set_grad_enabled(training):
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            # each virtual stage goes through the microbatches by itself
            data_iterator=iter(microbatches) if len(chunks) == 1 else [iter(microbatches) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(microbatches),
            seq_length=first.layout.length,
            micro_batch_size=first.inputs.shape[0],
            forward_only=not training,
        )
    return _reduce(reports, first.inputs.device)


def _reduce(reports: list[dict[str, Tensor]], device: torch.device) -> StepResult:
    """Sums the last stage's reports over microbatches and data-parallel ranks and tells every stage."""
    totals: dict[str, float] = {}
    if parallel_state.is_pipeline_last_stage():
        names = list(reports[0])
        values = torch.stack([sum(report[name].double() for report in reports) for name in names]).to(device)  # type: ignore[misc]
        if parallel_state.get_data_parallel_world_size() > 1:
            dist.all_reduce(values, group=data_group())
        totals = dict(zip(names, values.tolist()))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        box = [totals]
        dist.broadcast_object_list(
            box,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=pipeline_group(),
        )
        totals = box[0]
    clips = int(totals.pop("clips"))
    means = {name: value / max(clips, 1) for name, value in totals.items()}
    return StepResult(means.pop("loss"), clips, means)


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """The global norm of the gradients that `forward_backward` left, before clipping: the same on every rank; all must call it."""
    with cuda_redirected():
        optimizer.prepare_grads()
        return float(optimizer.get_grad_norm())


def apply_gradients(optimizer: MegatronOptimizer, lr: float, norm: float) -> None:
    """The second half of `update`: clips and takes the step. Who leaves it out has left weights and moments as they were.

    Args:
        optimizer: of `build_optimizer`.
        lr: this step's learning rate.
        norm: of `gradient_norm`.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        # megatron leaves this to its scheduler; a loaded checkpoint brings the old value, and the configuration decides
        group["weight_decay"] = optimizer.config.weight_decay * group["wd_mult"]
        # torch's own AdamW, where the others are missing: one pass over memory instead of some ten
        if "fused" in group:
            group["fused"] = True
    with cuda_redirected():
        # megatron's `step`, without the norm, which is known
        for one in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
            if parameters := one.get_parameters():
                decoupled = one.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                clip_grad_by_total_norm_fp32([*parameters], one.config.clip_grad, norm, decoupled)
        optimizer.step_with_ready_grads()
    for chunk in optimizer.model_chunks:  # type: ignore[attr-defined]
        for group in chunk.bucket_groups:
            # what `settle` may have gathered before this update is old now
            group.param_gather_dispatched = False


def update(optimizer: MegatronOptimizer, lr: float) -> float:
    """One AdamW step on the gradients that `forward_backward` left.

    Args:
        optimizer: of `build_optimizer`.
        lr: this step's learning rate.

    Returns:
        The gradient's global norm before clipping.
    """
    norm = gradient_norm(optimizer)
    apply_gradients(optimizer, lr, norm)
    return norm
