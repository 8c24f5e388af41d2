"""Generation: block steps against token steps and groups of tokens, against the machine's limit, and along a long video.

    python -m benchmarks.generate --keep                      two threads, bfloat16, some eight minutes
    python -m benchmarks.generate --device cuda --keep        on a GPU

L's network with random weights makes one 17x128x128 clip, class-conditional: 5 latent frames of 6 scales up to 8x8, 30 steps. Batch 1 and
both branches of the guidance ("ucf") in one batch of 2; pixels are not decoded, but where it is said.

speedup_vs_next_token    time of 1,280 steps of one token (5 x 16 x 16, what the same clip costs with the 8x tokenizers of the paper's
                         Table 2) over ours: a *simulation* of that schedule on the same network, with the same cache, weights and threads
speedup_vs_par4x         the same for PAR-4x's 323 steps: 4 tokens one by one, then fours; a simulation, too
step_over_limit          our time over the sum, step by step, of the larger of (weight bytes / bandwidth) and (FLOPs / matmul rate), both
                         measured here
limit_vs_next_token,     the same sum for those schedules over ours: the speedup between two perfect programs on this machine (keys and
limit_vs_par4x           values are not counted as bytes, which favours the many small steps)
first_frame_ratio        time until the first latent frame is drawn, times T, over the whole clip's
late_frame_ratio         time a frame at frame 60 over that at frame 20, window 8, a smaller network; the median of nine frames each
late_memory_growth       resident memory at frame 60 over that at frame 20
video_seconds_decoded    our clip with its pixels (the tokenizer at the paper's size)
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import psutil
import torch
from torch import Tensor

from benchmarks.report import hardware, report
from benchmarks.timing import best, wait
from benchmarks.training import network
from inference.config import ModelConfig
from inference.fast import prepare
from inference.model import VideoARTransformer
from inference.sampler import sample_frames
from inference.steps import decoding_steps
from tokenizer import ScaleSchedule, VideoTokenizer
from tokenizer.codes import Codes
from tokenizer.resample import to_values
from tokenizer.sequence import SequenceLayout
from tokenizer.tokenizer import TokenizerConfig

FRAMES, GUIDANCE = 5, "ucf"
NEXT_TOKEN = [1] * 1280
PAR_4X = [1] * 4 + [4] * 319
LATE = {"num_layers": 6, "hidden_size": 768, "num_attention_heads": 12}
"""The smaller network of the long video."""
WARM = 64
"""Steps of a simulated schedule before it is timed."""


def main() -> None:
    """Runs all measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name = "generate" if args.device == "cpu" else "generate_gpu"
    with torch.inference_mode():
        results = clip(args.device, args.repeat) | along(args.device)
    report(name, hardware(args.device, args.threads), results, args.keep)


def clip(device: str, repeat: int) -> dict[str, float | str]:
    """All that is measured on L's clip."""
    config = network("ucf101-l", ScaleSchedule.square(8, 6), FRAMES)
    torch.manual_seed(0)
    model, rate = make(config, device), measure_rate(device)
    made: list[tuple[Tensor, ...]] = []

    def ours() -> None:
        made[:] = list(frames(model))

    ours()
    seconds = best(ours, device, repeat)
    results: dict[str, float | str] = {
        "network": f"{config.num_layers} layers, width {config.hidden_size}",
        "late_network": f"{LATE['num_layers']} layers, width {LATE['hidden_size']}",
        "guidance": GUIDANCE,
        "batch": 1,
        "branches": 2,
        "dtype": "bfloat16",
        "pixels_decoded": "in video_seconds_decoded only",
        "video_seconds": round(seconds, 3),
    }
    others = {"par4x": PAR_4X} if device == "cuda" else {"par4x": PAR_4X, "next_token": NEXT_TOKEN}
    for label, sizes in others.items():
        # warm as ours is; on a GPU this captures its graphs, of which 1,280 would be too many
        simulate(model, sizes if device == "cuda" else sizes[:WARM])
        simulated = best(lambda sizes=sizes: simulate(model, sizes), device, repeat)
        results |= {
            f"speedup_vs_{label}": round(simulated / seconds, 2),
            f"{label}_seconds": round(simulated, 2),
        }
    least = limit(config, None, rate)
    results["step_over_limit"] = round(seconds / least, 3)
    for label, sizes in others.items():
        results[f"limit_vs_{label}"] = round(limit(config, sizes, rate) / least, 2)
    first = min(_until_first(model, device) for _ in range(repeat))
    results["first_frame_ratio"] = round(first * FRAMES / seconds, 3)
    tokenizer = VideoTokenizer(TokenizerConfig()).eval().to(device)
    codes = Codes(tuple(torch.stack(scale, dim=1) for scale in zip(*made)), config.schedule)
    decoding = best(lambda: tokenizer.decode(codes), device)
    results["video_seconds_decoded"] = round(seconds + decoding, 2)
    return results


