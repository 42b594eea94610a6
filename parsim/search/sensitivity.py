"""What binds a plan: how much faster a step would be with a little more of each resource."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from parsim.cost.stage import CostModel
from parsim.errors import NothingFits
from parsim.hardware import Cluster, Link
from parsim.plan import ParallelPlan
from parsim.search.scaling import TERMS
from parsim.search.search import Progress, search
from parsim.search.space import Constraints
from parsim.simulate.prediction import Prediction, estimate
from parsim.units import percent

SPEEDS = {
    "compute": "matrix FLOP/s",
    "memory_bandwidth": "memory bandwidth",
    "intra_node": "links inside a domain",
    "inter_node": "network between domains",
}
"""Resources that make the same plan faster, with words for them."""
RESOURCES = SPEEDS | {"memory_size": "device memory"}
CHANGE = 0.1
NOTICED = 0.005
"""A resource of which CHANGE more gives less than this does not bind."""


def with_more(cluster: Cluster, resource: str, factor: float) -> Cluster:
    """The cluster with `factor` times as much of one of RESOURCES.

    Latencies, launches and shares of a peak stay; times that were measured on the machine itself shrink
    as a whole, so there the effect is an upper bound.
    """
    device, kernels = cluster.device, cluster.kernels
    if resource == "compute":
        rates = {dtype: rate * factor for dtype, rate in device.peak_flops_per_s.items()}
        return replace(
            cluster,
            device=replace(device, peak_flops_per_s=rates),
            kernels=replace(
                kernels,
                measured_gemm=tuple(_faster(table, factor) for table in kernels.measured_gemm),
                measured_attention=tuple(_faster(table, factor) for table in kernels.measured_attention),
            ),
        )
    if resource == "memory_bandwidth":
        bandwidth = device.memory_bandwidth_bytes_per_s * factor
        return replace(
            cluster,
            device=replace(device, memory_bandwidth_bytes_per_s=bandwidth),
            kernels=replace(
                kernels,
                measured_memory_bound=_faster(kernels.measured_memory_bound, factor),
                measured_optimizer=_faster(kernels.measured_optimizer, factor),
            ),
        )
    if resource == "intra_node":
        tables = tuple(_faster(table, factor) for table in kernels.measured_collective)
        return replace(
            cluster,
            intra_node=_wider(cluster.intra_node, factor),
            kernels=replace(kernels, measured_collective=tables),
        )
    if resource == "inter_node":
        return replace(cluster, inter_node=_wider(cluster.inter_node, factor))
    return replace(cluster, device=replace(device, memory_bytes=device.memory_bytes * factor))


def _wider(link: Link, factor: float) -> Link:
    return replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * factor)


def _faster(table: Any, factor: float) -> Any:
    """A measured table with all its times, which stand last in its points, divided by `factor`."""
    if table is None:
        return None
    points = tuple((*point[:-1], point[-1] / factor) for point in table.points)
    return replace(table, points=points)


def _costs_with(costs: CostModel, resource: str, factor: float) -> CostModel:
    return CostModel(costs.model, with_more(costs.cluster, resource, factor), costs.stack)


def speed_gains(prediction: Prediction, costs: CostModel, *, change: float = CHANGE) -> dict[str, float]:
    """How much faster the very same plan is with `change` more of each of SPEEDS, re-simulated."""
    job, plan = prediction.job, prediction.plan
    gains = {}
    for resource in SPEEDS:
        faster_s = estimate(job, plan, _costs_with(costs, resource, 1 + change)).step_time_s
        gains[resource] = prediction.step_time_s / faster_s - 1
    return gains


def what_binds(gains: Mapping[str, float], breakdown_s: Mapping[str, float]) -> str:
    """In one sentence: the resource that would help most, and what most of the waiting is.

    `gains` as `speed_gains` has them, `breakdown_s` of the step.

    >>> what_binds({"compute": 0.07, "inter_node": 0.001}, {"compute": 8.0, "bubble": 2.0})
    "matrix FLOP/s first: 10% more gives 7.0%; 20% of the step is the pipeline's bubble and waiting"
    """
    step_s = sum(breakdown_s.values())
    idle = {key: seconds / step_s for key, seconds in breakdown_s.items() if key != "compute"}
    longest = max(idle, key=lambda key: idle[key])
    waiting = f"; {percent(idle[longest])} of the step is {TERMS[longest]}"
    ranked = sorted(gains, key=lambda key: -gains[key])
    noticed = [key for key in ranked if gains[key] >= NOTICED]
    if not noticed:
        return f"neither speed nor bandwidth binds, but launches and latencies{waiting}"
    first, *others = noticed
    rest = ", ".join(f"{RESOURCES[key]} {percent(gains[key])}" for key in others)
    text = f"{RESOURCES[first]} first: {percent(CHANGE)} more gives {percent(gains[first])}"
    text += f" ({rest})" if rest else ""
    return text + (waiting if idle[longest] >= NOTICED else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What another amount of one resource makes of the best plan."""

    resource: str
    change: float
    """More, or (negative) less, as a share."""
    gain: float | None
    """Speed over the speed before, less 1; None where nothing fits any more."""
    plan: ParallelPlan | None
    """The best plan then."""
    replanned: bool
    """Whether it is another plan than before."""


def sensitivities(
    prediction: Prediction,
    costs: CostModel,
    *,
    constraints: Constraints | None = None,
    change: float = CHANGE,
    budget_s: float = 60.0,
    progress: Progress | None = None,
) -> tuple[Sensitivity, ...]:
    """`change` more and less of every resource, the best plan searched for anew each time."""
    return tuple(
        sensitivity(
            prediction,
            costs,
            resource,
            share,
            constraints=constraints,
            budget_s=budget_s,
            progress=progress,
        )
        for resource in RESOURCES
        for share in (change, -change)
    )


def sensitivity(
    prediction: Prediction,
    costs: CostModel,
    resource: str,
    change: float,
    *,
    constraints: Constraints | None = None,
    budget_s: float = 60.0,
    progress: Progress | None = None,
) -> Sensitivity:
    """The best plan with `change` more (or less) of one resource, against the best as it is.

    The plan as it was stands in where a search that ran out of `budget_s` found nothing better.
    """
    costs = _costs_with(costs, resource, 1 + change)
    job, before = prediction.job, prediction.plan
    times: list[tuple[float, ParallelPlan]] = []
    needed = prediction.memory.peak + prediction.context_bytes
    if needed <= costs.cluster.device.memory_bytes:
        times.append((estimate(job, before, costs).step_time_s, before))
    try:
        result = search(
            job, before.gpus, costs, constraints=constraints, top=1, budget_s=budget_s, progress=progress
        )
        times += [(found.step_time_s, found.plan) for found in result.plans]
    except NothingFits:
        pass
    if not times:
        return Sensitivity(resource=resource, change=change, gain=None, plan=None, replanned=False)
    step_s, plan = min(times, key=lambda found: found[0])
    gain = prediction.step_time_s / step_s - 1
    return Sensitivity(resource=resource, change=change, gain=gain, plan=plan, replanned=plan != before)
