"""What a run starts from: its position in stages and data, the checkpoint that it goes on from, or an exported model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference.checkpoint import StoredWeights
from inference.config import ModelConfig
from pretrain.config import PretrainConfig
from pretrain.stages import Plan
from tokenizer.errors import UserError

LATER = ("scales", "num_frames", "fps", "window")
"""What a later run or stage may change of a network: no weight depends on it."""


@dataclass
class Position:
    """How far a run is.

    Args:
        stage: the stage that is next or under way.
        step: its finished steps.
        global_step: finished steps of all stages.
        stream: where its data stands; None: at its beginning.
        batches: of the stage's data that are behind it: one a step, and those left out.
        skips: all batches of the run that are left out (`Skips.to_list`).
        spikes: the statistic that tells spikes (`Spikes.state_dict`).
        productive_seconds: of these steps, on rank 0 (`watching.ledger`).
    """

    stage: int = 0
    step: int = 0
    global_step: int = 0
    stream: dict[str, Any] | None = None
    batches: int = 0
    skips: list[dict[str, Any]] = field(default_factory=list)
    spikes: dict[str, Any] = field(default_factory=dict)
    productive_seconds: float = 0.0

    @classmethod
    def of(cls, common: dict[str, Any]) -> Position:
        """The position in a checkpoint's `common`."""
        stored = common["position"]
        return cls(**{"batches": stored["step"]} | stored)  # before any could be left out


def exported_weights(folder: str, plan: Plan) -> StoredWeights:
    """An exported model's weights, for a warm start.

    Args:
        folder: what `videoar export` wrote.
        plan: the run that starts from them.

    Raises:
        UserError: it is no exported model, is another network, or was trained on another tokenizer's codes.
    """
    weights = StoredWeights(folder)
    stored, now = weights.content["model"], plan.model.to_dict()
    theirs, mine = weights.content.get("tokenizer_fingerprint"), plan.fingerprint
    for name, old, new in [("tokenizer", theirs, mine), *((name, stored.get(name), now[name]) for name in now)]:
        if name not in LATER and old != new:
            raise UserError(
                f"from_export: {folder} has {name} {old}, this run has {new}: start from a model that fits."
            )
    return weights


def check_same_run(config: PretrainConfig, model: ModelConfig, common: dict[str, Any], folder: Path) -> None:
    """A checkpoint may go on with other settings, but not with another network or other stages than those it has seen."""
    stored, now = common["model"], model.to_dict()
    for name, value in stored.items():
        if name not in LATER and value != now.get(name):
            raise UserError(
                f"{folder} was trained with {name} = {value}, the settings say {now.get(name)}: name another `out` for a new run."
            )
    names: Sequence[str] = [stage["name"] for stage in common["config"]["stages"]]
    mine = [stage.name for stage in config.stages]
    seen = common["position"]["stage"] + (common["position"]["step"] > 0)
    if mine[:seen] != list(names[:seen]):
        raise UserError(
            f"{folder} went through the stages {names[:seen]}, the settings begin with {mine[:seen]}: name another `out`."
        )
