"""A plan as text for a terminal."""

from __future__ import annotations

from typing import Any

from evaluation.tables import markdown_table

PARTS = {
    "parameters": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "ema": "running mean",
    "activations": "activations",
    "working": "at work",
    "communication": "communication",
    "total": "together",
    "usable": "of",
}
TIMES = {
    "matmul": "products",
    "attention": "attention",
    "elementwise": "passes",
    "tensor": "TP",
    "context": "CP",
    "messages": "PP",
    "bubble": "bubble",
    "data": "DP",
    "optimizer": "optimizer",
    "total": "together",
}
REJECTED = 14
"""Lines of that table."""


def text(plan: dict[str, Any]) -> str:
    """All of it, in paragraphs."""
    parts = [_head(plan), _layout(plan), _stages(plan), _memory(plan), _seconds(plan), _days(plan), _storage(plan)]
    if "rejected" in plan:
        parts.append(_others(plan))
    parts += [_assumptions(plan["gpus"]), *([f"Note: {note}." for note in plan["notes"]])]
    return "\n".join(parts)


def _head(plan: dict[str, Any]) -> str:
    network, gpus = plan["network"], plan["gpus"]
    return (
        f"{network['parameters']:,} parameters ({network['layers']} layers, width {network['hidden_size']}, {network['heads']} heads, "
        f"{network['bits']} bits a token); {gpus['number']} x {gpus['kind']}\n"
    )


def _layout(plan: dict[str, Any]) -> str:
    layout = plan["layout"]
    lines = [f"Layout: {layout['name']}", "  parallel:"]
    for name in (
        "tensor_parallel_size",
        "context_parallel_size",
        "pipeline_parallel_size",
        "virtual_pipeline_size",
        "recompute",
    ):
        if layout[name] != 1:
            lines.append(f"    {name}: {layout[name]}")
    for number, (stage, size, budget) in enumerate(
        zip(plan["stages"], layout["micro_batch_size"], layout["token_budget"]), 1
    ):
        budgets = "" if budget is None else f", token_budget: {budget}"
        lines.append(f"  stage {number} ({stage['name']}): micro_batch_size: {size}{budgets}")
    written = plan["as_written"]
    if isinstance(written, str):
        lines.append(f"As the settings have it: {written}")
    else:
        lines.append(f"As the settings have it: {written['name']}: {written['days']:.2f} days")
    return "\n".join(lines) + "\n"


def _stages(plan: dict[str, Any]) -> str:
    rows = []
    for number, stage in enumerate(plan["stages"], 1):
        for shape in stage["shapes"]:
            rows.append(
                [
                    f"{number} {shape['folder'].rsplit('/', 1)[-1]}",
                    shape["pixels"],
                    f"{shape['tokens_a_clip']:,}",
                    f"{shape['clips_a_step']:,}",
                    f"{100 * shape['share_of_steps']:.0f}%",
                    f"{shape['clips']:,}",
                    f"{shape['epochs']:.2f}",
                    f"{shape['flops_a_clip'] / 1e12:.2f}",
                ]
            )
    return markdown_table(
        ["stage, codes", "pixels", "tokens a clip", "clips a step", "steps", "clips", "epochs", "TFLOP a clip"], rows
    )


def _memory(plan: dict[str, Any]) -> str:
    parts = {key: title for key, title in PARTS.items() if any(stage["memory"][key] for stage in plan["stages"])}
    rows = [
        [f"{number} {stage['name']}", *(f"{stage['memory'][key] / 1e9:.1f}" for key in parts)]
        for number, stage in enumerate(plan["stages"], 1)
    ]
    modes = [
        [f"{number} {stage['name']}"]
        + [
            f"{(one['kept'] + one['working']) / 1e9:.1f} ({one['total'] / 1e9:.1f})"
            for one in stage["activations_by_recompute"].values()
        ]
        for number, stage in enumerate(plan["stages"], 1)
    ]
    recompute = markdown_table(
        ["activations and work by recompute", *plan["stages"][0]["activations_by_recompute"]], modes
    )
    return markdown_table(["GB a GPU", *parts.values()], rows) + "\n" + recompute


def _seconds(plan: dict[str, Any]) -> str:
    rows = [
        [
            f"{number} {stage['name']}",
            *(f"{1e3 * stage['seconds'][key]:.0f}" for key in TIMES),
            f"{100 * stage['mfu']:.1f}%",
        ]
        for number, stage in enumerate(plan["stages"], 1)
    ]
    return markdown_table(["milliseconds a step", *TIMES.values(), "MFU"], rows)


