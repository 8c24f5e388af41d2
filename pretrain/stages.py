"""What the settings and the codes' manifests say together: the network's configuration and each stage's data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path

from data_pipelines.code_stream import CodeStream, Source
from data_pipelines.codes import CodeDataset, Manifest
from inference.config import ModelConfig
from pretrain.config import PretrainConfig, SourceConfig, StageConfig
from pretrain.objective import ObjectiveConfig
from pretrain.randomness import Randomness
from tokenizer.errors import UserError
from tokenizer.resample import DownMode
from tokenizer.scales import ScaleSchedule
from tokenizer.sequence import SequenceLayout

DEFAULT_FPS = 8.0
MAX_SPREAD = 1.15
"""Most tokens of a step over least, with a token budget."""


@dataclass(frozen=True)
class StagePlan:
    """One stage with what its codes' manifests add.

    Args:
        index: from 0.
        config: its settings.
        sources: its data, every number of frames known.
        manifests: of the sources, in their order.
        validation: the validation clips, or None.
        objective: what `objective.prepare` needs.
        model: the network's configuration when this stage ends: the finest grids and the most frames trained on so far.
    """

    index: int
    config: StageConfig
    sources: tuple[Source, ...]
    manifests: tuple[Manifest, ...]
    validation: Source | None
    objective: ObjectiveConfig
    model: ModelConfig

    def stream(self, run: PretrainConfig, rank: int, size: int) -> CodeStream:
        """The stage's training batches for one data-parallel rank of `size`."""
        return CodeStream(
            self.sources,
            self.config.global_batch_size,
            rank=rank,
            size=size,
            seed=run.seed + self.index,
            max_text_length=run.network.max_text_length,
            shards_per_window=run.shards_per_window,
            num_workers=run.data_workers,
        )

    def validation_stream(self, run: PretrainConfig, rank: int, size: int) -> CodeStream | None:
        """The validation clips from the first one on, in stored order."""
        if self.validation is None:
            return None
        return CodeStream(
            [self.validation],
            self.config.global_batch_size,
            rank=rank,
            size=size,
            max_text_length=run.network.max_text_length,
            shards_per_window=0,
        )


@dataclass(frozen=True)
class Plan:
    """A run, ready to start.

    Args:
        stages: in their order.
        fingerprint: of the tokenizer.
        tokenizer: its folder.
    """

    stages: tuple[StagePlan, ...]
    fingerprint: str
    tokenizer: str

    @property
    def model(self) -> ModelConfig:
        """The network's configuration after the last stage; the weights have the same shapes in all stages."""
        return self.stages[-1].model

    def export_info(self, stage: int) -> dict[str, object]:
        """What an exported model's config.json says beside the network, as `VideoARPipeline.from_pretrained` reads it.

        Args:
            stage: the last one that was trained in.
        """
        manifest = self.stages[stage].manifests[-1]
        content: dict[str, object] = {"tokenizer_fingerprint": self.fingerprint}
        if self.model.num_classes:
            content["class_names"] = manifest.classes
        else:
            content |= {"text_encoder": manifest.text_encoder, "text_encoder_fingerprint": manifest.text_fingerprint}
        return content


def make_plan(run: PretrainConfig) -> Plan:
    """Reads the tokenizer's configuration and all manifests; the paths of the run are `rooted` already.

    Raises:
        UserError: codes are missing, not finished, another tokenizer's, or do not fit one network.
    """
    fingerprint, residual_down = read_tokenizer(run.tokenizer)
    stages: list[StagePlan] = []
    for index, stage in enumerate(run.stages):
        datasets = [_dataset(source, fingerprint) for source in stage.codes]
        sizes = _batch_sizes(stage, datasets)
        sources = tuple(
            Source(dataset.path, dataset.num_frames, source.proportion, source.cache, size)
            for source, dataset, size in zip(stage.codes, datasets, sizes)
        )
        frames = max(source.num_latent_frames for source in sources)
        validation = None
        if stage.validation is not None:
            dataset = _dataset(SourceConfig(stage.validation, frames), fingerprint)
            validation = Source(dataset.path, frames, batch_size=_clips(stage, dataset))
        manifests = tuple(dataset.manifest for dataset in datasets)
        model = _model_config(run, stage, sources, manifests, stages[-1].model if stages else None)
        objective = ObjectiveConfig(
            randomness=Randomness(run.seed, index),
            error_correction=stage.error_correction,
            p_mask=stage.p_mask,
            condition_dropout=stage.condition_dropout,
            token_weight=stage.token_weight,
            class_conditional=run.network.condition == "class",
            residual_down=residual_down,
            input_down=run.network.input_down,
        )
        stages.append(StagePlan(index, stage, sources, manifests, validation, objective, model))
    return Plan(tuple(stages), fingerprint, str(Path(run.tokenizer).resolve()))


