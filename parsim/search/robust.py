"""Which plan to take where several cannot be told apart: the one least hurt by adverse cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from parsim.cost.memory import ENOUGH_HEADROOM
from parsim.cost.order import SURE, order_scale, probability_faster
from parsim.cost.stage import CostModel
from parsim.cost.step import step_cost
from parsim.plan import Coordinate, Job, ParallelPlan
from parsim.search.search import Progress
from parsim.search.sensitivity import with_more
from parsim.simulate.prediction import Prediction, estimate
from parsim.simulate.uneven import Straggler, Unevenness
from parsim.units import format_duration, percent

LEAST_LOOKED_AT, MOST_LOOKED_AT = 10, 32
"""Ties are looked for among so many of the fastest plans, however few or many are asked for."""
NOTICED = 0.01
"""A plan is more robust than the fastest where its worst case is shorter by this share."""
LESS_BANDWIDTH = 0.75
"""What a congested or degraded link gives of its bandwidth."""
SLOW_DEVICE = 1.05
"""Time of a throttled device's compute over a healthy one's."""
SLOW_LAUNCHES = 1.5
"""Time of a busy host's launches over those assumed."""


def adverse_times_s(job: Job, plan: ParallelPlan, costs: CostModel) -> dict[str, float]:
    """Step times of a plan where things are worse than assumed, one at a time, by case."""

    def linked(resource: str) -> float:
        cluster = with_more(costs.cluster, resource, LESS_BANDWIDTH)
        return estimate(job, plan, CostModel(costs.model, cluster, costs.stack)).step_time_s

    stack = costs.stack
    slow_host = replace(
        stack,
        layer_host_s=stack.layer_host_s * SLOW_LAUNCHES,
        moe_host_s=stack.moe_host_s * SLOW_LAUNCHES,
        action_host_s=stack.action_host_s * SLOW_LAUNCHES,
        step_overhead_s=stack.step_overhead_s * SLOW_LAUNCHES,
    )
    straggler = Straggler(rank=_busiest(job, plan, costs), slow=SLOW_DEVICE)
    uneven = Unevenness(stragglers=(straggler,))
    share = f"{LESS_BANDWIDTH:.0%}"
    return {
        f"network between domains at {share}": linked("inter_node"),
        f"links inside a domain at {share}": linked("intra_node"),
        f"one device {SLOW_DEVICE - 1:.0%} slower": estimate(
            job, plan, costs, uneven=uneven
        ).step_time_s,
        "launches half as long again": estimate(
            job, plan, CostModel(costs.model, costs.cluster, slow_host)
        ).step_time_s,
    }


