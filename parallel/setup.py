"""Processes and their layout: which ranks share a layer (tensor), a sequence (context), the depth (pipeline) and the batch (data)."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.distributed as dist
import torch.utils.deterministic as deterministic
from megatron.core import parallel_state, tensor_parallel

from inference.config import ModelConfig
from parallel.cpu import cuda_redirected
from tokenizer.errors import UserError, check_each
from tokenizer.precision import Precision, uses_bfloat16


@dataclass(frozen=True)
class ParallelConfig:
    """How the network is spread over processes, and in which precision it computes.

    Args:
        tensor_parallel_size: processes that share each layer's matrices.
        pipeline_parallel_size: stages that share the depth.
        context_parallel_size: processes that share each clip's tokens, in equal numbers and with about as many visible keys.
        virtual_pipeline_size: pieces of the depth that each stage holds, taking turns (interleaved 1F1B): smaller bubbles, more messages.
        sequence_parallel: the tensor-parallel ranks also share the tokens outside the matrices (no effect at tensor parallel 1).
        precision: of parameters and activations, "auto" is bfloat16 where the device computes in it; the optimizer's copies,
            gradients and logits are float32 always.
        recompute: "full" keeps only each layer's input and computes the rest again in the backward pass; "selective" does so with
            the feed-forward networks, whose activations are most of a layer's (attention keeps no scores with any back end).
        fp8: matrix products in FP8 (E4M3 forward, E5M2 for gradients) by Transformer Engine: "delayed" scales by the largest values of the
            last 1,024 steps, "current" by those at hand; weights, gradients and norms stay as `precision` says, which must be bfloat16.
        overlap: gradients are reduced during the backward pass and parameters gathered during the next forward pass, among data-parallel
            ranks; "auto" does so on GPUs. With `optimizer.ema_decay` the gathering is waited for.
        deterministic: two runs of one layout give the same bits: only kernels that always add up in the same order.
        transformer_engine: "auto" takes Transformer Engine's layers where they are installed and a GPU is there; "on" demands them.
        attention: "frames" (frame by frame), "sdpa" (dense mask), "flex" (FlexAttention, GPU), or "auto": flex on a GPU, else frames.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    virtual_pipeline_size: int = 1
    context_parallel_size: int = 1
    sequence_parallel: bool = True
    precision: Precision = "float32"
    recompute: Literal["none", "selective", "full"] = "none"
    fp8: Literal["none", "delayed", "current"] = "none"
    overlap: Literal["auto", "on", "off"] = "auto"
    deterministic: bool = False
    transformer_engine: Literal["auto", "on", "off"] = "auto"
    attention: Literal["auto", "frames", "sdpa", "flex"] = "auto"

    @property
    def shares_sequence(self) -> bool:
        """Whether sequence parallelism is really on."""
        return self.sequence_parallel and self.tensor_parallel_size > 1

    @property
    def virtual_stages(self) -> int | None:
        """megatron's name for `virtual_pipeline_size`, None without interleaving."""
        return self.virtual_pipeline_size if self.virtual_pipeline_size > 1 else None

    @property
    def overlaps(self) -> bool:
        """Whether messages between data-parallel ranks overlap with computing on this machine."""
        return self.overlap == "on" or (self.overlap == "auto" and torch.cuda.is_available())

    @property
    def microbatch_multiple(self) -> int:
        """What the number of microbatches of a step must be a multiple of."""
        return self.pipeline_parallel_size if self.virtual_pipeline_size > 1 else 1

    @property
    def sequence_multiple(self) -> int:
        """What a sequence's length must be a multiple of: pass it to `ModelConfig.layout(multiple=...)`."""
        ranks = self.context_parallel_size * (self.tensor_parallel_size if self.shares_sequence else 1)
        # FP8 products want every dimension to be a multiple of 16
        return ranks if self.fp8 == "none" else 16 * ranks

    @property
    def dtype(self) -> torch.dtype:
        """The precision of parameters and activations on this machine."""
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.bfloat16 if uses_bfloat16(self.precision, device_type) else torch.float32


@dataclass(frozen=True)
class ProcessInfo:
    """Where this process stands.

    Args:
        rank, world_size: among all processes.
        data_parallel_rank, data_parallel_size: which part of the global batch this process reads, of how many.
        tensor_parallel_rank, pipeline_parallel_rank: its part of a layer, its stage.
        is_last_stage: whether it computes the loss.
        device: where its tensors live.
        first_of_its_clips: whether it is the one to speak for all processes that share its part of the batch.
    """

    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int
    tensor_parallel_rank: int
    pipeline_parallel_rank: int
    is_last_stage: bool
    device: torch.device
    first_of_its_clips: bool = True


