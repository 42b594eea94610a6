"""`parsim simulate --ps`: the job on parameter servers, beside all-reduce."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parsim.cli.output import Section
from parsim.cli.output_paths import to_picture

if TYPE_CHECKING:
    from collections.abc import Callable

    from parsim.cli.simulated_step import StepRequest
    from parsim.cost.parameter_server import ParameterServer, Servers
    from parsim.cost.stage import CostModel
    from parsim.plan import Job, ParallelPlan
    from parsim.simulate.parameter_server import PsRun
    from parsim.simulate.uneven import Unevenness

PsOption = Annotated[
    str | None,
    typer.Option(
        "--ps",
        help="The job on parameter servers: workers=16,servers=4,mode=sync, async, or ssp with bound=3; "
        "also jitter=0.1, shards=2-1-1, server_nic=200Gb/s, server_memory=300GB/s, steps=40.",
    ),
]
PsChartOption = Annotated[
    Path | None,
    typer.Option(
        "--ps-chart",
        help="Draw throughput over workers, parameter servers beside all-reduce: .png, .svg or .pdf.",
        callback=to_picture,
    ),
]

STEPS = 40
WORKER_STEPS = 5120
MOST_SHARED = 5_000_000
"""Steps times workers squared."""
"""Of all workers together, where the request does not say: many workers do fewer steps each."""
CHART_BOUND = 3
"""Bound of the chart's stale synchronous line where the request has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PsSetup:
    """A job, and the parameter servers that `--ps` puts it on."""

    job: Job
    plan: ParallelPlan
    costs: CostModel
    servers: Servers
    mode: str
    bound: float
    jitter: float
    compute_s: tuple[float, ...]
    """Of a step, by worker."""
    slow_links: tuple[float, ...]
    steps: int
    seed: int

    def of_workers(self, workers: int, bound: float) -> ParameterServer:
        """The first so many workers, each with its share of the batch, and all servers."""
        from parsim.cost.parameter_server import parameter_server

        return parameter_server(
            self.job,
            self.plan,
            self.costs,
            self.servers,
            compute_s=self.compute_s[:workers],
            slow_links=self.slow_links[:workers],
            bound=bound,
            jitter=self.jitter,
        )

    def run(self, workers: int, bound: float) -> PsRun:
        """Those workers simulated."""
        from parsim.simulate.parameter_server import simulate_parameter_server

        return simulate_parameter_server(
            self.of_workers(workers, bound), steps=self.steps, seed=self.seed
        )

    def all_reduce_steps_per_s(self, workers: int) -> float:
        """Worker steps a second of those workers with an all-reduce after their compute."""
        from parsim.cost.parameter_server import all_reduce_s
        from parsim.simulate.parameter_server import all_reduce_steps_per_s

        plan = replace(self.plan, dp=workers)
        reduce_s = all_reduce_s(self.job, plan, self.costs, slow_link=max(self.slow_links[:workers]))
        ps = self.of_workers(workers, 0.0)
        return all_reduce_steps_per_s(ps, reduce_s, steps=self.steps, seed=self.seed)

    @property
    def sequences(self) -> int:
        """Of a worker's step."""
        return self.job.global_batch // self.plan.dp


def read_ps(text: str | None) -> dict[str, Any] | None:
    """The settings of `--ps`; None where it was not given.

    Raises ParsimError for settings that are unknown, cannot be read, or contradict each other.
    """
    from parsim.errors import ParsimError
    from parsim.settings_text import choice, parse_settings, positive
    from parsim.units import parse_bandwidth, parse_count

    if text is None:
        return None
    readers: dict[str, Callable[[str], Any]] = {
        "workers": positive(parse_count),
        "servers": positive(parse_count),
        "mode": choice("sync", "async", "ssp"),
        "bound": positive(parse_count, or_zero=True),
        "jitter": float,
        "shards": lambda value: tuple(map(float, value.split("-"))),
        "server_nic": positive(parse_bandwidth),
        "server_memory": positive(parse_bandwidth),
        "steps": positive(parse_count),
    }
    given = parse_settings(text, readers, where="--ps").values
    if ("bound" in given) != (given.get("mode") == "ssp"):
        raise ParsimError(
            "a bound goes with mode=ssp, and that with a bound",
            where=f"--ps {text}",
            hint="mode=ssp,bound=3",
        )
    if "shards" in given and len(given["shards"]) != given.get("servers", len(given["shards"])):
        raise ParsimError(
            "every server has a shard",
            where=f"--ps {text}",
            got=f"{len(given['shards'])} shards",
            expected=f"{given['servers']}",
        )
    return given


