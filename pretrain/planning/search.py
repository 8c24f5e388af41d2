"""Which layouts a run can have on so many GPUs, which of them is predicted to be the fastest, and why the others are out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from parallel.memory import Memory
from parallel.setup import ParallelConfig, check_layout
from pretrain.config import StageConfig
from pretrain.planning.gpus import Gpu
from pretrain.planning.loads import StageLoad
from pretrain.planning.step_time import StepTime
from tokenizer.errors import UserError

CONTEXT = (1, 2, 4, 8)
VIRTUAL = (1, 2, 3, 4, 6)
RECOMPUTE = ("none", "selective", "full")
DAY = 86400.0


@dataclass(frozen=True)
class StageOption:
    """A stage on a layout.

    Args:
        stage: its settings, with the micro batch that suits the layout.
        time: of a step.
        memory: of the fullest GPU.
    """

    stage: StageConfig
    time: StepTime
    memory: Memory

    @property
    def days(self) -> float:
        """Of the whole stage."""
        return self.stage.steps * self.time.total / DAY


@dataclass(frozen=True)
class Option:
    """A run on a layout."""

    parallel: ParallelConfig
    world: int
    stages: tuple[StageOption, ...]

    @property
    def days(self) -> float:
        """Of the whole run."""
        return sum(stage.days for stage in self.stages)


@dataclass(frozen=True)
class Rejected:
    """A layout that is out.

    Args:
        layout: its name.
        reason: why, in a few words.
    """

    layout: str
    reason: str


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        best: the fastest layout that fits in all stages.
        next: the ones that come after it, of other sizes.
        alone: the fastest layout of each stage by itself.
        rejected: layouts that would be faster but do not fit, and those that do not divide.
        tried: layouts in all, micro batches not counted.
    """

    best: Option
    next: tuple[Option, ...]
    alone: tuple[Option, ...]
    rejected: tuple[Rejected, ...]
    tried: int


