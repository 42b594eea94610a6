"""A step whose transfers share the links of a network: closed forms, and SimGrid."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from parsim.charts.links import links_figure
from parsim.cli.main import app
from parsim.cost.algorithms import ALGORITHMS, all_reduce_s
from parsim.cost.cell import cell_of
from parsim.cost.collective import NETWORK_EFFICIENCY, Group, wire_factor
from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.hardware import Cluster
from parsim.model import MoeSpec
from parsim.plan import Coordinate, Job, ParallelPlan, parse_plan, stage_layers
from parsim.schedule.program import Program, Task
from parsim.simulate.contention import Contention, predict_over, replay_over
from parsim.simulate.fabric import Link, fabric_of
from parsim.simulate.network_load import network_load_of
from parsim.simulate.patterns import Patterns
from parsim.simulate.prediction import predict, program_of
from parsim.simulate.uneven import Replica, unfolded_program
from parsim.timeline import DP
from tests.builders import plain_stack, round_cluster, small_model
from tests.simgrid import simgrid_ends

NIC = NETWORK_EFFICIENCY * 1e10
MB = 1e6


def setting(plan: ParallelPlan, domain: int = 1) -> tuple[Job, CostModel]:
    model = small_model()
    job = Job(model=model, seq_len=256, global_batch=4 * plan.pp * plan.dp)
    cluster = round_cluster(gpus_per_node=domain, scale_up_domain=domain)
    return job, CostModel(model, cluster, plain_stack())


def contended(text: str, plan: ParallelPlan, tasks: tuple[Task, ...], domain: int = 1) -> Contention:
    """Some tasks of a plan over a fabric."""
    job, costs = setting(plan, domain)
    fabric = fabric_of(text, costs.cluster, plan.gpus)
    return replay_over(network_load_of(Program(tasks=tasks), job, plan, costs, fabric), fabric)


@pytest.mark.parametrize("overlap", [False, True])
def test_parameters_come_from_their_shard_group_while_gradients_are_summed_by_all(overlap: bool) -> None:
    plan = ParallelPlan(dp=4, zero=1, zero_group=2)  # two replicas in each of two domains
    job, costs = setting(plan, domain=2)
    costs = replace(costs, stack=plain_stack(dp_overlap=overlap))
    fabric = fabric_of("switch", costs.cluster, plan.gpus)
    load = network_load_of(program_of(job, plan, costs)[0], job, plan, costs, fabric)
    tasks = [task for task in load.program.tasks if task.kind == "dp"]
    assert {task.gathers for task in tasks} == {False, True}
    on_the_network = [load.program.tasks[index] for index in load.carried]
    assert on_the_network == [task for task in tasks if not task.gathers]


def sent(source: int, target: int, num_bytes: float, duration_s: float) -> Task:
    return Task(source, "pp_send_next", "x", "pp", duration_s, (), receiver=(target, "pp_recv_prev"),
                num_bytes=num_bytes)  # fmt: skip


def reduced(rank: int, num_bytes: float, duration_s: float, after: tuple[int, ...] = ()) -> Task:
    name = f"gradients {rank}"
    return Task(rank, DP, name, "dp", duration_s, after, rank, num_bytes=num_bytes)


@pytest.mark.parametrize("oversubscription", [1, 2, 4])
def test_sends_over_an_oversubscribed_spine_take_so_many_times_as_long(oversubscription: int) -> None:
    """Four replicas a leaf send to the next leaf at once: 4 x 8 MB over 4 / oversubscription links."""
    plan = ParallelPlan(dp=4, pp=2)
    task = sent(0, 1, 8 * MB, 8 * MB / NIC)
    found = contended(f"fat-tree,leaf=4,oversubscription={oversubscription}", plan, (task,))
    assert found.step_s == pytest.approx(oversubscription * 8 * MB / NIC, rel=1e-9)
    assert found.alone_s == pytest.approx(8 * MB / NIC, rel=1e-9)
    assert found.links[0].mean == pytest.approx(1.0, rel=1e-9)


def test_a_class_goes_at_the_pace_of_its_narrowest_link() -> None:
    """One flow over interfaces and a link between leaves of half their width."""
    task = sent(0, 1, 8 * MB, 8 * MB / NIC)
    found = contended("fat-tree,leaf=1,oversubscription=2", ParallelPlan(pp=2), (task,))
    assert found.step_s == pytest.approx(2 * 8 * MB / NIC, rel=1e-9)
    assert found.links[0].kind.bytes_per_s == pytest.approx(NIC / 2)


def test_sends_of_a_hashed_route_wait_for_the_fullest_link() -> None:
    plan = ParallelPlan(dp=16, pp=2)
    fabric = fabric_of("fat-tree,leaf=16,routing=hash", setting(plan)[1].cluster, 32)
    load = Counter(link for rank in range(16) for link in fabric.route(rank, rank + 16))
    found = contended("fat-tree,leaf=16,routing=hash", plan, (sent(0, 1, 8 * MB, 8 * MB / NIC),))
    assert max(load.values()) > 1
    assert found.step_s == pytest.approx(max(load.values()) * 8 * MB / NIC, rel=1e-9)


def test_two_rings_over_one_uplink_share_it() -> None:
    """Both stages' rings leave each leaf once, over its only link up, as wide as one of them."""
    plan = ParallelPlan(dp=4, pp=2, placement="tp-pp-cp-dp")
    tasks = reduced(0, 8 * MB, 8 * MB / NIC), reduced(1, 8 * MB, 8 * MB / NIC)
    fabric, ring_s = "fat-tree,leaf=4,oversubscription=4", 8 * MB / NIC
    found = contended(fabric, plan, tasks)
    assert found.alone_s == ring_s
    assert found.step_s == pytest.approx(2 * 8 * MB / NIC, rel=1e-9)
    # One that starts when the other is half through: both then run at half speed, the late one longer.
    wait = Task(1, "compute", "wait", "forward", ring_s / 2, ())
    later = contended(fabric, plan, (tasks[0], wait, reduced(1, 8 * MB, ring_s, (1,))))
    assert later.times.end_s[0] == pytest.approx(1.5 * ring_s, rel=1e-9)
    assert later.times.end_s[2] == pytest.approx(2 * ring_s, rel=1e-9)


