"""What each device sends in a step is what the plan says, however the step is cut up and overlapped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings

from parsim.cost.cell import cell_of
from parsim.cost.layer import layer_operations
from parsim.cost.memory import gathered_bytes, gradient_bytes
from parsim.cost.price import part_passes
from parsim.cost.stage import CostModel
from parsim.cost.step import StepCost, step_cost
from parsim.model import ModelSpec, MoeSpec
from parsim.plan import Job, ParallelPlan
from parsim.schedule.program import Program
from parsim.simulate.prediction import program_of
from tests.builders import plain_stack, round_cluster, small_model
from tests.strategies import CASES, Case


def sent(program: Program, name: str) -> dict[int, float]:
    """Bytes that a device of each pipeline rank sends in tasks whose name begins so."""
    total: dict[int, float] = defaultdict(float)
    for task in program.tasks:
        if task.name.startswith(name) and task.kind == "dp":
            total[task.rank] += task.num_bytes
    return total


def of_each_rank(case: Case, of_stage: Callable[[StepCost, int], float]) -> dict[int, float]:
    job, plan, costs = case
    cost = step_cost(job, plan, costs)
    total: dict[int, float] = defaultdict(float)
    for stage in range(plan.num_stages):
        total[plan.stage_rank(stage)] += of_stage(cost, stage)
    return {rank: num_bytes for rank, num_bytes in total.items() if num_bytes}


def groups(cost: StepCost, stage: int, plan: ParallelPlan) -> tuple[tuple[int, int, int], ...]:
    """(parameters, ranks that sum their gradients, ranks among which these are sharded)."""
    dense, experts = plan.dp * plan.cp, max(1, plan.dp * plan.cp * plan.tp // plan.ep)
    limit = plan.zero_group or plan.dp * plan.cp * plan.tp
    return (
        (cost.stages[stage].dense_parameters, dense, min(dense, limit) if plan.zero else 1),
        (cost.stages[stage].expert_parameters, experts, min(experts, limit) if plan.zero else 1),
    )


@given(CASES)
@settings(max_examples=60)
def test_gradients(case: Case) -> None:
    """All-reduce: 2(n−1)/n of them; in shard groups of g: (g−1)/g, then an all-reduce of the shard. The
    weights of replicas are one fp32 number each.
    """
    job, plan, costs = case
    plan = replace(plan, compression="none")  # has a test of its own
    case = job, plan, costs
    width = gradient_bytes(job.precision, costs.stack)

    def of_stage(cost: StepCost, stage: int) -> float:
        num_bytes = sum(
            width * parameters * ((g - 1) / g + 2 * (n / g - 1) / (n / g) / g)
            + plan.weighted * bool(parameters) * 2 * (n - 1) / n * 4
            for parameters, n, g in groups(cost, stage, plan)
        )
        runs = plan.num_micro_batches(job) // plan.chains
        return num_bytes * (runs if plan.zero >= 2 else 1)

    program, _ = program_of(*case)
    assert sent(program, "gradients") == pytest.approx(of_each_rank(case, of_stage))


@given(CASES)
@settings(max_examples=60)
def test_parameters(case: Case) -> None:
    """(g−1)/g of them: once a step with ZeRO-1 and 2, in every forward and backward with ZeRO-3."""
    job, plan, costs = case

    def of_stage(cost: StepCost, stage: int) -> float:
        values = sum(parameters * (g - 1) / g for parameters, _, g in groups(cost, stage, plan))
        times = 2 * plan.num_micro_batches(job) // plan.chains if plan.zero == 3 else 1
        return times * values * gathered_bytes(job.precision, costs.stack) * (plan.zero > 0)

    program, _ = program_of(*case)
    assert sent(program, "parameters") == pytest.approx(of_each_rank(case, of_stage))


@given(CASES)
@settings(max_examples=60)
def test_copies_of_stages(case: Case) -> None:
    """DualPipe holds each stage on two ranks: they sum what they keep of its gradients, once a step."""
    job, plan, costs = case
    program, _ = program_of(*case)
    copies = sent(program, "copies")
    assert bool(copies) == (plan.schedule == "dualpipe")
    if copies:
        cost = step_cost(job, plan, costs)
        kept = [sum(p / g for p, _, g in groups(cost, s, plan)) for s in range(plan.model_stages)]
        both = sum(kept) * gradient_bytes(job.precision, costs.stack)
        assert sum(copies.values()) == pytest.approx(both)


@given(CASES)
@settings(max_examples=60)
def test_pipeline(case: Case) -> None:
    """Each border between ranks is crossed there and back by all tokens, of which a tp rank may send its
    part.
    """
    job, plan, costs = case
    program, _ = program_of(*case)
    borders = sum(plan.stage_rank(s) != plan.stage_rank(s + 1) for s in range(plan.num_stages - 1))
    tokens = plan.micro_batch * job.seq_len / plan.cp
    cut = plan.tp if plan.sequence_parallel or costs.stack.pp_scatter_gather else 1
    runs = plan.num_micro_batches(job) // plan.chains
    expected = 2 * borders * runs * tokens * job.model.hidden * 2 / cut
    assert sum(t.num_bytes for t in program.tasks if t.kind == "pp") == pytest.approx(expected)


@given(CASES)
@settings(max_examples=60)
def test_only_transfers_send(case: Case) -> None:
    program, _ = program_of(*case)
    for task in program.tasks:
        if task.stream == "dp" or task.kind == "pp":
            assert task.num_bytes > 0
        elif task.stream not in ("tp", "cp", "ep"):
            assert task.num_bytes == 0


def in_the_way(plan: ParallelPlan, stream: str, model: ModelSpec) -> float:
    """Bytes that a device sends on a stream in the passes of one micro-batch, where compute waits."""
    job = Job(model=model, seq_len=256, global_batch=plan.dp)
    program, _ = program_of(job, plan, CostModel(model, round_cluster(), plain_stack()))
    return sum(task.num_bytes for task in program.tasks if task.stream == stream)


def in_all(plan: ParallelPlan, stream: str, **stack: object) -> float:
    """The same of one layer, with what runs beside compute."""
    model = small_model()
    cell = cell_of(Job(model=model, seq_len=256, global_batch=1), plan)
    operations = layer_operations(model, 0, cell, plain_stack(**stack))
    passes = part_passes(operations, cell, round_cluster(), plain_stack(**stack))
    return sum(op.num_bytes for timed in passes[:4] for op in timed if op.stream == stream)


@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_parallelism(tp: int) -> None:
    """Shoeybi et al. 2019: four all-reduces of b·s·h a layer; and one each for embedding and head, whose
    loss sums three numbers a token.
    """
    model = small_model()
    whole = 2 * (tp - 1) / tp * 256 * 512 * 2
    expected = (4 * model.layers + 2) * whole + 2 * (tp - 1) / tp * 3 * 256 * 4
    plan = ParallelPlan(tp=tp, sequence_parallel=False)
    assert in_the_way(plan, "tp", model) == pytest.approx(expected)
    # With sequence parallelism an all-reduce is a reduce-scatter and an all-gather of as many bytes.
    plan = replace(plan, sequence_parallel=True)
    assert in_the_way(plan, "tp", model) == pytest.approx(expected)
    # Hidden or not they are sent; an asynchronous backward gathers both inputs once more.
    assert in_all(plan, "tp") == pytest.approx(4 * whole)
    hidden = replace(plan, tp_overlap=True)
    assert in_all(hidden, "tp", tp_async_backward=True) == pytest.approx(5 * whole)


def test_exchanges_of_tokens() -> None:
    """There and back, in forward and backward: (n−1)/n of two copies of each token, in eight layers."""
    model = small_model(moe=MoeSpec(experts=8, top_k=2, ffn_hidden=256))
    expected = 8 * 4 * 3 / 4 * 2 * 256 * 512 * 2
    assert in_the_way(ParallelPlan(dp=4, ep=4), "ep", model) == pytest.approx(expected)


def test_rings() -> None:
    """Keys and values in the forward, with their gradients in the backward; attention hides a part."""
    ring = 3 * 3 / 4 * 256 * 2 * 256 * 2
    assert in_all(ParallelPlan(cp=4), "cp") == pytest.approx(ring)
    assert in_the_way(ParallelPlan(cp=4), "cp", small_model()) < 8 * ring
