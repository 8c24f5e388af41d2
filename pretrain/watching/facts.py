"""What a run is, for those who read its folder without its code: `run.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from parallel.setup import ProcessInfo
from pretrain.planning.flops import count
from pretrain.stages import Plan, StagePlan
from tokenizer.files import write_whole

FILE = "run.json"


def write_facts(out: Path, plan: Plan, info: ProcessInfo, began: float, peak: float, source: str) -> None:
    """Writes the stages with their steps and the mean cost of a step, the network's size, and what MFU is held against.

    Args:
        out: the run's folder.
        plan, info: the run.
        began: when its first process began, seconds since the epoch.
        peak, source: of `device_peak`.
    """
    content = {
        "began": round(began, 3),
        "parameters": plan.model.parameter_count(),
        "devices": info.world_size,
        "peak_flops": peak,
        "peak_source": source,
        "stages": [stage_facts(stage) for stage in plan.stages],
    }
    write_whole(out / FILE, json.dumps(content, indent=1))


def stage_facts(stage: StagePlan) -> dict[str, Any]:
    """A stage's name and steps, and predicted tokens and model FLOPs of a step, as means over its sources, with whole texts and no frame
    hidden."""
    model, shares = stage.model, [source.proportion for source in stage.sources]
    tokens = flops = 0.0
    for source, manifest, share in zip(stage.sources, stage.manifests, shares):
        schedule = manifest.buckets[source.bucket or 0].scale_schedule
        clips = source.batch_size or stage.config.global_batch_size
        layout = model.layout(source.num_latent_frames, schedule)
        each = count(model, layout, torch.tensor([layout.text_length])).model
        tokens += share / sum(shares) * clips * source.num_latent_frames * schedule.tokens_per_frame
        flops += share / sum(shares) * clips * each
    return {"name": stage.config.name, "steps": stage.config.steps, "tokens_per_step": tokens, "flops_per_step": flops}
