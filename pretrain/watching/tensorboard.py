"""TensorBoard, where it is wanted: the one place that chooses."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizer.errors import UserError

log = logging.getLogger(__name__)


class TensorBoard:
    """Writes every number of a line as a scalar. What a full disk does not take is left out, and no reason to end a training.

    Args:
        out: the run's folder; the event files go to its folder `tensorboard`.
        finished: steps of the checkpoint that the run goes on from: later ones that are there already are hidden.
    """

    def __init__(self, out: Path, finished: int):
        self.folder = out / "tensorboard"
        self._writer: Any = None
        self._open(finished)

    def _open(self, finished: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=finished + 1)
        return self._writer

    def write(self, values: dict[str, Any], step: int) -> None:
        """One line of metrics.jsonl."""
        with self._tolerant():
            writer = self._writer or self._open(step - 1)
            for name, value in values.items():
                if isinstance(value, int | float) and name not in ("time", "step", "global_step"):
                    writer.add_scalar(name, value, step)

    def rewind(self, finished: int) -> None:
        """Hides what came after so many finished steps, which the run will write again."""
        self.close()
        with self._tolerant():
            self._open(finished)

    def close(self) -> None:
        """Ends the log."""
        with self._tolerant():
            if self._writer is not None:
                self._writer.close()
        self._writer = None

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None  # the next line opens another file
            print(
                f"WARNING: {self.folder} can't be written ({error.strerror}): it lacks some lines.",
                file=sys.stderr,
                flush=True,
            )


def choose_tensorboard(wanted: bool, out: Path, finished: int) -> TensorBoard | None:
    """The writer, or None where there is to be none.

    Args:
        wanted, out, finished: the setting; see `TensorBoard`.

    Raises:
        UserError: it is wanted and not installed.
    """
    if not wanted:
        return None
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "watch.tensorboard is true, but the package tensorboard is not installed: install it (pip install tensorboard), or set it to "
            "false."
        )
    log.info("TensorBoard: %s", out / "tensorboard")
    return TensorBoard(out, finished)