def _days(plan: dict[str, Any]) -> str:
    titles = ["stage", "steps", "tokens a step", "tokens", "FLOPs", "tokens a second", "days"]
    rows = [
        [
            f"{number} {stage['name']}",
            f"{stage['steps']:,}",
            f"{stage['tokens_a_step']:,.0f}",
            f"{stage['tokens']:.2e}",
            f"{stage['flops']:.2e}",
            f"{stage['tokens_a_second']:,.0f}",
            f"{stage['days']:.2f}",
        ]
        for number, stage in enumerate(plan["stages"], 1)
    ]
    total = plan["total"]
    rows.append(["together", "", "", f"{total['tokens']:.2e}", f"{total['flops']:.2e}", "", f"{total['days']:.2f}"])
    return markdown_table(titles, rows) + f"{total['gpu_hours']:,.0f} GPU hours, MFU {100 * total['mfu']:.1f}%\n"


def _storage(plan: dict[str, Any]) -> str:
    rows = []
    for folder in plan["folders"]:
        sizes = [folder[key] for key in ("raw_bytes", "code_bytes", "text_bytes", "latent_bytes")]
        rows.append(
            [
                folder["path"].rsplit("/", 1)[-1] + (" (there)" if folder["there"] else ""),
                f"{folder['clips']:,}",
                f"{folder['hours']:,.0f}",
                *(f"{size / 1e9:,.1f}" for size in sizes),
                f"{folder['encode_flops']:.2e}",
            ]
        )
    together = [
        sum(folder[key] for folder in plan["folders"]) / 1e9
        for key in ("raw_bytes", "code_bytes", "text_bytes", "latent_bytes")
    ]
    rows.append(["together", "", "", *(f"{size:,.1f}" for size in together), ""])
    encoding = plan["encoding"]
    titles = [
        "codes",
        "clips",
        "hours",
        "raw shards (GB)",
        "code shards (GB)",
        "of it text",
        "latents (GB)",
        "encoder FLOPs",
    ]
    return markdown_table(titles, rows) + (
        f"Encoding what is not there: {encoding['gpu_hours']:,.1f} GPU hours, {encoding['days']:.2f} days on these GPUs\n"
    )


def _others(plan: dict[str, Any]) -> str:
    following = "; ".join(f"{one['name']}: {one['days']:.2f} days" for one in plan["next"])
    lines = [f"{plan['tried']:,} layouts were looked at. Next: {following}"]
    for number, one in enumerate(plan["alone"], 1):
        micro, days = one["micro_batch_size"], one["days"]
        lines.append(f"Stage {number} by itself: {one['name']}, micro_batch_size {micro}: {days:.2f} days")
    rejected = plan["rejected"]
    if not rejected:
        return "\n".join([*lines, "No sizes had to be left out.\n"])
    table = markdown_table(["left out", "because"], [[one["layout"], one["reason"]] for one in rejected[:REJECTED]])
    more = f"and {len(rejected) - REJECTED} more (--json has all)\n" if len(rejected) > REJECTED else ""
    return "\n".join(lines) + "\n\n" + table + more


def _assumptions(gpu: dict[str, Any]) -> str:
    share = {name: f"{100 * value:.0f}%" for name, value in gpu.items() if name.endswith("_share")}
    eight = ""
    if gpu["fp8_tflops"] is not None:
        eight = f", in FP8 {share['fp8_matmul_share']} of {gpu['fp8_tflops']:,g}"
    return (
        f"Assumed (docs/planning.md): products reach {share['matmul_share']} of {gpu['bf16_tflops']:,g} TFLOP/s{eight} (half at "
        f"{gpu['half_tokens']:g} rows), attention {share['attention_share']};\n{gpu['passes_forward']:g} passes a layer over memory, "
        f"forward, at {share['memory_share']} of {gpu['memory_gb_per_second']:,g} GB/s; collectives at {share['link_share']} of "
        f"{gpu['nvlink_gb_per_second']:g} GB/s in a node and\n{gpu['network_gb_per_second']:g} GB/s a GPU between nodes, "
        f"{gpu['latency_us']:g} us a hop; encoding {share['encode_share']}; {gpu['reserved_gb']:g} GB reserved, "
        f"{share['usable_share']} of the rest usable.\nNo failures, stragglers, saving or validation.\n"
    )
