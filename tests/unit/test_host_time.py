"""Host times that a machine was measured to have, and what of them a step contains."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parsim.config import load_stack
from parsim.cost.cell import cell_of
from parsim.cost.host import layer_host, stack_on
from parsim.cost.memory_bound import memory_bound_s
from parsim.cost.stage import HEAD, CostModel
from parsim.cost.step import step_cost
from parsim.errors import ParsimError
from parsim.execute.calibrate.host import (
    FEW,
    MORE,
    host_experts,
    host_mode,
    split_host,
)
from parsim.execute.one_rank.one_rank import ActionTime, OneRank
from parsim.execute.request import Case
from parsim.hardware import Cluster
from parsim.kernels import HOST_MODES, HostExperts, HostMode, Kernels, MeasuredHost
from parsim.model import num_parameters
from parsim.plan import Job, parse_plan
from parsim.schedule import make_schedule
from parsim.search.bound import lower_bound_s
from parsim.simulate.prediction import predict, program_of
from parsim.timeline import COMPUTE
from tests.builders import plain_stack, round_cluster, small_model

MODEL = small_model()
JOB = Job(model=MODEL, seq_len=64, global_batch=8, precision="fp32")
MODES = tuple(
    HostMode(
        mode=mode, layer_forward_s=1 + i, layer_backward_s=2 + 3 * i, ends_forward_s=0.25 * i,
        ends_backward_s=0.5 * i, layer_step_s=0.125 * (i + 1), step_s=0.0625,
    )
    for i, mode in enumerate(HOST_MODES)
)  # fmt: skip
"""Whole seconds, so that nothing else of a step matters: plain 1 and 2, selective 2 and 5, full 3 and 8,
tp 4 and 11, with sequence parallelism 5 and 14, ZeRO-2 6 and 17, ZeRO-3 7 and 20."""
HOST = MeasuredHost(
    op_s=1e-6, layer_forward_s=1.0, layer_backward_s=2.0, modes=MODES, action_s=0.03125,
    wait_s=0.015625, split_s=3.0, split_walk_s=0.25,
)  # fmt: skip


def on_host(host: MeasuredHost = HOST) -> Cluster:
    cluster = round_cluster(kernels=Kernels(measured_host=host))
    return replace(cluster, device=replace(cluster.device, is_host=True))


def costs_of(cluster: Cluster, **changes: object) -> CostModel:
    return CostModel(MODEL, cluster, stack_on(plain_stack(**changes), cluster))


def compute_s(text: str, name: str, **changes: object) -> float:
    """Whole seconds of compute of the tasks of one name under a plan."""
    plan = parse_plan(text)
    program, _ = program_of(JOB, plan, costs_of(on_host(), **changes))
    return sum(t.duration_s for t in program.tasks if t.name == name and t.stream == COMPUTE)


@pytest.mark.parametrize(
    ("text", "forward_s", "backward_s", "again_s"),
    [
        ("dp=1", 1, 2, 0),
        ("tp=2", 5, 14, 0),
        ("tp=2,sequence_parallel=false", 4, 11, 0),
        ("dp=1,recompute=selective", 2, 2, 3),
        ("dp=1,recompute=full", 3, 2, 6),
        ("tp=2,recompute=full", 5 + 2, 14, 6 + 4),
    ],
)
def test_a_layer_takes_what_its_modes_take_together(
    text: str, forward_s: float, backward_s: float, again_s: float
) -> None:
    cell = cell_of(JOB, parse_plan(text))
    found = layer_host(cell, on_host(), plain_stack(), experts=None)
    assert (found.forward_s, found.backward_s, found.again_s) == (forward_s, backward_s, again_s)


def test_without_modes_a_profile_says_what_it_says() -> None:
    """A layer's passes, and the stack's constants for the rest."""
    older = on_host(replace(HOST, modes=()))
    stack = plain_stack(action_host_s=5.0, step_overhead_s=6.0, collective_overhead_s=7.0)
    assert stack_on(stack, older) is stack
    cell = cell_of(JOB, parse_plan("tp=2,recompute=full"))
    found = layer_host(cell, older, stack, experts=None)
    assert (found.forward_s, found.backward_s, found.again_s) == (1.0, 2.0, 1.0)
    measured = stack_on(stack, on_host())
    assert (measured.action_host_s, measured.step_overhead_s) == (0.03125, 0.0625)
    assert measured.collective_overhead_s == 0.015625


def test_embedding_and_head_have_their_host_time_once() -> None:
    with_ends = CostModel(MODEL, on_host(), plain_stack()).part(cell_of(JOB, parse_plan("tp=2")), HEAD)
    bare = tuple(replace(mode, ends_forward_s=0.0, ends_backward_s=0.0) for mode in MODES)
    without = CostModel(MODEL, on_host(replace(HOST, modes=bare)), plain_stack()).part(
        cell_of(JOB, parse_plan("tp=2")), HEAD
    )
    assert with_ends.time.forward.compute_s - without.time.forward.compute_s == pytest.approx(1.0)
    assert with_ends.time.input_grad.compute_s - without.time.input_grad.compute_s == pytest.approx(2.0)


@pytest.mark.parametrize(("zero", "forward_s", "backward_s"), [(0, 8, 16), (2, 48, 136), (3, 56, 160)])
def test_hooks_of_shards_come_with_every_pass(zero: int, forward_s: float, backward_s: float) -> None:
    """Eight layers; gathers and reductions are cut in eight pieces, which share the host time."""
    text = f"dp=2,zero={zero},micro_batch=2"
    assert compute_s(text, "0F1") == pytest.approx(forward_s, abs=0.5)
    assert compute_s(text, "0B1") == pytest.approx(backward_s, abs=0.5)


@pytest.mark.parametrize(("text", "layer_s"), [("dp=2", 0.125), ("tp=2", 0.625), ("dp=2,zero=3", 0.875)])
def test_an_update_has_the_host_time_of_its_layers(text: str, layer_s: float) -> None:
    assert compute_s(text, "optimizer") == pytest.approx(8 * layer_s, abs=0.01)


def test_halves_of_a_backward_take_more_but_on_the_first_stage() -> None:
    """Four layers a stage: 4 · (3 + 4 · 0.25) s. The first stage hands nothing back."""
    whole, split = "pp=2,schedule=1f1b", "pp=2,schedule=zb-h1"
    for stage, more_s in ((0, 0.0), (1, 16.0)):
        halves_s = compute_s(split, f"{stage}I0") + compute_s(split, f"{stage}W0")
        extra_s = halves_s - compute_s(whole, f"{stage}B0") - 0.03125  # one action more
        assert extra_s == pytest.approx(more_s, abs=1e-3)


def test_a_recomputed_layer_runs_again_for_each_tensor_of_weights() -> None:
    """Nine of a gated layer: query, key, value, output, gate, up, down and two norms."""
    plan = parse_plan("pp=2,schedule=zb-h1,recompute=full")
    once, each = (
        step_cost(JOB, plan, costs_of(on_host(), recomputes_for_each_weight=each, merged_products=False))
        for each in (False, True)
    )
    recompute, before, after = (
        once.stages[1].time.recompute, once.stages[1].time.apart, each.stages[1].time.apart
    )  # fmt: skip
    assert after.compute_s - before.compute_s == pytest.approx(9 * recompute.compute_s)


def test_gradients_that_arise_anew_are_added_to_those_before() -> None:
    """Read twice and written once, in four bytes a parameter; the first backward has nothing before."""
    costs = costs_of(on_host(), gradients_arise_anew=True, gradient_dtype="same")
    plan = parse_plan("dp=2,micro_batch=2")
    (stage,) = step_cost(JOB, plan, costs).stages
    added_s = memory_bound_s(on_host(), 12 * stage.parameters)
    program, _ = program_of(JOB, plan, costs)
    first, second = (next(t.duration_s for t in program.tasks if t.name == f"0B{i}") for i in (0, 1))
    assert second - first == pytest.approx(added_s)
    assert compute_s("dp=2,micro_batch=2", "0B0") == compute_s("dp=2,micro_batch=2", "0B1")


@pytest.mark.parametrize(("zero", "copies"), [(0, 1), (1, 1), (2, 0)])
def test_replicas_copy_their_gradients_into_one_buffer(zero: int, copies: int) -> None:
    """Four bytes a parameter, read and written; shards are reduced where they arise."""
    plan = parse_plan(f"dp=2,zero={zero}")
    (plain,), (anew,) = (
        step_cost(
            JOB, plan, costs_of(on_host(), gradients_arise_anew=is_anew, gradient_dtype="same")
        ).syncs
        for is_anew in (False, True)
    )
    num_bytes = 8 * num_parameters(MODEL)
    copied_s = memory_bound_s(on_host(), num_bytes)
    assert anew.optimizer_s - plain.optimizer_s == pytest.approx(copies * copied_s)


def test_a_sequence_is_copied_where_collectives_cannot_cut_it() -> None:
    """Behind each of two gathers and two scatters of a layer's pass: read and written."""
    plain, copying = (costs_of(on_host(), sequence_copies=copies) for copies in (False, True))
    for text, count in (("tp=2", 4), ("tp=2,sequence_parallel=false", 0), ("dp=2", 0)):
        cell = cell_of(JOB, parse_plan(text))
        size = cell.tokens * MODEL.hidden * 4
        for passed in ("forward", "input_grad"):
            one, other = (getattr(c.layer(cell, 0).time, passed).compute_s for c in (plain, copying))
            assert other - one == pytest.approx(count * memory_bound_s(on_host(), 2 * size), rel=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        *("dp=2,zero=3", "dp=2,zero=2", "tp=2,recompute=full", "dp=2"),
        *("pp=2,schedule=zb-h1,recompute=full", "pp=2,vpp=2,schedule=zbv", "pp=2,dp=2,zero=2"),
    ],
)
def test_no_plan_beats_its_bound_on_a_measured_host(text: str) -> None:
    plan = parse_plan(text)
    cluster = on_host()
    stack = stack_on(replace(load_stack("parsim-executor"), merged_products=True), cluster)
    costs = CostModel(MODEL, cluster, stack)
    predicted, _ = predict(JOB, plan, costs, make_schedule(plan, plan.num_micro_batches(JOB)))
    assert lower_bound_s(step_cost(JOB, plan, costs), JOB, plan, stack) <= predicted.step_time_s


