"""megatron-core without CUDA: the one place where its CUDA assumptions are redirected to the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import layers, mappings
from megatron.core.tensor_parallel import random as megatron_random
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def _get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


class _Exchange:
    """The handle of two ranks' messages to each other.

    Args:
        send, receive: tensors of one shape; both must stay as they are until `wait` is over.
        group: the two ranks.
        finish: what is left to do when they are there.
        async_op: whether the caller waits later; megatron computes in between.
    """

    def __init__(
        self, send: Tensor, receive: Tensor, group: dist.ProcessGroup, finish: Callable[[], Any], async_op: bool
    ):
        peer = dist.get_global_rank(group, 1 - group.rank())
        self._sent = send.contiguous()  # kept until it is away
        self._works = [dist.isend(self._sent, peer, group=group), dist.irecv(receive, peer, group=group)]
        self._finish = finish
        if not async_op:
            self.wait()

    def wait(self) -> None:
        """Returns when `receive` is complete."""
        for work in self._works:
            if work is not None:
                work.wait()
        self._finish()


def _all_gather(output: Tensor, input: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> Any:
    """Between two CPU ranks an exchange of halves takes less than half of the time of gloo's collective."""
    if group.size() != 2:
        return dist.all_gather_into_tensor(output, input, group=group, async_op=async_op)
    mine, other = (output.chunk(2)[rank] for rank in (group.rank(), 1 - group.rank()))
    return _Exchange(input, other, group, lambda: mine.copy_(input), async_op)


def _reduce_scatter(output: Tensor, input: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> Any:
    """As `_all_gather`."""
    if group.size() != 2:
        return dist.reduce_scatter_tensor(output, input, group=group, async_op=async_op)
    mine, other = (input.chunk(2)[rank] for rank in (group.rank(), 1 - group.rank()))
    return _Exchange(other, output, group, lambda: output.add_(mine), async_op)


class _Done:
    """The handle of messages that nobody had to send."""

    def wait(self) -> None:
        """There is nothing to wait for."""


def _unless_alone(send: Callable[..., Any]) -> Callable[..., Any]:
    """A collective that does nothing within one rank, in place: gloo would copy all gradients and parameters onto themselves."""

    def message(output: Tensor, input: Tensor, *args: Any, group: dist.ProcessGroup, **kwargs: Any) -> Any:
        if group.size() > 1 or output.data_ptr() != input.data_ptr():
            return send(output, input, *args, group=group, **kwargs)
        return _Done()

    return message


def _coalescing(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
    """torch's manager can't close over no message."""
    return dist._coalescing_manager(group, *args, **kwargs) if group.size() > 1 else contextlib.nullcontext(_Done())


def _scale(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    """megatron's `multi_tensor_scale`, within the tensors' own memory."""
    for source, target in zip(*lists):
        torch.mul(source, factor, out=target)


class _WeightGradient:
    """What Apex's extension of this name does on GPUs: a weight's gradient goes straight into its float32 accumulator."""

    @staticmethod
    def wgrad_gemm_accum_fp32(input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """main_grad [out, in] += grad_output' [out, n] @ input [n, in]."""
        if input.dtype == main_grad.dtype:
            main_grad.addmm_(grad_output.t(), input)
        else:
            main_grad.add_(grad_output.t() @ input)


_MISSING = object()
# (owner, attribute, replacement)
_REDIRECTIONS: tuple[tuple[Any, str, Any], ...] = (
    (torch.cuda, "current_device", lambda: CPU),
    (torch.cuda, "synchronize", lambda *args, **kwargs: None),
    (torch.cuda, "is_current_stream_capturing", lambda: False),
    (torch.cuda, "manual_seed", torch.manual_seed),
    (torch.cuda, "get_rng_state", _get_state),
    (torch.cuda, "set_rng_state", _set_state),
    (megatron_random, "_get_cuda_rng_state", _get_state),
    (megatron_random, "_set_cuda_rng_state", _set_state),
    (layers, "fused_weight_gradient_mlp_cuda", _WeightGradient),
    (layers, "_grad_accum_fusion_available", True),
    (layers, "dist_all_gather_func", _all_gather),
    (layers, "dist_reduce_scatter_func", _reduce_scatter),
    (param_and_grad_buffer, "dist_all_gather_func", _unless_alone(dist.all_gather_into_tensor)),
    (param_and_grad_buffer, "dist_reduce_scatter_func", _unless_alone(dist.reduce_scatter_tensor)),
    (param_and_grad_buffer, "_coalescing_manager", _coalescing),
    (clip_grads, "multi_tensor_scale_impl", _scale),
    (mappings, "dist_all_gather_func", _all_gather),
    (mappings, "dist_reduce_scatter_func", _reduce_scatter),
)


def _is_cuda(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


class _CudaToCpu(TorchFunctionMode):
    """Turns `device="cuda"`, `.to("cuda")` and `.cuda()` into the CPU's.

    `Tensor.type()` gets its CUDA name, because megatron's optimizer and clipping assert on that string.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], str | torch.device) and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


@contextlib.contextmanager
def cuda_redirected() -> Iterator[None]:
    """Lets megatron-core's set-up, schedules, optimizer and checkpoints run without a GPU; does nothing where CUDA is there.

    The function mode is absent in backward passes and in other threads, so modules of ours take the device from their inputs.
    """
    if torch.cuda.is_available():
        yield
        return
    before = [getattr(owner, name, _MISSING) for owner, name, _ in _REDIRECTIONS]
    for owner, name, replacement in _REDIRECTIONS:
        setattr(owner, name, replacement)
    try:
        with _CudaToCpu():
            yield
    finally:
        for (owner, name, _), original in zip(_REDIRECTIONS, before):
            if original is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
