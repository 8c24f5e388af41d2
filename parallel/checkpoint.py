"""Training checkpoints: megatron-core's distributed format, written whole or not at all, read on any layout.

DIR/step-100/   complete.json is written last of all; the folder is `.tmp-step-100` until then
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint import CheckpointException

from parallel.cpu import cuda_redirected
from parallel.ema import Ema
from parallel.model import unwrap
from parallel.train_step import update
from tokenizer.errors import UserError
from tokenizer.files import sync

MARKER = "complete.json"
EMA_UPDATES = "ema_updates"
"""In `common`, where the checkpoint holds running means."""


def save(
    directory: str | Path,
    step: int,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    common: dict[str, Any],
    keep: int | None = None,
    ema: Ema | None = None,
) -> Path:
    """Writes `directory/step-<step>`. Every rank must call it.

    Args:
        directory: of all checkpoints of a run.
        step: finished optimizer steps.
        chunks, optimizer: of `build_model` and `build_optimizer`.
        common: what is the same on all ranks: data position, configuration (anything that pickles).
        keep: how many checkpoints stay, the newest ones; None: all.
        ema: running means to keep beside the weights.

    Returns:
        The checkpoint's folder.
    """
    directory = Path(directory)
    final, temporary = directory / f"step-{step}", directory / f".tmp-step-{step}"
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(".tmp-step-*"):
            shutil.rmtree(left)
        temporary.mkdir()
    dist.barrier()
    with cuda_redirected():
        state = _state(chunks, optimizer, ema, loading=False)
        state["common"] = common | ({EMA_UPDATES: ema.updates} if ema else {})
        dist_checkpointing.save(state, str(temporary), sharded_strategy=_InProcessSave("torch_dist", 1, thread_count=1))
    if dist.get_rank() == 0:
        _write_marker(temporary / MARKER, {"step": step})
        if final.exists():
            _remove(final)
        temporary.rename(final)
        sync(directory)
        for old in _complete(directory)[:-keep] if keep else []:
            _remove(old)
    dist.barrier()
    return final


def latest(directory: str | Path) -> Path | None:
    """The newest complete checkpoint of a run's folder, or None; incomplete ones do not count."""
    complete = _complete(Path(directory))
    return complete[-1] if complete else None


def load_common(checkpoint: str | Path) -> dict[str, Any]:
    """The `common` dictionary of a checkpoint; needs neither model nor process groups.

    Raises:
        UserError: it is missing or incomplete.
    """
    folder = _checked(checkpoint)
    try:
        return dist_checkpointing.load_common_state_dict(str(folder))["common"]
    except (CheckpointingException, OSError, KeyError) as error:
        raise UserError(
            f"the checkpoint {folder} is incomplete ({type(error).__name__}): name an older one."
        ) from error


def load(
    checkpoint: str | Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None = None,
    ema: Ema | None = None,
) -> dict[str, Any]:
    """Reads a checkpoint, whatever layout wrote it. Every rank must call it.

    Args:
        checkpoint: a `step-N` folder.
        chunks: of `build_model`.
        optimizer: None reads the weights alone (then build the optimizer after this call, so that it copies them).
        ema: takes the checkpoint's running means; where it has none, they begin at its weights.

    Returns:
        The `common` dictionary.

    Raises:
        UserError: the checkpoint is missing or incomplete, or is another network's.
    """
    folder = _checked(checkpoint)
    if optimizer is not None:
        # torch's AdamW has no step count before its first update, but a load asks for it: an update by nothing, overwritten next
        for chunk in chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        update(optimizer, 0.0)
    ema_updates = None if ema is None else load_common(folder).get(EMA_UPDATES)
    with cuda_redirected():
        state = _state(chunks, optimizer, ema if ema_updates is not None else None, loading=True)
        try:
            loaded = cast(dict[str, Any], dist_checkpointing.load(state, str(folder)))
        except (KeyError, CheckpointingException, CheckpointException) as error:
            # torch's exception quotes the traceback of every rank; the last line is the reason
            reason = str(error).strip().splitlines()[-1].rsplit("Exception: ", 1)[-1]
            raise UserError(
                f"the checkpoint {folder} does not fit this network ({reason}): use the configuration it was trained with."
            ) from error
        for index, chunk in enumerate(chunks):
            unwrap(chunk).load_state_dict(loaded[f"model{index}"])
        if ema is not None:
            source = "model" if ema_updates is None else "ema"
            ema.load_chunks([loaded[f"{source}{index}"] for index in range(len(chunks))], ema_updates or 0)
        if optimizer is not None:
            _load_optimizer(optimizer, loaded["optimizer"])
    return loaded["common"]