def one_rank(
    layers: int, actions: dict[str, float], *, optimizer_s: float = 0.0, step_host_s: float = 0.0
) -> OneRank:
    """What a rank took in whole milliseconds."""
    plan = parse_plan("dp=2")
    case = Case(
        job=JOB, plan=plan, schedule=make_schedule(plan, 4), steps=1, warmup=0, seed=0, dtype="fp32"
    )
    return OneRank(
        case=case, rank=1, steps_s=(1.0,), disturbed=(False,),
        actions=tuple(
            ActionTime(0, kind, 0.5 * s * 1e-3, 0.0, 1, s * 1e-3) for kind, s in actions.items()
        ),
        optimizer_s=optimizer_s * 1e-3, action_host_s=0.0, step_host_s=step_host_s * 1e-3, flops=layers,
        collectives=(), peak_bytes=1, device="cpu", machine="", torch_version="",
    )  # fmt: skip


def test_a_layer_is_the_difference_of_few_and_many() -> None:
    few = one_rank(FEW, {"F": 5 + FEW * 2, "B": 7 + FEW * 3}, optimizer_s=1, step_host_s=FEW * 0.5)
    more = one_rank(MORE, {"F": 5 + MORE * 2, "B": 7 + MORE * 3}, optimizer_s=1, step_host_s=MORE * 0.5)
    assert host_mode("plain", few, more) == HostMode(
        mode="plain", layer_forward_s=2e-3, layer_backward_s=3e-3, ends_forward_s=5e-3,
        ends_backward_s=7e-3, layer_step_s=0.5e-3, step_s=1e-3,
    )  # fmt: skip