def _busiest(job: Job, plan: ParallelPlan, costs: CostModel) -> int:
    """A device of the pipeline rank with the most to compute."""
    busy_s = [0.0] * plan.pp
    for stage, cost in enumerate(step_cost(job, plan, costs).stages):
        time = cost.time
        passes = (time.forward, time.input_grad, time.weight_grad, time.recompute)
        busy_s[plan.stage_rank(stage)] += sum(each.compute_s for each in passes)
    return plan.rank(Coordinate(busy_s.index(max(busy_s)), 0, 0, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How one plan of a ranking stands to the fastest."""

    first_faster: float
    """Probability that the fastest as predicted is really faster than this plan."""
    headroom: float
    """Share of the device's memory that it leaves free."""
    adverse_s: dict[str, float]
    """Step time by adverse case; of a plan that does not tie nothing."""

    @property
    def is_tight(self) -> bool:
        """Whether it may run out of memory where its peak is predicted somewhat too low."""
        return self.headroom < ENOUGH_HEADROOM

    @property
    def tied(self) -> bool:
        """Whether it cannot be told apart from the fastest."""
        return bool(self.adverse_s)

    @property
    def worst(self) -> tuple[str, float]:
        """The worst case of a tied plan and its step time."""
        return max(self.adverse_s.items(), key=lambda item: item[1])

    def to_data(self) -> dict[str, Any]:
        """What JSON says of the plan."""
        data: dict[str, Any] = {
            "ties_with_fastest": self.tied,
            "probability_fastest_is_faster": self.first_faster,
            "memory_headroom": self.headroom,
            "robust": None,
        }
        if self.tied:
            case, seconds = self.worst
            data["robust"] = {
                "worst_step_time_s": seconds,
                "worst_case": case,
                "step_time_s": self.adverse_s,
            }
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """The plan to take among the fastest ones."""

    index: int
    reason: str
    standings: tuple[Standing, ...]
    """Of each plan that was looked at."""


def recommend(
    plans: Sequence[Prediction], costs: CostModel, progress: Progress | None = None
) -> Recommendation:
    """The most robust of the plans, fastest first, that cannot be told apart from the first.

    Robust: it leaves ENOUGH_HEADROOM of the memory free; then the shortest step in its worst case.
    """
    standings = tuple(_standings(plans, costs, progress))
    tied = [index for index, standing in enumerate(standings) if standing.tied]

    def fragility(index: int) -> tuple[bool, float]:
        return standings[index].is_tight, standings[index].worst[1]

    best, first = min(tied, key=fragility), standings[0]
    if first.is_tight == standings[best].is_tight:
        gain = first.worst[1] / standings[best].worst[1] - 1
        best = best if gain >= NOTICED else 0
    spread = plans[tied[-1]].step_time_s / plans[0].step_time_s - 1
    reason = _reason(best, tied, standings, spread)
    return Recommendation(index=best, reason=reason, standings=standings)


def _standings(
    plans: Sequence[Prediction], costs: CostModel, progress: Progress | None
) -> Iterator[Standing]:
    first = plans[0]
    for number, plan in enumerate(plans, start=1):
        scale = order_scale(plan.job, first.plan, plan.plan)
        sure = probability_faster(first.step_time_s, plan.step_time_s, scale)
        adverse_s: dict[str, float] = {}
        if plan is first or sure < SURE:
            if progress is not None:
                progress("trying adverse cases", number, 0)
            adverse_s = adverse_times_s(plan.job, plan.plan, costs)
        used = plan.memory.peak + plan.context_bytes
        yield Standing(
            first_faster=sure, headroom=1 - used / plan.device_memory_bytes, adverse_s=adverse_s
        )


def _reason(best: int, tied: Sequence[int], standings: Sequence[Standing], spread: float) -> str:
    """Why this plan, in a sentence; plans are numbered from 1, tied ones lie within `spread`."""
    mine, first = standings[best], standings[0]
    tight = f", but it leaves only {percent(mine.headroom)} of the memory free" if mine.is_tight else ""
    if len(tied) == 1:
        return f"plan 1 is ahead of all others by more than the model's error{tight}"
    all_tie = "at least " if len(tied) == len(standings) else ""
    text = (
        f"{all_tie}plans {_numbers(tied)} cannot be told apart: they lie within {percent(spread)}, "
        f"less than the model's error between two plans; "
    )
    (case, worst_s), (other, other_s) = mine.worst, first.worst
    at_worst = f"{format_duration(worst_s)} at worst ({case})"
    if best == 0:
        return f"{text}plan 1 is as robust as any: {at_worst}{tight}"
    text += f"plan {best + 1} is the most robust: {at_worst}, where plan 1 takes "
    text += f"{format_duration(other_s)}" + ("" if other == case else f" ({other})")
    if first.is_tight and not mine.is_tight:
        text += f" and leaves only {percent(first.headroom)} of the memory free"
    return text + tight


def _numbers(indices: Sequence[int]) -> str:
    """Plans by number, runs of them joined.

    >>> _numbers([0, 1, 2, 4])
    '1–3, 5'
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{r[0] + 1}–{r[-1] + 1}" if len(r) > 1 else f"{r[0] + 1}" for r in runs)