def test_a_send_and_a_reduction_share_an_interface() -> None:
    """Each alone would fill it: 8 MB at half speed, then the rest of 24 MB alone."""
    plan = ParallelPlan(dp=4, pp=2)
    tasks = sent(0, 1, 8 * MB, 8 * MB / NIC), reduced(0, 24 * MB, 24 * MB / NIC)
    found = contended("switch", plan, tasks)
    assert found.times.end_s == pytest.approx([16 * MB / NIC, 32 * MB / NIC], rel=1e-9)
    assert found.contended_s["pp"] == pytest.approx(8 * MB / NIC, rel=1e-9)


def test_what_stays_in_a_domain_is_left_alone() -> None:
    plan = ParallelPlan(dp=4, pp=2)
    tasks = sent(0, 1, 8 * MB, 1.0), reduced(0, 24 * MB, 1.0)
    assert contended("switch", plan, tasks, domain=8).links == ()


def members(plan: ParallelPlan, cluster: Cluster, task: Task) -> list[tuple[int, int]]:
    """The flows of a class one by one, for plans with tp · dp and rings that pass every domain twice."""
    at = [Coordinate(task.rank, d, 0, t) for d in range(plan.dp) for t in range(plan.tp)]
    if task.receiver is not None:
        return [(plan.rank(a), plan.rank(a._replace(pp=task.receiver[0]))) for a in at]
    step = cluster.scale_up_domain // plan.tp  # replicas in a domain
    return [(plan.rank(a), plan.rank(a._replace(dp=(a.dp + step) % plan.dp))) for a in at]


@pytest.mark.parametrize("text", ["rail,leaf=1", "fat-tree,leaf=4", "fat-tree,leaf=4,oversubscription=2",
                                  "rail,leaf=1,oversubscription=1", "switch",
                                  "fat-tree,leaf=8,oversubscription=4"])  # fmt: skip
