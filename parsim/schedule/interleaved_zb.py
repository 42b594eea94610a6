"""Interleaved 1F1B with split backwards: weight gradients fill a part of the bubble.

Source: ZB1P of Qi et al. 2024, arXiv 2401.10241 (ZB-H1), on the chunks of Narayanan et al. 2021, arXiv
2104.04473, as in torch's ScheduleInterleavedZeroBubble. The bubble is ZB-H1's over v,
(p − 1)(T_F + T_B − T_W)/v where micro-batches are a multiple of p.
"""

from __future__ import annotations

from parsim.schedule.action import FORWARD, INPUT_GRAD, WEIGHT_GRAD, Action, Schedule
from parsim.schedule.interleaved import micro_batches_per_round, turns


def interleaved_zb(pp: int, vpp: int, num_micro_batches: int) -> Schedule:
    """The interleaved zero-bubble schedule: stage c·pp + r is chunk c of rank r.

    >>> [str(action) for action in interleaved_zb(2, 2, 2).ranks[1]]
    ['1F0', '1F1', '3F0', '3I0', '3F1', '3I1', '3W0', '1I0', '3W1', '1I1', '1W0', '1W1']
    """
    return Schedule(
        name="interleaved-zb",
        ranks=tuple(_rank_actions(pp, vpp, rank, num_micro_batches) for rank in range(pp)),
    )


def _rank_actions(pp: int, vpp: int, rank: int, num_micro_batches: int) -> tuple[Action, ...]:
    per_round = micro_batches_per_round(pp, num_micro_batches)
    total = vpp * num_micro_batches
    warmup = min(total, (vpp - 1) * per_round + pp - 1 - rank)
    forwards = turns(FORWARD, pp, vpp, rank, num_micro_batches)
    backwards = turns(INPUT_GRAD, pp, vpp, rank, num_micro_batches)
    actions = forwards[:warmup]
    for k, backward in enumerate(backwards):
        actions += (*forwards[warmup + k : warmup + k + 1], backward)
        # As many weight gradients wait as there are ranks before this one, as in ZB-H1.
        if k >= rank:
            actions.append(backwards[k - rank]._replace(kind=WEIGHT_GRAD))
    actions += (action._replace(kind=WEIGHT_GRAD) for action in backwards[max(0, total - rank) :])
    return tuple(actions)
