"""From a training checkpoint of any layout to the inference format: config.json, the weights, tokenizer/, README.md.

videoar export --checkpoint runs/demo/pretrain/checkpoints --out runs/demo/model
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from inference.checkpoint import StoredWeights, save_weights
from inference.config import ModelConfig
from inference.model import VideoARTransformer
from inference.weight_files import INDEX_FILE
from parallel import checkpoint as checkpoints
from parallel.convert import gather_reference
from parallel.ema import Ema
from parallel.integrity import damage
from parallel.setup import ParallelConfig, destroy, initialize
from parallel.train_step import build_model
from pretrain.model_card import CARD, PICTURE, Sampling, write_card
from pretrain.stages import read_tokenizer
from pretrain.watching.best import best_checkpoint
from tokenizer.errors import UserError
from tokenizer.files import sync
from tokenizer.receipts import temporary_folder

TOLERANCE = 1e-4
"""Largest difference of logits between megatron's network and the exported one, in float32."""
BEST = "best"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export(
    checkpoint: str | Path,
    out: str | Path,
    tokenizer: str | Path | None = None,
    verify: bool = True,
    dtype: Literal["float32", "bfloat16"] | None = None,
    max_shard_size: int | None = None,
    sampling: Sampling | None = None,
) -> ModelConfig:
    """Writes a model that `VideoARPipeline.from_pretrained` loads. It needs one process, whatever layout trained.

    Where the run kept running means of the weights (`optimizer.ema_decay`), they are exported. The recorded grids and number
    of frames are the finest and longest of the stages trained so far. The folder is written under another name and takes
    its own when it is whole; it replaces an earlier export, and nothing else.

    Args:
        checkpoint: a `step-N` folder; a run's folder, of which the newest complete one is taken; or RUN/best, the best one.
        out: the model's folder.
        tokenizer: the tokenizer's folder; None: the one that the run was trained with.
        verify: compares the network's logits with the trained one's, and what was stored with the network, bit for bit.
        dtype: of the stored weights; None: as they were trained.
        max_shard_size: bytes of a weight file; None: one file.
        sampling: whether and how the model card shows a sample; None: one, where the model is small.

    Raises:
        UserError: the checkpoint is missing, incomplete or damaged, the tokenizer is another one, the logits differ, or `out` holds
            something else than an export.
    """
    folder, out = _resolve(Path(checkpoint)), Path(out)
    out = out.resolve() if out.is_symlink() else out
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"weights can't be stored as {dtype}: choose one of {', '.join(DTYPES)}.")
    if (folder / checkpoints.MARKER).is_file() and (reason := damage(folder)) is not None:
        raise UserError(f"the checkpoint {folder} is damaged ({reason}): export another one.")
    common = checkpoints.load_common(folder)
    source = Path(tokenizer or common["tokenizer"])
    fingerprint, _ = read_tokenizer(source)
    expected = common["export"]["tokenizer_fingerprint"]
    if fingerprint != expected:
        raise UserError(
            f"{folder} was trained on codes of the tokenizer {expected}, {source} is {fingerprint}: name the right one."
        )
    _check_replaceable(out)
    model = ModelConfig.from_dict(common["model"])
    layout = ParallelConfig(transformer_engine="off", attention="sdpa")
    try:
        info = initialize(layout, seed=0)
        chunks = build_model(model, layout, info)
        ema = Ema(chunks, decay=0.0) if common.get(checkpoints.EMA_UPDATES) is not None else None
        checkpoints.load(folder, chunks, ema=ema)
        if ema is not None:
            ema.take_over()
        state = gather_reference(chunks)
        stored = state if dtype is None else {name: value.to(DTYPES[dtype]) for name, value in state.items()}
        temporary = temporary_folder(out)
        try:
            _copy_tokenizer(source, temporary / "tokenizer")
            save_weights(model, stored, temporary, common["export"], max_shard_size)
            if verify:
                _check_stored(stored, temporary)
                _compare(chunks[0], model, state, info.device)
            write_card(temporary, common, folder, sampling or Sampling(), info.device)
            _take_name(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        destroy()
    return model


def _check_replaceable(out: Path) -> None:
    """Raises UserError if `out` is there and holds anything that no export writes."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file: name a folder for the model.")
    own = {"config.json", "tokenizer", INDEX_FILE, CARD, PICTURE}
    others = [entry.name for entry in out.iterdir() if entry.name not in own and not entry.match("model*.safetensors")]
    with suppress(OSError, ValueError):  # a tokenizer's folder has files of the same names
        if "model" not in json.loads((out / "config.json").read_text()):
            others.append("config.json")
    if others:
        raise UserError(f"{out} holds {sorted(others)[0]}, which no export has written: name another folder.")


def _take_name(temporary: Path, out: Path) -> None:
    """Renames a whole folder to `out`; an export that is there goes first, as a whole, so no mixture is ever seen."""
    for entry in sorted(temporary.rglob("*")):
        sync(entry)
    sync(temporary)
    old = temporary_folder(out)
    try:
        if out.exists():
            out.rename(old)
        try:
            temporary.rename(out)
        except OSError:
            old.rename(out)
            raise
        sync(out.absolute().parent)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _resolve(checkpoint: Path) -> Path:
    if checkpoint.name == BEST and not checkpoint.exists():
        best = best_checkpoint(checkpoint.parent)
        if best is None:
            raise UserError(
                f"{checkpoint.parent} has no best checkpoint: name another, or its newest by naming the run alone."
            )
        return best
    for folder in (checkpoint, checkpoint / "checkpoints"):
        newest = checkpoints.latest(folder)
        if newest is not None:
            return newest
    return checkpoint


def _copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer's two files (its folder may hold a training's other files, too)."""
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        if not (source / name).is_file():
            raise UserError(f"{source} holds no whole tokenizer ({name} is missing): train or copy it again.")
        shutil.copyfile(source / name, target / name)


def _check_stored(state: dict[str, Tensor], folder: Path) -> None:
    """Raises UserError if what a reader gets is not, bit for bit, what was to be written."""
    stored = StoredWeights(folder)
    for name, value in state.items():
        found = stored[name]
        if found.dtype != value.dtype or not torch.equal(found, value):
            raise UserError(f"'{name}' was read back changed: nothing was exported; look at the disk, and try again.")


@torch.no_grad()
def _compare(trained: torch.nn.Module, model: ModelConfig, state: dict[str, Tensor], device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    sequence = model.layout()
    inputs = torch.randn(2, sequence.video_tokens, model.bits, generator=generator).to(device)
    if model.num_classes:
        text = torch.tensor([0, model.num_classes - 1], device=device)
    else:
        text = torch.randn(2, model.max_text_length, model.text_dim, generator=generator).to(device)
    lengths = torch.tensor([1, sequence.text_length], device=device)
    expected = trained.eval()(inputs, sequence, text, lengths)
    network = VideoARTransformer.empty(model)
    network.load_state_dict({name: value.to(device) for name, value in state.items()}, assign=True)
    found = network.eval()(inputs, sequence, text, lengths)
    difference = (expected - found).abs().max().item()
    if not difference <= TOLERANCE:
        raise UserError(
            f"the exported network's logits differ from the trained one's by {difference:.1e}: nothing was exported; "
            "report this with the run's config.yaml."
        )
