"""From a training checkpoint of any layout to the inference format: config.json, model.safetensors, tokenizer/.

videoar export --checkpoint runs/demo/pretrain/checkpoints --out runs/demo/model
"""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import torch

from inference.checkpoint import load_model, save_weights
from inference.config import ModelConfig
from parallel import checkpoint as checkpoints
from parallel.convert import gather_reference
from parallel.ema import Ema
from parallel.setup import ParallelConfig, destroy, initialize
from parallel.train_step import build_model
from pretrain.stages import read_tokenizer
from tokenizer.errors import UserError

TOLERANCE = 1e-4
"""Largest difference of logits between megatron's network and the exported one, in float32."""


def export(
    checkpoint: str | Path, out: str | Path, tokenizer: str | Path | None = None, verify: bool = True
) -> ModelConfig:
    """Writes a model that `VideoARPipeline.from_pretrained` loads. It needs one process, whatever layout trained.

    Where the run kept running means of the weights (`optimizer.ema_decay`), they are exported. The recorded grids and number
    of frames are the finest and longest of the stages trained so far. The configuration is
    written last, so that an export that was cut short is not taken for a model.

    Args:
        checkpoint: a `step-N` folder, or a folder of them, of which the newest complete one is taken.
        out: the model's folder.
        tokenizer: the tokenizer's folder; None: the one that the run was trained with.
        verify: compares the exported network's logits with the trained one's.

    Raises:
        UserError: the checkpoint is missing or incomplete, the tokenizer is another one, or the logits differ.
    """
    folder, out = _resolve(Path(checkpoint)), Path(out)
    common = checkpoints.load_common(folder)
    source = Path(tokenizer or common["tokenizer"])
    fingerprint, _ = read_tokenizer(source)
    expected = common["export"]["tokenizer_fingerprint"]
    if fingerprint != expected:
        raise UserError(
            f"{folder} was trained on codes of the tokenizer {expected}, {source} is {fingerprint}: name the right one."
        )
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
        temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
        try:
            temporary.mkdir(parents=True)
            _copy_folder(source, temporary / "tokenizer")
            save_weights(model, state, temporary, extra=common["export"])
            if verify:
                _compare(chunks[0], model, temporary, info.device)
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.json").unlink(missing_ok=True)  # what is between two exports is no model
            _copy_folder(temporary / "tokenizer", out / "tokenizer")
            for name in ("model.safetensors", "config.json"):
                (temporary / name).replace(out / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        destroy()
    return model


def _resolve(checkpoint: Path) -> Path:
    for folder in (checkpoint, checkpoint / "checkpoints"):
        newest = checkpoints.latest(folder)
        if newest is not None:
            return newest
    return checkpoint


def _copy_folder(source: Path, target: Path) -> None:
    """Copies a tokenizer's two files (its folder may hold a training's other files, too)."""
    if source.resolve() == target.resolve():
        return
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        for name in ("config.json", "model.safetensors"):
            if not (source / name).is_file():
                raise UserError(f"{source} holds no whole tokenizer ({name} is missing): train or copy it again.")
            shutil.copyfile(source / name, temporary / name)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@torch.no_grad()
def _compare(trained: torch.nn.Module, model: ModelConfig, out: Path, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    sequence = model.layout()
    inputs = torch.randn(2, sequence.video_tokens, model.bits, generator=generator).to(device)
    if model.num_classes:
        text = torch.tensor([0, model.num_classes - 1], device=device)
    else:
        text = torch.randn(2, model.max_text_length, model.text_dim, generator=generator).to(device)
    lengths = torch.tensor([1, sequence.text_length], device=device)
    expected = trained.eval()(inputs, sequence, text, lengths)
    found = load_model(out, device)(inputs, sequence, text, lengths)
    difference = (expected - found).abs().max().item()
    if not difference <= TOLERANCE:
        raise UserError(
            f"the exported network's logits differ from the trained one's by {difference:.1e}: nothing was exported; "
            "report this with the run's config.yaml."
        )