def plan_of_workers(plan: str, settings: dict[str, Any] | None) -> str:
    """The plan as given; a short form that names no dp has as many replicas as there are workers."""
    pieces = [piece.partition("=")[0].strip() for piece in plan.split(",")]
    if settings and "workers" in settings and "=" in plan and "dp" not in pieces:
        return f"{plan},dp={settings['workers']}"
    return plan


def ps_section(settings: dict[str, Any] | None, chart: Path | None, request: StepRequest) -> Section:
    """What `--ps` and `--ps-chart` add to a simulated step."""
    from parsim.errors import ParsimError

    if settings is None:
        if chart is not None:
            raise ParsimError(
                "there are no parameter servers to draw",
                where="--ps-chart",
                hint="--ps workers=16,servers=4",
            )
        return Section()
    _check(settings, request.plan, request.uneven)
    setup = _setup(settings, request)
    run = setup.run(request.plan.dp, setup.bound)
    if chart is not None:
        _draw(setup, chart)
    item = _item(setup, run)
    return Section(
        item={"parameter_server": item},
        lines=_lines(setup, run, item),
        written=[] if chart is None else [chart],
    )


def _check(settings: dict[str, Any], plan: ParallelPlan, uneven: Unevenness | None) -> None:
    from parsim.errors import ParsimError
    from parsim.plan import TWO_CHAIN_SCHEDULES

    if settings.get("workers", plan.dp) != plan.dp:
        raise ParsimError(
            "a worker is a data-parallel replica of the plan",
            where="--ps workers",
            got=settings["workers"],
            expected=f"dp = {plan.dp}",
        )
    if plan.zero or plan.cp > 1 or plan.ep > 1 or plan.schedule in TWO_CHAIN_SCHEDULES:
        raise ParsimError(
            "servers hold what ZeRO would shard, and each worker holds the model once",
            where="--ps with --plan",
            got=plan.short(),
            expected=f"zero=0, cp=1, ep=1, not schedule={TWO_CHAIN_SCHEDULES[0]}",
        )
    if plan.compression != "none":
        raise ParsimError(
            "gradients are compressed for all-reduces only, not for servers",
            where="--ps with --plan",
            got=f"compression={plan.compression}",
            expected="compression=none",
        )
    if uneven is not None and uneven.jitter:
        raise ParsimError(
            "with parameter servers jitter is that of a worker's whole step",
            where="--jitter with --ps",
            hint="--ps …,jitter=0.1",
        )


