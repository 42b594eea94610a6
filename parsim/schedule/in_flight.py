"""How many micro-batches each stage keeps activations of, at the rank's fullest moment."""

from __future__ import annotations

from collections.abc import Sequence

from parsim.plan import ParallelPlan
from parsim.schedule.action import BACKWARD, FORWARD, WEIGHT_GRAD, Action
from parsim.schedule.interleaved import micro_batches_per_round, warmup_forwards


def in_flight(plan: ParallelPlan, rank: int, num_micro_batches: int) -> tuple[int, ...]:
    """Micro-batches kept by each chunk of a rank (first chunk first), in closed form.

    For schedules made by parsim whose chunks keep alike; peak_in_flight walks any list of actions.
    """
    m = num_micro_batches
    if plan.schedule == "gpipe":
        return (m,)
    if plan.schedule == "1f1b":
        return (min(m, plan.pp - rank),)
    # One forward follows the warm-up before the first backward.
    forwards = min(warmup_forwards(plan.pp, plan.vpp, rank, m) + 1, plan.vpp * m)
    rounds, rest = divmod(forwards, (per_round := micro_batches_per_round(plan.pp, m)) * plan.vpp)
    return tuple(
        rounds * per_round + min(per_round, max(0, rest - chunk * per_round))
        for chunk in range(plan.vpp)
    )


def peak_in_flight(
    actions: Sequence[Action], saved_bytes: dict[int, float]
) -> tuple[float, dict[int, int]]:
    """The most bytes that a rank's actions keep at once, and the micro-batches of each stage then."""
    held = dict.fromkeys(saved_bytes, 0)
    now = most = 0.0
    at_peak = dict(held)
    for action in actions:
        if action.kind == FORWARD:
            held[action.stage] += 1
            now += saved_bytes[action.stage]
            if now > most:
                most, at_peak = now, dict(held)
        elif action.kind in (BACKWARD, WEIGHT_GRAD):
            held[action.stage] -= 1
            now -= saved_bytes[action.stage]
    return most, at_peak