def test_a_disturbed_difference_leaves_all_of_it_to_the_layers() -> None:
    few = one_rank(FEW, {"F": 13, "B": 30}, optimizer_s=9, step_host_s=0)
    more = one_rank(MORE, {"F": 12, "B": 54}, optimizer_s=6, step_host_s=0)
    mode = host_mode("plain", few, more)
    assert (mode.layer_forward_s, mode.ends_forward_s) == (2e-3, 0.0)
    assert (mode.layer_backward_s, mode.ends_backward_s) == (6e-3, 18e-3)
    assert (mode.layer_step_s, mode.step_s) == (0.0, 6e-3)  # which may well not grow with layers


def test_walks_over_a_graph_grow_with_the_square_of_its_layers() -> None:
    whole = tuple(one_rank(n, {"B": 3 * n}) for n in (FEW, MORE))
    split = tuple(one_rank(n, {"I": 2 * n, "W": 4 * n + 0.5 * n * n}) for n in (FEW, MORE))
    assert split_host(whole, split) == pytest.approx((3e-3, 0.5e-3))  # type: ignore[arg-type]


def test_experts_take_their_time_one_by_one() -> None:
    """A layer of 5 and 7 ms without its experts, and 2 and 3 ms for each of them."""

    def measured(layers: int, experts: int) -> OneRank:
        return one_rank(
            layers, {"F": 9 + layers * (5 + 2 * experts), "B": 9 + layers * (7 + 3 * experts)}
        )

    few, more = ((measured(FEW, experts), measured(MORE, experts)) for experts in (FEW, MORE))
    assert host_experts(few, more) == HostExperts(
        layer_forward_s=5e-3, layer_backward_s=7e-3, expert_forward_s=2e-3, expert_backward_s=3e-3
    )