def make(config: ModelConfig, device: str) -> VideoARTransformer:
    """A network with random weights, prepared for speed."""
    # drawn where they are used: a processor takes a minute for L's
    model = VideoARTransformer.empty(config).to(torch.bfloat16).to_empty(device=device).eval()
    for name, weight in model.named_parameters():
        weight.fill_(1) if "norm" in name else weight.normal_(std=0.02)
    prepare(model, "fast", compiled=device == "cuda")
    return model


def frames(model: VideoARTransformer, number: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """A clip of class 0, frame by frame."""
    device = model.head.weight.device
    label, length = torch.zeros(1, dtype=torch.long, device=device), torch.ones(1, dtype=torch.long, device=device)
    return sample_frames(model, label, length, [0], number, guidance=GUIDANCE)


def simulate(model: VideoARTransformer, sizes: Sequence[int]) -> None:
    """Another schedule's steps on this network: both branches, guidance, bits drawn and fed back; no change of grids to pay for."""
    config, device = model.config, model.head.weight.device
    layout = SequenceLayout(ScaleSchedule(((16, 16),)), FRAMES, 1)
    user = type("User", (), {})()
    steps = decoding_steps(model, layout, None, 2, user)
    positions = layout.positions(torch.ones(2, dtype=torch.long, device=device))  # [2, S, 3]
    draw, bits = torch.Generator().manual_seed(0), torch.zeros(1, 1, config.bits, dtype=torch.bool, device=device)
    text = model.embedding.embed_text(
        torch.zeros(2, dtype=torch.long, device=device), torch.tensor([False, True], device=device)
    )
    done = 0
    for size in sizes:
        values = to_values(bits[:, -1:].expand(2, size, -1))  # [2, n, d]
        place = torch.full((size,), int(done > 0), device=device)
        hidden = model.embedding.embed_video(values, place, place * 0, 1)
        start, end = 1 + done, 1 + done + size
        if done == 0:
            hidden, start = torch.cat([text, hidden], dim=1), 0
        conditional, unconditional = steps(hidden, model.rotary(positions[:, start:end]), None, size).chunk(2)
        logits = unconditional + 3.0 * (conditional - unconditional)
        bits = torch.rand(logits.shape, generator=draw).to(device) < torch.sigmoid(logits)
        done += size


@dataclass(frozen=True)
class Rate:
    """What the machine can do.

    Args:
        bandwidth: bytes a second.
        flops: of a large bfloat16 product, a second.
    """

    bandwidth: float
    flops: float


def measure_rate(device: str) -> Rate:
    """Measured now."""
    large = torch.ones(1 << 28, dtype=torch.int64, device=device)  # 2 GiB
    bandwidth = large.nbytes / best(lambda: large.sum(), device, 5)
    a, b = (torch.randn(4096, 4096, device=device).to(torch.bfloat16) for _ in range(2))
    return Rate(bandwidth, 2 * 4096**3 / best(lambda: torch.mm(a, b), device, 5))


def limit(config: ModelConfig, sizes: Sequence[int] | None, rate: Rate) -> float:
    """Seconds that the machine needs at least for steps of so many tokens each; None: our 30 steps."""
    width, inner, layers = config.hidden_size, config.feed_forward_size, config.num_layers
    weights = layers * (4 * width**2 + 3 * width * inner)
    total, cached = 0.0, 0
    for size in sizes or [height * wide for height, wide in config.scales] * FRAMES:
        rows = 2 * size  # both branches
        cached += size
        flops = 2 * weights * rows + 4 * width * layers * rows * cached
        total += max(2 * weights / rate.bandwidth, flops / rate.flops)
    return total


def along(device: str) -> dict[str, float]:
    """A long video with a window."""
    config = replace(network("ucf101-l", ScaleSchedule.square(8, 6), 12), **LATE, window=8)
    seconds, memory, last = [], [], time.perf_counter()
    for _ in frames(make(config, device), 65):
        wait(device)
        now = time.perf_counter()
        seconds.append(now - last)
        memory.append(torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss)
        last = now
    early, late = (statistics.median(seconds[at - 4 : at + 5]) for at in (20, 60))
    return {
        "late_frame_ratio": round(late / early, 3),
        "late_memory_growth": round(memory[60] / memory[20], 3),
    }


def _until_first(model: VideoARTransformer, device: str) -> float:
    return best(lambda: next(frames(model)), device)


if __name__ == "__main__":
    main()
