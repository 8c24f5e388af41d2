"""The settings of a pretraining run; YAML files under `pretrain/configs/` mirror these classes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from parallel.setup import ParallelConfig
from pretrain.bitwise_loss import TokenWeight
from pretrain.error_correction import ErrorCorrectionConfig
from pretrain.expected import ExpectedClips, ExpectedCodes
from pretrain.resilience import ResilienceConfig
from pretrain.watching.config import SamplesConfig, WatchConfig
from tokenizer.errors import UserError, check_each
from tokenizer.wandb_log import WandbConfig


@dataclass(frozen=True)
class NetworkConfig:
    """The network, but for what the codes fix (bits, grids, frames, width of the text features, number of classes).

    Args:
        num_layers, hidden_size, num_attention_heads, ffn_hidden_size: sizes; ffn_hidden_size null is 4 hidden_size.
        condition: "text", or "class" for one learnt token a class.
        max_text_length: text tokens a clip has at most.
        max_scales: scale embeddings allocated.
        rope: "multiscale" (Eq. 7) or "flat", the ablation's baseline.
        rope_theta: base of the rotary frequencies.
        rope_scaled_spatial: spatial positions are scaled to the finest grid.
        norm_eps: RMSNorm's epsilon.
        window: earlier frames that a frame sees, in the stages that set none of their own; null: all.
        context_block: each finished frame enters the context once more as its full sum.
        input_down: how accumulated features come to a scale's grid (Eq. 2).
    """

    num_layers: int = 24
    hidden_size: int = 1536
    num_attention_heads: int = 12
    ffn_hidden_size: int | None = None
    condition: Literal["text", "class"] = "text"
    max_text_length: int = 16
    max_scales: int = 16
    rope: Literal["multiscale", "flat"] = "multiscale"
    rope_theta: float = 10000.0
    rope_scaled_spatial: bool = False
    norm_eps: float = 1e-6
    window: int | None = None
    context_block: bool = False
    input_down: Literal["bilinear", "area"] = "bilinear"


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine decay in each stage.

    Args:
        lr: peak learning rate of the stages that set none of their own.
        warmup_steps: of the stages that set none of their own.
        min_lr_ratio: what is left of the peak at a stage's end.
        betas, eps, weight_decay: AdamW's; only matrices decay.
        clip_grad: largest gradient norm.
        ema_decay: of the running mean of the weights that is validated and exported in their place; 0: there is none.
    """

    lr: float = 1e-4
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip_grad: float = 1.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        check_each(self, ("ema_decay",), lambda value: 0 <= value < 1, "be from 0 to below 1", "optimizer.")


@dataclass(frozen=True)
class SourceConfig:
    """One ingredient of a stage's data.

    Args:
        dir: a folder of code shards (`videoar encode`), or its URL. Clips of several shapes in it take turns, each as often as any.
        num_frames: the first so many latent frames of each clip that has them, 1 for images; null: all.
        proportion: its share of the steps, relative to the other sources'.
        cache: a local folder for the shards of a URL.
        expected: what it will hold, for `videoar plan` before the codes are there; see its class.
    """

    dir: str
    num_frames: int | None = None
    proportion: float = 1.0
    cache: str | None = None
    expected: tuple[ExpectedClips, ...] = ()


