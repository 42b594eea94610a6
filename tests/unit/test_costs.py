"""The cost of layers and steps against closed forms."""

from dataclasses import replace
from typing import TypeGuard

import pytest

from parsim.cost.cell import Cell, cell_of
from parsim.cost.collective import NETWORK_EFFICIENCY, NETWORK_HOP_S
from parsim.cost.flops import model_flops, model_flops_per_token
from parsim.cost.gemm import DEFAULT_LAUNCH_S, DEFAULT_MEMORY_EFFICIENCY
from parsim.cost.layer import embedding_operations, layer_operations
from parsim.cost.operation import Attention, Elementwise, Gemm, Operation, Transfer
from parsim.cost.price import PartTime, PassTime, part_time
from parsim.cost.self_attention import attention_operations
from parsim.cost.stage import CostModel
from parsim.cost.step import step_cost
from parsim.model import MlaSpec, ModelSpec, num_parameters
from parsim.plan import Job, ParallelPlan
from parsim.simulate.prediction import predict
from parsim.stack import Fp8Scaling, Stack
from tests.builders import plain_stack, round_cluster, small_model

GPT = ModelSpec(
    name="gpt", layers=24, hidden=2048, heads=16, ffn_hidden=8192, gated_mlp=False, vocab=51200,
    max_seq_len=2048, norm="layernorm", position="learned", linear_bias=True,
)  # fmt: skip
LLAMA = ModelSpec(
    name="llama", layers=2, hidden=4096, heads=32, kv_heads=8, ffn_hidden=14336, gated_mlp=True,
    vocab=128256, max_seq_len=8192,
)  # fmt: skip


def layer_flops(plan: ParallelPlan, model: ModelSpec = GPT) -> float:
    job = Job(model=model, seq_len=2048, global_batch=plan.dp * plan.micro_batch)
    operations = layer_operations(model, 0, cell_of(job, plan), plain_stack())
    return sum(op.flops for op in operations if isinstance(op, Gemm | Attention))


def test_forward_flops_of_a_layer() -> None:
    # Narayanan et al. 2021, arXiv 2104.04473, appendix: 24·B·s·h² + 4·B·s²·h a layer and forward
    b, s, h = 4, 2048, 2048
    expected = 24 * b * s * h**2 + 4 * b * s**2 * h
    assert layer_flops(ParallelPlan(micro_batch=b)) == pytest.approx(expected)


def test_parallelism_shares_the_flops_of_a_layer() -> None:
    whole = layer_flops(ParallelPlan(micro_batch=4))
    assert layer_flops(ParallelPlan(micro_batch=4, tp=4)) == pytest.approx(whole / 4)
    assert layer_flops(ParallelPlan(micro_batch=4, cp=4)) == pytest.approx(whole / 4)


def test_model_flops_of_palm() -> None:
    # Chowdhery et al. 2022, appendix B: 6N + 12·L·H·Q·T
    model = small_model()
    n = num_parameters(model)
    assert model_flops_per_token(model, 256) == 6 * n + 12 * 8 * 8 * 64 * 256
    assert model_flops_per_token(model, 256, causal=True) == 6 * n + 6 * 8 * 8 * 64 * 256
    assert model_flops(Job(model=model, seq_len=256, global_batch=3)) == 3 * 256 * model_flops_per_token(
        model, 256
    )


def transfers(plan: ParallelPlan) -> dict[tuple[str, str], float]:
    job = Job(model=GPT, seq_len=2048, global_batch=plan.micro_batch)
    found: dict[tuple[str, str], float] = {}
    for op in layer_operations(GPT, 0, cell_of(job, plan), plain_stack()):
        if isinstance(op, Transfer):
            key = (op.when, op.kind)
            found[key] = found.get(key, 0.0) + op.num_bytes
    return found


def test_tensor_parallel_communication() -> None:
    # Shoeybi et al. 2019, section 3: two all-reduces of b·s·h each way. Korthikanti et al. 2022, section
    # 4.2.2: sequence parallelism makes each an all-gather and a reduce-scatter of the same bytes.
    bsh = 2 * 2048 * 2048 * 2
    assert transfers(ParallelPlan(tp=2, micro_batch=2)) == {
        ("forward", "all_reduce"): 2 * bsh,
        ("backward", "all_reduce"): 2 * bsh,
    }
    assert transfers(ParallelPlan(tp=2, micro_batch=2, sequence_parallel=True)) == {
        (when, kind): 2 * bsh
        for when in ("forward", "backward")
        for kind in ("all_gather", "reduce_scatter")
    }
    assert transfers(ParallelPlan()) == {}


