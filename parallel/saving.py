"""Writing checkpoints while training goes on: a copy of the state is taken at once, a thread writes it, and the ranks finish it together.

saver = Saver(directory, keep=2)
saver.save(step, chunks, optimizer, common, background=True)    the training may go on: later updates do not reach the copy
saver.poll()                                                    after each step: finishes the checkpoint once all ranks have written
saver.wait()                                                    before the process ends

What fails (a full disk) leaves no part of a checkpoint behind and raises SaveError on all ranks: the next one may succeed.
"""

from __future__ import annotations

import json
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import MegatronOptimizer

from parallel.checkpoint import EMA_UPDATES, MARKER, complete, latest, sharded_state
from parallel.cpu import cuda_redirected
from parallel.ema import Ema
from parallel.integrity import FileSum, sum_of
from parallel.model import settle
from tokenizer.errors import Fault
from tokenizer.files import sync


class SaveError(Fault):
    """A checkpoint could not be written; nothing of it is left, all ranks have this error, and the training may go on.

    Args:
        step: its number.
        text: for users.
    """

    def __init__(self, step: int, text: str):
        super().__init__(text)
        self.step = step


class _Strategy(TorchDistSaveShardedStrategy):
    """megatron-core's format and plan; writing and finishing are `Saver`'s."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)
        self.writer: Any = None
        self.metadata: Any = None

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        self.writer, self.metadata = writer, save_state_dict_ret[1]  # the metadata on rank 0 only
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)


@dataclass
class _Pending:
    """A checkpoint that is being written.

    Args:
        step: its number.
        strategy: knows what is to be written.
        thread: writes it.
        sums: of the files that it has written.
    """

    step: int
    strategy: _Strategy
    thread: threading.Thread
    sums: dict[str, FileSum]


class Saver:
    """Writes the checkpoints of one run, one at a time. Every rank must call the same methods in the same order.

    Args:
        directory: of all checkpoints of the run.
        keep: how many checkpoints stay, the newest ones; None: all.
    """

    spared: Callable[[], set[Path]] = staticmethod(set)  # type: ignore[assignment]
    """On rank 0 it may be set to what names older checkpoints, resolved, that stay, too."""
    completed: Callable[[Path], None] = staticmethod(lambda folder: None)  # type: ignore[assignment]
    """On rank 0 it may be set to what is told of each complete checkpoint."""

    def __init__(self, directory: str | Path, keep: int | None = None):
        self.directory, self.keep = Path(directory), keep
        self._pending: _Pending | None = None
        self._removal: threading.Thread | None = None
        if dist.get_rank() == 0:
            self._remove_left()  # a run that was killed after its last checkpoint saves no other

    def save(
        self,
        step: int,
        chunks: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        common: dict[str, Any],
        ema: Ema | None = None,
        background: bool = False,
    ) -> Path:
        """Writes `directory/step-<step>`; one that is still being written is waited for.

        Args:
            step: finished optimizer steps.
            chunks, optimizer: of `build_model` and `build_optimizer`.
            common: what is the same on all ranks: data position, configuration (anything that pickles).
            ema: running means to keep beside the weights.
            background: return once the state is copied; `poll` or `wait` finish the checkpoint.

        Returns:
            The checkpoint's folder.

        Raises:
            SaveError: this checkpoint or the one before can't be written; on all ranks alike.
        """
        self.wait()
        settle(chunks)
        self._together(step, self._make_folder)
        results: queue.Queue = queue.Queue()
        strategy, failures = _Strategy(), []
        with cuda_redirected(), _prepared(results, failures):
            state = sharded_state(chunks, optimizer, ema, loading=False)
            state["common"] = common | ({EMA_UPDATES: ema.updates} if ema else {})
            folder = str(self._temporary(step))
            request = dist_checkpointing.save(state, folder, sharded_strategy=strategy, async_sharded_save=True)
            buckets = [] if request is None or request.async_fn is None else _copied(request.preload_fn())

        def check(step: int) -> None:
            if failures:
                raise failures[0]

        self._together(step, check)
        sums: dict[str, FileSum] = {}
        transforms = [strategy.writer.transforms] if hasattr(strategy.writer, "transforms") else []
        # a daemon: what a failed process leaves half-written is never read, and its end must not wait for a slow disk
        thread = threading.Thread(
            target=_write, args=(transforms, buckets, results, sums), name=f"save-step-{step}", daemon=True
        )
        thread.start()
        self._pending = _Pending(step, strategy, thread, sums)
        if not background:
            self.wait()
        return self._final(step)

    def poll(self) -> Path | None:
        """Finishes the checkpoint that is being written, if all ranks have written theirs; returns its folder then."""
        if self._pending is None:
            return None
        written = torch.tensor(int(not self._pending.thread.is_alive()))  # on the CPU: gloo carries it beside NCCL
        if dist.get_world_size() > 1:
            dist.all_reduce(written, op=dist.ReduceOp.MIN)
        return self._finish() if written else None

    def wait(self) -> Path | None:
        """Finishes the checkpoint that is being written, if there is one, and returns its folder.

        Raises:
            SaveError: it could not be written; on all ranks alike.
        """
        finished = self._finish()
        if self._removal is not None:
            self._removal.join()
            self._removal = None
        return finished

    def _finish(self) -> Path | None:
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        pending.thread.join()
        mine = (pending.strategy.writer.retrieve_write_results(), pending.sums)
        everybodys: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, everybodys)

        def complete_folder(step: int) -> None:
            written, sums = zip(*(everybodys or []))
            self._complete(step, pending.strategy, list(written), {k: v for one in sums for k, v in one.items()})

        self._together(pending.step, complete_folder)
        self.completed(self._final(pending.step))
        return self._final(pending.step)

    def _make_folder(self, step: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_left()
        self._temporary(step).mkdir()

    def _remove_left(self) -> None:
        for left in self.directory.glob(".tmp-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _complete(self, step: int, strategy: _Strategy, written: list[Any], sums: dict[str, FileSum]) -> None:
        """On rank 0: index, marker, name; then what is older than `keep` goes."""
        for one in written:
            if isinstance(one, tuple):  # torch's form of an exception with its traceback
                raise one[0]
        final, temporary = self._final(step), self._temporary(step)
        strategy.writer.finish(strategy.metadata, written)
        save_config(CheckpointingConfig(strategy.backend, strategy.version), str(temporary))
        for file in sorted(temporary.iterdir()):
            sync(file)
            if file.name not in sums:  # index and what is common: rank 0's
                sums[file.name] = sum_of(file)
        _write_marker(temporary / MARKER, {"step": step, "files": sums})
        sync(temporary)
        aside = [self._put_aside(final)] if final.exists() else []
        temporary.rename(final)
        sync(self.directory)
        old, spared = complete(self.directory)[: -self.keep] if self.keep else [], self.spared()
        aside += [self._put_aside(folder) for folder in old if folder.resolve() not in spared]
        # seconds on a network's disks
        self._removal = threading.Thread(target=_remove, args=(aside,), name="remove-old", daemon=True)
        self._removal.start()

    def _put_aside(self, folder: Path) -> Path:
        """Renames a checkpoint so that nobody takes what is left of it for whole; the next start removes what a kill leaves."""
        aside = folder.with_name(f".tmp-old-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        return folder.rename(aside)

    def _together(self, step: int, work: Callable[[int], None]) -> None:
        """Does something on rank 0 that may fail; all ranks wait for it and raise what it raised."""
        reason: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                work(step)
            except (OSError, RuntimeError) as error:
                lines = str(error).strip().splitlines()
                reason = [f"{lines[-1].strip() if lines else type(error).__name__}; {_free(self.directory)} free there"]
                shutil.rmtree(self._temporary(step), ignore_errors=True)  # no rank's thread is still at it
        dist.broadcast_object_list(reason, src=0)
        if reason[0] is not None:
            newest = latest(self.directory)
            raise SaveError(
                step,
                f"the checkpoint {self._final(step)} could not be written ({reason[0]}): mend that (is the disk full?) and start "
                f"again, from {newest or 'the beginning'}.",
            )

    def _final(self, step: int) -> Path:
        return self.directory / f"step-{step}"

    def _temporary(self, step: int) -> Path:
        return self.directory / f".tmp-step-{step}"


@contextmanager
def _prepared(results: queue.Queue, failures: list[Exception]) -> Iterator[None]:
    """Around megatron's planning of a save: results go into this queue, and rank 0's failure to write what is common is kept for later.

    megatron would start a manager process for results (seconds), and raise on rank 0 alone, while the others wait for its plan.
    """
    original = TorchCommonSaveStrategy.save_common

    def save_common(strategy: TorchCommonSaveStrategy, state: Any, folder: Any) -> None:
        try:
            original(strategy, state, folder)
        except (OSError, RuntimeError) as error:
            failures.append(error)

    filesystem_async._results_queue = results
    TorchCommonSaveStrategy.save_common = save_common  # type: ignore[method-assign]
    try:
        yield
    finally:
        filesystem_async._results_queue = None
        TorchCommonSaveStrategy.save_common = original  # type: ignore[method-assign]


def _copied(buckets: Any) -> Any:
    """On a GPU the tensors have just been copied; a CPU's are the training's own."""
    if torch.cuda.is_available():
        return buckets
    return [
        (path, key, (bytes_data, [(item, tensor.clone()) for item, tensor in tensors]))
        for path, key, (bytes_data, tensors) in buckets
    ]


def _write(transforms: Any, buckets: Any, results: queue.Queue, sums: dict[str, FileSum]) -> None:
    """The thread: writes what `save` copied. No collective runs here: the training's own would get in its way."""
    try:
        if buckets:
            results.put({index: _write_bucket(transforms, bucket) for index, bucket in enumerate(buckets)})
        for path, *_ in buckets:
            sums[Path(path).name] = sum_of(Path(path))
    except Exception as error:  # all ranks are told when they finish
        results.put(error)


def _write_bucket(transforms: Any, bucket: Any) -> Any:
    written: queue.Queue = queue.Queue()
    counted: queue.Queue = queue.Queue()
    counted.put(0)
    # unwrapped: as megatron calls it, in a process of its own, it turns off that process's garbage collection
    write = FileSystemWriterAsync.write_preloaded_data.__wrapped__  # type: ignore[attr-defined]
    write(transforms, 0, bucket, written, counted, True)
    _, outcome = written.get_nowait()
    if isinstance(outcome, Exception):
        raise outcome
    sync(Path(bucket[0]))  # megatron does so before the last buffer is written
    return outcome


def _free(directory: Path) -> str:
    """The space beside a checkpoint that failed: torch's own error does not say that there was none."""
    with suppress(OSError):
        return f"{shutil.disk_usage(directory).free / 1e6:.1f} MB"
    return "unknown space"


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _write_marker(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content))
    sync(file)
