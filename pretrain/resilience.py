"""The settings of staying alive: what a run does about hangs, bad steps and failed saves; docs/staying-alive.md tells of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenizer.errors import check_each


@dataclass(frozen=True)
class ResilienceConfig:
    """What a run does when something goes wrong.

    Args:
        hang_timeout: seconds without a finished step, batch of validation or other sign of progress after which every process writes its
            stacks to the log and the run ends with status 4; above `data_timeout`, and enough for the first step, which compiles, and for
            loading and copying a checkpoint. 0: never.
        hang_monitor: who ends a run that hangs: "own", "nvidia" (the rank monitor of NVIDIA's resiliency extension, under ft_launcher), or
            "auto": nvidia where it is there.
        heartbeat_every: seconds between two heartbeats of each process (`heartbeats/` in the run's folder).
        on_bad_step: what is done about a step whose loss or gradient is not finite, or is a spike: "stop" the run, "skip" its batch, or
            "rollback": load the newest checkpoint and leave out all batches from there on, the bad one included; before the first
            checkpoint, "skip".
        spike_factor: a loss or gradient norm is a spike if it lies so many times the usual spread above the median of the steps before;
            0: there are no spikes.
        spike_window: the steps whose median and spread (1.4826 times the median distance from the median) are meant; each stage judges none
            until it has made so many.
        max_bad_steps: bad steps of a stage that are skipped or rolled back; the next one stops the run.
        save_tries: how often the last save of a run is tried, at its end or a signal; one in between that fails (a full disk) is
            tried again at its next turn.
        save_pause: seconds between two of these tries.
    """

    hang_timeout: float = 1800.0
    hang_monitor: Literal["auto", "own", "nvidia"] = "auto"
    heartbeat_every: float = 10.0
    on_bad_step: Literal["stop", "skip", "rollback"] = "stop"
    spike_factor: float = 0.0
    spike_window: int = 128
    max_bad_steps: int = 10
    save_tries: int = 3
    save_pause: float = 10.0

    def __post_init__(self) -> None:
        not_negative = ("hang_timeout", "spike_factor", "max_bad_steps", "save_pause")
        check_each(self, not_negative, lambda value: value >= 0, "be at least 0", "resilience.")
        check_each(self, ("heartbeat_every",), lambda value: value > 0, "be above 0", "resilience.")
        check_each(self, ("save_tries",), lambda value: value >= 1, "be at least 1", "resilience.")
        check_each(self, ("spike_window",), lambda value: value >= 2, "be at least 2", "resilience.")