def test_backward_and_recomputation() -> None:
    costs = CostModel(GPT, round_cluster(), plain_stack())
    job = Job(model=GPT, seq_len=2048, global_batch=1)
    times = {
        mode: costs.layer(cell_of(job, ParallelPlan(recompute=mode)), 0).time  # type: ignore[arg-type]
        for mode in ("none", "selective", "full")
    }
    none, selective, full = (times[mode] for mode in ("none", "selective", "full"))
    assert none.recompute.total_s == 0
    assert full.recompute == full.forward
    assert 0 < selective.recompute.total_s < full.recompute.total_s
    # Each of the two gradients of a GEMM has its forward's FLOPs.
    assert none.backward.total_s > 1.5 * none.forward.total_s


def test_fp8_gemms_read_half_the_bytes_and_cast() -> None:
    model = small_model()
    plan, job = ParallelPlan(), Job(model=model, seq_len=256, global_batch=1, precision="fp8")
    operations = layer_operations(model, 0, cell_of(job, plan), plain_stack())
    gemms = [op for op in operations if isinstance(op, Gemm)]
    assert all(op.low_precision for op in gemms)
    casts = [op for op in operations if isinstance(op, Elementwise) and "cast" in op.name]
    assert len(casts) == len(gemms)


def test_a_network_ten_times_slower_makes_gradients_ten_times_dearer() -> None:
    fast = round_cluster()
    job = Job(model=GPT, seq_len=2048, global_batch=16)
    plan = ParallelPlan(dp=16, tp=8)  # one rank of a data-parallel group in each node
    slow = round_cluster(inter_node=fast.inter_node.__class__(
        latency_s=0.0, bandwidth_bytes_per_s=1e9, source="", date=""))  # fmt: skip
    stack = plain_stack(dp_bucket_parameters=1e12)  # one bucket: one latency
    reduce_s = [
        step_cost(job, plan, CostModel(GPT, cluster, stack)).syncs[0].reduce_s
        for cluster in (fast, slow)
    ]
    assert reduce_s[1] == pytest.approx(10 * reduce_s[0], rel=0.01)  # but for latency


def test_a_host_that_cannot_keep_up_sets_the_pace() -> None:
    model = small_model()
    job = Job(model=model, seq_len=256, global_batch=4)
    busy = CostModel(model, round_cluster(), plain_stack(layer_host_s=1.0))
    prediction, _ = predict(job, ParallelPlan(), busy)
    # 8 layers × 4 micro-batches × (forward + backward) of one host second each, and little else
    assert prediction.step_time_s == pytest.approx(64, rel=0.01)


def test_a_tensor_parallel_group_is_torn_only_where_the_plan_has_the_ranks() -> None:
    """Six ranks fit a node of eight; the next six begin in it and end in another."""
    model = small_model(hidden=768, heads=12, kv_heads=6, ffn_hidden=1536)
    job = Job(model=model, seq_len=256, global_batch=4)

    def forward_tp_s(dp: int) -> float:
        cell = cell_of(job, ParallelPlan(tp=6, dp=dp))
        return CostModel(model, round_cluster(), plain_stack()).layer(cell, 0).time.forward.tp_s

    assert forward_tp_s(2) > 5 * forward_tp_s(1)  # the network has a tenth of the rate


def test_a_loaded_network_slows_every_collective_that_crosses_it() -> None:
    model = small_model()
    job = Job(model=model, seq_len=256, global_batch=16)

    def forward_tp_s(tp: int, dp_slowdown: float) -> float:
        costs = CostModel(model, round_cluster(gpus_per_node=2, scale_up_domain=2),
                          plain_stack(dp_slowdown=dp_slowdown))  # fmt: skip
        return costs.layer(cell_of(job, ParallelPlan(tp=tp)), 0).time.forward.tp_s

    assert forward_tp_s(4, 3.0) == pytest.approx(3 * forward_tp_s(4, 1.0))
    assert forward_tp_s(2, 3.0) == forward_tp_s(2, 1.0)


