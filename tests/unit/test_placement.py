"""Which mesh dimension lies inside a node, and what that changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsim.cost.cell import cell_of
from parsim.cost.collective import DEFAULT_LINK_EFFICIENCY, NETWORK_EFFICIENCY, group_over
from parsim.cost.stage import CostModel
from parsim.cost.step import StepCost, step_cost
from parsim.errors import ParsimError
from parsim.hardware import Cluster
from parsim.mesh import mesh_axes, part_of
from parsim.model import MoeSpec
from parsim.plan import USUAL_PLACEMENT, Coordinate, Job, ParallelPlan, parse_plan
from parsim.schedule import with_schedule
from parsim.schedule.check import check_plan, placement_problems
from parsim.search.placements import ANY_PLACEMENT, orders, placed
from parsim.simulate.prediction import predict
from parsim.simulate.uneven import Straggler, Unevenness, replicas_of
from tests.builders import plain_stack, round_cluster, small_model

PLACEMENTS = ["-".join(order) for order in permutations(USUAL_PLACEMENT.split("-"))]
SIZES = {"tp": 4, "cp": 2, "dp": 4, "pp": 2}


def costs_of(plan: ParallelPlan) -> StepCost:
    model = small_model()
    job = Job(model=model, seq_len=256, global_batch=16)
    return step_cost(job, plan, CostModel(model, round_cluster(), plain_stack()))


def layer_tp_s(plan: ParallelPlan, seq_len: int) -> float:
    """Tensor-parallel communication of one layer's forward."""
    model = small_model(max_seq_len=seq_len)
    costs = CostModel(model, round_cluster(), plain_stack())
    job = Job(model=model, seq_len=seq_len, global_batch=16)
    return costs.layer(cell_of(job, plan), 0).time.forward.tp_s


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_rank_has_one_place(placement: str) -> None:
    plan = ParallelPlan(**SIZES, placement=placement)  # type: ignore[arg-type]
    assert [plan.rank(plan.coordinate(rank)) for rank in range(64)] == list(range(64))
    assert len({plan.coordinate(rank) for rank in range(64)}) == 64
    fastest = placement.split("-", maxsplit=1)[0]
    assert plan.coordinate(1) == Coordinate(0, 0, 0, 0)._replace(**{fastest: 1})


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dimensions", [("tp",), ("cp",), ("dp",), ("cp", "dp"), ("tp", "cp", "dp")])
def test_groups_meet_in_domains_as_counting_their_ranks_says(
    placement: str, dimensions: tuple[str, ...]
) -> None:
    plan = ParallelPlan(**SIZES, placement=placement)  # type: ignore[arg-type]
    group = group_over(round_cluster(), mesh_axes(plan, *dimensions), gpus=64)
    fewest = 64
    others = [name for name in SIZES if name not in dimensions]
    for fixed in product(*(range(SIZES[name]) for name in others)):
        at = dict(zip(others, fixed, strict=True))
        members = [
            rank
            for rank in range(64)
            if all(getattr(plan.coordinate(rank), name) == place for name, place in at.items())
        ]
        assert len(members) == group.size
        fewest = min(fewest, *Counter(rank // 8 for rank in members).values())
    assert group.local == fewest


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("size", "skip"), [(2, 1), (4, 1), (2, 4), (4, 2), (8, 1), (1, 8)])
def test_part_of_a_group_takes_its_ranks_in_order(placement: str, size: int, skip: int) -> None:
    plan = ParallelPlan(**SIZES, placement=placement)  # type: ignore[arg-type]
    axes = mesh_axes(plan, "cp", "dp")
    whole = sorted(sum(i * axis.stride for i, axis in zip(at, axes, strict=True))
                   for at in product(*(range(axis.size) for axis in axes)))  # fmt: skip
    part = part_of(axes, size=size, skip=skip)
    taken = sorted(sum(i * axis.stride for i, axis in zip(at, part, strict=True))
                   for at in product(*(range(axis.size) for axis in part)))  # fmt: skip
    assert taken == whole[: size * skip : skip]


def test_tensor_parallelism_outside_the_node_slows_it_by_the_bandwidths_ratio() -> None:
    inside = ParallelPlan(tp=4, dp=8, sequence_parallel=True)
    outside = replace(inside, placement="dp-tp-cp-pp")
    ratio = (DEFAULT_LINK_EFFICIENCY * 1e11) / (NETWORK_EFFICIENCY * 1e10)
    more_s = {}
    for plan in (inside, outside):
        # What more bytes take, so that the hops of the network do not count.
        short_s, long_s = (layer_tp_s(plan, seq_len) for seq_len in (256, 512))
        more_s[plan.placement] = long_s - short_s
    # The ring's way inside a domain shows for (9.3 / 100)^4 / 4 beside that of the network.
    assert more_s[outside.placement] == pytest.approx(ratio * more_s[inside.placement], rel=5e-5)
    assert costs_of(outside).syncs[0].reduce_s < costs_of(inside).syncs[0].reduce_s / 4


def test_a_pipeline_inside_the_node_sends_faster_and_reduces_slower() -> None:
    plan = ParallelPlan(tp=2, pp=4, dp=4)
    usual, inside = costs_of(plan), costs_of(replace(plan, placement="tp-pp-cp-dp"))
    # The network adds a hop of 5 us to the ratio of the bandwidths.
    ratio = (DEFAULT_LINK_EFFICIENCY * 1e11) / (NETWORK_EFFICIENCY * 1e10)
    for slow, fast in zip(usual.send_s, inside.send_s, strict=True):
        assert slow - 5e-6 == pytest.approx(ratio * fast, rel=1e-9)
    # All four replicas of a rank met in one node; now each lies in a node of its own.
    for fast_sync, slow_sync in zip(usual.syncs, inside.syncs, strict=True):
        assert slow_sync.reduce_s > 5 * fast_sync.reduce_s


def test_a_placement_is_written_in_the_short_form_and_changes_the_step() -> None:
    text = "dp=4,tp=2,pp=4,micro_batch=1,schedule=1f1b,placement=tp-pp-cp-dp"
    plan = parse_plan(text)
    assert plan.short() == text
    assert "placement" not in replace(plan, placement=USUAL_PLACEMENT).short()
    model = small_model()
    job = Job(model=model, seq_len=256, global_batch=16)
    costs = CostModel(model, round_cluster(), plain_stack())
    placed, _ = predict(job, plan, costs)
    usual, _ = predict(job, replace(plan, placement=USUAL_PLACEMENT), costs)
    assert placed.step_time_s != usual.step_time_s
    assert placed.to_item()["plan"]["placement"] == "tp-pp-cp-dp"


@pytest.mark.parametrize("placement", ["tp", "tp-cp-dp", "tp-tp-dp-pp", "tp-cp-dp-pp-ep", ""])
def test_what_is_no_placement(placement: str) -> None:
    with pytest.raises(ParsimError, match="every mesh dimension once"):
        ParallelPlan(placement=placement)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tp=2,dp=3,placement=dp-tp-cp-pp", "tears blocks"),
        ("tp=2,pp=2,dp=6,ep=6,placement=tp-cp-pp-dp", "12 ranks that share experts"),
        ("tp=1,cp=2,dp=6,pp=4,zero=1,zero_group=3,placement=cp-pp-tp-dp", "tears a group"),
    ],
)
def test_a_placement_that_tears_groups_is_refused(text: str, words: str) -> None:
    plan = parse_plan(text)
    moe = MoeSpec(experts=6, top_k=2, ffn_hidden=256)
    job = Job(model=small_model(moe=moe), seq_len=256, global_batch=12)
    with pytest.raises(ParsimError, match=words):
        check_plan(job, plan, round_cluster())


