"""Training checkpoints in megatron-core's distributed format: what is in them, which are whole, and reading them on any layout.

DIR/step-100/   complete.json is written last of all; the folder is `.tmp-step-100` until then (`parallel.saving`)
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint import CheckpointException

from parallel.cpu import cuda_redirected
from parallel.ema import Ema
from parallel.model import unwrap
from parallel.train_step import update
from tokenizer.errors import UserError

MARKER = "complete.json"
SCALES = "._extra_state"
"""How the names end under which Transformer Engine keeps its FP8 scales and their history."""
TRUSTED = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
"""Transformer Engine's switch for reading delayed scaling's history, which it keeps as a pickle."""
EMA_UPDATES = "ema_updates"
"""In `common`, where the checkpoint holds running means."""


def latest(directory: str | Path) -> Path | None:
    """The newest complete checkpoint of a run's folder, or None; incomplete ones do not count."""
    whole = complete(Path(directory))
    return whole[-1] if whole else None


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
        state = sharded_state(chunks, optimizer, ema if ema_updates is not None else None, loading=True)
        try:
            _leave_out_scales(state, folder)
            loaded = cast(dict[str, Any], dist_checkpointing.load(state, str(folder)))
        except (KeyError, CheckpointingException, CheckpointException) as error:
            # torch's exception quotes the traceback of every rank; the last line is the reason
            reason = str(error).strip().splitlines()[-1].rsplit("Exception: ", 1)[-1]
            raise UserError(
                f"the checkpoint {folder} does not fit this network ({reason}): use the configuration it was trained with."
            ) from error
        for index, chunk in enumerate(chunks):
            _load_weights(unwrap(chunk), loaded[f"model{index}"])
        if ema is not None:
            source = "model" if ema_updates is None else "ema"
            ema.load_chunks([loaded[f"{source}{index}"] for index in range(len(chunks))], ema_updates or 0)
        if optimizer is not None:
            _load_optimizer(optimizer, loaded["optimizer"])
    return loaded["common"]


def sharded_state(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, ema: Ema | None, loading: bool
) -> dict[str, Any]:
    """What a checkpoint holds of this process, as megatron-core's shards.

    Args:
        chunks, optimizer, ema: what there is of it.
        loading: whether it is about to be read.
    """
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        # gathered by one rank over gloo, not by all of them on their GPUs
        "distrib_optim_fully_reshardable_mem_efficient": torch.cuda.is_available(),
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


def _leave_out_scales(state: dict[str, Any], folder: Path) -> None:
    """Asks for no FP8 scales that the checkpoint lacks, as one does that was written in another precision: they begin anew."""
    stored = {entry.key for entry in load_sharded_metadata(str(folder)).values()}
    for name, part in state.items():
        if name.startswith("model"):
            for key in [key for key, entry in part.items() if key.endswith(SCALES) and entry.key not in stored]:
                del part[key]


def _load_weights(stage: torch.nn.Module, state: dict[str, Any]) -> None:
    if stage.parallel.fp8 != "delayed":  # type: ignore[union-attr]
        # nobody else has a history of scales: one of another precision must not go into this one's checkpoints
        state = {name: value for name, value in state.items() if not name.endswith(SCALES)}
    with _trusted():
        missing, unexpected = stage.load_state_dict(state, strict=False)
    wrong = [name for name in (*missing, *unexpected) if not name.endswith(SCALES)]
    if wrong:
        raise UserError(
            f"the checkpoint and this network have different weights ({', '.join(wrong[:3])}): use the configuration it was trained with."
        )


@contextmanager
def _trusted() -> Iterator[None]:
    """Transformer Engine refuses the scales of delayed FP8 in a checkpoint unless told that it is no stranger's: a run resumes its own."""
    before = os.environ.get(TRUSTED)
    os.environ[TRUSTED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[TRUSTED]
        else:
            os.environ[TRUSTED] = before


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
        for parameter, entry in inner.optimizer.state.items():
            # where the update looks for it, whichever optimizer wrote the checkpoint
            entry["step"] = entry["step"].to(parameter.device, copy=True)


def _distributed(optimizer: MegatronOptimizer) -> Any:
    inner = optimizer.chained_optimizers[0] if isinstance(optimizer, ChainedOptimizer) else optimizer
    assert isinstance(inner, DistributedOptimizer)
    return inner


def complete(directory: Path) -> list[Path]:
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
        if complete(folder):
            other = f"it holds checkpoints: use {latest(folder)}"
        raise UserError(f"the checkpoint {folder} is incomplete (no {MARKER}: its writing was cut short): {other}.")
    return folder
