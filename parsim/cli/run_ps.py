"""`parsim run --ps`: replicas as workers of real parameter servers, beside their simulation."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parsim.cli.simulate_ps import read_ps

if TYPE_CHECKING:
    from parsim.execute.measurement import Measurement
    from parsim.execute.request import Case
    from parsim.setup import Setup
    from parsim.simulate.parameter_server import PsRun
    from parsim.timeline import Timeline

RunPsOption = Annotated[
    str | None,
    typer.Option(
        "--ps",
        help="Workers and parameter servers in place of all-reduces: workers=2,servers=1,mode=sync, "
        "async, or ssp with bound=3; also shards=2-1.",
    ),
]
SIMULATED_ONLY = ("jitter", "server_nic", "server_memory", "steps")


def read_run_ps(text: str | None) -> dict[str, Any] | None:
    """The settings of `--ps`; None where it was not given.

    Raises ParsimError as `simulate --ps` does, and for settings that a real machine decides.
    """
    from parsim.errors import ParsimError

    given = read_ps(text)
    for key in SIMULATED_ONLY:
        if given and key in given:
            raise ParsimError(
                "this is what a simulation has to be told, and a run finds out",
                where=f"--ps {text}: {key}",
                expected="workers, servers, mode, bound, shards",
                hint="--steps 20" if key == "steps" else f"parsim simulate --ps {text}",
            )
    return given


def with_servers(case: Case, settings: dict[str, Any] | None) -> Case:
    """The case on parameter servers, where `--ps` asks for them."""
    from parsim.errors import ParsimError
    from parsim.execute.request import ParameterServers

    if settings is None:
        return case
    if settings.get("workers", case.plan.dp) != case.plan.dp:
        raise ParsimError(
            "a worker is a data-parallel replica of the plan",
            where="--ps workers",
            got=settings["workers"],
            expected=f"dp = {case.plan.dp}",
        )
    bounds = {"sync": 0.0, "async": math.inf, "ssp": settings.get("bound", 0.0)}
    servers = ParameterServers(
        shares=settings.get("shards", (1.0,) * settings.get("servers", 1)),
        bound=bounds[settings.get("mode", "sync")],
    )
    return dataclasses.replace(case, servers=servers)


def simulate_served(setup: Setup, case: Case) -> PsRun:
    """The simulation of the same workers and servers: a core each, on the links of one machine."""
    from parsim.cost.parameter_server import Servers, nic_bytes_per_s, parameter_server
    from parsim.cost.stage import CostModel
    from parsim.simulate.parameter_server import simulate_parameter_server, worker_compute_s

    assert case.servers is not None
    cluster = dataclasses.replace(setup.cluster, inter_node=setup.cluster.intra_node)
    costs = CostModel(case.job.model, cluster, setup.stack)
    servers = Servers(
        shares=case.servers.shares,
        bytes_per_s=nic_bytes_per_s(cluster),
        memory_bytes_per_s=cluster.device.memory_bandwidth_bytes_per_s,
    )
    ps = parameter_server(
        case.job,
        case.plan,
        costs,
        servers,
        compute_s=worker_compute_s(case.job, case.plan, costs),
        slow_links=(1.0,) * case.plan.dp,
        bound=case.servers.bound,
    )
    return simulate_parameter_server(ps, steps=case.total_steps, seed=case.seed)


def served_data(case: Case, measurement: Measurement, run: PsRun) -> dict[str, Any]:
    """The `parameter_server` field of the answer: measured, and the same figures predicted."""
    from parsim.execute.measurement_file import staleness_data

    assert case.servers is not None
    assert measurement.served is not None
    served, workers, bound = measurement.served, case.plan.dp, case.servers.bound
    sequences = case.job.global_batch / workers
    ages: dict[int, int] = {}
    for own in measurement.staleness:
        for age, count in own.items():
            ages[age] = ages.get(age, 0) + count
    return {
        "mode": {0.0: "sync", math.inf: "async"}.get(bound, "ssp"),
        "bound": bound if math.isfinite(bound) else None,
        "workers": workers,
        "servers": served.servers,
        "step_time_s": workers / served.worker_steps_per_s,
        "worker_steps_per_s": served.worker_steps_per_s,
        "samples_per_s": served.worker_steps_per_s * sequences,
        "tokens_per_s": served.worker_steps_per_s * sequences * case.job.seq_len,
        "worker_time": served.worker_time,
        "staleness": staleness_data(ages)
        | {"by_worker": [staleness_data(own) for own in measurement.staleness]},
        "max_lead": served.max_lead,
        "predicted": {
            "step_time_s": workers / run.steps_per_s,
            "worker_steps_per_s": run.steps_per_s,
            "samples_per_s": run.steps_per_s * sequences,
            "worker_time": run.worker_time(),
            "staleness": run.staleness().to_data(),
            "max_lead": max(step.lead for step in run.steps),
        },
    }


def served_lines(item: dict[str, Any]) -> list[str]:
    """Measured beside predicted, for reading."""
    predicted = item["predicted"]
    modes = {"sync": "synchronous", "async": "asynchronous"}
    mode = modes.get(item["mode"]) or f"stale synchronous, bound {item['bound']:.0f}"
    lines = [
        f"parameter servers: {item['workers']} workers, {item['servers']} "
        f"server{'s' * (item['servers'] > 1)}, {mode}",
        f"  throughput     {item['samples_per_s']:>8,.2f}  sequences/s "
        f"(predicted {predicted['samples_per_s']:,.2f})",
    ]
    for key, share in item["worker_time"].items():
        foreseen = predicted["worker_time"][key]
        lines.append(f"  {key:<14}{share:>9.1%}  of a worker's time (predicted {foreseen:.1%})")
    staleness, foreseen = item["staleness"], predicted["staleness"]
    ages = ", ".join(f"{age}: {count}" for age, count in staleness["histogram"].items())
    lines.append(
        f"  staleness      {staleness['mean']:>8.2f}  updates on average, {staleness['max']} at most "
        f"(predicted {foreseen['mean']:.2f} and {foreseen['max']}); updates: gradients {ages}"
    )
    if item["mode"] == "ssp":
        lines.append(f"  lead           {item['max_lead']:>8}  clocks at most, of bound + 1")
    return lines


def simulated_timeline(run: PsRun, title: str) -> Timeline:
    """What all workers do during the first one's step of median length."""
    from parsim.timeline import COMPUTE, DP, Span, Timeline

    own = sorted((s for s in run.steps if s.worker == 0), key=lambda s: s.applied_s - s.ready_s)
    middle = own[(len(own) - 1) // 2]
    begin_s, end_s = middle.ready_s, middle.applied_s
    spans = []
    for step in run.steps:
        times = (step.ready_s, step.allowed_s, step.pulled_s, step.computed_s, step.applied_s)
        for k, (stream, name, kind) in enumerate(
            [(DP, "wait", DP), (DP, "pull", DP), (COMPUTE, "gradients", "backward"), (DP, "push", DP)]
        ):
            start, end = max(times[k], begin_s), min(times[k + 1], end_s)
            if start < end:
                spans.append(Span(step.worker, stream, name, start - begin_s, end - begin_s, kind))
    return Timeline(spans=tuple(spans), source="predicted", title=title)
