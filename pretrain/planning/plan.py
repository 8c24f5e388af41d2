"""`videoar plan`: everything that is known of a run before it starts, as one dictionary.

videoar plan --config pretrain/configs/t2v-4b.yaml --gpus 128 --gpu h100
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from pretrain.config import PretrainConfig
from pretrain.planning.gpus import Gpu, load_gpu
from pretrain.planning.loads import StageLoad, stage_loads
from pretrain.planning.search import DAY, Found, Option, Search, layout_name
from pretrain.planning.shapes import Shapes, read_shapes
from pretrain.planning.storage import folders
from tokenizer.errors import UserError

MODES = ("none", "selective", "full")


def make(run: PretrainConfig, gpus: int, kind: str, as_written: bool = False) -> dict[str, Any]:
    """The plan of a run.

    Args:
        run: its settings.
        gpus: how many.
        kind: of GPU: a name in gpus.yaml, or a file.
        as_written: take the settings' own layout and micro batches, and search for no other.

    Raises:
        UserError: codes are neither there nor expected, the kind is unknown, or no layout divides or fits.
    """
    if gpus < 1:
        raise UserError(f"{gpus} GPUs can train nothing: give at least 1.")
    gpu = load_gpu(kind)
    if run.parallel.fp8 != "none" and gpu.fp8_tflops is None:
        raise UserError(
            f"parallel.fp8 is {run.parallel.fp8}, which '{kind}' does not compute in: choose another kind, or fp8: none."
        )
    run = run.rooted()
    shapes = read_shapes(run)
    # precision auto is bfloat16 on every kind of GPU that there is a data sheet of
    kept = replace(run.parallel, precision="bfloat16") if run.parallel.precision == "auto" else run.parallel
    loads = stage_loads(run, shapes)
    search = Search(loads, kept, gpus, gpu)
    written: Option | str
    try:
        written = search.as_written(kept)
    except UserError as error:
        if as_written:
            raise
        written = str(error)
    found = None if as_written else search.run()
    best = found.best if found else written
    assert isinstance(best, Option)
    return {
        "network": _network(shapes),
        "gpus": {"number": gpus, "kind": kind, **asdict(gpu)},
        "layout": _layout(best),
        "stages": [
            _stage(load, option, best, gpu, search, number)
            for number, (load, option) in enumerate(zip(loads, best.stages))
        ],
        "total": _total(best, loads, gpu),
        "as_written": written if isinstance(written, str) else {**_layout(written), "days": written.days},
        **(_others(found, loads, gpu) if found else {}),
        "folders": [asdict(folder) for folder in folders(run, shapes)],
        "encoding": _encoding(run, shapes, gpus, gpu),
        "notes": list(shapes.notes),
    }


def _network(shapes: Shapes) -> dict[str, Any]:
    model = shapes.plan.model
    return {
        "parameters": model.parameter_count(),
        "layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "heads": model.num_attention_heads,
        "bits": model.bits,
    }


def _layout(option: Option) -> dict[str, Any]:
    parallel = option.parallel
    return {
        "name": layout_name(parallel, option.world),
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "virtual_pipeline_size": parallel.virtual_pipeline_size,
        "data_parallel_size": option.world
        // (parallel.tensor_parallel_size * parallel.context_parallel_size * parallel.pipeline_parallel_size),
        "recompute": parallel.recompute,
        "micro_batch_size": [one.stage.micro_batch_size for one in option.stages],
        "token_budget": [one.stage.token_budget for one in option.stages],
    }


def _stage(load: StageLoad, option: Any, best: Option, gpu: Gpu, search: Search, number: int) -> dict[str, Any]:
    stage = option.stage
    tokens, flops = load.tokens_a_step(stage), load.flops_a_step(stage)
    shapes = []
    for one in load.loads:
        bucket, clips = one.clips.manifest.buckets[one.clips.number], load.clips(one, stage)
        shapes.append(
            {
                "folder": one.clips.path,
                "pixels": f"{bucket.height}x{bucket.width}x{1 + 4 * (one.clips.num_frames - 1)}",
                "clips": len(one.clips),
                "tokens_a_clip": one.tokens,
                "sequence": one.layout.length,
                "clips_a_step": clips,
                "share_of_steps": one.share,
                "epochs": stage.steps * one.share * clips / len(one.clips),
                "flops_a_clip": one.flops.model,
            }
        )
    modes = {mode: load.memory(replace(best.parallel, recompute=mode), best.world, stage) for mode in MODES}  # type: ignore[arg-type]
    return {
        "name": stage.name,
        "steps": stage.steps,
        "window": load.model.window,
        "shapes": shapes,
        "microbatches": stage.global_batch_size // stage.micro_batch_size // _layout(best)["data_parallel_size"],
        "memory": {**asdict(option.memory), "total": option.memory.total, "usable": gpu.usable_bytes},
        "activations_by_recompute": {
            mode: {"kept": one.activations, "working": one.working, "total": one.total} for mode, one in modes.items()
        },
        "seconds": {**asdict(option.time), "total": option.time.total},
        "tokens_a_step": tokens,
        "flops_a_step": flops,
        "mfu": flops / option.time.total / (best.world * 1e12 * gpu.bf16_tflops),
        "tokens_a_second": tokens / option.time.total,
        "tokens": stage.steps * tokens,
        "flops": stage.steps * flops,
        "days": option.days,
    }


def _total(best: Option, loads: list[StageLoad], gpu: Gpu) -> dict[str, float]:
    flops = sum(one.stage.steps * load.flops_a_step(one.stage) for one, load in zip(best.stages, loads))
    tokens = sum(one.stage.steps * load.tokens_a_step(one.stage) for one, load in zip(best.stages, loads))
    return {
        "days": best.days,
        "gpu_hours": best.days * 24 * best.world,
        "flops": flops,
        "tokens": tokens,
        "mfu": flops / (best.days * DAY) / (best.world * 1e12 * gpu.bf16_tflops),
    }


def _others(found: Found, loads: list[StageLoad], gpu: Gpu) -> dict[str, Any]:
    return {
        "next": [{"name": layout_name(one.parallel, one.world), "days": one.days} for one in found.next],
        "alone": [
            {
                "stage": load.config.name,
                "name": layout_name(one.parallel, one.world),
                "days": one.days,
                "micro_batch_size": one.stages[0].stage.micro_batch_size,
            }
            for load, one in zip(loads, found.alone)
        ],
        "rejected": [asdict(one) for one in found.rejected],
        "tried": found.tried,
    }


def _encoding(run: PretrainConfig, shapes: Shapes, gpus: int, gpu: Gpu) -> dict[str, float]:
    """Of what is not there yet, on the same GPUs."""
    flops = sum(folder.encode_flops for folder in folders(run, shapes) if not folder.there)
    seconds = flops / (1e12 * gpu.bf16_tflops * gpu.encode_share)
    return {"flops": flops, "gpu_hours": seconds / 3600, "days": seconds / gpus / DAY}
