"""`videoar encode` without Ray: the real driver and the real worker in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.encode import EncodeConfig, EncodeSummary, encode
from data_pipelines.encode_worker import TEMPORARY, ShardEncoder, Task


class Pool:
    """In the place of `EncoderPool`."""

    def __init__(self, arguments: tuple[Any, ...], *_: Any):
        self.arguments = arguments

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def run(self, tasks: Sequence[Task], rows_per_shard: Sequence[int]) -> None:
        worker = ShardEncoder(*self.arguments)
        for task in tasks:
            Path(task.out, TEMPORARY).mkdir(exist_ok=True)
            worker.encode(replace(task, attempt="try"))


def encode_here(config: EncodeConfig) -> list[EncodeSummary]:
    """What `encode` returns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipelines.encode_pool.EncoderPool", Pool)
        return encode(config)
