"""The full-size tokenizer (width 128, multipliers 1, 2, 4, 4, 4, d = 48): time over its convolutions' own, rates, memory, streaming.

    python -m benchmarks.tokenizer --threads 2 --keep          some twenty minutes
    python -m benchmarks.tokenizer --device cuda --keep        on a GPU, in bfloat16

forward_over_conv_floor   on one core (or a GPU): time of the encoder's forward / (FLOPs of its convolutions / rate of one large conv3d),
                          both the best of their repetitions in this process; FLOPs as torch.utils.flop_counter counts them
stream_memory_ratio       peak memory of encoding and decoding 129 frames as a stream over that of 17 frames at once, both above what the
                          loaded tokenizer takes, each in a process of its own
compiled_step_ratio       time of a training step (forward and backward) with the recipe's `compile` over that without, of the recipe
                          shapes-all-terms.yaml (its width is a quarter) at 17x64x64; `compile_seconds` is what the first step took longer
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import hardware, peak_memory, report
from benchmarks.shapes_data import RECIPE
from benchmarks.timing import best, by_turns, wait
from tokenizer import settings
from tokenizer.objective import Generator
from tokenizer.streaming import decode_stream, encode_stream
from tokenizer.tokenizer import TokenizerConfig, VideoTokenizer
from tokenizer.train_config import TokenizerTrainConfig

LARGE = (256, 9, 64, 64)  # channels, frames, height, width of the convolution that sets the rate


def main() -> None:
    """Runs all measurements, or the one that `--only` names (in a process of its own)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the rates and of the stream (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results/")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads if args.only else 1)
    if args.only:
        kind, frames, size = args.only.split(",")
        part = compiled_step if kind == "compiled" else partial(memory_and_rate, kind)
        print(json.dumps(part(int(frames), int(size), args.device)))
        return
    results: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16) if args.device == "cpu" else (torch.bfloat16,):
        name = str(dtype).removeprefix("torch.")
        ratio, details = conv_floor(dtype, args.device, args.repeat)
        results[
            "forward_over_conv_floor"
            if name == "float32" or args.device != "cpu"
            else f"forward_over_conv_floor_{name}"
        ] = ratio
        results |= {f"{key}_{name}": value for key, value in details.items()}
    for size in args.sizes:
        for kind in ("encode", "decode"):
            one = alone(kind, 17, size, args)
            results[f"{kind}_17x{size}x{size}_clips_per_second"] = round(1 / one["seconds"], 4)
            results[f"{kind}_17x{size}x{size}_peak_gb"] = round(one["peak_gb"], 3)
    whole, stream = alone("both", 17, args.sizes[0], args), alone("stream", 129, args.sizes[0], args)
    results["stream_memory_ratio"] = round(stream["above_gb"] / whole["above_gb"], 3)
    results["stream_129_frames_seconds"] = round(stream["seconds"], 2)
    results |= alone("compiled", 17, 64, args)
    report(
        "tokenizer" if args.device == "cpu" else "tokenizer_gpu",
        hardware(args.device, args.threads),
        results,
        args.keep,
    )


def build(device: str, dtype: torch.dtype = torch.float32) -> VideoTokenizer:
    """The full-size tokenizer with random kernels in all temporal slices (a fresh one's are mostly zero, which may be faster)."""
    torch.manual_seed(0)
    tokenizer = VideoTokenizer(TokenizerConfig()).eval()
    for parameter in tokenizer.parameters():
        if parameter.ndim == 5:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return tokenizer.to(device, dtype)