class Search:
    """The layouts of a run.

    Args:
        stages: what each stage asks for.
        parallel: settings that are kept: precision, FP8 and the like.
        world: GPUs.
        gpu: each of them.
    """

    def __init__(self, stages: list[StageLoad], parallel: ParallelConfig, world: int, gpu: Gpu):
        self.stages, self.kept, self.world, self.gpu = stages, parallel, world, gpu
        self.model = stages[0].model
        self._fitting: dict[tuple[ParallelConfig, int], StageOption | None] = {}

    def sizes(self, world: int) -> Iterator[tuple[int, int, int]]:
        """Tensor, context and pipeline parallel sizes whose product divides the GPUs."""
        tensor = [size for size in (1, 2, 4, 8, 16) if size <= self.gpu.gpus_per_node]
        pipeline = [size for size in range(1, self.model.num_layers + 1) if self.model.num_layers % size == 0]
        for pp in pipeline:
            for cp in CONTEXT:
                for tp in tensor:
                    if world % (tp * cp * pp) == 0:
                        yield tp, cp, pp

    def layouts(self, tp: int, cp: int, pp: int) -> Iterator[ParallelConfig]:
        """Of these sizes, those that the network divides into."""
        for virtual in VIRTUAL if pp > 1 else (1,):
            if self.model.num_layers % (pp * virtual) == 0:
                for recompute in RECOMPUTE:
                    yield replace(
                        self.kept,
                        tensor_parallel_size=tp,
                        context_parallel_size=cp,
                        pipeline_parallel_size=pp,
                        virtual_pipeline_size=virtual,
                        recompute=recompute,  # type: ignore[arg-type]
                    )

    def micro_batches(self, number: int, parallel: ParallelConfig, world: int) -> list[StageConfig]:
        """A stage with each micro batch that its batch divides into on this layout."""
        load = self.stages[number]
        ranks = world // (
            parallel.tensor_parallel_size * parallel.context_parallel_size * parallel.pipeline_parallel_size
        )
        whole, unit = load.config.global_batch_size, ranks * parallel.microbatch_multiple
        powers = {2**power for power in range(whole.bit_length())}
        sizes = [size for size in sorted(powers | {load.config.micro_batch_size}) if whole % (size * unit) == 0]
        return [stage for size in sizes if (stage := load.with_micro_batch(size))]

    def fastest(self, number: int, parallel: ParallelConfig) -> StageOption | None:
        """A stage on a layout with the micro batch that is the fastest of those that fit; None: none does."""
        if (parallel, number) not in self._fitting:
            load, fits = self.stages[number], None
            times = [
                (load.time(parallel, self.world, stage, self.gpu), stage)
                for stage in self.micro_batches(number, parallel, self.world)
            ]
            for time, stage in sorted(times, key=lambda one: one[0].total):
                memory = load.memory(parallel, self.world, stage)
                if memory.total <= self.gpu.usable_bytes:
                    fits = StageOption(stage, time, memory)
                    break
            self._fitting[parallel, number] = fits
        return self._fitting[parallel, number]

    @cached_property
    def ordered(self) -> list[tuple[ParallelConfig, list[float]]]:
        """Layouts that divide, with the least seconds of each stage whatever it takes of memory; the least in all first."""
        found = []
        for sizes in self.sizes(self.world):
            if self.refusal(*sizes):
                continue
            for parallel in self.layouts(*sizes):
                least = []
                for number, load in enumerate(self.stages):
                    times = [
                        load.time(parallel, self.world, stage, self.gpu).total
                        for stage in self.micro_batches(number, parallel, self.world)
                    ]
                    least.append(load.config.steps * min(times) if times else float("inf"))
                if sum(least) < float("inf"):
                    found.append((parallel, least))
        return sorted(found, key=lambda one: sum(one[1]))

    def run(self, others: int = 3) -> Found:
        """Searches.

        Args:
            others: how many of `Found.next`.

        Raises:
            UserError: no layout divides, or none fits.
        """
        if not self.ordered:
            raise UserError(
                f"no layout of {self.world} GPUs divides the network's {self.model.num_layers} layers and "
                f"{self.model.num_attention_heads} heads and the batches of all stages "
                f"({', '.join(str(one.config.global_batch_size) for one in self.stages)} clips): try {self._nearest()} GPUs."
            )
        options = self._options(range(len(self.stages)), others + 1)
        if not options:
            raise UserError(self._too_large())
        rejected = tuple(self._rejected(options[0]))
        alone = tuple(self._options([number], 1)[0] for number in range(len(self.stages)))
        tried = sum(1 for sizes in self.sizes(self.world) for _ in self.layouts(*sizes))
        return Found(options[0], tuple(options[1:]), alone, rejected, tried)

    def as_written(self, parallel: ParallelConfig) -> Option:
        """The run on the layout of its own settings.

        Raises:
            UserError: it does not divide, or does not fit.
        """
        check_layout(self.model, parallel, self.world)
        found = []
        for load in self.stages:
            ranks = self.world // (
                parallel.tensor_parallel_size * parallel.context_parallel_size * parallel.pipeline_parallel_size
            )
            share = load.config.micro_batch_size * ranks * parallel.microbatch_multiple
            if load.config.global_batch_size % share:
                raise UserError(
                    f"stage '{load.config.name}': global_batch_size {load.config.global_batch_size} is no multiple of micro_batch_size "
                    f"{load.config.micro_batch_size} x {ranks} data-parallel ranks x {parallel.microbatch_multiple}: choose a multiple "
                    f"of {share}, or leave the layout to the search."
                )
            time = load.time(parallel, self.world, load.config, self.gpu)
            memory = load.memory(parallel, self.world, load.config)
            if memory.total > self.gpu.usable_bytes:
                raise UserError(
                    f"stage '{load.config.name}' takes {memory.total / 1e9:.1f} GB a GPU as written, of "
                    f"{self.gpu.usable_bytes / 1e9:.1f} GB: "
                    "share it over more GPUs, recompute more, or lower micro_batch_size."
                )
            found.append(StageOption(load.config, time, memory))
        return Option(parallel, self.world, tuple(found))

    def _options(self, stages: range | list[int], wanted: int) -> list[Option]:
        """The fastest layouts on which these stages fit, each of other sizes."""
        found: list[Option] = []
        for parallel, least in sorted(self.ordered, key=lambda one: sum(one[1][number] for number in stages)):
            bound = sum(least[number] for number in stages) / DAY
            if len(found) >= wanted and bound >= found[wanted - 1].days:
                break  # what follows can only be slower
            fits = [self.fastest(number, parallel) for number in stages]
            if all(fits):
                option = Option(parallel, self.world, tuple(one for one in fits if one))
                same = [one for one in found if sizes_of(one.parallel) == sizes_of(parallel)]
                if same and same[0].days <= option.days:
                    continue
                found = sorted([one for one in found if one not in same] + [option], key=lambda one: one.days)
        return found[:wanted]

    def refusal(self, tp: int, cp: int, pp: int) -> str | None:
        """Why these sizes can't be used whatever they take of memory."""
        plain = replace(
            self.kept,
            tensor_parallel_size=tp,
            context_parallel_size=cp,
            pipeline_parallel_size=pp,
            virtual_pipeline_size=1,
        )
        try:
            check_layout(self.model, plain, self.world)
        except UserError as error:
            return str(error).split(":")[0]
        ranks = self.world // (tp * cp * pp)
        for number, load in enumerate(self.stages):
            if not self.micro_batches(number, plain, self.world):
                return f"{ranks} data-parallel ranks do not divide the {load.config.global_batch_size} clips of stage {number + 1}"
        return None

    def _rejected(self, best: Option) -> Iterator[Rejected]:
        """What would be faster than the best but does not fit, then what does not divide."""
        seen = set[tuple[object, ...]]()
        for parallel, least in self.ordered:
            kind = (*sizes_of(parallel), parallel.recompute)
            if sum(least) / DAY >= best.days or kind in seen:
                continue
            needs = {
                number: self.stages[number]
                .memory(parallel, self.world, self.micro_batches(number, parallel, self.world)[0])
                .total
                for number in range(len(self.stages))
                if self.fastest(number, parallel) is None
            }
            if needs:
                seen.add(kind)
                number = max(needs, key=lambda one: needs[one])
                reason = f"stage {number + 1} takes {needs[number] / 1e9:.1f} GB at least, of {self.gpu.usable_bytes / 1e9:.1f}"
                yield Rejected(layout_name(parallel, self.world), reason)
        for tp, cp, pp in sorted(self.sizes(self.world), key=lambda sizes: (sizes[0] * sizes[1] * sizes[2], sizes)):
            reason = self.refusal(tp, cp, pp)
            if reason is not None:
                parallel = replace(
                    self.kept, tensor_parallel_size=tp, context_parallel_size=cp, pipeline_parallel_size=pp
                )
                yield Rejected(layout_name(replace(parallel, virtual_pipeline_size=1), self.world, False), reason)
        stages = [
            size
            for size in range(2, self.model.num_layers + 1)
            if self.model.num_layers % size == 0 and self.world % size
        ]
        if stages:
            yield Rejected(f"PP {', '.join(map(str, stages))}", f"{self.world} GPUs do not divide by it")

    def _least_memory(self, number: int, sizes: tuple[int, int, int]) -> float:
        """The least that a stage takes on layouts of these sizes."""
        *_, leanest = (one for one in self.layouts(*sizes) if one.virtual_pipeline_size == 1)
        stages = self.micro_batches(number, leanest, self.world)
        return min(self.stages[number].memory(leanest, self.world, stage).total for stage in stages[:1])

    def _too_large(self) -> str:
        sizes = {sizes_of(parallel) for parallel, _ in self.ordered}
        least = {one: max(self._least_memory(number, one) for number in range(len(self.stages))) for one in sizes}
        best = min(least, key=lambda one: (least[one], one))
        leanest = next(iter(self.layouts(*best)))
        name = layout_name(leanest, self.world, False)
        return (
            f"the run fits no layout of {self.world} GPUs: the leanest one ({name}, one clip at a time, all recomputed) takes "
            f"{least[best] / 1e9:.1f} GB a GPU of {self.gpu.usable_bytes / 1e9:.1f} GB: take more or larger GPUs, or a smaller network."
        )

    def _nearest(self) -> str:
        """Numbers of GPUs around this one that some layout divides."""

        def divides(world: int) -> bool:
            if world < 1:
                return False
            other = Search(self.stages, self.kept, world, self.gpu)
            return any(other.refusal(*sizes) is None for sizes in other.sizes(world))

        below = next((world for world in range(self.world - 1, 0, -1) if divides(world)), None)
        above = next((world for world in range(self.world + 1, self.world + 4097) if divides(world)), None)
        return " or ".join(str(one) for one in (below, above) if one)


def sizes_of(parallel: ParallelConfig) -> tuple[int, int, int]:
    """Tensor, context and pipeline parallel."""
    return parallel.tensor_parallel_size, parallel.context_parallel_size, parallel.pipeline_parallel_size


def layout_name(parallel: ParallelConfig, world: int, whole: bool = True) -> str:
    """Such as "TP 4 CP 2 DP 16, recompute full".

    Args:
        parallel: the layout.
        world: GPUs.
        whole: virtual stages and recomputation are named, too.
    """
    tp, cp, pp = sizes_of(parallel)
    parts = [
        f"{name} {size}"
        for name, size in (("TP", tp), ("CP", cp), ("PP", pp), ("DP", world // (tp * cp * pp)))
        if size > 1
    ]
    name = " ".join(parts) or "one process"
    if not whole:
        return name
    if parallel.virtual_pipeline_size > 1:
        name += f", {parallel.virtual_pipeline_size} virtual stages"
    return name + (f", recompute {parallel.recompute}" if parallel.recompute != "none" else "")