def test_sends_over_the_network_leave_a_node_that_holds_both_stages() -> None:
    model = small_model()
    job = Job(model=model, seq_len=256, global_batch=16)
    inside_s, outside_s = (
        step_cost(
            job, ParallelPlan(pp=2), CostModel(model, round_cluster(), plain_stack(**stack))
        ).send_s[0]
        for stack in ({}, {"pp_over_network": True})
    )
    network = round_cluster().inter_node
    sent_s = 256 * model.hidden * 2 / (NETWORK_EFFICIENCY * network.bandwidth_bytes_per_s)
    assert outside_s == pytest.approx(NETWORK_HOP_S + sent_s)
    assert inside_s < outside_s


def test_an_embedding_timed_alone_has_no_transfers() -> None:
    model = small_model()
    cell = cell_of(Job(model=model, seq_len=256, global_batch=4), ParallelPlan(tp=4))

    def end_tp_s(lead_s: float) -> float:
        costs = CostModel(model, round_cluster(), plain_stack(layer_lead_s=lead_s))
        whole, layer = costs.stages(cell, (model.layers,))[0].time, costs.layer(cell, 0).time
        return whole.forward.tp_s - model.layers * layer.forward.tp_s

    assert end_tp_s(0.0) > 1e-6
    assert end_tp_s(0.5) == pytest.approx(0.0, abs=1e-12)


def test_layers_timed_alone_begin_with_an_idle_device() -> None:
    """A device that is busy for long pays the lead once a pass; collectives are not beside launches."""
    model = small_model()
    job = Job(model=model, seq_len=256, global_batch=4)

    def forward(host_s: float, lead_s: float, tp: int = 1) -> PassTime:
        stack = plain_stack(layer_host_s=host_s, layer_lead_s=lead_s)
        costs = CostModel(model, round_cluster(), stack)
        return costs.layer(cell_of(job, ParallelPlan(tp=tp)), 0).time.forward

    device_s = forward(0.0, 0.0).compute_s
    assert forward(0.0, 0.5).compute_s == pytest.approx(device_s + 0.5)
    assert forward(2.0, 0.5).compute_s == pytest.approx(2.0)
    sharded = forward(2.0, 0.5, tp=8)
    assert sharded.tp_s > 0
    assert sharded.total_s == pytest.approx(2.0 + sharded.tp_s)
    queued = forward(2.0, 0.0, tp=8)
    assert queued.total_s == pytest.approx(2.0)  # the host is still launching while tokens travel


def test_idle_time_of_the_ideal_pipeline() -> None:
    # DESIGN: ideal 1F1B gives a bubble of (p − 1)/(m + p − 1); here stages differ by embedding and head.
    model = small_model(layers=64, vocab=8)
    job = Job(model=model, seq_len=256, global_batch=8)
    costs = CostModel(model, round_cluster(), plain_stack())
    prediction, _ = predict(job, ParallelPlan(pp=4), costs)
    parts = prediction.breakdown_s
    idle_s = parts["bubble"] + parts["pp_exposed"]
    pipeline_s = prediction.step_time_s - parts["optimizer"]
    assert idle_s / pipeline_s == pytest.approx(3 / 11, rel=0.02)


def test_a_pipeline_hop_is_as_slow_as_its_slowest_replica() -> None:
    # Stages of 3 ranks on nodes of 8: 0-2 → 3-5 stays inside, 3-5 → 6-8 leaves for one replica of three.
    model = small_model()
    job = Job(model=model, seq_len=256, global_batch=12)
    plan = ParallelPlan(dp=3, pp=4)
    send_s = step_cost(job, plan, CostModel(model, round_cluster(), plain_stack())).send_s
    assert send_s[0] < send_s[1] == send_s[2]


def test_data_parallel_groups_that_nodes_tear_apart_are_dearer() -> None:
    # 6 ranks stay on one node of 8 alone; among 24, nodes tear ranks 6-11 into 2 and 4.
    model = small_model()
    job = Job(model=model, seq_len=256, global_batch=24)
    costs = CostModel(model, round_cluster(), plain_stack())
    alone, torn = (step_cost(job, ParallelPlan(dp=6, pp=pp), costs).syncs[0] for pp in (1, 4))
    assert torn.reduce_s > 2 * alone.reduce_s * 2 / 8  # of 8 layers a stage has 2


