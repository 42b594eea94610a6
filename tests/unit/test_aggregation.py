"""How gradients are grouped into reductions, and what weighting them costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from parsim.cost.cell import cell_of
from parsim.cost.memory_bound import memory_bound_s
from parsim.cost.stage import CostModel
from parsim.cost.step import StepCost, step_cost
from parsim.hardware import Link
from parsim.model import ModelSpec, MoeSpec, expert_parameters, layer_parameters, num_parameters
from parsim.plan import Job, ParallelPlan, stage_layers
from tests.builders import plain_stack, round_cluster, small_model

MODEL = small_model()
PLAN = ParallelPlan(dp=8)


def step(
    plan: ParallelPlan, *, model: ModelSpec = MODEL, latency_s: float = 0.0, **stack: Any
) -> StepCost:
    link = Link(latency_s=latency_s, bandwidth_bytes_per_s=1e11, source="", date="")
    job = Job(model=model, seq_len=256, global_batch=8)
    return step_cost(job, plan, CostModel(model, round_cluster(intra_node=link), plain_stack(**stack)))


@pytest.mark.parametrize(
    ("aggregation", "reductions"),
    [
        ("bucket", 1),  # 21 million parameters in a bucket of 40
        ("layer", 8),
        # qkv, output, fc1, fc2 and two norms in each of eight layers; both tables and the last norm.
        ("tensor", 8 * 6 + 3),
    ],
)
def test_each_reduction_has_its_latency(aggregation: str, reductions: int) -> None:
    """The same bytes in more messages: a ring passes 2(n − 1) hops in each."""
    plan = replace(PLAN, aggregation=aggregation)  # type: ignore[arg-type]
    quick, late = (step(plan, latency_s=latency_s).syncs[0] for latency_s in (0.0, 1e-3))
    assert late.reduce_s - quick.reduce_s == pytest.approx(reductions * 2 * 7 * 1e-3)
    assert quick.reduce_s == pytest.approx(step(PLAN).syncs[0].reduce_s)
    assert quick.reduce_bytes == pytest.approx(2 * 7 / 8 * 4 * num_parameters(MODEL))


def test_separate_products_are_separate_tensors() -> None:
    """q, k and v, gate and up each on their own: three more tensors a layer."""
    plan = replace(PLAN, aggregation="tensor")
    merged, separate = (
        step(plan, latency_s=1e-3, merged_products=merged).syncs[0].reduce_s for merged in (True, False)
    )
    assert separate - merged == pytest.approx(8 * 3 * 2 * 7 * 1e-3)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_tensors_of_a_stage_are_its_parameters(tp: int) -> None:
    """All but norms (this model has no biases) are matrices; experts are apart."""
    model = small_model(moe=MoeSpec(experts=8, top_k=2, ffn_hidden=256), tied_embeddings=True)
    plan = ParallelPlan(tp=tp, pp=2, sequence_parallel=tp > 1)
    costs = CostModel(model, round_cluster(), plain_stack())
    cell = cell_of(Job(model=model, seq_len=256, global_batch=8), plan)
    split = stage_layers(model, plan)
    found = zip(costs.stages(cell, split), costs.stage_weights(cell, split), strict=True)
    for index, (stage, weights) in enumerate(found):
        norms = 4 * 2 * 512 + (512 if index else 0)
        assert sum(m.values for m in weights.dense.matrices) == stage.dense_parameters - norms
        assert weights.dense.num_vectors == 4 * 2 + index
        assert sum(m.values for m in weights.experts.matrices) == stage.expert_parameters
        assert stage.expert_parameters == 4 * 8 * expert_parameters(model)
        shapes = {(m.rows * tp, m.columns) for m in weights.dense.matrices}
        assert (4096, 512) in shapes  # the table at the front, and its copy at the end
    assert layer_parameters(model, 0) > 8 * expert_parameters(model)


def test_weighting_reads_and_writes_all_gradients_and_sums_one_number() -> None:
    """g → w·g in place, and an all-reduce of the weights themselves."""
    plain, weighted = (step(replace(PLAN, weighted=w)).syncs[0] for w in (False, True))
    num_bytes = 4 * num_parameters(MODEL)
    assert plain.reduce_kernels_s == 0
    assert weighted.reduce_kernels_s == pytest.approx(memory_bound_s(round_cluster(), 2 * num_bytes))
    assert weighted.reduce_bytes - plain.reduce_bytes == pytest.approx(2 * 7 / 8 * 4)
    late = [step(replace(PLAN, weighted=w), latency_s=1e-3).syncs[0].reduce_s for w in (False, True)]
    assert late[1] - late[0] == pytest.approx(2 * 7 * 1e-3, rel=1e-6)