@pytest.mark.parametrize(("text", "again_s"), [("dp=1", 0), ("dp=1,recompute=full", 4 + 6 + 2)])
def test_a_layer_with_experts_launches_each_of_them(text: str, again_s: float) -> None:
    """Three experts: 4 + 3 · 1 s forward and 5 + 3 · 2 s backward, where a dense layer has 1 and 2."""
    experts = HostExperts(
        layer_forward_s=4.0, layer_backward_s=5.0, expert_forward_s=1.0, expert_backward_s=2.0
    )
    cluster, cell = on_host(replace(HOST, experts=experts)), cell_of(JOB, parse_plan(text))
    found, dense = (layer_host(cell, cluster, plain_stack(), experts=n) for n in (3, None))
    assert found.forward_s - dense.forward_s == 4 + 3 - 1
    assert found.backward_s - dense.backward_s == 5 + 6 - 2
    assert found.again_s == again_s
    older = on_host(replace(HOST, modes=(), experts=experts))
    assert layer_host(cell, older, plain_stack(), experts=3).forward_s == 4 + 3
    assert layer_host(cell, on_host(), plain_stack(), experts=3) == dense


@pytest.mark.parametrize(
    ("text", "waits"), [("dp=2,zero=2", 1), ("dp=4,zero=3", 2), ("dp=2,zero=1", 0), ("dp=2", 0)]
)
def test_shards_of_each_layer_wait_for_the_rank_that_comes_last(text: str, waits: int) -> None:
    """Eight layers, 1/64 s each for each doubling of ranks, in both directions; not on GPUs."""
    plan = parse_plan(text)

    def sync(wait_s: float, *, is_host: bool) -> tuple[float, float]:
        cluster = on_host(replace(HOST, wait_s=wait_s))
        cluster = replace(cluster, device=replace(cluster.device, is_host=is_host))
        (found,) = step_cost(JOB, plan, costs_of(cluster, fsdp_copies=True)).syncs
        return found.gather_s, found.reduce_s

    for is_host, expected_s in ((True, waits * 8 / 64), (False, 0.0)):
        with_waits, without = sync(1 / 64, is_host=is_host), sync(0.0, is_host=is_host)
        more_s = [a - b for a, b in zip(with_waits, without, strict=True)]
        assert more_s == pytest.approx([expected_s, expected_s])


def test_modes_are_all_there_or_none() -> None:
    with pytest.raises(ParsimError, match="none of the modes"):
        replace(HOST, modes=MODES[:-1])
    with pytest.raises(ParsimError, match="unknown mode"):
        replace(MODES[0], mode="zero 4")