def test_broadcasts_of_zero_cost_once_a_rank_and_nothing_where_nobody_shares() -> None:
    model = small_model()
    job = Job(model=model, seq_len=256, global_batch=16)

    def broadcasts_s(plan: ParallelPlan) -> float:
        """Of one pipeline rank in a step."""
        without, with_them = (
            sum(
                sync.gather_s
                for sync in step_cost(job, plan, CostModel(model, round_cluster(), stack)).syncs
            )
            for stack in (plain_stack(), plain_stack(zero_broadcast_s=3e-3))
        )
        return (with_them - without) / plan.pp

    shared = ParallelPlan(dp=4, pp=2, zero=1)
    assert broadcasts_s(shared) == pytest.approx(4 * 3e-3)
    assert broadcasts_s(replace(shared, vpp=2, schedule="interleaved")) == pytest.approx(4 * 3e-3)
    assert broadcasts_s(ParallelPlan(pp=2, zero=1)) == 0


def test_tf32_narrows_only_the_operands_of_gemms() -> None:
    """Activations stay in fp32 (NVIDIA A100 whitepaper, "TF32"): twice the bytes of bf16."""
    saved = [
        cell_of(Job(model=GPT, seq_len=2048, global_batch=1, precision=precision), ParallelPlan())
        for precision in ("tf32", "fp32", "bf16", "fp8", "nvfp4", "fp64")
    ]
    assert [cell.activation_bytes for cell in saved] == [4, 4, 2, 2, 2, 8]
    assert [cell.low_precision for cell in saved] == [False, False, False, True, True, False]


def test_recomputing_the_attention_core_repeats_its_ring() -> None:
    job = Job(model=GPT, seq_len=2048, global_batch=1)
    plan = ParallelPlan(cp=16, recompute="selective")  # a ring over two nodes that attention cannot hide
    time = CostModel(GPT, round_cluster(), plain_stack()).layer(cell_of(job, plan), 0).time
    assert time.recompute.cp_s == time.forward.cp_s > 0


def test_gathered_keys_and_values_are_sent_once_each_way_and_kept() -> None:
    """Llama Team 2024, section 3.3.2: an all-gather before the attention, a reduce-scatter behind it."""
    plan = ParallelPlan(cp=4)
    cell = cell_of(Job(model=GPT, seq_len=2048, global_batch=1), plan)
    ring, gathered = (
        attention_operations(GPT, cell, plain_stack(context_exchange=how), 0)
        for how in ("ring", "all_gather")
    )
    whole = 2048 * 2 * GPT.kv_heads * GPT.head_dim * 2.0
    sent = [(op.kind, op.num_bytes, op.beside) for op in gathered if isinstance(op, Transfer)]
    assert sent == [("all_gather", whole, None), ("reduce_scatter", whole, None)]
    assert sum(op.num_bytes for op in ring if isinstance(op, Transfer)) == 3 * whole
    kept = [
        op.qkv_bytes + op.saved_bytes
        for operations in (ring, gathered)
        for op in operations
        if isinstance(op, Attention)
    ]
    assert kept[1] - kept[0] == whole * 3 / 4  # what the other three have


def norm_bytes(model: ModelSpec, plan: ParallelPlan, layer: int = 0) -> tuple[float, float]:
    """Bytes that the norms of a layer and of the embedding read and write in a forward."""
    cell = cell_of(Job(model=model, seq_len=256, global_batch=1), plan)
    layer_sum, embedding_sum = (
        sum(op.forward_bytes for op in operations if isinstance(op, Elementwise) and "norm" in op.name)
        for operations in (
            layer_operations(model, layer, cell, plain_stack()),
            embedding_operations(model, cell, plain_stack()),
        )
    )
    return layer_sum, embedding_sum


@pytest.mark.parametrize("norms_per_layer", [0, 1, 2, 3, 4])
def test_every_norm_of_a_layer_reads_and_writes_its_tensor(norms_per_layer: int) -> None:
    model = small_model(norms_per_layer=norms_per_layer)
    assert norm_bytes(model, ParallelPlan()) == (norms_per_layer * 2 * 256 * 512 * 2, 0)