def test_classes_end_as_simgrid_says_of_their_flows_one_by_one(text: str) -> None:
    plan = ParallelPlan(dp=8, tp=2, pp=4)
    job, costs = setting(plan, domain=4)
    fabric = fabric_of(f"{text},algorithm=ring", costs.cluster, plan.gpus)
    starts = (0.0, 0.001, 0.0015, 0.004, 0.0, 0.002, 0.0025)
    transfers = [sent(0, 1, 20 * MB, 0.003), sent(1, 2, 30 * MB, 0.0035), sent(2, 3, 25 * MB, 0.004),
                 reduced(3, 80 * MB, 0.005), reduced(2, 80 * MB, 0.005), reduced(1, 99 * MB, 0.006),
                 reduced(0, 60 * MB, 0.004)]  # fmt: skip
    waits = [Task(100 + i, "compute", "wait", "forward", at, ()) for i, at in enumerate(starts)]
    tasks = tuple(waits) + tuple(t._replace(after=(i,)) for i, t in enumerate(transfers))
    capacities = {str(link): rate for link, rate in fabric.capacities().items()}
    flows: list[tuple[float, list[str], float]] = []
    owners: list[int] = []
    traffic = network_load_of(Program(tasks=tasks), job, plan, costs, fabric)
    found = replay_over(traffic, fabric)
    for i, task in enumerate(transfers):
        for j, (source, target) in enumerate(members(plan, costs.cluster, task)):
            # Two of four replicas a domain share a reduction: each interface has half of the bytes.
            num_bytes = task.num_bytes / (1 if task.receiver else 2)
            duration_s = traffic.program.tasks[len(waits) + i].duration_s
            capacities[f"cap {i} {j}"] = num_bytes / duration_s
            path = [f"cap {i} {j}", *map(str, fabric.route(source, target))]
            flows.append((starts[i], path, num_bytes))
            owners.append(i)
    ends = [0.0] * len(transfers)
    for owner, end in zip(
        owners, simgrid_ends([{"capacities": capacities, "flows": flows}])[0], strict=True
    ):
        ends[owner] = max(ends[owner], end)
    assert found.times.end_s[len(waits) :] == pytest.approx(ends, rel=1e-6)
    assert found.step_s > found.alone_s * 1.01


def interface_bytes(algorithm: str, plan: ParallelPlan, domain: int) -> dict[Link, float]:
    """What each network interface sends for every byte of the buffer."""
    job, costs = setting(plan, domain)
    fabric = fabric_of(f"fat-tree,leaf=4,algorithm={algorithm}", costs.cluster, plan.gpus)
    stages = costs.stages(cell_of(job, plan), stage_layers(job.model, plan))
    load = Patterns(plan=plan, costs=costs, stages=stages, fabric=fabric).load(reduced(0, MB, 1.0))
    wire = wire_factor("all_reduce", plan.dp)
    return {link: wire * share for link, share in load.items() if link[0][0] == "gpu"}


@pytest.mark.parametrize(("dp", "domain"), [(8, 1), (8, 2), (16, 4), (24, 2)])
def test_bytes_over_interfaces_by_algorithm(dp: int, domain: int) -> None:
    """Domains of D send 2 (n-1)/n of the buffer on rings, 2 (D-1)/D between shards, 1 to a switch."""
    plan, domains = ParallelPlan(dp=dp), dp // domain
    expected = {
        "ring": 2 * (dp - 1) / dp,
        "hierarchical": 2 * (domains - 1) / domains,
        "in-switch": 1.0,
    }
    for algorithm, whole in expected.items():
        sent_bytes = interface_bytes(algorithm, plan, domain)
        assert len(sent_bytes) == dp
        assert list(sent_bytes.values()) == pytest.approx([whole / domain] * dp, rel=1e-9)
    trees = interface_bytes("tree", plan, domain)
    assert sum(trees.values()) == pytest.approx(2 * (domains - 1), rel=1e-9)
    assert max(trees.values()) <= 2 / domain * (1 + 1e-9)


def patterns(plan: ParallelPlan, domain: int, **model: object) -> Patterns:
    job, costs = setting(plan, domain)
    job = replace(job, model=small_model(**model))
    costs = CostModel(job.model, costs.cluster, plain_stack(moe_dispatch="all_to_all"))
    stages = costs.stages(cell_of(job, plan), stage_layers(job.model, plan))
    fabric = fabric_of("switch", costs.cluster, plan.gpus)
    return Patterns(plan=plan, costs=costs, stages=stages, fabric=fabric)


