"""Schedules: pure functions from sizes to lists of Actions, and what turns them into Programs."""

from __future__ import annotations

from dataclasses import replace

from parsim.errors import ParsimError, did_you_mean
from parsim.plan import ASYNCHRONOUS_SCHEDULES, V_SHAPED_SCHEDULES, ParallelPlan
from parsim.schedule.action import Schedule
from parsim.schedule.dualpipe import check_two_ways, dualpipe
from parsim.schedule.dualpipev import check_full_v, dualpipev
from parsim.schedule.gpipe import gpipe
from parsim.schedule.interleaved import interleaved, micro_batches_per_round
from parsim.schedule.interleaved_zb import interleaved_zb
from parsim.schedule.looped_bfs import looped_bfs
from parsim.schedule.one_f_one_b import one_f_one_b
from parsim.schedule.pipedream import check_stale, endless, pipedream
from parsim.schedule.zb_h1 import zb_h1
from parsim.schedule.zb_h2 import zb_h2
from parsim.schedule.zbv import zbv

SYNCHRONOUS_SCHEDULES = (
    "gpipe",
    "1f1b",
    "interleaved",
    "looped-bfs",
    "zb-h1",
    "zb-h2",
    "interleaved-zb",
    "zbv",
    "dualpipe",
    "dualpipev",
)
"""Schedules that train as one process does."""
SCHEDULES = (*SYNCHRONOUS_SCHEDULES, *ASYNCHRONOUS_SCHEDULES)
"""Names of all schedules that parsim makes."""

ONE_CHUNK_SCHEDULES = ("gpipe", "1f1b", "zb-h1", "zb-h2", *ASYNCHRONOUS_SCHEDULES)
"""Those with one stage on each rank."""
SPLIT_SCHEDULES = ("zb-h1", "zb-h2", "interleaved-zb", "zbv", "dualpipe", "dualpipev")
"""Those that split some of their backwards into input and weight gradients."""
OVERLAPPED_SCHEDULES = ("dualpipe", "dualpipev")
"""Those with overlapped pairs of a forward and a backward."""


def make_schedule(plan: ParallelPlan, num_micro_batches: int) -> Schedule:
    """The schedule that a plan names, for its pp, vpp and number of micro-batches in a step.

    Raises ParsimError for a name that parsim does not know or sizes that the schedule does not take.
    """
    match plan.schedule:
        case "gpipe":
            return gpipe(plan.pp, num_micro_batches)
        case "1f1b":
            return one_f_one_b(plan.pp, num_micro_batches)
        case "interleaved":
            return interleaved(plan.pp, plan.vpp, num_micro_batches)
        case "looped-bfs":
            return looped_bfs(plan.pp, plan.vpp, num_micro_batches)
        case "zb-h1":
            return zb_h1(plan.pp, num_micro_batches)
        case "zb-h2":
            return zb_h2(plan.pp, num_micro_batches)
        case "interleaved-zb":
            return interleaved_zb(plan.pp, plan.vpp, num_micro_batches)
        case "zbv":
            return zbv(plan.pp, num_micro_batches)
        case "dualpipe":
            return dualpipe(plan.pp, num_micro_batches)
        case "dualpipev":
            return dualpipev(plan.pp, num_micro_batches)
        case "pipedream" | "pipedream-2bw":
            return pipedream(plan, num_micro_batches)
    raise unknown_schedule(plan.schedule)


def running_schedule(plan: ParallelPlan, num_micro_batches: int, steps: int) -> Schedule:
    """What a run of so many steps does: a step's schedule again and again, or, without a flush, one
    schedule of all steps.

    Raises ParsimError as `make_schedule` does.
    """
    if plan.schedule not in ASYNCHRONOUS_SCHEDULES:
        return make_schedule(plan, num_micro_batches)
    check_stale(plan, num_micro_batches)
    return endless(plan, num_micro_batches, steps)


def with_schedule(plan: ParallelPlan, name: str, vpp: int | None = None) -> ParallelPlan:
    """The plan with another schedule, with the chunks that this has.

    A schedule of any number of chunks gets `vpp` of them, or as many as the plan has, at least two. What
    the plan says of each stage is dropped where the model is cut into another number of stages.
    """
    if name in ONE_CHUNK_SCHEDULES:
        chunks = 1
    elif name in V_SHAPED_SCHEDULES:
        chunks = 2
    else:
        chunks = vpp or max(2, plan.vpp)
    other = replace(plan, schedule=name, vpp=chunks, stage_split=(), recompute_layers=())
    if other.model_stages != plan.model_stages:
        return other
    return replace(other, stage_split=plan.stage_split, recompute_layers=plan.recompute_layers)


def check_micro_batches(plan: ParallelPlan, num_micro_batches: int) -> None:
    """Raises ParsimError where a plan's schedule does not take its ranks or so many micro-batches."""
    match plan.schedule:
        case "interleaved" | "interleaved-zb":
            micro_batches_per_round(plan.pp, num_micro_batches)
        case "dualpipe":
            check_two_ways(plan.pp, num_micro_batches)
        case "dualpipev":
            check_full_v(plan.pp, num_micro_batches)
        case "pipedream" | "pipedream-2bw":
            check_stale(plan, num_micro_batches)


def unknown_schedule(name: str) -> ParsimError:
    """The error for a schedule that parsim does not make."""
    return ParsimError(
        f"unknown schedule {name!r}",
        where="schedule",
        expected=", ".join(SCHEDULES),
        hint=did_you_mean(name, SCHEDULES),
    )