def clip(frames: int, size: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Noise [1, 3, frames, size, size] in [-1, 1]."""
    return (torch.rand(1, 3, frames, size, size) * 2 - 1).to(device, dtype)


@torch.inference_mode()
def conv_floor(dtype: torch.dtype, device: str, repeat: int) -> tuple[float, dict[str, float]]:
    """The encoder's forward over its convolutions' floor, at 17x128x128."""
    channels, *grid = LARGE
    conv = torch.nn.Conv3d(channels, channels, 3, padding=1).to(device, dtype, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    input = torch.randn(1, channels, *grid, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    tokenizer, video = build(device, dtype), clip(17, 128, device, dtype)
    flops = []
    for run in (lambda: conv(input), lambda: tokenizer.encoder(video)):
        with FlopCounterMode(display=False) as counter:
            run()  # also warms up
        flops.append(counter.get_total_flops())
    # by turns, so that a machine whose speed drifts is fair to both
    times = [
        (best(lambda: conv(input), device, 2), best(lambda: tokenizer.encoder(video), device, 1)) for _ in range(repeat)
    ]
    rate = flops[0] / min(one for one, _ in times)
    seconds = min(other for _, other in times)
    details = {
        "conv3d_gflops_per_second": round(rate / 1e9, 1),
        "encoder_tflop": round(flops[1] / 1e12, 3),
        "encoder_seconds": round(seconds, 3),
    }
    return round(seconds / (flops[1] / rate), 3), details


def alone(kind: str, frames: int, size: int, args: argparse.Namespace) -> dict[str, float]:
    """One part in a process of its own."""
    words = ["--only", f"{kind},{frames},{size}", "--device", args.device, "--threads", str(args.threads)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tokenizer", *words], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@torch.inference_mode()
def memory_and_rate(kind: str, frames: int, size: int, device: str) -> dict[str, float]:
    """Seconds of one call, its peak memory and that above the loaded tokenizer, in 10^9 bytes."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tokenizer = build(device, dtype)

    def stream() -> None:
        pieces = (clip(1 if step == 0 else 4, size, device, dtype) for step in range(1 + (frames - 1) // 4))
        for pixels in decode_stream(tokenizer, encode_stream(tokenizer, pieces)):
            del pixels

    if kind == "stream":
        before, started = _now(device), time.perf_counter()
        stream()
    else:
        video = clip(frames, size, device, dtype)
        latent = torch.randn(
            1, tokenizer.quantizer.dim, 1 + (frames - 1) // 4, size // 16, size // 16, device=device, dtype=dtype
        )
        if device != "cpu":
            tokenizer.decode(tokenizer.encode(video))  # chooses kernels
            wait(device)
        before, started = _now(device), time.perf_counter()
        code = tokenizer.encode(video) if kind in ("encode", "both") else None
        if kind == "decode":
            tokenizer.decode_latent(latent)
        elif kind == "both" and code is not None:
            tokenizer.decode(code)
    wait(device)
    seconds, peak = time.perf_counter() - started, _peak(device)
    return {"seconds": seconds, "peak_gb": peak, "above_gb": peak - before}


def compiled_step(frames: int, size: int, device: str) -> dict[str, float]:
    """What `torch.compile` gains in training, and what it costs at the beginning."""
    recipe = settings.load(TokenizerTrainConfig, RECIPE)
    video = (torch.rand(4, 3, frames, size, size) * 2 - 1).to(device)
    steps = []
    for compiled in (False, True):
        generator = Generator(VideoTokenizer(recipe.tokenizer).to(device).train(), recipe.precision)
        if compiled:
            generator.tokenizer.encoder.compile()
            generator.tokenizer.decoder.compile()

        def step(generator: Generator = generator) -> None:
            generator(video)["video"].square().mean().backward()
            generator.zero_grad()

        steps.append(step)
    first = [best(step, device, 1) for step in steps]
    times = by_turns(steps, 5, device)
    return {"compiled_step_ratio": round(times[1] / times[0], 3), "compile_seconds": round(first[1] - times[1], 1)}


def _now(device: str) -> float:
    """Memory in use in 10^9 bytes; peaks count from here on (on a CPU from the start of the process, whose first call this is)."""
    if device == "cpu":
        return _peak(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 1e9


def _peak(device: str) -> float:
    """Peak memory so far in 10^9 bytes."""
    if device == "cpu":
        return peak_memory() / 1e9
    return torch.cuda.max_memory_allocated() / 1e9


if __name__ == "__main__":
    main()
