"""The shapes that a run trains on: of the codes where they are there, else as its settings expect them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipelines.codes import MANIFEST, Bucket, CodeDataset, CodeFolder, Manifest
from data_pipelines.variants import Variant, nearest_size
from pretrain.config import PretrainConfig, SourceConfig
from pretrain.expected import ExpectedClips
from pretrain.stages import Clips, Plan, buckets_in_use, make_plan, read_tokenizer
from tokenizer import settings
from tokenizer.autoencoder import AutoencoderConfig
from tokenizer.clip_shape import SPATIAL_COMPRESSION, ClipShape
from tokenizer.errors import UserError
from tokenizer.scales import ScaleSchedule, natural_scales
from tokenizer.tokenizer import TokenizerConfig
from tokenizer.train_config import TokenizerTrainConfig

EXPECTED = "expected"
"""Stands for the fingerprint of a tokenizer that is not there yet."""
PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True)
class ExpectedDataset:
    """Clips of one shape that are not there yet, in the place of a `CodeDataset`."""

    path: str
    manifest: Manifest
    number: int
    num_frames: int

    @property
    def schedule(self) -> ScaleSchedule:
        """The grids of the scales."""
        return self.manifest.buckets[self.number].scale_schedule

    def __len__(self) -> int:
        return self.manifest.buckets[self.number].rows


@dataclass(frozen=True)
class Shapes:
    """A run's shapes.

    Args:
        plan: its stages, as the training would see them; validation is left out.
        tokenizer: the tokenizer's sizes.
        folders: the manifest of each folder of codes, or what it is expected to be, by path.
        found: the folders that are there.
        notes: where a folder holds something else than was expected.
    """

    plan: Plan
    tokenizer: TokenizerConfig
    folders: dict[str, Manifest]
    found: frozenset[str]
    notes: tuple[str, ...]


def read_shapes(run: PretrainConfig) -> Shapes:
    """Opens no shard: manifests where they are there, else the settings' `expected`.

    Args:
        run: `rooted`.

    Raises:
        UserError: codes are neither there nor expected; or what is there contradicts what is expected.
    """
    tokenizer, known = _tokenizer(run)
    expected = dict[str, Manifest]()
    for stage in run.stages:
        for source in stage.codes:
            if source.expected:
                _add(expected, source.dir, _expected_manifest(run, source, tokenizer))
    folders, found, notes = dict[str, Manifest](), set[str](), list[str]()

    def datasets_of(source: SourceConfig, fingerprint: str, timeout: float) -> Sequence[Clips]:
        path = source.dir
        if "://" not in path and (Path(path) / MANIFEST).is_file() or path not in expected:
            folder = CodeFolder(path, None if fingerprint == EXPECTED else fingerprint, source.cache, timeout)
            if path in expected and path not in found:
                notes.extend(_compare(path, folder.manifest, expected[path]))
            folders[path] = folder.manifest
            found.add(path)
            used = buckets_in_use(source, folder.manifest)
            return [CodeDataset(folder, num_frames=source.num_frames, bucket=number) for number in used]
        manifest = folders[path] = expected[path]
        return [
            ExpectedDataset(path, manifest, number, source.num_frames or manifest.buckets[number].num_frames)
            for number in buckets_in_use(source, manifest)
        ]

    _check_there(run, expected)
    stages = tuple(replace(stage, validation=None, validation_cache=None) for stage in run.stages)
    plan = make_plan(replace(run, stages=stages), known or (EXPECTED, tokenizer.residual_down), datasets_of)
    return Shapes(plan, tokenizer, folders, frozenset(found), tuple(notes))


def _check_there(run: PretrainConfig, expected: dict[str, Manifest]) -> None:
    for stage in run.stages:
        for source in stage.codes:
            there = "://" in source.dir or (Path(source.dir) / MANIFEST).is_file()
            if source.dir not in expected and not there:
                raise UserError(
                    f"stage '{stage.name}': {source.dir} holds no codes yet, and the settings do not say what it will hold: "
                    "add `expected` to this source, such as [{variant: 256x17, aspect: 1.75, clips: 1000000}]."
                )


def _tokenizer(run: PretrainConfig) -> tuple[TokenizerConfig, tuple | None]:
    """The tokenizer's sizes, and what `read_tokenizer` says if it is there."""
    file = Path(run.tokenizer) / "config.json"
    if file.is_file():
        known = read_tokenizer(run.tokenizer)
        content = json.loads(file.read_text())
        sizes = content["autoencoder"] | {"multipliers": tuple(content["autoencoder"]["multipliers"])}
        return TokenizerConfig(AutoencoderConfig(**sizes), content["num_scales"], known[1]), known
    recipe = Path(run.expected.tokenizer)
    here = recipe if recipe.is_file() else PROJECT / recipe
    return settings.load(TokenizerTrainConfig, here).tokenizer, None