def _state(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, ema: Ema | None, loading: bool
) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state: dict[str, Any] = {
        f"model{index}": unwrap(chunk).sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=metadata)
    if ema is not None:
        means = ema.sharded([state[f"model{index}"] for index in range(len(chunks))])
        state |= {f"ema{index}": one for index, one in enumerate(means)}
    return state


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """megatron's loading, with two repairs for torch's AdamW, whose state has a `step` tensor a parameter.

    While the moments are copied in, `step` must be left out, and afterwards each parameter needs a step tensor of its own: megatron
    hands the same tensor to all, which would then count every parameter's update.
    """
    inner = _distributed(optimizer)
    original = inner._set_main_param_and_optimizer_states

    def without_step(parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = inner.model_param_group_index_map[parameter]
        main = inner.optimizer.param_groups[group]["params"][order]
        targets = {"param": main, **inner.optimizer.state[main]}
        for name, target in targets.items():
            if name != "step":
                target.copy_(tensors[name])

    has_step = any("step" in entry for entry in inner.optimizer.state.values())
    if has_step:
        inner._set_main_param_and_optimizer_states = without_step  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            optimizer.load_state_dict(state)
    finally:
        inner._set_main_param_and_optimizer_states = original  # type: ignore[method-assign]
    if has_step:
        for entry in inner.optimizer.state.values():
            entry["step"] = entry["step"].clone()


def _distributed(optimizer: MegatronOptimizer) -> Any:
    inner = optimizer.chained_optimizers[0] if isinstance(optimizer, ChainedOptimizer) else optimizer
    assert isinstance(inner, DistributedOptimizer)
    return inner


class _InProcessSave(TorchDistSaveShardedStrategy):
    """Writes in this process. megatron's own synchronous save spawns a manager and forks writers: seconds for a small model."""

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        # megatron makes a manager process for results unless a queue is there already
        results: queue.Queue = queue.Queue()
        filesystem_async._results_queue = results
        try:
            request = self.async_save(sharded_state_dict, checkpoint_dir)
            if request.async_fn is not None:
                transforms = request.async_fn.args[0]  # type: ignore[attr-defined]
                buckets = request.preload_fn()
                results.put({index: self._write(transforms, bucket) for index, bucket in enumerate(buckets)})
            dist.barrier()
            for finalize in request.finalize_fns:
                finalize()
        finally:
            filesystem_async._results_queue = None

    @staticmethod
    def _write(transforms: Any, bucket: Any) -> Any:
        written: queue.Queue = queue.Queue()
        counted: queue.Queue = queue.Queue()
        counted.put(0)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, written, counted, True)  # type: ignore[arg-type]
        _, outcome = written.get_nowait()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def _complete(directory: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    found = []
    for folder in directory.glob("step-*") if directory.is_dir() else ():
        match = re.fullmatch(r"step-(\d+)", folder.name)
        if match and (folder / MARKER).is_file():
            found.append((int(match.group(1)), folder))
    return [folder for _, folder in sorted(found)]


def _checked(checkpoint: str | Path) -> Path:
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise UserError(f"the checkpoint {folder} does not exist: give a folder named step-N.")
    if not (folder / MARKER).is_file():
        newest = latest(folder.parent)
        other = f"use {newest}" if newest else "start again"
        if _complete(folder):
            other = f"it holds checkpoints: use {latest(folder)}"
        raise UserError(f"the checkpoint {folder} is incomplete (no {MARKER}: its writing was cut short): {other}.")
    return folder


def _remove(folder: Path) -> None:
    """Deletes a checkpoint so that what a kill leaves behind is not taken for whole."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _write_marker(file: Path, content: dict[str, Any]) -> None:
    with file.open("w") as out:
        json.dump(content, out)
        out.flush()
        os.fsync(out.fileno())