def test_norms_inside_attention_and_after_the_embedding() -> None:
    # BLOOM's embedding norm; Qwen3's norms on 8 query and 4 key heads of 64, cut by tp; DeepSeek's on
    # latents of 96 and 32, which are whole on every tp rank.
    hidden = 2 * 2 * 256 * 512
    bloom = small_model(embedding_norm=True)
    assert norm_bytes(bloom, ParallelPlan()) == (2 * hidden, hidden)
    assert norm_bytes(bloom, ParallelPlan(tp=4, sequence_parallel=True))[1] == hidden / 4
    qwen = small_model(qk_norm=True)
    assert norm_bytes(qwen, ParallelPlan())[0] == 2 * hidden + 2 * 2 * 256 * 12 * 64
    assert norm_bytes(qwen, ParallelPlan(tp=4))[0] == 2 * hidden + 2 * 2 * 256 * 3 * 64
    mla = MlaSpec(
        kv_lora_rank=32, q_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
    )
    deepseek = small_model(mla=mla, kv_heads=8)
    assert norm_bytes(deepseek, ParallelPlan(tp=4))[0] == 2 * hidden + 2 * 2 * 256 * 128


def test_kernels_of_an_eager_stack() -> None:
    """PyTorch has one kernel for a layernorm and for GELU; an rmsnorm and SiLU(x)·y are several."""

    def passes(model: ModelSpec, *, fused: bool) -> dict[str, float]:
        """Tensors of the residual stream's width that norms and the activation move."""
        cell = cell_of(Job(model=model, seq_len=2048, global_batch=1), ParallelPlan())
        operations = layer_operations(model, 0, cell, plain_stack(fused_elementwise=fused))
        return {
            op.name: (op.forward_bytes + op.backward_bytes) / (2 * 2048 * model.hidden)
            for op in operations
            if isinstance(op, Elementwise) and op.name in ("attention norm", "activation")
        }

    mpt = replace(GPT, linear_bias=False)
    assert passes(mpt, fused=False) == passes(mpt, fused=True) == {"attention norm": 5, "activation": 20}
    llama = replace(mpt, norm="rmsnorm", gated_mlp=True)
    assert passes(llama, fused=True) == {"attention norm": 5, "activation": 8 * 4}
    assert passes(llama, fused=False) == {"attention norm": 54, "activation": 12 * 4}


def layer_time(stack: Stack, cell: Cell) -> PartTime:
    return part_time(layer_operations(LLAMA, 0, cell, stack), cell, round_cluster(), stack)


def test_products_of_their_own_add_up_the_gradients_of_their_input() -> None:
    """q, k and v: two sums more; w1 and w3: one. A sum reads two tensors and writes one."""
    cell = cell_of(Job(model=LLAMA, seq_len=8192, global_batch=1), ParallelPlan())
    one, several = (layer_time(plain_stack(merged_products=merged), cell) for merged in (True, False))
    products_s = 3 * DEFAULT_LAUNCH_S  # the round device's products are as fast in pieces
    added_s = 3 * 3 * 8192 * 4096 * 2 / (DEFAULT_MEMORY_EFFICIENCY * 1e12) + 2 * DEFAULT_LAUNCH_S
    assert several.forward.compute_s - one.forward.compute_s == pytest.approx(products_s)
    more_s = several.input_grad.compute_s - one.input_grad.compute_s
    assert more_s == pytest.approx(added_s + products_s)


def test_complex_rotary_positions_move_20_bytes_a_value() -> None:
    cell = cell_of(Job(model=LLAMA, seq_len=8192, global_batch=1), ParallelPlan())
    (rotary,) = (
        op
        for op in layer_operations(LLAMA, 0, cell, plain_stack(complex_rotary=True))
        if isinstance(op, Elementwise) and op.name == "rotary positions"
    )
    assert rotary.forward_bytes == rotary.backward_bytes == 20 * 8192 * (4096 + 1024)