@pytest.mark.parametrize(
    ("placement", "slowed"), [(USUAL_PLACEMENT, (0, 1)), ("dp-tp-cp-pp", (0, 1, 2, 3))]
)
def test_those_who_share_experts_with_a_straggler_wait_for_it(
    placement: str, slowed: tuple[int, ...]
) -> None:
    """Four neighbouring ranks share experts: two pipelines of two, or one rank of each of four."""
    plan = ParallelPlan(dp=4, tp=2, ep=4, placement=placement)
    uneven = Unevenness(stragglers=(Straggler(0, slow=2.0),))
    found = [r.members for r in replicas_of(plan, uneven) if r.slow == (2.0,)]
    assert found == [slowed]


@st.composite
def meshes(draw: st.DrawFn) -> tuple[ParallelPlan, Cluster]:
    """Any mesh on domains of several sizes, and with the experts and schedules that pair up ranks."""
    domain = draw(st.sampled_from([2, 4, 6, 8, 12]))
    sizes, powers = st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 4])
    dp, tp, pp, cp = draw(sizes), draw(powers), draw(sizes), draw(powers)
    plan = ParallelPlan(dp=dp, tp=tp, pp=pp, cp=cp, zero=draw(st.integers(0, 3)), sequence_parallel=True)
    if pp % 2 == 0 and draw(st.booleans()):
        plan = with_schedule(plan, draw(st.sampled_from(["dualpipe", "zbv"])))
    eps = [ep for ep in (1, 2, 4) if plan.dp * plan.tp * plan.cp % ep == 0]
    cluster = round_cluster(gpus_per_node=domain, scale_up_domain=domain)
    return replace(plan, ep=draw(st.sampled_from(eps))), cluster


