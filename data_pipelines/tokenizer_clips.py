"""The clips of a tokenizer's training and of its validation, by its recipe."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from data_pipelines.clips import ClipBatches, open_clips, split_clips
from tokenizer.errors import UserError
from tokenizer.train_config import TokenizerTrainConfig
from tokenizer.validation import ValidationSource

VALIDATION_BATCH = 8


def training_clips(
    config: TokenizerTrainConfig, shards: Path, validation: Path | None, workers: int
) -> tuple[ClipBatches, ValidationSource | None]:
    """What `tokenizer.train.train` takes.

    Args:
        config: the recipe.
        shards: raw shards of the training clips.
        validation: raw shards of others; None: `validation_share` of the training clips are set apart.
        workers: threads a process that decode.

    Raises:
        UserError: no clips, or validations are wanted and there is nothing to validate on.
    """
    if not config.validate_every and (validation is not None or config.validation_share):
        raise UserError(
            "there are clips to validate on and validate_every is 0: set it to a number of steps, or take them out."
        )
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    spec = config.largest
    source = open_clips(shards, spec.num_frames, spec.size, config.decoder)
    everything = ClipBatches(source, config.seed)
    train, held_out = split_clips(len(everything), 0.0 if validation else config.validation_share, config.seed)
    batches = ClipBatches(source, config.seed, rank, size, workers, train)
    if not config.validate_every:
        return batches, None
    if validation is not None:
        others = ClipBatches(
            open_clips(validation, spec.num_frames, spec.size, config.decoder), config.seed, workers=workers
        )
    elif len(held_out):
        others = ClipBatches(source, config.seed, workers=workers, indices=held_out)
    else:
        raise UserError(
            f"validate_every is {config.validate_every} and there are no clips for it: name shards with --validation, or set "
            "validation_share above 0."
        )
    shape = replace(spec, batch_size=VALIDATION_BATCH)

    def in_order() -> Iterator[Tensor]:
        return others.in_order(shape, config.validation_clips)

    return batches, in_order
