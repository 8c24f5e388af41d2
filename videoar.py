"""The command line: one thin sub-command a verb. `videoar VERB --help` explains each."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from tokenizer import settings
from tokenizer.device import check_device
from tokenizer.errors import UserError
from tokenizer.launcher import end_with_launcher

Handler = Callable[[argparse.Namespace, list[str]], None]


def corpus(args: argparse.Namespace, _: list[str]) -> None:
    from data_pipelines.moving_shapes import write_corpus

    receipt = write_corpus(args.out, args.clips, args.seed, args.size, args.frames, validation=args.validation)
    print(
        f"{args.out}: {args.clips} training clips, {args.validation} validation clips, {receipt['prompts']} held-out prompts"
    )


def shards(args: argparse.Namespace, words: list[str]) -> None:
    from data_pipelines.shard_part import ShardsConfig
    from data_pipelines.shards import write_shards

    summary = write_shards(args.videos, args.out, settings.load(ShardsConfig, args.config, words))
    print(json.dumps(summary, indent=2))


def tokenizer_train(args: argparse.Namespace, words: list[str]) -> None:
    from data_pipelines.tokenizer_clips import training_clips
    from tokenizer.train import train
    from tokenizer.train_config import TokenizerTrainConfig

    config = settings.load(TokenizerTrainConfig, args.config, words)
    clips, validation = training_clips(config, args.shards, args.validation, args.workers)
    if train(config.resolved(len(clips)), clips, args.out, args.device, validation) is None:
        _stopped("tokenizer train")


def tokenizer_inflate(args: argparse.Namespace, _: list[str]) -> None:
    from tokenizer.inflation import inflate

    print(f"{args.out}: {inflate(args.image_checkpoint, args.out, args.dim).summary()}")


def tokenizer_reconstruct(args: argparse.Namespace, _: list[str]) -> None:
    from evaluation.reconstruct import reconstruct

    print(reconstruct(args.tokenizer, args.videos, args.out, args.size, args.frames, args.device), end="")


def encode(args: argparse.Namespace, words: list[str]) -> None:
    from data_pipelines.encode import EncodeConfig
    from data_pipelines.encode import encode as run

    config = settings.load(EncodeConfig, args.config, words)
    if args.submit:
        from cluster.ray_job import DESCRIPTION, RayJobConfig, submit_encode

        job = settings.load(RayJobConfig, args.job or DESCRIPTION)
        sys.exit(submit_encode(settings.to_dict(config), job, not args.no_wait))
    if args.job or args.no_wait:
        raise UserError("--job and --no-wait say how to submit: give --submit too, or leave them out.")
    run(config)


def pretrain(args: argparse.Namespace, words: list[str]) -> None:
    from pretrain.config import PretrainConfig
    from pretrain.train import main_entry

    if not main_entry(settings.load(PretrainConfig, args.config, words)):
        _stopped("pretrain")


def plan(args: argparse.Namespace, words: list[str]) -> None:
    from pretrain.config import PretrainConfig
    from pretrain.planning.plan import make
    from pretrain.planning.report import text

    made = make(settings.load(PretrainConfig, args.config, words), args.gpus, args.gpu, args.as_written)
    print(json.dumps(made, indent=1) if args.json else text(made), end="")


def samples(args: argparse.Namespace, words: list[str]) -> None:
    from pretrain.watching.sampler import yield_to_training
    from pretrain.watching.samples import make_samples

    yield_to_training()
    print(make_samples(args.run, args.checkpoint, words))


def _stopped(verb: str) -> None:
    print(f"videoar {verb}: stopped by a signal and saved; the same command goes on from there", file=sys.stderr)
    sys.exit(3)  # a chain of commands must not take it for finished


def submit(args: argparse.Namespace, words: list[str]) -> None:
    from cluster import slurm
    from cluster.slurm_config import DESCRIPTION, SlurmConfig

    job = settings.load(SlurmConfig, args.job or DESCRIPTION, words)
    if args.command == "encode":
        from cluster.slurm_encode import encode_work
        from data_pipelines.encode import EncodeConfig

        if args.stages:
            raise UserError("--stages makes a job of each stage of a training: leave it out for an encoding.")
        config = settings.load(EncodeConfig, args.config, args.given)
        chain = [encode_work(settings.to_dict(config), job, write=not args.dry_run)]
    else:
        from pretrain.submission import pretrain_work

        chain = pretrain_work(args.config, args.given, job, args.stages, write=not args.dry_run)
    for number in slurm.submit(job, chain, args.dry_run):
        print(number)


def export(args: argparse.Namespace, _: list[str]) -> None:
    from inference.weight_files import parse_size
    from pretrain.export import export as run
    from pretrain.model_card import Sampling

    size = parse_size(args.max_shard_size)
    sampling = Sampling(args.sample, args.sample_prompt)
    run(args.checkpoint, args.out, args.tokenizer, args.verify, args.dtype, size, sampling)
    print(f"{args.out}: ready for `videoar generate --model {args.out}`")


def generate(args: argparse.Namespace, _: list[str]) -> None:
    from inference.generate import Given, generate_file, generate_folder, generate_grid
    from inference.pipeline import VideoARPipeline
    from inference.prompt_file import Prompt, read_prompts

    if args.samples < 1 or args.batch_size < 1:
        raise UserError("--samples and --batch-size must be at least 1.")
    if not 0 <= args.seed < 2**62:
        raise UserError(f"the seed is {args.seed}: give one from 0 to 2^62 - 1.")
    if args.seconds is not None and not 0 < args.seconds < 10**6:
        raise UserError(f"a video of {args.seconds} seconds is impossible: give a length above 0.")
    if not args.temperature >= 0:
        raise UserError(f"the temperature is {args.temperature}: use 0 (the likelier bit) or more.")
    folder = not args.grid and (args.prompt_file is not None or args.samples > 1)
    if args.format and not folder:
        raise UserError(
            f"--format {args.format} is for the videos of a folder: leave it out, and let the ending of --out say it."
        )
    options: dict[str, Any] = {
        "guidance": _guidance(args.guidance),
        "temperature": args.temperature,
    }
    prompts = read_prompts(args.prompt_file) if args.prompt_file else [Prompt(args.prompt)]
    pipe = VideoARPipeline.from_pretrained(args.model, args.device, **_loading(args))
    frames = pipe.frames_for(args.seconds) if args.seconds is not None else args.frames
    given = Given(args.image, args.video, args.video_frames)
    many = (args.samples, args.seed, args.batch_size, given)
    if args.grid:
        out = generate_grid(pipe, [prompt.text for prompt in prompts], args.out, frames, *many, **options)
    elif folder:
        out = generate_folder(pipe, prompts, args.out, frames, *many, format=args.format or "mp4", **options)
    else:
        out = generate_file(pipe, args.prompt, args.out, frames, args.seed, given, **options)
    print(out)


def info(args: argparse.Namespace, _: list[str]) -> None:
    from tokenizer.video_metadata import read_metadata

    print(json.dumps(read_metadata(args.file), indent=2, ensure_ascii=False))


def serve(args: argparse.Namespace, words: list[str]) -> None:
    from inference.serving.config import ServeConfig
    from inference.serving.server import serve as run

    run(args.model, args.device, settings.load(ServeConfig, args.config, words), _loading(args))


def _loading(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    return {
        "dtype": None if args.dtype is None else getattr(torch, args.dtype),
        "weights": args.weights,
        "compiled": args.compile,
    }


def _guidance(text: str) -> str | float:
    from inference.guidance import SCHEDULES

    if text in SCHEDULES:
        return text
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"the guidance '{text}' is neither {', '.join(SCHEDULES)} nor a number: choose one of them.")
    return number


def evaluate_shapes(args: argparse.Namespace, _: list[str]) -> None:
    from evaluation.videos import frame_range, score_videos

    print(json.dumps(score_videos(args.videos, args.out, frame_range(args.frames)), indent=2))


def evaluate_continuation(args: argparse.Namespace, _: list[str]) -> None:
    from evaluation.continuation import evaluate_continuation as run

    options = {"guidance": _guidance(args.guidance), "temperature": args.temperature}
    result = run(
        args.model, args.videos, args.out, args.clips, args.frames, args.given_frames, args.seed, args.device, **options
    )
    print(json.dumps(result, indent=2))


def evaluate_reconstruction(args: argparse.Namespace, _: list[str]) -> None:
    from evaluation.reconstruction import evaluate_reconstruction as run
    from evaluation.reconstruction import summary

    if args.variants and (args.size is not None or args.frames is not None):
        raise UserError("--variants names whole sizes: give either it or --size and --frames.")
    size = 64 if args.size is None else args.size
    variants = (args.variants or f"{size}x{size}x{17 if args.frames is None else args.frames}").split(",")
    result = run(
        args.tokenizer, args.videos, args.out, variants, args.lpips_weights, args.i3d, args.batch_size, args.device
    )
    print(summary(result), end="")


def evaluate_fvd(args: argparse.Namespace, _: list[str]) -> None:
    from evaluation.fvd_protocol import evaluate_fvd as run
    from evaluation.fvd_protocol import summary

    result = run(
        args.real, args.out, args.i3d, args.generated, args.tokenizer, args.split, args.shape, args.fps, args.start, args.clips,
        args.seed, args.batch_size, args.device,
    )  # fmt: skip
    if result is not None:
        print(summary(result))


def evaluate_vbench(args: argparse.Namespace, _: list[str]) -> None:
    from evaluation.vbench import evaluate_vbench as run

    guidance = _guidance(args.guidance)
    wanted = [name for name in args.dimensions.split(",") if name]
    result = run(
        args.model, args.prompts, args.out, wanted, args.samples, args.seconds, args.seed, args.batch_size, args.device,
        args.generate_only, guidance=guidance, temperature=args.temperature,
    )  # fmt: skip
    if result is not None:
        print((args.out / "vbench.md").read_text(), end="")


def demo(args: argparse.Namespace, words: list[str]) -> None:
    from pretrain.demo import DemoConfig
    from pretrain.demo import demo as run

    run(settings.load(DemoConfig, args.config, words), args.out)


def ablate(args: argparse.Namespace, words: list[str]) -> None:
    from pretrain.ablation import ablate as run
    from pretrain.ablation import table
    from pretrain.ablation_config import AblationConfig

    if not args.table:
        run(settings.load(AblationConfig, args.config, words), args.out)
    print(table(args.out), end="")


def report(args: argparse.Namespace, _: list[str]) -> None:
    from evaluation.report import write_report

    print(write_report(args.run))


def status(args: argparse.Namespace, _: list[str]) -> None:
    if args.html is not None:
        from evaluation.run_page import write_page

        print(write_page(args.run, args.html))
        return
    from evaluation.run_status import run_status, status_text

    found = run_status(args.run)
    print(json.dumps(found, indent=2) if args.json else status_text(found), end="\n" if args.json else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "videoar", allow_abbrev=False, description="VideoAR: from video files to a model that generates videos."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(
        group,
        name: str,
        handler: Handler,
        text: str,
        config: str | None = None,
        config_help: str = "YAML file with settings",
    ) -> argparse.ArgumentParser:
        command = group.add_parser(name, allow_abbrev=False, help=text, description=text[0].upper() + text[1:] + ".")
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.set_defaults(handler=handler, settings_class=config)
        if config:
            command.add_argument("--config", type=Path, help=config_help)
            command.add_argument(
                "--help-settings", action=_HelpSettings, const=config, help="list every setting and its default"
            )
            command.epilog = (
                "Any setting can also be given as --name value (dotted: --optimizer.lr 1e-4); they win over the file."
            )
        return command

    command = add(verbs, "corpus", corpus, "write the moving-shapes corpus: real encoded video files with captions")
    _folder(command, "--out", "the folder to make")
    command.add_argument("--clips", type=int, default=1600, help="training clips (default: %(default)s)")
    command.add_argument("--validation", type=int, default=192, help="validation clips (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the whole corpus (default: %(default)s)")
    command.add_argument("--size", type=int, default=64, help="height and width in pixels (default: %(default)s)")
    command.add_argument("--frames", type=int, default=17, help="frames a clip (default: %(default)s)")

    command = add(
        verbs,
        "shards",
        shards,
        "pack video files into streaming (MDS) shards",
        "data_pipelines.shard_part:ShardsConfig",
    )
    _folder(
        command,
        "--videos",
        "a folder of videos, a CSV with the columns path,caption, or the UCF-101 layout Class/v_*.avi",
    )
    _folder(command, "--out", "the folder for the shards")

    group = verbs.add_parser(
        "tokenizer", help="train the video tokenizer, start it from an image tokenizer, or look at what it keeps"
    ).add_subparsers(dest="action", required=True, metavar="ACTION")
    command = add(
        group,
        "train",
        tokenizer_train,
        "train the tokenizer on raw shards; under torchrun for more than one process",
        "tokenizer.train_config:TokenizerTrainConfig",
    )
    _folder(command, "--shards", "raw shards")
    _folder(command, "--out", "the folder for the tokenizer; a killed run goes on from here")
    command.add_argument(
        "--validation", type=Path, help="raw shards of clips to validate on (default: validation_share of --shards)"
    )
    command.add_argument("--device", default="cpu", help="where to train: cpu or cuda (default: %(default)s)")
    command.add_argument(
        "--workers",
        type=int,
        default=2,
        help="threads a process that decode, for splits too large for memory (default: %(default)s)",
    )
    command = add(
        group,
        "inflate",
        tokenizer_inflate,
        "make a video tokenizer out of an image tokenizer: it encodes and decodes single frames as that one did, and has still to be "
        "trained on clips",
    )
    command.add_argument(
        "--image-checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help='in the layout of the published Infinity image tokenizers: a .pth file of {"vae": weights}, or .safetensors',
    )
    _folder(command, "--out", "the folder for the tokenizer and inflation.json, which says what became of every weight")
    command.add_argument(
        "--dim",
        type=int,
        metavar="N",
        help="bits a token of the video tokenizer (default: as the image tokenizer). With another number the encoder's last and the "
        "decoder's first layer start untrained",
    )
    command = add(
        group, "reconstruct", tokenizer_reconstruct,
        "show what the tokenizer keeps: each video beside its reconstruction, and a table",
    )  # fmt: skip
    command.epilog = (
        "Without --size each side becomes the nearest multiple of 16, so that every video keeps its aspect ratio; large videos\n"
        "need much memory, and --size helps. Without --frames a video's middle is taken, as many frames as it has, 1+4n and at\n"
        "most 65, fewer where they are so large that the clip would have more pixels than 65 frames of 384x672."
    )
    _folder(command, "--tokenizer", "a trained tokenizer")
    _folder(command, "--videos", "a video file, a folder of videos, or a CSV with the columns path,caption")
    _folder(command, "--out", "the folder to make: an mp4 a video (left the original), table.csv and table.md")
    command.add_argument(
        "--size",
        type=int,
        help="height and width in pixels, a multiple of 16; what does not fit is cropped (default: own)",
    )
    command.add_argument("--frames", type=int, help="frames of each clip, 1+4n (default: as many as the video has)")
    command.add_argument("--device", default="cpu", help="where to run (default: %(default)s)")

    command = add(
        verbs, "encode", encode, "encode raw shards to code shards with Ray actors (--shards DIR --tokenizer DIR --out DIR)",
        "data_pipelines.encode:EncodeConfig",
    )  # fmt: skip
    command.add_argument(
        "--submit",
        action="store_true",
        help="run the driver as a job of the Ray cluster whose dashboard is at --ray-address (http://HEAD:8265)",
    )
    command.add_argument(
        "--job",
        type=Path,
        metavar="FILE",
        help="with --submit: the job's description (default: cluster/jobs/encode.yaml)",
    )
    command.add_argument("--no-wait", action="store_true", help="with --submit: do not follow the job's log")

    add(
        verbs, "pretrain", pretrain, "train the transformer through its stages; under torchrun for more than one process",
        "pretrain.config:PretrainConfig",
    )  # fmt: skip

    command = add(
        verbs, "plan", plan,
        "before anyone books GPUs: memory, FLOPs, time, storage and the fastest layout of a pretraining run; no data need be there",
        "pretrain.config:PretrainConfig",
    )  # fmt: skip
    command.add_argument("--gpus", type=int, required=True, metavar="N", help="how many")
    command.add_argument(
        "--gpu",
        default="h100",
        metavar="KIND",
        help="a100, h100, h200, b200, or a YAML file of your own (default: %(default)s)",
    )
    command.add_argument(
        "--as-written", action="store_true", help="the settings' own layout, without a search for a faster one"
    )
    command.add_argument("--json", action="store_true", help="all numbers as JSON")

    command = add(
        verbs, "status", status, "how a pretraining run is doing: alive or not, how far, how fast, how good, and what has happened to it"
    )  # fmt: skip
    command.add_argument("run", type=Path, metavar="RUN", help="the folder `out` of a run, which may be going on")
    command.add_argument("--json", action="store_true", help="for programs")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page with curves and samples instead")

    command = add(
        verbs, "submit", submit, "run a training or an encoding as a SLURM job, which survives time limits, preemption and lost nodes",
        "cluster.slurm_config:SlurmConfig", config_help="settings of the command that runs (it is what `--config` is to it)",
    )  # fmt: skip
    command.add_argument("--command", choices=("pretrain", "encode"), default="pretrain", help="(default: %(default)s)")
    command.add_argument("--job", type=Path, metavar="FILE", help="the booking (default: cluster/jobs/slurm.yaml)")
    command.add_argument("--stages", action="store_true", help="a job a stage, each after the one before")
    command.add_argument("--dry-run", action="store_true", help="print the scripts, write and submit nothing")
    command.usage = "videoar submit --config FILE [--nodes N ...] [-- --SETTING VALUE of the command that runs ...]"

    command = add(
        verbs, "export", export, "turn a training checkpoint into config.json, model.safetensors and a model card"
    )
    _folder(
        command,
        "--checkpoint",
        "a checkpoint, the folder that holds them or its run (then the newest complete one), or RUN/best",
    )
    command.add_argument(
        "--tokenizer", type=Path, help="the tokenizer of the codes (default: the one the run was trained with)"
    )
    _folder(command, "--out", "the folder for the model")
    command.add_argument("--verify", action="store_true", help="compare the logits before and after")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the stored weights (default: as trained)")
    command.add_argument(
        "--max-shard-size", default="5gb", metavar="SIZE",
        help="larger weights go to several files with an index, such as 500mb (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--sample", choices=("auto", "yes", "no"), default="auto",
        help="a sample in the model card (default: auto, yes for up to 100 million parameters)",
    )  # fmt: skip
    command.add_argument("--sample-prompt", metavar="TEXT", help="what it shows (default: a caption of the last stage)")

    command = add(verbs, "generate", generate, "make videos from prompts, an image, or the start of a video")
    _folder(command, "--model", "an exported model")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="what to show")
    what.add_argument(
        "--prompt-file", type=Path,
        help="a CSV with a column caption (and name, for the files), or one prompt a line; --out is then a folder",
    )  # fmt: skip
    command.add_argument(
        "--out", type=Path, required=True,
        help="an .mp4, .gif or .png file; without an ending a folder for .png frames; a folder of videos with --prompt-file or --samples",
    )  # fmt: skip
    command.add_argument(
        "--grid",
        action="store_true",
        help="all videos in the one file --out, a row a prompt; .png: their middle frames",
    )
    command.add_argument(
        "--format", choices=("mp4", "gif", "frames"), help="of the videos of --prompt-file or --samples (default: mp4)"
    )
    given = command.add_mutually_exclusive_group()
    given.add_argument("--image", type=Path, help="the first frame")
    given.add_argument("--video", type=Path, help="a video to go on from")
    command.add_argument("--video-frames", type=int, help="use only the first so many frames of --video")
    length = command.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="length of the video")
    length.add_argument("--frames", type=int, help="length of the video in frames, 1+4n")
    command.add_argument("--samples", type=int, default=1, help="videos a prompt (default: %(default)s)")
    _drawing(command)
    command.add_argument("--batch-size", type=int, default=16, help="videos at once (default: %(default)s)")
    command.add_argument("--device", default="cpu", help="where to run (default: %(default)s)")
    _speed(command)

    command = add(
        verbs, "samples", samples, "make and score videos of a checkpoint while its run goes on, as `samples.every` does by itself",
        "pretrain.watching.config:SamplesConfig",
    )  # fmt: skip
    _folder(command, "--run", "the folder of a pretraining run; the sets are in its folder samples")
    command.add_argument("--checkpoint", metavar="NAME", help="such as step-4000, or best (default: the newest one)")

    command = add(verbs, "info", info, "print what a generated video says about itself: model, prompt, seed, guidance")
    command.add_argument("file", type=Path, help="an .mp4, .gif or .png, or a folder of frames")

    command = add(
        verbs, "serve", serve, "serve a model to programs and browsers until Ctrl-C",
        "inference.serving.config:ServeConfig",
    )  # fmt: skip
    _folder(command, "--model", "an exported model")
    command.add_argument("--device", default="cpu", help="where to run (default: %(default)s)")
    _speed(command)

    group = verbs.add_parser("evaluate", help="score videos").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    command = add(
        group, "shapes", evaluate_shapes, "read colour, shape, direction and speed off videos of moving shapes"
    )
    _folder(command, "--videos", "a CSV with the columns path,caption")
    command.add_argument("--out", type=Path, help="a JSON file for the scores")
    command.add_argument("--frames", metavar="FIRST:LAST", help="score frames FIRST to LAST-1 only, such as 16:33")
    command = add(
        group, "continuation", evaluate_continuation,
        "go on from the first frames of real videos of moving shapes, and compare with what really followed: how a model drifts",
    )  # fmt: skip
    _folder(command, "--model", "an exported model")
    _folder(command, "--videos", "a CSV with the columns path,caption")
    _folder(command, "--out", "the JSON file for the result")
    command.add_argument("--clips", type=int, help="the first so many videos (default: all)")
    command.add_argument("--frames", type=int, help="of each result, 1+4n (default: as trained)")
    command.add_argument(
        "--given-frames", type=int, default=5, help="real frames at the beginning, 1+4n (default: %(default)s)"
    )
    _drawing(command)
    command.add_argument("--device", default="cpu", help="where to run: cpu or cuda (default: %(default)s)")
    command = add(
        group, "reconstruction", evaluate_reconstruction,
        "score a tokenizer over many videos: PSNR, SSIM, LPIPS, rFVD, and how much of its bits it uses",
    )  # fmt: skip
    _folder(command, "--tokenizer", "a trained tokenizer")
    _folder(command, "--videos", "a CSV with the columns path,caption, a folder of videos, or a video file")
    _folder(command, "--out", "the folder to make: reconstruction.json and .png, and the reconstructed videos")
    command.add_argument("--size", type=int, help="height and width in pixels, a multiple of 16 (default: 64)")
    command.add_argument("--frames", type=int, help="frames a clip, 1+4n, from the middle of each video (default: 17)")
    command.add_argument(
        "--variants",
        help="several sizes, HEIGHTxWIDTHxFRAMES with commas, such as 32x32x17,64x64x17; scored apart and together",
    )
    command.add_argument(
        "--lpips-weights", type=Path,
        help="torchvision's AlexNet weights for LPIPS (default: where torch.hub keeps them; LPIPS is left out if they are not there)",
    )  # fmt: skip
    command.add_argument(
        "--i3d", type=Path,
        help="the torchscript file of I3D for rFVD, which is left out without it; loading it runs its code, so know its origin",
    )  # fmt: skip
    command.add_argument("--batch-size", type=int, default=8, help="clips at once (default: %(default)s)")
    command.add_argument("--device", default="cpu", help="where to run (default: %(default)s)")

    command = add(
        group, "fvd", evaluate_fvd,
        "gFVD of generated videos, or rFVD of a tokenizer, against real ones; under torchrun for more than one process",
    )  # fmt: skip
    _folder(command, "--real", "UCF-101's folder, any folder of videos, or a table with the columns path,caption")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--generated", type=Path, help="gFVD: a folder of `videoar generate`, or of any videos")
    what.add_argument("--tokenizer", type=Path, help="rFVD: the tokenizer, which reconstructs the real clips")
    _folder(command, "--out", "the JSON file for the score, with seeds, hashes and versions")
    command.add_argument(
        "--i3d", type=Path, help="the torchscript file of I3D; loading it runs its code, so know its origin"
    )
    command.add_argument(
        "--split", type=Path, action="append", default=[], metavar="LIST",
        help="take the real videos of this list of UCF-101, such as ucfTrainTestlist/trainlist01.txt; may be repeated",
    )  # fmt: skip
    command.add_argument(
        "--shape", default="128x128x17", help="of the clips, HEIGHTxWIDTHxFRAMES (default: %(default)s)"
    )
    command.add_argument("--fps", type=float, help="frames a second of the real clips (default: every frame)")
    command.add_argument(
        "--start", choices=("random", "centre"), default="random",
        help="where in a longer video its clip starts (default: %(default)s, by seed and name)",
    )  # fmt: skip
    command.add_argument("--clips", type=int, help="of each side, drawn with the seed (default: as many as both have)")
    command.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    command.add_argument("--batch-size", type=int, default=8, help="clips at once (default: %(default)s)")
    command.add_argument("--device", default="cpu", help="where to run: cpu or cuda (default: %(default)s)")

    command = add(
        group, "vbench", evaluate_vbench,
        "make VBench's videos, measure them with its package where that is installed, and write its table; under torchrun the "
        "processes share the prompts",
    )  # fmt: skip
    _folder(command, "--model", "an exported model")
    _folder(
        command, "--prompts", "VBench_full_info.json, one of VBench's plain lists, or its folder prompts_per_dimension"
    )
    _folder(command, "--out", "the folder for videos, results, vbench.json and vbench.md; the same command goes on")
    command.add_argument(
        "--dimensions", default="", help="to measure, with commas (default: all that the prompts are for)"
    )
    command.add_argument("--samples", type=int, default=5, help="videos a prompt (default: %(default)s)")
    command.add_argument("--seconds", type=float, help="length of the videos (default: as trained)")
    _drawing(command)
    command.add_argument("--batch-size", type=int, default=16, help="videos at once (default: %(default)s)")
    command.add_argument("--device", default="cpu", help="where to run: cpu or cuda (default: %(default)s)")
    command.add_argument("--generate-only", action="store_true", help="make the videos, and measure elsewhere")

    command = add(
        verbs, "demo", demo, "everything on this machine, from video files to a report", "pretrain.demo:DemoConfig"
    )
    command.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="the folder of the run (default: %(default)s)"
    )

    command = add(
        verbs, "ablate", ablate,
        "train and measure variations of a recipe with several seeds, and write the table with its spread; it goes on after a kill",
        "pretrain.ablation_config:AblationConfig",
    )  # fmt: skip
    _folder(command, "--out", "the folder for the runs, ablation.json, ablation.md and ablation.png")
    command.add_argument(
        "--table", action="store_true", help="only write and print the table of what is finished so far"
    )

    command = add(verbs, "report", report, "write report.html and metrics.json of a demo run again")
    command.add_argument(
        "--run", type=Path, default=Path("runs/demo"), help="the folder of the run (default: %(default)s)"
    )
    return parser


def _folder(command: argparse.ArgumentParser, name: str, text: str) -> None:
    command.add_argument(name, type=Path, required=True, help=text)


def _drawing(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--seed", type=int, default=0, help="of the first video; the others count on (default: %(default)s)"
    )
    command.add_argument("--guidance", default="t2v", help="ucf, t2v, or a number (default: %(default)s)")
    command.add_argument(
        "--temperature", type=float, default=1.0, help="of the drawn bits; 0: the likelier bit (default: %(default)s)"
    )


def _speed(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the transformer's numbers (default: as stored)"
    )
    command.add_argument(
        "--weights", choices=("plain", "fast", "int8"), default="plain",
        help="as stored, laid out for speed, or rounded to eight bits (torchao) (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--compile", action="store_true",
        help="on a GPU: torch.compile and CUDA graphs; the first video of a shape (size, length, videos at once, text tokens to the next "
        "multiple of 64) takes longer, later ones less",
    )  # fmt: skip


class _HelpSettings(argparse.Action):
    """Prints every setting of the verb's configuration class, named "module:class" so that only this imports it."""

    def __init__(self, option_strings: list[str], dest: str, const: str, help: str):
        super().__init__(option_strings, dest, nargs=0, const=const, help=help)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values, option_string=None
    ) -> None:
        module, name = str(self.const).split(":")
        print(settings.describe(getattr(import_module(module), name)))
        parser.exit()


def main(words: list[str] | None = None) -> int:
    """Runs one sub-command; a mistake of the user's ends with one sentence and status 2, a `Fault` with 1."""
    words = sys.argv[1:] if words is None else words
    end_with_launcher()
    parser = _parser()
    split = words.index("--") if words[:1] == ["submit"] and "--" in words else len(words)
    args, rest = parser.parse_known_args(words[:split])
    args.given = words[split + 1 :]  # for the command that `submit` starts
    if rest and not args.settings_class:
        parser.error(f"unknown words: {' '.join(rest)}; see videoar {args.verb} --help")
    try:
        check_device(getattr(args, "device", "cpu"))
        args.handler(args, rest)
    except UserError as error:
        print(f"videoar {args.verb}: {error}", file=sys.stderr)
        return error.status
    except BrokenPipeError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