def _steps(settings: dict[str, Any], workers: int) -> int:
    """Steps to simulate; each transfer of a worker may share links with those of all others.

    Raises ParsimError for more than a minute or so of simulating.
    """
    from parsim.errors import ParsimError

    usual = max(STEPS // 4, min(STEPS, WORKER_STEPS // workers))
    steps: int = settings.get("steps", max(2, min(usual, MOST_SHARED // workers**2)))
    if steps * workers**2 > MOST_SHARED:
        raise ParsimError(
            "these are too many steps of too many workers to simulate",
            where="--ps",
            got=f"{workers} workers, {steps} steps",
            expected=f"at most {MOST_SHARED // workers**2} steps, or fewer workers",
            hint="steps=… in --ps" if workers**2 < MOST_SHARED else None,
        )
    return steps


def _setup(settings: dict[str, Any], request: StepRequest) -> PsSetup:
    from parsim.cost.parameter_server import Servers, nic_bytes_per_s
    from parsim.simulate.parameter_server import worker_compute_s

    job, plan, costs = request.setup.job, request.plan, request.costs
    stragglers = request.uneven.stragglers if request.uneven is not None else ()
    slow_links = [1.0] * plan.dp
    for straggler in stragglers:
        worker = plan.coordinate(straggler.rank).dp
        slow_links[worker] = max(slow_links[worker], straggler.link)
    node_bytes_per_s = costs.cluster.gpus_per_node * nic_bytes_per_s(costs.cluster)
    mode = settings.get("mode", "sync")
    return PsSetup(
        job=job,
        plan=plan,
        costs=costs,
        servers=Servers(
            shares=settings.get("shards", (1.0,) * settings.get("servers", 1)),
            bytes_per_s=settings.get("server_nic", node_bytes_per_s),
            memory_bytes_per_s=settings.get("server_memory"),
        ),
        mode=mode,
        bound={"sync": 0.0, "async": math.inf}.get(mode, settings.get("bound", 0.0)),
        jitter=settings.get("jitter", 0.0),
        compute_s=worker_compute_s(
            job,
            plan,
            costs,
            request.schedule,
            stragglers=stragglers,
            costs_by_rank=request.costs_by_rank,
        ),
        slow_links=tuple(slow_links),
        steps=_steps(settings, plan.dp),
        seed=request.seed,
    )


def _item(setup: PsSetup, run: PsRun) -> dict[str, Any]:
    """The `parameter_server` field of the JSON ITEM."""
    from parsim.cost.parameter_server import server_limit, worker_limit

    workers, samples_per_s = setup.plan.dp, run.steps_per_s * setup.sequences
    all_reduce = setup.all_reduce_steps_per_s(workers)
    return {
        "mode": setup.mode,
        "bound": setup.bound if math.isfinite(setup.bound) else None,
        "workers": workers,
        "servers": len(run.ps.shards),
        "step_time_s": workers / run.steps_per_s,
        "all_reduce_step_time_s": workers / all_reduce,
        "worker_steps_per_s": run.steps_per_s,
        "samples_per_s": samples_per_s,
        "tokens_per_s": samples_per_s * setup.job.seq_len,
        "limits": {"servers": server_limit(run.ps), "workers": worker_limit(run.ps)},
        "compute_s": list(setup.compute_s),
        "shards_bytes": [shard.pull_bytes for shard in run.ps.shards],
        "worker_time": run.worker_time(),
        "link_utilisation": run.link_utilisation(),
        "staleness": run.staleness().to_data()
        | {"by_worker": [run.staleness(worker).to_data() for worker in range(workers)]},
        "max_lead": max(step.lead for step in run.steps),
        "steps": setup.steps,
    }


def _lines(setup: PsSetup, run: PsRun, item: dict[str, Any]) -> list[str]:
    """The parameter servers, for reading."""
    from parsim.units import format_bandwidth, format_bytes, format_duration

    ps, sequences = run.ps, setup.sequences
    mode = {"sync": "synchronous", "async": "asynchronous"}.get(
        setup.mode, f"stale synchronous, bound {setup.bound:.0f}"
    )
    pull_bytes = max(shard.pull_bytes for shard in ps.shards)
    push_bytes = max(shard.push_bytes for shard in ps.shards)
    use, staleness, limits = item["link_utilisation"], item["staleness"], item["limits"]
    lines = [
        f"  parameter servers: {item['workers']} workers, {item['servers']} servers, {mode}",
        f"    step          {format_duration(item['step_time_s']):>10}  of every worker, on average "
        f"(all-reduce without overlap: {format_duration(item['all_reduce_step_time_s'])})",
        f"    throughput    {item['samples_per_s']:>10,.2f}  sequences/s, {item['tokens_per_s']:,.0f} "
        f"tokens/s; at most {limits['workers'] * sequences:,.2f} sequences/s by the workers, "
        f"{limits['servers'] * sequences:,.2f} by the servers",
    ]
    for key, share in item["worker_time"].items():
        lines.append(f"    {key:<14}{share:>10.1%}  of a worker's time")
    lines += [
        f"    server links  {use['server_send']:>10.1%}  sending, {use['server_receive']:.1%} "
        f"receiving, of {format_bandwidth(ps.server_bytes_per_s)}; a worker's step pulls "
        f"{format_bytes(pull_bytes)} from each server and pushes {format_bytes(push_bytes)}",
        f"    staleness     {staleness['mean']:>10.1f}  updates on average, {staleness['max']} at most",
    ]
    return lines


def _draw(setup: PsSetup, path: Path) -> None:
    """The chart: every mode and all-reduce over the number of workers."""
    from parsim.charts.parameter_server import PsComparison, PsCurve, draw_parameter_servers

    most, sequences = setup.plan.dp, setup.sequences
    workers = (*(2**k for k in range(most.bit_length()) if 2**k < most), most)
    bound = setup.bound if setup.mode == "ssp" else float(CHART_BOUND)
    modes = {"asynchronous": math.inf, f"stale (bound {bound:.0f})": bound, "synchronous": 0.0}
    curves = []
    for name, limit in modes.items():
        runs = [setup.run(n, limit) for n in workers]
        rates = tuple(run.steps_per_s * sequences for run in runs)
        curves.append(PsCurve(name, rates, runs[-1].staleness().mean))
    reduced = tuple(setup.all_reduce_steps_per_s(n) * sequences for n in workers)
    servers = len(setup.servers.shares)
    comparison = PsComparison(
        title=f"{setup.job.model.name} on {setup.costs.cluster.name}",
        note=f"{servers} server{'s' * (servers > 1)}; a worker has "
        f"{setup.plan.tp * setup.plan.pp} GPUs and {sequences} sequences a step; "
        "all communicate after they have computed",
        workers=workers,
        all_reduce=PsCurve("all-reduce", reduced),
        servers=tuple(curves),
        compute_samples_per_s=sequences * most / math.fsum(setup.compute_s),
    )
    draw_parameter_servers(comparison, path)