def read_tokenizer(directory: str | Path) -> tuple[str, DownMode]:
    """A tokenizer's fingerprint and its `residual_down`.

    Raises:
        UserError: the folder holds no tokenizer.
    """
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise UserError(
            f"{directory} holds no tokenizer (config.json is missing): set `tokenizer` to the folder of the tokenizer "
            "that made the codes."
        )
    try:
        content = json.loads(file.read_text())
        return content["fingerprint"], content["residual_down"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{file} is not a tokenizer's configuration ({error!r}): copy the tokenizer again.") from error


@lru_cache(maxsize=16)
def layout_for(
    model: ModelConfig, num_frames: int, scales: tuple[tuple[int, int], ...], multiple: int
) -> SequenceLayout:
    """The layout of a batch; kept, so that what it computes is computed once."""
    return model.layout(num_frames, ScaleSchedule(scales), multiple)


def _clips(stage: StageConfig, dataset: CodeDataset) -> int:
    """Clips of a step on one source."""
    if stage.token_budget is None:
        return stage.global_batch_size
    return stage.global_batch_size // stage.micro_batch_size * _clips_within(stage.token_budget, dataset)


def _clips_within(budget: int, dataset: CodeDataset) -> int:
    """Clips of a microbatch whose tokens come nearest to the budget."""
    return max(1, round(budget / _tokens(dataset)))


def _tokens(dataset: CodeDataset) -> int:
    """Of a clip."""
    return dataset.num_frames * dataset.manifest.scale_schedule.tokens_per_frame


def _batch_sizes(stage: StageConfig, datasets: Sequence[CodeDataset]) -> list[int]:
    """Clips of a step on each source.

    Raises:
        UserError: their steps would differ by more than `MAX_SPREAD` in tokens.
    """

    def alike(budget: int) -> bool:
        tokens = [_clips_within(budget, dataset) * _tokens(dataset) for dataset in datasets]
        return max(tokens) <= MAX_SPREAD * min(tokens)

    sizes = [_clips(stage, dataset) for dataset in datasets]
    if stage.token_budget is not None and not alike(stage.token_budget):
        tokens = [size * _tokens(dataset) for size, dataset in zip(sizes, datasets)]
        longest = max(_tokens(dataset) for dataset in datasets)
        wider = next(filter(alike, count(longest * max(1, stage.token_budget // longest), longest)))
        raise UserError(
            f"stage '{stage.name}': with token_budget {stage.token_budget} its steps have {min(tokens)} to {max(tokens)} tokens, "
            f"which cost too differently: choose {wider}."
        )
    return sizes


def _dataset(source: SourceConfig, fingerprint: str) -> CodeDataset:
    return CodeDataset(source.dir, fingerprint, source.num_frames, source.cache)


def _model_config(
    run: PretrainConfig,
    stage: StageConfig,
    sources: tuple[Source, ...],
    manifests: tuple[Manifest, ...],
    before: ModelConfig | None,
) -> ModelConfig:
    finest = max(manifests, key=lambda manifest: manifest.scale_schedule.tokens_per_frame)
    schedule, frames = finest.scale_schedule, max(source.num_latent_frames for source in sources)
    if before is not None:
        frames = max(frames, before.num_frames)
        schedule = max(schedule, before.schedule, key=lambda one: one.tokens_per_frame)
    network = asdict(run.network)
    by_class = network.pop("condition") == "class"
    num_classes = len(finest.classes) if by_class else 0
    if by_class and not num_classes:
        raise UserError(f"the codes of stage '{stage.name}' have no classes: set network.condition to text.")
    model = ModelConfig(
        **network,  # the two classes call these fields alike
        scales=schedule.scales,
        num_frames=frames,
        bits=finest.dim,
        text_dim=finest.text_dim,
        num_classes=num_classes,
        fps=finest.fps or DEFAULT_FPS,
    )
    for manifest, source in zip(manifests, sources):
        for name, mine, theirs in (
            ("bits a token", model.bits, manifest.dim),
            ("text width", model.text_dim, manifest.text_dim),
            ("text encoder", finest.text_fingerprint, manifest.text_fingerprint),
        ):
            if mine != theirs:
                raise UserError(
                    f"the codes in {source.path} have {name} {theirs}, others of the run {mine}: encode them alike."
                )
    if before is not None and (before.bits, before.text_dim, before.num_classes) != (
        model.bits,
        model.text_dim,
        model.num_classes,
    ):
        raise UserError(
            f"the codes of stage '{stage.name}' differ from the stage before in bits, text width or classes: encode them alike."
        )
    return model
