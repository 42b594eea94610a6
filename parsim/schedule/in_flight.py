"""How many micro-batches each stage keeps activations of, at the rank's fullest moment."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from operator import le, mul

from parsim.plan import ParallelPlan
from parsim.schedule import make_schedule
from parsim.schedule.action import BACKWARD, FORWARD, WEIGHT_GRAD, Action, computations
from parsim.schedule.interleaved import micro_batches_per_round, warmup_forwards

STEADY_ROUNDS = 2
"""Times pp micro-batches: with more, a schedule that is walked through keeps no more."""


def in_flight(
    plan: ParallelPlan, rank: int, num_micro_batches: int, saved_bytes: Sequence[float] = ()
) -> tuple[int, ...]:
    """Micro-batches kept by each chunk of a rank (first chunk first), of the schedule that a plan names.

    saved_bytes is what each chunk keeps of a micro-batch; without it they keep alike.
    """
    moments = full_moments(plan.schedule, plan.pp, plan.vpp, rank, num_micro_batches)
    size = saved_bytes or (1.0,) * plan.vpp
    return max(moments, key=lambda kept: sum(map(mul, kept, size)))


@cache
def full_moments(
    schedule: str, pp: int, vpp: int, rank: int, num_micro_batches: int
) -> tuple[tuple[int, ...], ...]:
    """Micro-batches kept by each chunk of a rank at the moments that may be its fullest, in order.

    Which of them is, depends on what each chunk keeps of a micro-batch. In closed form where there is
    one, else by a walk through the rank's actions.
    """
    m = num_micro_batches
    match schedule:
        case "gpipe" | "looped-bfs":
            return ((m,) * vpp,)
        case "1f1b":
            return ((min(m, pp - rank),),)
        case "pipedream" | "pipedream-2bw":
            return ((pp - rank,),)
        case "zb-h1":
            return ((min(m, pp),),)
        case "zb-h2":
            return ((min(m, 2 * pp - 1),),)
        case "interleaved":
            return _interleaved(pp, vpp, warmup_forwards(pp, vpp, rank, m), m)
        case "interleaved-zb":
            # As many weight gradients wait as there are ranks before this one: that is as if so many
            # more forwards came ahead, and makes all ranks alike.
            ahead = (vpp - 1) * micro_batches_per_round(pp, m) + pp - 1
            return _interleaved(pp, vpp, min(ahead, vpp * m), m)
    if m > STEADY_ROUNDS * pp:
        return full_moments(schedule, pp, vpp, rank, STEADY_ROUNDS * pp)
    stages = ParallelPlan(pp=pp, vpp=vpp, schedule=schedule).rank_stages()[rank]
    return _walked(_actions(schedule, pp, vpp, m)[rank], stages)


@lru_cache(maxsize=4)
def _actions(schedule: str, pp: int, vpp: int, m: int) -> tuple[tuple[Action, ...], ...]:
    return make_schedule(ParallelPlan(pp=pp, vpp=vpp, schedule=schedule), m).ranks


def _walked(actions: Sequence[Action], stages: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """What is kept after each forward that a backward follows, unless another moment has more of all."""
    place = {stage: chunk for chunk, stage in enumerate(stages)}
    held = [0] * len(stages)
    tops: dict[tuple[int, ...], None] = {}
    rising = False
    for action in computations(actions):
        if action.kind == FORWARD:
            held[place[action.stage]] += 1
            rising = True
        elif action.kind in (BACKWARD, WEIGHT_GRAD):
            if rising:
                tops[tuple(held)] = None
            rising = False
            held[place[action.stage]] -= 1
    return tuple(
        top for top in tops if not any(other != top and all(map(le, top, other)) for other in tops)
    )


def _interleaved(pp: int, vpp: int, warmup: int, m: int) -> tuple[tuple[int, ...], ...]:
    """Interleaved 1F1B: after the warm-up one forward follows before the first backward; then they
    alternate, forward warmup + k behind backward k − 1.

    What is kept then is a sum of two periodic terms, each straight until its pass turns to the next
    chunk: the peak lies where one of them turns.
    """
    per_round = micro_batches_per_round(pp, m)

    def done(turns: int, chunk: int) -> int:
        """Micro-batches among the first turns that fall to the chunk-th chunk to have its turn."""
        rounds, rest = divmod(turns, per_round * vpp)
        return rounds * per_round + min(per_round, max(0, rest - chunk * per_round))

    last = min(vpp * m - warmup, per_round * vpp) - 1
    turns = {0, *range(0, last, per_round), *range(-(warmup + 1) % per_round, last, per_round)}
    moments: dict[tuple[int, ...], None] = {}
    for backwards in sorted({*turns, max(0, last)}):
        forwards = min(warmup + 1 + backwards, vpp * m)
        kept = (done(forwards, c) - done(backwards, vpp - 1 - c) for c in range(vpp))
        moments[tuple(kept)] = None
    return tuple(moments)


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
