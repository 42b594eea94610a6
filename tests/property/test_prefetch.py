"""Parameters gathered further ahead never make a step slower, and soon make it no faster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.model import layer_parameters
from parsim.plan import Job, ParallelPlan
from parsim.schedule import make_schedule
from parsim.schedule.lower import lower
from parsim.schedule.program import Program, step_time_s
from parsim.simulate.prediction import program_of
from tests.builders import flat_cost, plain_stack, round_cluster, small_model
from tests.strategies import CASES, Case

DEPTH = {1: "zero_prefetch", 2: "zero_prefetch", 3: "fsdp_prefetch"}


def with_stack(case: Case, **changes: Any) -> Program:
    job, plan, costs = case
    stack = replace(costs.stack, **changes)
    return program_of(job, plan, CostModel(job.model, costs.cluster, stack))[0]


@given(CASES.filter(lambda case: case[1].zero > 0), st.integers(0, 5))
@settings(max_examples=50)
def test_more_depth_never_slows_a_step(case: Case, depth: int) -> None:
    # What communication takes from the compute beside it is another matter: depth 0 has none beside.
    key = DEPTH[case[1].zero]
    less, more = (
        step_time_s(with_stack(case, dp_overlap_cost=0.0, **{key: d})) for d in (depth, depth + 1)
    )
    assert more <= less * (1 + 1e-12)


@given(CASES.filter(lambda case: case[1].zero > 0))
@settings(max_examples=30)
def test_depth_saturates_when_no_gather_waits_for_compute_any_more(case: Case) -> None:
    key = DEPTH[case[1].zero]
    enough = len(with_stack(case, **{key: 1}).tasks)
    ends = [step_time_s(with_stack(case, **{key: depth})) for depth in (enough, 2 * enough)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize(
    ("depth", "each_s"),
    [
        (0, 3.0 + 2 * 1.5),  # every gather in the way of its layer
        (1, 3.0 + 3 * 0.125 + 0.125),  # a forward waits before three layers, a backward before its first
        (2, 3.0 + 0.125),
        (3, 3.0),
        (9, 3.0),
    ],
)
def test_the_backward_gathers_for_the_next_forward(m: int, depth: int, each_s: float) -> None:
    """Four layers under FSDP: f = 0.25, b = 0.5 and a gather of 0.375 each, all of which a backward has
    time for and a forward has not.
    """
    plan, cost = ParallelPlan(dp=2, zero=3), flat_cost(1, gather_s=1.5, buckets=4)
    program = lower(make_schedule(plan, m), cost, plan, plain_stack(fsdp_prefetch=depth))
    # Nothing is there before the first forward.
    first_s = 6.0 if depth == 0 else 4 * 0.375 + 0.25 + 0.125 + 2.0
    assert step_time_s(program) == pytest.approx(first_s + (m - 1) * each_s)


def test_later_stages_gather_while_they_wait_for_their_first_input() -> None:
    """ZeRO-1 with buckets that take longer to gather than their forward does."""
    plan, cost = ParallelPlan(dp=2, pp=2, zero=1), flat_cost(2, gather_s=6.0, buckets=4)
    schedule = make_schedule(plan, 2)
    ends = {
        depth: step_time_s(
            lower(schedule, cost, plan, plain_stack(dp_overlap=True, zero_prefetch=depth))
        )
        for depth in (0, 1, 2, 3, None)
    }
    # Rank 0 starts with nothing and gathers at the network's pace; rank 1 has four buckets by then.
    assert ends[None] == pytest.approx(6.0 + 0.25 + 3 * 1.0 + 2 * 2.0 + 1.0)
    assert ends[0] > ends[1] > ends[2] > ends[3] == ends[None]
    # One at a time: both ranks' forwards take their gathers' time on top.
    assert ends[0] == pytest.approx((2 + 1) * 3.0 + 2 * 6.0)


def test_memory_holds_what_is_gathered_ahead() -> None:
    """FSDP: the largest part once for what runs, and once for each gathered ahead, in 16 bits."""
    model, plan = small_model(), ParallelPlan(dp=8, zero=3)
    job = Job(model=model, seq_len=256, global_batch=8)
    largest = max(layer_parameters(model, 0), model.vocab * model.hidden + model.hidden)
    for depth in (1, 2, 5):
        costs = CostModel(model, round_cluster(), plain_stack(fsdp_prefetch=depth))
        _, (memory,) = program_of(job, plan, costs)
        assert memory.buffers == (depth + 1) * largest * 2


def test_a_depth_is_no_negative_number() -> None:
    for key in ("fsdp_prefetch", "zero_prefetch"):
        with pytest.raises(ParsimError, match="prefetch depth"):
            plain_stack(**{key: -1})