def shape_of(clips: ExpectedClips) -> ClipShape:
    """The size and length that `videoar encode` would give these clips."""
    variant = Variant.parse(clips.variant)
    size = variant.size if isinstance(variant.size, tuple) else nearest_size(1, clips.aspect, variant.size)  # type: ignore[arg-type]
    return ClipShape(*size, variant.frames[0])


def _expected_manifest(run: PretrainConfig, source: SourceConfig, tokenizer: TokenizerConfig) -> Manifest:
    """What `videoar encode` would write, were the clips as expected; a shard a shape, since shards cost nothing here."""
    buckets, codes = [], run.expected
    for clips in source.expected:
        shape = shape_of(clips)
        grid = (shape.height // SPATIAL_COMPRESSION, shape.width // SPATIAL_COMPRESSION)
        schedule = ScaleSchedule.for_grid(*grid, min(tokenizer.num_scales, natural_scales(max(grid))))
        buckets.append(Bucket(shape.height, shape.width, shape.frames, schedule.to_list(), clips.clips, 1))
    return Manifest(
        fingerprint=EXPECTED,
        buckets=buckets,
        dim=tokenizer.autoencoder.dim,
        fps=codes.fps,
        text_encoder=EXPECTED,
        text_fingerprint=EXPECTED,
        text_dim=codes.text_dim,
        has_latents=codes.latents,
        dead=0,
        classes=[str(number) for number in range(codes.classes)],
    )


def _add(expected: dict[str, Manifest], path: str, manifest: Manifest) -> None:
    """A folder that two sources name must be expected alike by both."""
    if expected.setdefault(path, manifest) != manifest:
        raise UserError(f"{path} is expected to hold different clips in two places: write the same `expected` in both.")


def _compare(path: str, there: Manifest, expected: Manifest) -> list[str]:
    """Differences that only change the estimate; one that would be another network is refused."""
    for what, mine, theirs in (
        ("bits a token", expected.dim, there.dim),
        ("text width", expected.text_dim, there.text_dim),
        ("classes", len(expected.classes), len(there.classes)),
        ("latents", expected.has_latents, there.has_latents),
    ):
        if mine != theirs and (what != "classes" or mine):
            raise UserError(f"the codes in {path} have {what} {theirs}, the settings expect {mine}: mend `expected`.")
    notes, rates = [], (there.fps or 0, expected.fps or 0)
    pairs = (("clips", there.rows, expected.rows), ("tokens a clip", _mean_tokens(there), _mean_tokens(expected)))
    for what, mine, theirs in (*pairs, ("frames a second", *rates)):
        if mine != theirs:
            notes.append(f"{path} holds {mine:,.6g} {what}, {theirs:,.6g} were expected: what is there counts")
    return notes


def _mean_tokens(manifest: Manifest) -> float:
    tokens = sum(one.rows * one.num_frames * one.scale_schedule.tokens_per_frame for one in manifest.buckets)
    return tokens / manifest.rows
