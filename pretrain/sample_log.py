"""Which clips each step trained on: to find the clip behind a step that went wrong, and to show that a resumed run reads what it should.

    {"stage": "one", "step": 3, "global_step": 3, "source": 0, "sample_index": [17, 4], "epoch": [0, 0]}

`sample_index` counts the clips of all sources of the stage, one source after the other, as the random draws of a clip do.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipelines.code_stream import CodeBatch
from tokenizer.metrics_log import drop_after

KEY = "global_step"


class SampleLog:
    """Appends to `samples-<rank>.jsonl`; a resumed run first drops the lines after its checkpoint, as `MetricsLog` does.

    Args:
        out: the run's folder.
        rank, size: the data-parallel rank and the number of ranks.
        finished: steps of the checkpoint that the run goes on from.
    """

    def __init__(self, out: Path, rank: int, size: int, finished: int):
        out.mkdir(parents=True, exist_ok=True)
        file = self._file = out / f"samples-{rank}.jsonl"
        drop_after(file, finished, KEY)
        if rank == 0:
            # of ranks that the run had before it went on with fewer
            for other in out.glob("samples-*.jsonl"):
                match = re.fullmatch(r"samples-(\d+)\.jsonl", other.name)
                if match and int(match.group(1)) >= size:
                    drop_after(other, finished, KEY)
        self._out = file.open("a")

    def write(self, head: dict[str, Any], source: int, batch: CodeBatch) -> None:
        """Logs a finished step.

        Args:
            head: its numbers, with "global_step".
            source: the number of the stage's source that all its clips come from.
            batch: this rank's part of the global batch.
        """
        clips = {"sample_index": batch.sample_index.tolist(), "epoch": batch.epoch.tolist()}
        with suppress(OSError):  # what a full disk does not take stays in the buffer until there is space again
            self._out.write(json.dumps(head | {"source": source} | clips) + "\n")
            self._out.flush()

    def rewind(self, finished: int) -> None:
        """Drops the lines after so many finished steps, which the run will write again."""
        self.close()
        drop_after(self._file, finished, KEY)
        self._out = self._file.open("a")

    def close(self) -> None:
        """Ends the log."""
        with suppress(OSError):
            self._out.close()
