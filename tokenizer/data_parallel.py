"""Data parallelism of the tokenizer's training: ranks under torchrun, DDP or FSDP2, and states that fit any number of ranks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokenizer.device import check_device
from tokenizer.errors import UserError

Strategy = Literal["ddp", "fsdp2"]


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Args:
        rank, size: its number, and how many there are.
        device: its own.
    """

    rank: int
    size: int
    device: torch.device

    def share(self, batch_size: int) -> int:
        """Clips a rank of a batch.

        Raises:
            UserError: the batch does not divide.
        """
        if batch_size % self.size:
            near = max(1, round(batch_size / self.size)) * self.size
            raise UserError(
                f"a batch of {batch_size} clips does not divide among {self.size} processes: choose {near}, for example."
            )
        return batch_size // self.size


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Joins the processes that torchrun has started; alone without it.

    Args:
        device: "cpu" or "cuda", of which a process takes the one with its local number.
    """
    check_device(device)
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    mine = torch.device(device, local) if device == "cuda" else torch.device(device)
    if mine.type == "cuda":
        torch.cuda.set_device(mine)
    if size == 1 or dist.is_initialized():
        known = dist.is_initialized()
        yield Ranks(dist.get_rank() if known else 0, dist.get_world_size() if known else 1, mine)
        return
    dist.init_process_group("cuda:nccl,cpu:gloo" if mine.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), size, mine)
    finally:
        dist.destroy_process_group()


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, without a gradient; the tensor itself where there is one rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def wrap(module: nn.Module, ranks: Ranks, strategy: Strategy) -> nn.Module:
    """The module that trains on all ranks: gradients are means over them. Parameters keep their names in `full_state`.

    Args:
        module: on its device, with equal weights on all ranks.
        ranks: this process.
        strategy: "ddp" (each rank holds everything) or "fsdp2" (weights, gradients and moments are sharded).
    """
    if ranks.size == 1:
        return module
    if strategy == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        for parameter in module.parameters():
            parameter.data = parameter.data.contiguous()  # FSDP2 takes no other order of dimensions
        mesh = init_device_mesh(ranks.device.type, (ranks.size,))
        for child in module.modules():
            if getattr(child, "is_shard_unit", False):
                fully_shard(child, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(module, device_ids=[ranks.device] if ranks.device.type == "cuda" else None)


def unwrap(module: nn.Module) -> nn.Module:
    """What was wrapped."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def full(value: Tensor) -> Tensor:
    """A whole tensor from a sharded one; every rank must call it."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[operator]


def gather(texts: list[str]) -> list[str]:
    """The texts of all ranks; every rank must call it."""
    if not dist.is_initialized():
        return texts
    lists: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, texts)
    return list(itertools.chain.from_iterable(lists))


def reshard(module: nn.Module) -> None:
    """After a forward pass without a backward one FSDP2's root still holds its whole weights; this gives them back."""
    if hasattr(module, "reshard"):
        module.reshard()  # type: ignore[operator]


def full_state(state: Any, keep: bool = True) -> Any:
    """A copy of a state dictionary with whole tensors on the CPU; every rank must call it.

    Args:
        state: nested dictionaries and lists.
        keep: False on ranks that only help to gather: their result is of no use.
    """
    if isinstance(state, dict):
        return {key: full_state(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [full_state(value, keep) for value in state]
    if isinstance(state, Tensor):
        if not keep:
            full(state.detach())
            return None
        # contiguous memory fits any strategy
        return torch.empty(state.shape, dtype=state.dtype).copy_(full(state.detach()))
    return state


@torch.no_grad()
def load_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads whole tensors into a module whose own may be sharded."""
    mine = module.state_dict()
    if mine.keys() != state.keys():
        raise KeyError(f"{sorted(mine.keys() ^ state.keys())[:3]} are in one of the two only")
    for name, value in mine.items():
        value.copy_(like(state[name], value))


@torch.no_grad()
def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], peak: float) -> None:
    """Loads a whole optimizer state, as `full_state` gave it, into one whose parameters may be sharded.

    Args:
        optimizer, state: both of the same parameters.
        peak: the groups' "peak" learning rate from now on.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, moments in state["state"].items():
        for name, value in moments.items():
            if name != "step":
                moments[name] = like(value, parameters[number])
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["peak"] = peak


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor as `target` is: sharded like it, or whole and with its order of dimensions in memory."""
    if not hasattr(target, "device_mesh"):
        # the fused AdamW walks parameter and moments by their memory, whatever their strides
        return torch.empty_like(target, dtype=value.dtype).copy_(value)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)  # type: ignore[attr-defined]
