"""The pool of Ray actors that encode shards, and what happens when one of them dies."""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipelines.encode_metrics import EncodeMetrics
from data_pipelines.encode_worker import NO_ROW, SOME_ROW, TEMPORARY, ShardEncoder, Task, read_breadcrumb, shard_receipt
from tokenizer.errors import UserError
from tokenizer.progress import Meter

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

KILLS = 3  # a row that killed its worker so often is set aside
FAILURES = 5  # a shard that failed so often for other reasons ends the run
STARTS = 60  # tries to reach a worker that is being restarted
POLL = 0.5  # seconds
OBJECT_STORE = 200 << 20  # bytes; only paths and receipts travel
ROOT = str(Path(__file__).resolve().parents[1])


def start_ray(num_cpus: int) -> str:
    """Starts Ray inside this machine, for this process; returns its address.

    Args:
        num_cpus: CPUs that Ray may hand out.
    """
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=OBJECT_STORE,
        # by default Ray's workers give way to everything else on the machine, to the point of standing still
        _system_config={"worker_niceness": 0},
    )
    return ray.get_runtime_context().gcs_address


class EncodeActor:
    """A `ShardEncoder` in a process of its own."""

    def __init__(self, *arguments: Any):
        self.encoder = ShardEncoder(*arguments)

    def ready(self) -> str:
        """The Ray node's id, once the tokenizer is loaded."""
        return ray.get_runtime_context().get_node_id()

    def encode(self, task: Task) -> dict[str, Any]:
        """See `ShardEncoder.encode`."""
        return self.encoder.encode(task)


