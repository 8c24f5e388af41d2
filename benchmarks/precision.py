"""What other numbers cost: a trained model with its weights in bfloat16, laid out for speed, and rounded to eight bits.

    python -m benchmarks.precision --run runs/demo --keep          after `make demo`, some minutes

Each kind of weights is held against the plain float32 ones, on the run's held-out clips and prompts:

loss, bit_accuracy    teacher-forced, over all held-out clips
same_bits             share of bits whose likelier value is the same as in float32
shapes                share of clips generated for held-out prompts in which colour, shape, direction and speed each are read right (mean)
seconds               of generating them, pixels included
megabytes             of the transformer's weights
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import hardware, report
from data_pipelines.code_stream import collate
from data_pipelines.codes import CodeDataset
from evaluation.shapes import ATTRIBUTES, score
from inference.fast import Product
from inference.pipeline import VideoARPipeline
from inference.prompt_file import read_prompts
from pretrain.bitwise_loss import bitwise_loss
from tokenizer.progress import track
from tokenizer.sequence import video_inputs

KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16_fast": {"dtype": torch.bfloat16, "weights": "fast"},
    "int8": {"weights": "int8"},
    "bfloat16_int8": {"dtype": torch.bfloat16, "weights": "int8"},
}


def main() -> None:
    """Measures all kinds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="the folder of a demo")
    parser.add_argument("--codes", default="codes/validation/64x64x17", help="held-out codes, from there")
    parser.add_argument("--samples", type=int, default=6, help="clips a prompt")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, float] = {}
    signs = None
    for kind in track(list(KINDS), "kinds of weights"):
        pipe = VideoARPipeline.from_pretrained(args.run / "model", args.device, **KINDS[kind])
        forced, mine = teacher_forced(pipe, args.run / args.codes)
        signs = mine if signs is None else signs
        found = forced | {"same_bits": float((mine == signs).float().mean()), "megabytes": megabytes(pipe)}
        found |= generated(pipe, args.run / "corpus" / "prompts.csv", args.samples, args.guidance)
        results |= {f"{kind}/{name}": round(value, 5) for name, value in found.items()}
    report("precision", hardware(args.device, args.threads), results, args.keep)


@torch.inference_mode()
def teacher_forced(pipe: VideoARPipeline, codes: Path) -> tuple[dict[str, float], torch.Tensor]:
    """Loss and accuracy over all clips, and the likelier bits, bool [clips, V, d]."""
    data, config = CodeDataset(codes), pipe.config
    layout = config.layout(data.num_frames, data.schedule)
    loss, right, likelier = 0.0, 0.0, []
    for start in range(0, len(data), 32):
        batch = collate(
            [data[row] for row in range(start, min(start + 32, len(data)))], config.max_text_length, data.schedule
        ).to(pipe.device)
        inputs = video_inputs(batch.codes, layout, config.input_down)
        logits = pipe.model(inputs, layout, batch.text, batch.text_lengths)
        total, _, sums = bitwise_loss(logits, batch.tokens, layout)
        loss, right = loss + float(total), right + float(sums["bit_accuracy"])
        likelier.append(logits > 0)
    return {"loss": loss / len(data), "bit_accuracy": right / len(data)}, torch.cat(likelier)


def generated(pipe: VideoARPipeline, prompts: Path, samples: int, guidance: float) -> dict[str, float]:
    """The ruler's verdict on generated clips, and how long they took."""
    captions = [prompt.text for prompt in read_prompts(prompts) for _ in range(samples)]
    pipe(captions[0], guidance=guidance)  # the first call's set-up is not what is measured
    started = time.perf_counter()
    clips = pipe(captions, guidance=guidance, seed=0, batch_size=16).frames
    seconds = time.perf_counter() - started
    found = score(clips, captions)
    return {"shapes": sum(found[name] for name in ATTRIBUTES) / len(ATTRIBUTES), "seconds": seconds}


def megabytes(pipe: VideoARPipeline) -> float:
    """What the transformer's weights take."""
    weights = [*pipe.model.parameters(), *(part.weight for part in pipe.model.modules() if isinstance(part, Product))]
    total = 0
    for weight in weights:
        inner = getattr(weight, "__tensor_flatten__", None)
        parts = [weight] if inner is None else [getattr(weight, name) for name in inner()[0]]
        total += sum(part.nbytes for part in parts)
    return total / 1e6


if __name__ == "__main__":
    main()