def test_shard_groups_send_what_their_collectives_do() -> None:
    """Two ranks of a domain share shards: each sends P/2 there, then 2 · 3/4 · P/2 to three others."""
    load = patterns(ParallelPlan(dp=8, zero=1, zero_group=2), 2).load(reduced(0, MB, 1.0))
    up = [share for (a, _), share in load.items() if a[0] == "gpu"]
    assert up == pytest.approx([0.75 / (0.5 + 0.75)] * 8)


def test_two_ranks_that_sum_a_tied_embedding_both_send() -> None:
    task = Task(0, DP, "tied embedding", "dp", 1.0, (), receiver=(1, DP), num_bytes=MB)
    load = patterns(ParallelPlan(dp=2, pp=2), 1).load(task)
    assert {link[0]: share for link, share in load.items() if link[0][0] == "gpu"} == {
        ("gpu", rank): 1.0 for rank in range(4)
    }


@pytest.mark.parametrize(
    ("stream", "ep", "tp"), [("tp", 1, 4), ("ep", 4, 1), ("ep", 8, 2), ("pp", 1, 1)]
)
def test_what_each_replica_sends_adds_up_to_what_all_send(stream: str, ep: int, tp: int) -> None:
    plan = ParallelPlan(dp=8, tp=tp, pp=2, ep=ep, expert_tp=1, sequence_parallel=tp > 1)
    found = patterns(plan, 2, moe=MoeSpec(experts=8, top_k=2, ffn_hidden=256))
    task = Task(1, stream, "0F0", stream, 1.0, (), num_bytes=MB)
    if stream == "pp":
        task = sent(0, 1, MB, 1.0)
    each = [found.load(task, (dp_i,)) for dp_i in range(plan.dp)]
    assert [sum(load.values()) for load in each] == pytest.approx([sum(each[0].values())] * plan.dp)
    assert sum(each, Counter()) == pytest.approx(dict(found.load(task)))
    assert each[0]


def test_replicas_told_apart_wait_as_long_as_together() -> None:
    plan = ParallelPlan(dp=4, pp=2)
    job, costs = setting(plan)
    fabric = fabric_of("fat-tree,leaf=4,oversubscription=4", costs.cluster, plan.gpus)
    program, _ = program_of(job, plan, costs)
    whole = replay_over(network_load_of(program, job, plan, costs, fabric), fabric)
    replicas = tuple(
        Replica(members=found, slow=(1.0, 1.0), link=(1.0, 1.0), exchange=(1.0, 1.0))
        for found in ((0, 1, 2), (3,))
    )
    unfolded = unfolded_program(program, replicas)
    apart = replay_over(network_load_of(unfolded, job, plan, costs, fabric, replicas), fabric)
    assert apart.step_s == pytest.approx(whole.step_s, rel=1e-9)
    assert apart.contended_s == pytest.approx(dict(whole.contended_s), rel=1e-6)
    assert min(whole.contended_s.values()) > 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_step_sums_gradients_by_the_algorithm_that_is_asked_for(algorithm: str) -> None:
    plan = ParallelPlan(dp=16)
    job, costs = setting(plan, domain=2)
    costs.stack = plain_stack(dp_bucket_parameters=1e12)
    fabric = fabric_of(f"switch,algorithm={algorithm}", costs.cluster, plan.gpus)
    usual = fabric_of("switch", costs.cluster, plan.gpus)
    prediction, timeline, _ = predict_over(fabric, job, plan, costs)
    _, before, _ = predict_over(usual, job, plan, costs)
    assert before == predict(job, plan, costs)[1]
    num_bytes = 4.0 * costs.stages(cell_of(job, plan), (8,))[0].dense_parameters
    group = Group(16, 2)
    spans = [span.duration_s for span in timeline.spans if span.stream == DP]
    assert sum(spans) == pytest.approx(
        all_reduce_s(costs.cluster, algorithm, num_bytes, group), rel=1e-6
    )
    assert prediction.step_time_s == timeline.end_s