@given(meshes())
@settings(max_examples=100, deadline=None)
def test_of_placements_that_are_the_same_one_is_searched(case: tuple[ParallelPlan, Cluster]) -> None:
    plan, cluster = case
    model = small_model(layers=12, tied_embeddings=True, moe=MoeSpec(experts=4, top_k=2, ffn_hidden=512))
    job = Job(model=model, seq_len=256, global_batch=12)
    stack = plain_stack(fp8_scaling="delayed", pp_scatter_gather=True)
    costs = CostModel(model, cluster, stack)
    searched = [p.placement for p in placed(plan, orders((ANY_PLACEMENT,)), cluster)]
    assert searched[0] == USUAL_PLACEMENT
    assert len(searched) == len(set(searched))

    def cost(order: str) -> StepCost:
        return step_cost(job, replace(plan, placement=order), costs)

    kept = {cost(order) for order in searched if legal(plan, order, cluster)}
    for order in PLACEMENTS:
        assert not legal(plan, order, cluster) or cost(order) in kept


def legal(plan: ParallelPlan, placement: str, cluster: Cluster) -> bool:
    if placement == USUAL_PLACEMENT:
        return True
    return next(placement_problems(replace(plan, placement=placement), cluster), None) is None


@pytest.mark.parametrize(
    ("text", "gpus_a_domain", "searched"),
    [
        ("dp=8,tp=8", 8, 2),  # which of the two lies inside
        ("dp=2,tp=2,pp=2", 8, 1),  # all inside
        ("dp=64", 8, 1),
        # tp inside, then none of them; dp inside, or pp; of tp-dp-pp and tp-pp-dp no group tells.
        ("dp=8,tp=8,pp=8", 8, 3),
        # Each whole inside or none; two at a time where they are cut.
        ("dp=4,tp=4,pp=4", 8, 6),
        ("dp=4,tp=4,pp=4", 16, 3),
        # Of six tp ranks two share a domain at the least either way, but pipeline ranks only in one.
        ("tp=6,pp=4", 8, 2),
        ("tp=2,dp=4,ep=4", 4, 2),
    ],
)
def test_how_many_placements_mean_something(text: str, gpus_a_domain: int, searched: int) -> None:
    cluster = round_cluster(gpus_per_node=gpus_a_domain, scale_up_domain=gpus_a_domain)
    assert len(list(placed(parse_plan(text), orders((ANY_PLACEMENT,)), cluster))) == searched
