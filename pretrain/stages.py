"""What the settings and the codes' manifests say together: the network's configuration and each stage's data."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from data_pipelines.code_stream import CodeStream, Source
from data_pipelines.codes import CodeDataset, CodeFolder, Manifest
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


class Clips(Protocol):
    """What a plan needs to know of the clips of one shape; a `CodeDataset` is one."""

    @property
    def path(self) -> Any: ...
    @property
    def manifest(self) -> Manifest: ...
    @property
    def number(self) -> int: ...
    @property
    def num_frames(self) -> int: ...
    @property
    def schedule(self) -> ScaleSchedule: ...
    def __len__(self) -> int: ...


DatasetsOf = Callable[[SourceConfig, str, float], Sequence[Clips]]


@dataclass(frozen=True)
class StagePlan:
    """One stage with what its codes' manifests add.

    Args:
        index: from 0.
        config: its settings.
        sources: its data, one for each shape of clips.
        manifests: of the sources, in their order.
        validation: the validation clips, likewise; none: there is no validation.
        objective: what `objective.prepare` needs.
        model: the network's configuration in this stage: its window, the finest grids and the most frames trained on so far.
    """

    index: int
    config: StageConfig
    sources: tuple[Source, ...]
    manifests: tuple[Manifest, ...]
    validation: tuple[Source, ...]
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
            timeout=run.data_timeout,
        )

    def validation_stream(self, run: PretrainConfig, rank: int, size: int) -> CodeStream | None:
        """The validation clips from the first one on, in stored order."""
        if not self.validation:
            return None
        return CodeStream(
            self.validation,
            self.config.global_batch_size,
            rank=rank,
            size=size,
            max_text_length=run.network.max_text_length,
            shards_per_window=0,
            timeout=run.data_timeout,
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


def make_plan(
    run: PretrainConfig, tokenizer: tuple[str, DownMode] | None = None, datasets_of: DatasetsOf | None = None
) -> Plan:
    """Reads the tokenizer's configuration and all manifests; the paths of the run are `rooted` already.

    Args:
        run: the settings.
        tokenizer: what `read_tokenizer` would say, for codes that are yet to be made.
        datasets_of: the clips of a source by shape, given its settings, the tokenizer's fingerprint and the seconds that reading may take;
            None: they are opened.

    Raises:
        UserError: codes are missing, not finished, another tokenizer's, or do not fit one network.
    """
    fingerprint, residual_down = tokenizer or read_tokenizer(run.tokenizer)
    open_datasets = datasets_of or _datasets
    stages: list[StagePlan] = []
    for index, stage in enumerate(run.stages):
        groups = [open_datasets(source, fingerprint, run.data_timeout) for source in stage.codes]
        datasets = [dataset for group in groups for dataset in group]
        check_spread(stage, datasets)
        sources = [one for source, group in zip(stage.codes, groups) for one in _sources(stage, source, group)]
        validation: list[Source] = []
        if stage.validation is not None:
            longest = max(dataset.num_frames for dataset in datasets)
            held_out = SourceConfig(stage.validation, longest, cache=stage.validation_cache)
            validation = _sources(stage, held_out, open_datasets(held_out, fingerprint, run.data_timeout))
        manifests = tuple(dataset.manifest for dataset in datasets)
        model = _model_config(run, stage, datasets, stages[-1].model if stages else None)
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
        stages.append(StagePlan(index, stage, tuple(sources), manifests, tuple(validation), objective, model))
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


def clips_a_step(stage: StageConfig, dataset: Clips) -> int:
    """Clips of a step on one source."""
    if stage.token_budget is None:
        return stage.global_batch_size
    return stage.global_batch_size // stage.micro_batch_size * clips_within(stage.token_budget, dataset)


def clips_within(budget: int, dataset: Clips) -> int:
    """Clips of a microbatch whose tokens come nearest to the budget."""
    return max(1, round(budget / _tokens(dataset)))


def _tokens(dataset: Clips) -> int:
    """Of a clip."""
    return dataset.num_frames * dataset.schedule.tokens_per_frame


def _sources(stage: StageConfig, config: SourceConfig, datasets: Sequence[Clips]) -> list[Source]:
    """One for each shape of a folder's clips; each gets steps by its clips, so that all clips are seen equally often."""
    batches = [len(dataset) / clips_a_step(stage, dataset) for dataset in datasets]
    return [
        Source(
            path=dataset.path,
            num_latent_frames=dataset.num_frames,
            proportion=config.proportion * share / sum(batches),
            cache=config.cache,
            batch_size=clips_a_step(stage, dataset),
            bucket=dataset.number,
        )
        for dataset, share in zip(datasets, batches)
    ]


def check_spread(stage: StageConfig, datasets: Sequence[Clips]) -> None:
    """Raises UserError if steps with a token budget would differ by more than `MAX_SPREAD` in tokens."""

    def alike(budget: int) -> bool:
        tokens = [clips_within(budget, dataset) * _tokens(dataset) for dataset in datasets]
        return max(tokens) <= MAX_SPREAD * min(tokens)

    if stage.token_budget is None or alike(stage.token_budget):
        return
    tokens = [clips_a_step(stage, dataset) * _tokens(dataset) for dataset in datasets]
    longest = max(_tokens(dataset) for dataset in datasets)
    wider = next(filter(alike, count(longest * max(1, stage.token_budget // longest), longest)))
    raise UserError(
        f"stage '{stage.name}': with token_budget {stage.token_budget} its steps have {min(tokens)} to {max(tokens)} tokens, "
        f"which cost too differently: choose {wider}."
    )


def _datasets(source: SourceConfig, fingerprint: str, timeout: float) -> list[CodeDataset]:
    """The clips of a folder by shape; with `num_frames`, those that have so many."""
    folder = CodeFolder(source.dir, fingerprint, source.cache, timeout)
    return [
        CodeDataset(folder, num_frames=source.num_frames, bucket=number)
        for number in buckets_in_use(source, folder.manifest)
    ]


def buckets_in_use(source: SourceConfig, manifest: Manifest) -> list[int]:
    """The shapes of a folder whose clips have the frames that a source takes, by number."""
    lengths, wanted = [bucket.num_frames for bucket in manifest.buckets], source.num_frames
    if wanted is not None and not 1 <= wanted <= max(lengths):
        raise UserError(
            f"{source.dir} holds clips of {max(lengths)} latent frames, {wanted} were asked for: ask for fewer, or encode longer clips."
        )
    return [number for number, frames in enumerate(lengths) if wanted is None or frames >= wanted]


def _model_config(
    run: PretrainConfig, stage: StageConfig, datasets: Sequence[Clips], before: ModelConfig | None
) -> ModelConfig:
    largest = max(datasets, key=lambda dataset: dataset.schedule.tokens_per_frame)
    finest, schedule = largest.manifest, largest.schedule
    frames = max(dataset.num_frames for dataset in datasets)
    if before is not None:
        frames = max(frames, before.num_frames)
        schedule = max(schedule, before.schedule, key=lambda one: one.tokens_per_frame)
    network = asdict(run.network)
    if stage.window is not None:
        network["window"] = stage.window
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
    for dataset in datasets:
        for name, mine, theirs in (
            ("bits a token", model.bits, dataset.manifest.dim),
            ("text width", model.text_dim, dataset.manifest.text_dim),
            ("text encoder", finest.text_fingerprint, dataset.manifest.text_fingerprint),
        ):
            if mine != theirs:
                raise UserError(
                    f"the codes in {dataset.path} have {name} {theirs}, others of the run {mine}: encode them alike."
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
