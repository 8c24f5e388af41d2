"""TensorBoard, where it is wanted: the one place that chooses."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from tokenizer.errors import UserError

log = logging.getLogger(__name__)


class TensorBoard:
    """Writes every number of a line as a scalar.

    Args:
        out: the run's folder; the event files go to its folder `tensorboard`.
        finished: steps of the checkpoint that the run goes on from: later ones that are there already are hidden.
    """

    def __init__(self, out: Path, finished: int):
        self.folder = out / "tensorboard"
        self._writer = self._open(finished)

    def _open(self, finished: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder), purge_step=finished + 1)

    def write(self, values: dict[str, Any], step: int) -> None:
        """One line of metrics.jsonl."""
        for name, value in values.items():
            if isinstance(value, int | float) and name not in ("time", "step", "global_step"):
                self._writer.add_scalar(name, value, step)

    def rewind(self, finished: int) -> None:
        """Hides what came after so many finished steps, which the run will write again."""
        self._writer.close()
        self._writer = self._open(finished)

    def close(self) -> None:
        """Ends the log."""
        self._writer.close()


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