def test_sums_in_switches_need_switches() -> None:
    plan = ParallelPlan(dp=16)
    job, costs = setting(plan, domain=2)
    with pytest.raises(ParsimError, match="no switches"):
        predict_over(fabric_of("torus,algorithm=in-switch", costs.cluster, 16), job, plan, costs)


def test_experts_exchange_tokens_with_every_other_domain() -> None:
    """Of 15 others one shares the domain."""
    model = small_model(moe=MoeSpec(experts=16, top_k=2, ffn_hidden=256))
    plan = ParallelPlan(dp=16, ep=16)
    job = Job(model=model, seq_len=256, global_batch=32)
    cluster = round_cluster(gpus_per_node=2, scale_up_domain=2)
    costs = CostModel(model, cluster, plain_stack(moe_dispatch="all_to_all"))
    fabric = fabric_of("switch", cluster, 16)
    stages = costs.stages(cell_of(job, plan), stage_layers(model, plan))
    task = Task(0, "ep", "0F0", "ep", 1.0, (), num_bytes=MB)
    load = Patterns(plan=plan, costs=costs, stages=stages, fabric=fabric).load(task)
    up = [share for (a, _), share in load.items() if a[0] == "gpu"]
    assert up == pytest.approx([14 / 15] * 16, rel=1e-9)


def test_tensor_parallel_rings_that_leave_their_domain_are_on_the_network() -> None:
    plan = ParallelPlan(tp=4, dp=2, sequence_parallel=True)
    job, costs = setting(plan, domain=2)
    fabric = fabric_of("switch", costs.cluster, 8)
    _, _, found = predict_over(fabric, job, plan, costs)
    assert "tp" in found.contended_s


def test_a_chart_has_a_panel_for_each_kind_of_link() -> None:
    plan = parse_plan("dp=4,pp=2")
    job, costs = setting(plan)
    fabric = fabric_of("fat-tree,leaf=4,oversubscription=4", costs.cluster, 8)
    _, _, found = predict_over(fabric, job, plan, costs)
    figure = links_figure(found, title="small")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert any("leaf" in title and "spine" in title for title in titles)
    assert len(titles) == min(6, len(found.links))
    text = " ".join(item.get_text() for item in figure.findobj() if hasattr(item, "get_text"))
    assert "longer" in text
    quiet = predict_over(fabric, job, replace(plan, dp=1, pp=1, micro_batch=4), costs)[2]
    with pytest.raises(ParsimError, match="no transfer crosses"):
        links_figure(quiet)


PLAN = ("simulate", "--model", "llama-3.1-8b", "--hardware", "h100-sxm-80gb", "--plan", "dp=4,tp=8,pp=2")


def test_the_command_says_what_the_network_does(tmp_path: Path) -> None:
    runner, chart = CliRunner(), tmp_path / "links.png"
    options = ("--fabric", "fat-tree,leaf=8,oversubscription=8", "--fabric-chart", str(chart))
    item = json.loads(runner.invoke(app, [*PLAN, *options, "--json"]).stdout)
    fabric = item["fabric"]
    assert fabric["settings"]["oversubscription"] == 8
    assert fabric["slowdown"] == pytest.approx(item["step_time_s"] / fabric["step_time_alone_s"])
    assert fabric["slowdown"] > 1
    assert fabric["nodes"] == {"gpu": 64, "nvswitch": 8, "leaf": 8, "spine": 1}
    assert fabric["busiest_links"][0]["peak_utilization"] == pytest.approx(1.0)
    assert chart.stat().st_size > 10_000
    assert "every link alone" in runner.invoke(app, [*PLAN, *options]).stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--fabric", "rail", "--plan", "dp=4,tp=8,pp=2,schedule=pipedream"), "end in a flush"),
        (("--fabric", "fattree"), "did you mean 'fat-tree'?"),
        (("--fabric", "rail", "--rank-hardware", "0=a100-sxm-80gb"), "devices of one kind"),
        (("--fabric-chart", "x.png"), "add --fabric"),
    ],
)
def test_what_the_command_refuses(options: tuple[str, ...], words: str) -> None:
    result = CliRunner().invoke(app, [*PLAN, *options])
    assert isinstance(result.exception, ParsimError)
    assert words in str(result.exception)