def check_layout(model: ModelConfig, parallel: ParallelConfig, world_size: int) -> None:
    """Raises UserError, with the nearest sizes that work, if the network does not divide over the processes."""
    check_processes(parallel, world_size)
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    for what, value, size, name in (
        ("num_attention_heads", model.num_attention_heads, tensor, "tensor_parallel_size"),
        ("ffn_hidden_size", model.feed_forward_size, tensor, "tensor_parallel_size"),
        ("num_layers", model.num_layers, pipeline, "pipeline_parallel_size"),
    ):
        if value % size:
            works = max(divisor for divisor in range(1, size) if value % divisor == 0)
            raise UserError(
                f"{what} {value} does not divide by {name} {size}: choose {name} {works} or {what} {_neighbours(value, size)}."
            )
    for what, value in (("hidden_size", model.hidden_size), ("ffn_hidden_size", model.feed_forward_size)):
        if parallel.fp8 != "none" and value % (16 * tensor):
            raise UserError(
                f"{what} {value} is no multiple of 16 x tensor_parallel_size {tensor}, which fp8: {parallel.fp8} needs: choose "
                f"{_neighbours(value, 16 * tensor)}."
            )
    virtual = parallel.virtual_pipeline_size
    if model.num_layers % (pipeline * virtual):
        works = max(size for size in range(1, virtual) if model.num_layers % (pipeline * size) == 0)
        raise UserError(
            f"num_layers {model.num_layers} does not divide by pipeline_parallel_size {pipeline} x virtual_pipeline_size {virtual}: choose "
            f"virtual_pipeline_size {works} or num_layers {_neighbours(model.num_layers, pipeline * virtual)}."
        )


def check_processes(parallel: ParallelConfig, world_size: int) -> None:
    """Raises UserError, with the nearest numbers that work, if so many processes do not divide by the layout."""
    tensor, pipeline, context = (
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.context_parallel_size,
    )
    check_each(
        parallel,
        ("tensor_parallel_size", "pipeline_parallel_size", "virtual_pipeline_size", "context_parallel_size"),
        lambda value: value >= 1,
        "be at least 1",
    )
    if parallel.virtual_pipeline_size > 1 and pipeline == 1:
        raise UserError(
            f"virtual_pipeline_size {parallel.virtual_pipeline_size} needs a pipeline: set pipeline_parallel_size to 2 or more, "
            "or virtual_pipeline_size to 1."
        )
    together = tensor * pipeline * context
    if world_size % together:
        raise UserError(
            f"{world_size} processes do not divide into groups of {together} (tensor parallel {tensor} x pipeline parallel "
            f"{pipeline} x context parallel {context}): start {_neighbours(world_size, together)} processes or change these sizes."
        )


def _neighbours(value: int, multiple: int) -> str:
    below = value // multiple * multiple
    return f"{below} or {below + multiple}" if below else str(multiple)


def initialize(parallel: ParallelConfig, seed: int, timeout_minutes: float = 30.0) -> ProcessInfo:
    """Joins the processes that torchrun started (or makes a group of one) and lays the parallel groups over them.

    NCCL carries GPU tensors; gloo carries CPU tensors, and everything where there is no GPU.

    Args:
        parallel: the layout.
        seed: of megatron's generators (nothing in this network draws from them; recomputation saves and restores them).
        timeout_minutes: after which a collective that misses a process fails.

    Raises:
        UserError: the processes do not divide by the layout.
    """
    make_deterministic(parallel.deterministic)
    has_cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if has_cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if has_cuda else "gloo"
        timeout = datetime.timedelta(minutes=timeout_minutes)
        if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    world_size = dist.get_world_size()
    try:
        check_processes(parallel, world_size)
    except UserError:
        dist.destroy_process_group()
        raise
    with cuda_redirected():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_stages,
            context_parallel_size=parallel.context_parallel_size,
            # gloo groups beside gloo groups would only be copies
            create_gloo_process_groups=has_cuda,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return ProcessInfo(
        rank=dist.get_rank(),
        world_size=world_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_parallel_rank=parallel_state.get_pipeline_model_parallel_rank(),
        is_last_stage=parallel_state.is_pipeline_last_stage(),
        device=device,
        first_of_its_clips=not any(
            (
                parallel_state.get_tensor_model_parallel_rank(),
                parallel_state.get_pipeline_model_parallel_rank(),
                parallel_state.get_context_parallel_rank(),
            )
        ),
    )


def make_deterministic(wanted: bool) -> None:
    """Turns the switch for this process; it must be turned before the first tensor is on the GPU."""
    if wanted:
        # read by cuBLAS and Transformer Engine at their start
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.deterministic = wanted
    # only tells apart code that reads memory before writing it, at the price of a pass over each new tensor
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def tensor_group() -> dist.ProcessGroup:
    """The processes that share this one's layers."""
    return cast(dist.ProcessGroup, parallel_state.get_tensor_model_parallel_group())


def context_group() -> dist.ProcessGroup:
    """The processes that share this one's sequences."""
    return cast(dist.ProcessGroup, parallel_state.get_context_parallel_group())


def pipeline_group() -> dist.ProcessGroup:
    """The stages that this process's microbatches pass through."""
    return cast(dist.ProcessGroup, parallel_state.get_pipeline_model_parallel_group())


def data_group() -> dist.ProcessGroup:
    """The processes that hold the same weights and read other clips."""
    return cast(dist.ProcessGroup, parallel_state.get_data_parallel_group())


def destroy() -> None:
    """Leaves the groups; a later `initialize` may lay others."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