def test_scaling_by_maxima_reads_operands_twice() -> None:
    """torchao: 5 bytes a cast; X forward and backward, dY once, or along both its sides by row."""

    def cast_bytes(scaling: Fp8Scaling) -> tuple[float, float]:
        job = Job(model=LLAMA, seq_len=8192, global_batch=1, precision="fp8")
        operations = layer_operations(
            LLAMA, 0, cell_of(job, ParallelPlan()), plain_stack(fp8_scaling=scaling, fp8_keeps_wide=True)
        )
        (cast,) = (op for op in operations if isinstance(op, Elementwise) and op.name == "fc2 cast")
        return cast.forward_bytes / 8192, cast.backward_bytes / 8192

    x, dy = 14336, 4096
    assert cast_bytes("tensor") == (5 * x, 7 * x + 7 * dy)
    assert cast_bytes("row") == (5 * x, 5 * x + 10 * dy)


def test_rows_are_scaled_after_the_gather_and_their_products_are_slower() -> None:
    job = Job(model=LLAMA, seq_len=8192, global_batch=1, precision="fp8")
    cell = cell_of(job, ParallelPlan(tp=4, sequence_parallel=True))
    stacks = [plain_stack(fp8_scaling=scaling, fp8_row_slowdown=2.0) for scaling in ("tensor", "row")]
    gathered = [
        sum(op.num_bytes for op in layer_operations(LLAMA, 0, cell, stack) if _is_gather(op))
        for stack in stacks
    ]
    assert gathered[1] == 2 * gathered[0]
    device = replace(round_cluster().device, peak_flops_per_s={"bf16": 1e14, "fp8": 2e14})
    by_tensor, by_row = (
        part_time(layer_operations(LLAMA, 0, cell, stack), cell, round_cluster(device=device), stack)
        for stack in stacks
    )
    assert by_row.weight_grad.compute_s == pytest.approx(2 * by_tensor.weight_grad.compute_s)


def _is_gather(op: Operation) -> TypeGuard[Transfer]:
    return isinstance(op, Transfer) and op.kind == "all_gather"


def test_fsdp2_copies_what_it_gathers_and_reduces() -> None:
    """Read and written: 16-bit weights at a gather; at a reduction 16-bit gradients that become fp32."""
    model = small_model()
    job, plan = Job(model=model, seq_len=256, global_batch=8), ParallelPlan(dp=8, zero=3)
    (sync,) = step_cost(
        job, plan, CostModel(model, round_cluster(), plain_stack(fsdp_copies=True))
    ).syncs
    byte_s = num_parameters(model) / (DEFAULT_MEMORY_EFFICIENCY * 1e12)
    assert sync.gather_takes_s == pytest.approx(DEFAULT_LAUNCH_S + 4 * byte_s)
    assert sync.reduce_takes_s == pytest.approx(DEFAULT_LAUNCH_S + 6 * byte_s)
    (plain,) = step_cost(job, plan, CostModel(model, round_cluster(), plain_stack())).syncs
    assert plain.gather_takes_s == plain.reduce_takes_s == 0


@pytest.mark.parametrize(("prefetch", "share"), [(1, 0.25), (0, 0.0)])
def test_hidden_communication_takes_its_share_of_compute(prefetch: int, share: float) -> None:
    model = small_model()
    job, plan = Job(model=model, seq_len=256, global_batch=8), ParallelPlan(dp=8, zero=3)
    stack = plain_stack(dp_overlap_cost=0.25, fsdp_prefetch=prefetch)
    (sync,) = step_cost(job, plan, CostModel(model, round_cluster(), stack)).syncs
    assert sync.gather_takes_s == share * sync.gather_s
    assert sync.reduce_takes_s == 0.25 * sync.reduce_s


@pytest.mark.parametrize(("bucket", "share"), [(1e9, 0.0), (num_parameters(small_model()) / 4, 3 / 4)])
@pytest.mark.parametrize("zero", [0, 1])
def test_the_last_reduction_has_no_compute_to_take_from(bucket: float, share: float, zero: int) -> None:
    """The last of four buckets is reduced after all backwards: it takes nothing from them."""
    model = small_model()
    job, plan = Job(model=model, seq_len=256, global_batch=8), ParallelPlan(dp=8, zero=zero)
    stack = plain_stack(dp_overlap_cost=0.25, dp_bucket_parameters=bucket)
    (sync,) = step_cost(job, plan, CostModel(model, round_cluster(), stack)).syncs
    assert sync.reduce_takes_s == pytest.approx(0.25 * share * sync.reduce_s)
    assert sync.gather_takes_s == 0.25 * sync.gather_s
