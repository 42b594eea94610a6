"""Multi-token prediction: a module after the last layer."""

from __future__ import annotations

import pytest

from parsim.config import load_model
from parsim.cost.cell import cell_of
from parsim.cost.layer import head_operations, layer_operations, mtp_operations
from parsim.cost.operation import Gemm, Operation
from parsim.cost.stage import CostModel
from parsim.model import MoeSpec, mtp_parameters, num_parameters
from parsim.plan import Job, ParallelPlan, stage_layers
from tests.builders import plain_stack, round_cluster, small_model

MODEL = small_model(mtp_layers=1, moe=MoeSpec(experts=4, top_k=2, ffn_hidden=512))
CELL = cell_of(Job(model=MODEL, seq_len=256, global_batch=1), ParallelPlan())


def flops(operations: tuple[Operation, ...]) -> float:
    return sum(op.flops for op in operations if isinstance(op, Gemm))


def test_a_module_is_a_layer_a_projection_and_the_head_again() -> None:
    parts = layer_operations(MODEL, 7, CELL, plain_stack()), head_operations(MODEL, CELL, plain_stack())
    projection = 2 * 256 * 512 * (2 * 512)
    module = mtp_operations(MODEL, CELL, plain_stack())
    assert flops(module) == sum(map(flops, parts)) + projection


def test_the_last_stage_holds_it_whole() -> None:
    costs = CostModel(MODEL, round_cluster(), plain_stack())
    without = CostModel(small_model(moe=MODEL.moe), round_cluster(), plain_stack())
    (*first, last), (*same, plain) = (c.stages(CELL, (4, 4)) for c in (costs, without))
    assert first == same
    assert last.parameters - plain.parameters == mtp_parameters(MODEL)
    layer, head = costs.layer(CELL, 7), without.stages(CELL, (8, 0))[1]
    more = last.time.forward.compute_s - plain.time.forward.compute_s
    assert more > layer.time.forward.compute_s + head.time.forward.compute_s
    assert last.expert_parameters == plain.expert_parameters + layer.expert_parameters


def test_deepseek_v3_has_one_of_eleven_billion_parameters_and_its_total_counts_none() -> None:
    """arXiv 2412.19437, section 4.2, 671B; the released weights add 11.5B for the module, without the
    copies of embedding and head (deepseek-ai/DeepSeek-V3, README_WEIGHTS.md)."""
    model = load_model("deepseek-v3")
    assert num_parameters(model) == pytest.approx(671e9, rel=1e-3)
    assert mtp_parameters(model) == pytest.approx(11.5e9, rel=0.02)


def test_stages_leave_room_for_it() -> None:
    """Layouts of Megatron-Bridge for DeepSeek-V3: Et*4|(t*4|)*14tmL and Et|(tt|)*30mL."""
    model = load_model("deepseek-v3")
    assert stage_layers(model, ParallelPlan(pp=16)) == (4,) * 15 + (1,)
    assert stage_layers(model, ParallelPlan(pp=8, vpp=4)) == (1, *(2,) * 30, 0)
