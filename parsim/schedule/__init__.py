"""Schedules: pure functions from sizes to lists of Actions, and what turns them into Programs."""

from __future__ import annotations

from parsim.errors import ParsimError, did_you_mean
from parsim.plan import ParallelPlan
from parsim.schedule.action import Schedule
from parsim.schedule.gpipe import gpipe
from parsim.schedule.interleaved import interleaved
from parsim.schedule.one_f_one_b import one_f_one_b

SCHEDULES = ("gpipe", "1f1b", "interleaved")
"""Names of the schedules that parsim makes."""


def make_schedule(plan: ParallelPlan, num_micro_batches: int) -> Schedule:
    """The schedule that a plan names, for its pp, vpp and number of micro-batches.

    Raises ParsimError for a name that parsim does not know or sizes that the schedule does not take.
    """
    if plan.schedule == "gpipe":
        return gpipe(plan.pp, num_micro_batches)
    if plan.schedule == "1f1b":
        return one_f_one_b(plan.pp, num_micro_batches)
    if plan.schedule == "interleaved":
        return interleaved(plan.pp, plan.vpp, num_micro_batches)
    raise unknown_schedule(plan.schedule)


def unknown_schedule(name: str) -> ParsimError:
    """The error for a schedule that parsim does not make."""
    return ParsimError(
        f"unknown schedule {name!r}",
        where="schedule",
        expected=", ".join(SCHEDULES),
        hint=did_you_mean(name, SCHEDULES),
    )
