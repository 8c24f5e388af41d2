"""The planner: shares of the weights, what each setting changes, and a real step."""

import dataclasses

import pytest

from benchmarks.memory import PAPER, SMALL, planned_over_measured, table
from benchmarks.training import network
from inference.config import ModelConfig
from parallel.memory import Memory, estimate, parameters
from parallel.setup import ParallelConfig
from tokenizer.errors import UserError
from tokenizer.scales import ScaleSchedule

BF16 = ParallelConfig(precision="bfloat16")
LONG = network(PAPER["4B"], ScaleSchedule.for_grid(24, 42, 12), 17)


def plan(parallel: ParallelConfig, world: int, model: ModelConfig = LONG, clips: int = 1, **changes: bool) -> Memory:
    return estimate(model, parallel, world, model.layout(), clips, 16, **changes)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_real_step_takes_what_was_planned(recompute):
    model = dataclasses.replace(SMALL, num_layers=3)
    ratio = planned_over_measured(ParallelConfig(recompute=recompute), model)
    assert 0.9 <= ratio <= 1.1


def test_the_paper_s_sizes_have_the_paper_s_numbers_of_weights():
    for size, billions in (("L", 0.91), ("XL", 2.15), ("4B", 3.78)):
        model = network(PAPER[size], ScaleSchedule.square(8, 6), 5)
        assert parameters(model, ParallelConfig(), 0) / 1e9 == pytest.approx(billions, rel=0.02)


def test_states_by_hand():
    small = plan(BF16, 8, clips=2, ema=True)
    weights = parameters(LONG, BF16, 0)
    assert small.parameters == 2 * weights and small.gradients == 4 * weights and small.ema == 4 * weights
    assert small.optimizer == 12 * weights // 8  # main copy and two moments, over eight ranks
    wide = plan(ParallelConfig(), 8, clips=2)
    assert wide.parameters == 4 * weights and wide.optimizer == 8 * weights // 8 and wide.ema == 0


def test_what_each_way_of_sharing_saves():
    whole = plan(BF16, 1)
    tensor = plan(dataclasses.replace(BF16, tensor_parallel_size=4), 4)
    context = plan(dataclasses.replace(BF16, context_parallel_size=4), 4)
    pipeline = plan(dataclasses.replace(BF16, pipeline_parallel_size=4), 4)
    assert tensor.parameters < 0.27 * whole.parameters and tensor.activations < 0.27 * whole.activations
    assert context.parameters == whole.parameters and context.optimizer == whole.optimizer // 4
    assert 0.25 * whole.activations < context.activations < 0.6 * whole.activations  # keys and values are whole
    assert pipeline.parameters < 0.27 * whole.parameters
    assert pipeline.activations == pytest.approx(whole.activations, rel=0.02)  # four microbatches are on their way
    interleaved = plan(dataclasses.replace(BF16, pipeline_parallel_size=4, virtual_pipeline_size=3), 4)
    assert pipeline.activations < interleaved.activations < 1.5 * pipeline.activations
    selective, full = (plan(dataclasses.replace(BF16, recompute=kind), 1) for kind in ("selective", "full"))  # type: ignore[arg-type]
    assert full.activations < 0.1 * selective.activations and selective.activations < whole.activations
    assert full.working > whole.working


def test_a_plan_that_does_not_divide_is_refused_and_the_table_has_a_line_for_each_plan():
    with pytest.raises(UserError, match="num_attention_heads 32 does not divide by tensor_parallel_size 5"):
        plan(dataclasses.replace(BF16, tensor_parallel_size=5), 5)
    lines = table().splitlines()
    assert len(lines) > 8 and all(line.count("|") == lines[0].count("|") for line in lines)
