"""Memory against the papers that derive it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parsim.config import load_cluster, load_model, load_stack
from parsim.cost.cell import Cell, cell_of
from parsim.cost.memory import optimizer_bytes, rank_memory
from parsim.cost.stage import CostModel
from parsim.model import ModelSpec, MoeSpec, num_parameters
from parsim.plan import V_SHAPED_SCHEDULES, Job, ParallelPlan
from parsim.schedule import OVERLAPPED_SCHEDULES, make_schedule
from parsim.schedule.in_flight import in_flight, peak_in_flight
from parsim.search.fullest import fullest_rank
from parsim.stack import Stack
from tests.builders import plain_stack, round_cluster, small_model

GPT3 = ModelSpec(
    name="gpt3", layers=96, hidden=12288, heads=96, ffn_hidden=4 * 12288, gated_mlp=False, vocab=51200,
    max_seq_len=2048, norm="layernorm", position="learned", linear_bias=True,
)  # fmt: skip
KORTHIKANTI = plain_stack(attention="fused_softmax", dropout=True)


def layer_bytes(
    tp: int, *, sequence_parallel: bool, recompute: str, stack: Stack = KORTHIKANTI
) -> float:
    cell = Cell(
        seq_len=2048, micro_batch=1, tp=tp, cp=1, ep=1, sequence_parallel=sequence_parallel,
        recompute=recompute, precision="bf16", tp_overlap=False,
    )  # fmt: skip
    return CostModel(GPT3, round_cluster(), stack).layer(cell, 0).saved_bytes


@pytest.mark.parametrize(
    ("tp", "sequence_parallel", "recompute", "per_sbh"),
    [
        # Korthikanti et al. 2022, arXiv 2205.05198, table 2, in units of s·b·h; a·s/h = 16 for GPT-3
        (1, False, "none", 34 + 5 * 16),
        (8, False, "none", 10 + 24 / 8 + 5 * 16 / 8),
        (8, True, "none", 34 / 8 + 5 * 16 / 8),
        (8, False, "selective", 10 + 24 / 8),
        (8, True, "selective", 34 / 8),
        (8, False, "full", 2),
        (8, True, "full", 2 / 8),
    ],
)
def test_activations_of_a_layer(
    tp: int, sequence_parallel: bool, recompute: str, per_sbh: float
) -> None:
    sbh = 2048 * 12288
    found = layer_bytes(tp, sequence_parallel=sequence_parallel, recompute=recompute)
    assert found == pytest.approx(per_sbh * sbh, rel=0.005)


def test_the_stack_of_the_paper_keeps_what_the_paper_says() -> None:
    # Korthikanti et al. 2022, equations 1, 2, 4, 5 and 6 for the shipped stack of that year
    stack = load_stack("megatron-lm-2022")
    sbh = 2048 * 12288
    for tp, sequence_parallel, recompute, per_sbh in (
        (1, False, "none", 34 + 5 * 16),
        (8, False, "none", 10 + 24 / 8 + 5 * 16 / 8),
        (8, True, "none", 34 / 8 + 5 * 16 / 8),
        (8, True, "selective", 34 / 8),
        (8, True, "full", 2 / 8),
    ):
        found = layer_bytes(tp, sequence_parallel=sequence_parallel, recompute=recompute, stack=stack)
        assert found == pytest.approx(per_sbh * sbh, rel=0.005)


def test_empty_gradients_hold_a_weight_of_every_shape() -> None:
    """Of one layer, however many there are, and of the head; an embedding has a real gradient."""
    model = small_model(tied_embeddings=False)
    job, plan = Job(model=model, seq_len=256, global_batch=1), ParallelPlan()

    def working(stack: Stack) -> float:
        stages = CostModel(model, round_cluster(), stack).stages(cell_of(job, plan), (8,))
        return rank_memory(stages, (1,), job, plan, stack).working

    layer = 512 * (512 + 2 * 256) + 512 * 512 + 3 * 512 * 1024 + 2 * 512  # qkv, output, gated mlp, norms
    head = 4096 * 512 + 512
    more = working(plain_stack(empty_gradients=True)) - working(plain_stack())
    assert more == 2 * (layer + head)


def test_flash_attention_keeps_no_scores() -> None:
    flash = plain_stack(attention="flash", dropout=False)
    found = layer_bytes(1, sequence_parallel=False, recompute="none", stack=flash)
    # 34 less two dropout masks of one byte each; of 5·a·s/h only a logarithm a query and head is left.
    assert found / (2048 * 12288) == pytest.approx(32 + 4 * 96 / 12288, rel=0.005)


def test_a_replica_of_7_5_billion_parameters_needs_120_gb() -> None:
    # Rajbhandari et al. 2020 (ZeRO), arXiv 1910.02054, figure 1: 2 + 2 + 12 bytes a parameter
    model = small_model(
        layers=36, hidden=4096, heads=32, kv_heads=32, ffn_hidden=16384, gated_mlp=False, vocab=51200
    )
    job = Job(model=model, seq_len=256, global_batch=64)
    stack = plain_stack(gradient_dtype="bf16")
    static = {}
    for zero in range(4):
        plan = ParallelPlan(dp=64, zero=zero)
        stages = CostModel(model, round_cluster(), stack).stages(cell_of(job, plan), (36,))
        static[zero] = rank_memory(stages, (1,), job, plan, stack).static / num_parameters(model)
    assert static[0] == pytest.approx(16)
    assert static[1] == pytest.approx(4 + 12 / 64)
    assert static[2] == pytest.approx(2 + 14 / 64)
    assert static[3] == pytest.approx(16 / 64)


def test_fsdp_gathers_the_head_of_llama_too() -> None:
    # The head, 128256 × 4096 in 16 bits, is larger than any layer (436 MB); two parts are whole at once.
    model = load_model("llama-3.1-8b")
    job = Job(model=model, seq_len=8192, global_batch=64)
    plan = ParallelPlan(dp=64, zero=3)
    stages = CostModel(model, round_cluster(), plain_stack()).stages(cell_of(job, plan), (32,))
    buffers = rank_memory(stages, (1,), job, plan, plain_stack()).buffers
    assert buffers == 2 * 2 * (128256 * 4096 + 4096)


def test_memory_of_llama_8b_on_torchtitan() -> None:
    """fp32 weights, gradients and moments, 16 bytes a parameter, over 8 GPUs; local batch 2.

    torchtitan's benchmark page of December 2024, table 1: 82.4 GiB eager, 77.0 compiled.
    """
    model, cluster = load_model("llama-3.1-8b"), load_cluster("h100-sxm-96gb-500w")
    job = Job(model=model, seq_len=8192, global_batch=16)
    plan = ParallelPlan(dp=8, zero=3, micro_batch=2, recompute="selective")
    compiled = load_stack("torchtitan-2024")
    uses = [
        fullest_rank(job, plan, CostModel(model, cluster, replace(compiled, fused_elementwise=fused)))
        for fused in (False, True)
    ]
    assert [use.static for use in uses] == pytest.approx([2 * num_parameters(model)] * 2)
    assert [use.peak / 2**30 for use in uses] == pytest.approx([82.4, 77.0], rel=0.03)
    # w2's output, which no backward reads, in each of 32 layers
    assert uses[0].activations - uses[1].activations == 32 * 2 * 8192 * 4096 * 2


def test_slack_of_the_allocator_is_a_share_of_the_tensors() -> None:
    model = small_model()
    job = Job(model=model, seq_len=256, global_batch=1)
    tight, loose = (
        fullest_rank(job, ParallelPlan(), CostModel(model, round_cluster(), plain_stack(**changes)))
        for changes in ({}, {"allocator_slack": 0.25})
    )
    assert (tight.slack, loose.slack) == (0, 0.25 * tight.peak)
    assert loose.peak == 1.25 * tight.peak


@pytest.mark.parametrize(
    ("moe", "widest"),
    [
        (MoeSpec(experts=8, top_k=4, ffn_hidden=512), 4 * 512),
        (MoeSpec(experts=8, top_k=1, ffn_hidden=512), 512),  # and no layer of ffn_hidden = 1024
        (MoeSpec(experts=8, top_k=1, ffn_hidden=512, dense_layers=1), 1024),
        (MoeSpec(experts=8, top_k=1, ffn_hidden=512, shared_ffn_hidden=4096), 4096),
    ],
)
def test_the_widest_tensor_of_experts_has_all_routed_tokens(moe: MoeSpec, widest: int) -> None:
    model = small_model(moe=moe, gated_mlp=True)
    job, plan, stack = Job(model=model, seq_len=256, global_batch=1), ParallelPlan(), plain_stack()
    stages = CostModel(model, round_cluster(), stack).stages(cell_of(job, plan), (8,))
    boundary = 256 * 512 * 2
    assert rank_memory(stages, (1,), job, plan, stack).working == 2 * boundary + 256 * 3 * widest * 2


def test_optimizer_states() -> None:
    model = small_model()
    sizes = {
        precision: optimizer_bytes(
            Job(model=model, seq_len=8, global_batch=1, precision=precision), plain_stack()
        )
        for precision in ("bf16", "fp8", "fp32", "fp64")
    }
    assert sizes == {"bf16": 12, "fp8": 12, "fp32": 8, "fp64": 16}


def test_more_ranks_never_need_more_memory() -> None:
    model = small_model()
    costs = CostModel(model, round_cluster(), plain_stack())
    job = Job(model=model, seq_len=256, global_batch=64)

    def peak(**sizes: int) -> float:
        return fullest_rank(job, ParallelPlan(**sizes), costs).peak  # type: ignore[arg-type]

    assert peak(tp=2, sequence_parallel=True) < peak(tp=1)
    assert peak(dp=4, zero=3) < peak(dp=4, zero=2) < peak(dp=4, zero=1) < peak(dp=4)
    assert peak(dp=8, zero=1) < peak(dp=4, zero=1)


def test_experts_are_shared_by_ep_and_dense_parts_are_not() -> None:
    model = small_model(moe=MoeSpec(experts=8, top_k=2, ffn_hidden=1024))
    costs = CostModel(model, round_cluster(), plain_stack())

    def stage(ep: int):  # type: ignore[no-untyped-def]
        plan = ParallelPlan(dp=8, ep=ep)
        return costs.stages(cell_of(Job(model=model, seq_len=256, global_batch=8), plan), (8,))[0]

    assert stage(1).parameters == num_parameters(model)
    assert stage(4).expert_parameters == stage(1).expert_parameters // 4
    assert stage(4).dense_parameters == stage(1).dense_parameters


def dense_parameters(model: ModelSpec, tp: int, layers: int) -> list[int]:
    """Of each of the first `layers` layers on one tensor-parallel rank."""
    cell = cell_of(Job(model=model, seq_len=2048, global_batch=1), ParallelPlan(tp=tp))
    costs = CostModel(model, round_cluster(), plain_stack())
    return [costs.layer(cell, i).dense_parameters for i in range(layers)]


def test_latents_and_router_are_whole_on_every_tensor_parallel_rank() -> None:
    # DeepSeek-V3 (arXiv 2412.19437, section 4.2): W^DQ, W^DKV, W^KR with the norms of their latents, the
    # router and two norms are whole; W^UQ, W^UK, W^UV, W^O and the shared expert are cut.
    whole = 7168 * (1536 + 512 + 64) + 1536 + 512 + 7168 * 256 + 2 * 7168
    cut = 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168 + 3 * 7168 * 2048
    model = load_model("deepseek-v3")
    assert dense_parameters(model, 1, 4)[3] == whole + cut
    assert dense_parameters(model, 8, 4)[3] == whole + cut // 8


def test_norms_biases_after_a_sum_and_positions_are_whole_on_every_tensor_parallel_rank() -> None:
    # Shoeybi et al. 2019, section 3: two layernorms of 2·h; W^O and the second feed-forward matrix are
    # cut by rows, so that their biases of h are added once, after the sum.
    h, tp = 12288, 8
    cut = 12 * h**2 + 3 * h + 4 * h
    assert dense_parameters(GPT3, tp, 1) == [cut // tp + 6 * h]
    cell = cell_of(Job(model=GPT3, seq_len=2048, global_batch=1), ParallelPlan(tp=tp))
    first, *_, last = CostModel(GPT3, round_cluster(), plain_stack()).stages(cell, (0, 96, 0))
    assert first.dense_parameters == 51200 * h // tp + 2048 * h
    assert last.dense_parameters == 51200 * h // tp + 2 * h


@st.composite
def ranks_with_unequal_chunks(draw: st.DrawFn) -> tuple[ParallelPlan, int, int, list[int]]:
    """A plan of several chunks, a rank of it, the micro-batches, and bytes that each chunk keeps."""
    pp = draw(st.integers(2, 8))
    schedule = draw(st.sampled_from(["interleaved", "interleaved-zb", *V_SHAPED_SCHEDULES]))
    pp += pp % 2 if schedule == "dualpipe" else 0
    vpp = 2 if schedule in V_SHAPED_SCHEDULES else draw(st.integers(2, 6))
    rounds = draw(st.integers(1, 9))
    num_micro_batches = rounds * pp if rounds > 1 else draw(st.integers(1, 2 * pp - 1))
    if schedule in OVERLAPPED_SCHEDULES:
        num_micro_batches = 2 * pp + 2 * num_micro_batches
    saved = draw(st.lists(st.integers(0, 100), min_size=vpp, max_size=vpp))
    plan = ParallelPlan(pp=pp, vpp=vpp, schedule=schedule)
    return plan, draw(st.integers(0, pp - 1)), num_micro_batches, saved


@given(ranks_with_unequal_chunks())
def test_the_fullest_moment_of_unequal_chunks_is_that_of_the_walk(
    case: tuple[ParallelPlan, int, int, list[int]],
) -> None:
    plan, rank, m, saved = case
    actions = make_schedule(plan, m).ranks[rank]
    stages = [stage for stage in range(plan.num_stages) if plan.stage_rank(stage) == rank]
    most, _ = peak_in_flight(actions, dict(zip(stages, saved, strict=True)))
    kept = in_flight(plan, rank, m, saved)
    assert sum(count * size for count, size in zip(kept, saved, strict=True)) == most
    assert all(0 <= count <= m for count in kept)


def test_a_heavy_first_chunk_is_fullest_one_forward_after_the_warm_up() -> None:
    # Rank 0 of 4 with 4 chunks: 18 forwards of warm-up and one more leave 7 + 4 + 4 + 4; the next ends
    # the first chunk's second round and follows a backward of the last chunk: 8 + 4 + 4 + 3.
    plan = ParallelPlan(pp=4, vpp=4, schedule="interleaved")
    assert in_flight(plan, 0, 16) == (7, 4, 4, 4)
    assert in_flight(plan, 0, 16, (10, 1, 1, 1)) == (8, 4, 4, 3)
