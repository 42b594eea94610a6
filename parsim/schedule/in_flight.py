"""How many micro-batches each stage keeps activations of, at the rank's fullest moment."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from parsim.plan import ParallelPlan
from parsim.schedule import make_schedule
from parsim.schedule.action import BACKWARD, FORWARD, WEIGHT_GRAD, Action, computations
from parsim.schedule.interleaved import micro_batches_per_round, warmup_forwards


def in_flight(
    plan: ParallelPlan, rank: int, num_micro_batches: int, saved_bytes: Sequence[float] = ()
) -> tuple[int, ...]:
    """Micro-batches kept by each chunk of a rank (first chunk first), of the schedule that a plan names.

    saved_bytes is what each chunk keeps of a micro-batch; without it they keep alike. In closed form
    where there is one, else by a walk through the rank's actions.
    """
    m, pp = num_micro_batches, plan.pp
    match plan.schedule:
        case "gpipe" | "looped-bfs":
            return (m,) * plan.vpp
        case "1f1b":
            return (min(m, pp - rank),)
        case "pipedream" | "pipedream-2bw":
            return (pp - rank,)
        case "zb-h1":
            return (min(m, pp),)
        case "zb-h2":
            return (min(m, 2 * pp - 1),)
        case "interleaved":
            return _interleaved(plan, rank, m, saved_bytes)
    stages = [stage for stage in range(plan.num_stages) if plan.stage_rank(stage) == rank]
    kept = dict(zip(stages, saved_bytes or [1.0] * plan.vpp, strict=True))
    _, held = peak_in_flight(_actions(plan, num_micro_batches)[rank], kept)
    return tuple(held.values())


@lru_cache(maxsize=4)
def _actions(plan: ParallelPlan, num_micro_batches: int) -> tuple[tuple[Action, ...], ...]:
    return make_schedule(plan, num_micro_batches).ranks


def _interleaved(plan: ParallelPlan, rank: int, m: int, saved_bytes: Sequence[float]) -> tuple[int, ...]:
    vpp, per_round = plan.vpp, micro_batches_per_round(plan.pp, m)
    warmup = warmup_forwards(plan.pp, vpp, rank, m)

    def done(turns: int, chunk: int) -> int:
        """Micro-batches among the first turns that fall to the chunk-th chunk to have its turn."""
        rounds, rest = divmod(turns, per_round * vpp)
        return rounds * per_round + min(per_round, max(0, rest - chunk * per_round))

    # One forward follows the warm-up before the first backward; then they alternate.
    backwards = 0
    if warmup < vpp * m and len(set(saved_bytes)) > 1:
        backwards = _backwards_at_peak(saved_bytes, per_round, warmup, vpp * m - warmup)
    forwards = min(warmup + 1 + backwards, vpp * m)
    return tuple(done(forwards, c) - done(backwards, vpp - 1 - c) for c in range(vpp))


def _backwards_at_peak(
    saved_bytes: Sequence[float], per_round: int, warmup: int, alternations: int
) -> int:
    """Backwards that interleaved 1F1B has run when a rank keeps most.

    Forward warmup + k follows backward k − 1. What is kept then is a sum of two periodic terms, each
    straight until its pass turns to the next chunk: the peak lies where one of them turns.
    """
    vpp = len(saved_bytes)
    last = min(alternations, per_round * vpp) - 1
    turns = {*range(0, last, per_round), *range(-(warmup + 1) % per_round, last, per_round), last}
    now = most = 0.0
    peak = at = 0
    for k in sorted(turns):
        forward = saved_bytes[(warmup + 1 + at) // per_round % vpp]
        backward = saved_bytes[vpp - 1 - at // per_round % vpp]
        now += (k - at) * (forward - backward)
        at = k
        if now > most:
            most, peak = now, k
    return peak


def peak_in_flight(
    actions: Sequence[Action], saved_bytes: dict[int, float]
) -> tuple[float, dict[int, int]]:
    """The most bytes that a rank's actions keep at once, and the micro-batches of each stage then."""
    held = dict.fromkeys(saved_bytes, 0)
    now = most = 0.0
    at_peak = dict(held)
    for action in computations(actions):
        if action.kind == FORWARD:
            held[action.stage] += 1
            now += saved_bytes[action.stage]
            if now > most:
                most, at_peak = now, dict(held)
        elif action.kind in (BACKWARD, WEIGHT_GRAD):
            held[action.stage] -= 1
            now -= saved_bytes[action.stage]
    return most, at_peak