class EncoderPool:
    """Workers that encode tasks; use it in a `with` block.

    Args:
        arguments: of each worker's `ShardEncoder`.
        device: "cpu", or "cuda" for one GPU a worker.
        num_workers: 0: as many as there is room for.
        threads: CPU threads of a worker.
        ray_address: of a running cluster; None: Ray inside this machine (or what this process has started already).
    """

    actor_class = EncodeActor

    def __init__(
        self,
        arguments: tuple[Any, ...],
        device: str,
        num_workers: int,
        threads: int,
        ray_address: str | None = None,
    ):
        self.arguments = arguments
        self.device, self.num_workers, self.threads = device, num_workers, threads
        self.ray_address = ray_address
        self.actors: list[Any] = []
        self.nodes: dict[int, str] = {}  # worker -> its Ray node
        self.kills: Counter[tuple[str, int, int]] = Counter()  # (out, shard, row) -> workers that died at this row
        self.failures: Counter[tuple[str, int]] = Counter()  # (out, shard) -> tries that failed otherwise
        self._started_ray = False

    def __enter__(self) -> EncoderPool:
        if ray.is_initialized():
            return self
        if self.ray_address:
            try:
                ray.init(address=self.ray_address, log_to_driver=False, logging_level=logging.ERROR)
            except (RayError, ConnectionError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"no Ray cluster answers at '{self.ray_address}' ({_short(error)}): start one, set RAY_AUTH_MODE=token if it asks "
                    "for a token, or leave --ray-address out."
                ) from error
        else:
            start_ray(max(os.cpu_count() or 1, self.num_workers * self.threads))
        self._started_ray = True
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        for actor in self.actors:
            ray.kill(actor)
        if self._started_ray:
            ray.shutdown()

    def run(self, tasks: Sequence[Task], rows_per_shard: Sequence[int]) -> None:
        """Encodes all tasks.

        Args:
            tasks: what to do, in this order.
            rows_per_shard: rows of each raw shard.

        Raises:
            UserError: a task failed for a reason that a user can mend, or again and again.
        """
        for out in {task.out for task in tasks}:
            Path(out, TEMPORARY).mkdir(parents=True, exist_ok=True)
        self._start_actors(min(self._room(), len(tasks)))
        pending, idle = deque(tasks), deque[int]()
        starting = {actor.ready.remote(): worker for worker, actor in enumerate(self.actors)}
        running: dict[Any, tuple[int, Task, float]] = {}  # result -> worker, its task, when it was handed out
        tries: Counter[int] = Counter()
        rows_done = 0
        metrics, waiting = EncodeMetrics(), Counter[str]()
        for task in tasks:
            waiting[task.job.variant] += rows_per_shard[task.shard]
        with Meter("encode", sum(rows_per_shard[task.shard] for task in tasks)) as meter:
            while pending or running:
                done, _ = ray.wait([*starting, *running], num_returns=1, timeout=POLL)
                for reference in done:
                    if reference in starting:
                        worker = starting.pop(reference)
                        if self._is_ready(worker, reference, tries):
                            idle.append(worker)
                        else:
                            starting[self.actors[worker].ready.remote()] = worker
                        continue
                    worker, task, begun = running.pop(reference)
                    try:
                        receipt = ray.get(reference)
                        idle.append(worker)
                        rows_done += rows_per_shard[task.shard]
                        metrics.shard_done(task.job.variant, receipt, time.monotonic() - begun)
                        continue
                    except RayActorError as error:
                        again = self._after_death(task, self.nodes.get(worker, ""), error)
                    except RayTaskError as error:
                        again = self._after_failure(task, error)
                        # a device error or a lack of memory may have left the process unusable
                        ray.kill(self.actors[worker], no_restart=False)
                    metrics.worker_lost()
                    if again is None:
                        rows_done += rows_per_shard[task.shard]
                        if receipt := shard_receipt(task.out, task.shard):
                            metrics.shard_done(task.job.variant, receipt)
                    else:
                        pending.appendleft(again)
                        waiting[task.job.variant] += rows_per_shard[task.shard]
                    starting[self.actors[worker].ready.remote()] = worker
                while idle and pending:
                    worker, task = idle.popleft(), replace(pending.popleft(), attempt=uuid.uuid4().hex)
                    running[self.actors[worker].encode.remote(task)] = (worker, task, time.monotonic())
                    waiting[task.job.variant] -= rows_per_shard[task.shard]
                metrics.show(waiting, len(idle) + len(running))
                seen = rows_done + sum(read_breadcrumb(task)[1] for _, task, _ in running.values())
                meter.advance(max(0, seen - meter.done), f"{len(idle) + len(running)} workers")

    def _room(self) -> int:
        """How many workers to start."""
        if self.num_workers:
            return self.num_workers
        resources = ray.cluster_resources()
        if self.device == "cuda":
            if not resources.get("GPU"):
                raise UserError("Ray sees no GPU: start it on GPU machines, or set device to cpu.")
            return int(resources["GPU"])
        return max(1, int(resources.get("CPU", 1)) // self.threads)

    def _start_actors(self, count: int) -> None:
        remote_class = ray.remote(self.actor_class).options(  # type: ignore[attr-defined]
            num_cpus=self.threads,
            num_gpus=1 if self.device == "cuda" else 0,
            max_restarts=-1,
            max_task_retries=0,  # this driver re-queues, so that it can count
            runtime_env={"env_vars": {"PYTHONPATH": ROOT}},
        )
        self.actors = [remote_class.remote(*self.arguments) for _ in range(count)]

    def _is_ready(self, worker: int, reference: Any, tries: Counter[int]) -> bool:
        """Whether a worker that was asked to come up has done so; work goes to no other."""
        try:
            self.nodes[worker] = ray.get(reference)
            tries[worker] = 0
            return True
        except RayError as error:
            _raise_user_error(error)
            tries[worker] += 1
            if tries[worker] >= STARTS:
                raise UserError(
                    f"an encoding worker does not start ({_short(error)}): see the logs in /tmp/ray."
                ) from error
            time.sleep(POLL)
            return False

    def _after_death(self, task: Task, node: str, error: RayActorError) -> Task | None:
        """The task to do again after its worker's process died; None if another run has finished it."""
        blame, _ = read_breadcrumb(task)
        _clean(task)
        if shard_receipt(task.out, task.shard) is not None:
            return None
        if node and not any(entry["Alive"] and entry["NodeID"] == node for entry in ray.nodes()):
            return task  # the machine went, which is nobody's fault
        if blame == SOME_ROW:
            return replace(task, one_by_one=True)
        if blame == NO_ROW:
            return self._count_failure(task, error)
        self.kills[task.out, task.shard, blame] += 1
        if self.kills[task.out, task.shard, blame] < KILLS:
            return task
        return replace(task, quarantined=tuple(sorted({*task.quarantined, blame})))

    def _after_failure(self, task: Task, error: RayTaskError) -> Task | None:
        """The task to do again after it raised; None if another run has finished it."""
        _raise_user_error(error)
        _clean(task)
        if shard_receipt(task.out, task.shard) is not None:
            return None
        return self._count_failure(task, error)

    def _count_failure(self, task: Task, error: Exception) -> Task:
        self.failures[task.out, task.shard] += 1
        if self.failures[task.out, task.shard] >= FAILURES:
            raise UserError(
                f"encoding the raw shard {task.shard} at {task.job.variant} failed {FAILURES} times ({_short(error)}): "
                "mend the cause (memory, disk space, device), then start the same command again."
            ) from error
        return task


def _clean(task: Task) -> None:
    """Removes what a dead try has left."""
    task.breadcrumb.unlink(missing_ok=True)
    shutil.rmtree(task.breadcrumb.with_suffix(""), ignore_errors=True)


def _raise_user_error(error: Exception) -> None:
    cause = getattr(error, "cause", None)
    if isinstance(cause, UserError):
        raise type(cause)(str(cause)) from error


def _short(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[-1].strip() if lines else type(error).__name__)[:300].rstrip(". ")