@dataclass(frozen=True)
class StageConfig:
    """One stage. It starts from the weights and optimizer moments that the stage before left; its learning rate starts anew.

    Args:
        name: for the log.
        codes: the data; every step takes one source, so that all clips of a step have one shape.
        steps: optimizer steps.
        global_batch_size: clips a step = micro_batch_size x data-parallel ranks x microbatches.
        micro_batch_size: clips a forward pass.
        token_budget: video tokens of a forward pass: each source takes as many clips as come nearest to it, in as many microbatches as the
            two numbers above make, so that images and clips of all sizes cost about the same; null: as many clips of every source.
        lr: peak learning rate; null: the optimizer's.
        warmup_steps: null: the optimizer's.
        error_correction: flip ratios.
        window: earlier frames that a frame sees; null: the network's.
        p_mask: Random Frame Mask's probability.
        condition_dropout: probability that a clip's text is replaced by the null sequence.
        token_weight: "uniform" or "scale" (sqrt(HW / H_k W_k)).
        validation: a folder of code shards for validation, those of its clips that have the stage's largest number of frames; null: none.
        validation_cache: a local folder for its shards where it is a URL.
    """

    name: str
    codes: tuple[SourceConfig, ...]
    steps: int
    global_batch_size: int = 32
    micro_batch_size: int = 32
    token_budget: int | None = None
    lr: float | None = None
    warmup_steps: int | None = None
    error_correction: ErrorCorrectionConfig = field(default_factory=ErrorCorrectionConfig)
    window: int | None = None
    p_mask: float = 0.0
    condition_dropout: float = 0.1
    token_weight: TokenWeight = "uniform"
    validation: str | None = None
    validation_cache: str | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.micro_batch_size < 1 or self.global_batch_size % self.micro_batch_size:
            raise UserError(
                f"stage '{self.name}' has {self.steps} steps of {self.global_batch_size} clips in microbatches of "
                f"{self.micro_batch_size}: use at least 1 step and a global_batch_size that micro_batch_size divides."
            )
        if self.token_budget is not None and self.token_budget < 1:
            raise UserError(
                f"stage '{self.name}' has a token_budget of {self.token_budget}: choose at least 1, or null."
            )
        if self.window is not None and self.window < 1:
            raise UserError(f"stage '{self.name}' has a window of {self.window}: choose at least 1 frame, or null.")
        probabilities, where = ("p_mask", "condition_dropout"), f"stage '{self.name}': "
        check_each(self, probabilities, lambda value: 0 <= value <= 1, "be from 0 to 1", where)
        if not self.codes:
            raise UserError(f"stage '{self.name}' has no codes: list at least one source with its `dir`.")


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run through its stages.

    Args:
        root: the folder that all relative paths below start from.
        out: the folder for checkpoints, metrics.jsonl and config.yaml; a run in the same folder goes on.
        tokenizer: the folder of the tokenizer that made the codes; codes of another one are refused.
        stages: in their order.
        last_stage: stop after the stage of this name, so that each stage can be a job of its own; null: go through all.
        from_export: a folder that `videoar export` wrote: a new run starts from its weights; null: from random ones.
        network, optimizer, parallel, resilience, wandb, watch, samples: see their classes.
        expected: of all codes, for `videoar plan` before they are there; see its class.
        seed: of weights, data order, flips, frame masks and condition dropout.
        checkpoint_every: steps between two checkpoints; the end of a stage and a signal save one, too.
        save_in_background: the training goes on while a checkpoint is written; a copy of the state is held meanwhile.
        keep: the newest so many checkpoints stay, and the best one (`watch.best_metric`).
        validate_every: steps between two validations, and one at the end of each stage; 0: none.
        validation_batches: global batches of a validation.
        log_every: steps between two lines of metrics.jsonl.
        log_samples: for each step write which clips it trained on to samples-R.jsonl, R the data-parallel rank, to look into a step.
        data_workers: processes that read codes ahead; 0: none.
        data_timeout: seconds that a batch may take, downloads and their retries included, before the run stops.
        shards_per_window: clips are shuffled within windows of so many shards.
    """

    out: str
    tokenizer: str
    stages: tuple[StageConfig, ...]
    root: str = "."
    last_stage: str | None = None
    from_export: str | None = None
    network: NetworkConfig = field(default_factory=NetworkConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    expected: ExpectedCodes = field(default_factory=ExpectedCodes)
    seed: int = 0
    checkpoint_every: int = 500
    save_in_background: bool = True
    keep: int = 2
    validate_every: int = 0
    validation_batches: int = 4
    log_every: int = 10
    log_samples: bool = False
    data_workers: int = 0
    data_timeout: float = 600.0
    shards_per_window: int = 32

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError("a pretraining run needs at least one stage: list them under `stages`.")
        counts = ("checkpoint_every", "keep", "validation_batches", "log_every", "shards_per_window")
        check_each(self, counts, lambda value: value >= 1, "be at least 1")
        check_each(self, ("data_timeout",), lambda value: value > 0, "be above 0")
        if 0 < self.resilience.hang_timeout <= self.data_timeout:
            raise UserError(
                f"resilience.hang_timeout {self.resilience.hang_timeout:g} is not above data_timeout {self.data_timeout:g}: a step "
                "that waits for its data is no hang; raise the one or lower the other."
            )
        if self.resilience.on_bad_step == "skip" and self.parallel.fp8 == "delayed":
            raise UserError(
                "resilience.on_bad_step: skip leaves a bad batch's numbers in the history of FP8's delayed scales: choose rollback."
            )
        names = [stage.name for stage in self.stages]
        if self.last_stage is not None and self.last_stage not in names:
            raise UserError(
                f"last_stage is '{self.last_stage}': choose one of the stages, {', '.join(names)}, or null."
            )

    @property
    def stages_to_go(self) -> int:
        """How many stages the run goes through, from the first on."""
        return len(self.stages) if self.last_stage is None else 1 + [s.name for s in self.stages].index(self.last_stage)

    def rooted(self) -> PretrainConfig:
        """The same run with every relative path joined to `root`; URLs stay."""

        def join(path: str) -> str:
            return path if "://" in path else str(Path(self.root) / path)

        stages = tuple(
            replace(
                stage,
                codes=tuple(
                    replace(source, dir=join(source.dir), cache=None if source.cache is None else join(source.cache))
                    for source in stage.codes
                ),
                validation=None if stage.validation is None else join(stage.validation),
                validation_cache=None if stage.validation_cache is None else join(stage.validation_cache),
            )
            for stage in self.stages
        )
        start = None if self.from_export is None else join(self.from_export)
        tokenizer, samples = join(self.tokenizer), self.samples.joined(join)
        return replace(
            self, root=".", out=join(self.out), tokenizer=tokenizer, from_export=start, stages=stages, samples=samples
        )
