"""1F1B: after a warm-up each rank alternates one forward and one backward.

Source: Narayanan et al. 2019 (PipeDream) with a flush at the end of the step, as in Narayanan et al.
2021, arXiv 2104.04473, section 2.2. Bubble (p − 1)/(m + p − 1), as GPipe; but rank r keeps the
activations of min(m, p − r) micro-batches only.
"""

from __future__ import annotations

from parsim.schedule.action import BACKWARD, FORWARD, Action, Schedule


def one_f_one_b(pp: int, num_micro_batches: int) -> Schedule:
    """The 1F1B schedule on pp ranks, one stage each; fewer micro-batches than ranks are fine.

    >>> [str(action) for action in one_f_one_b(2, 3).ranks[0]]
    ['0F0', '0F1', '0B0', '0F2', '0B1', '0B2']
    """
    return Schedule(
        name="1f1b", ranks=tuple(_rank_actions(pp, rank, num_micro_batches) for rank in range(pp))
    )


def _rank_actions(pp: int, rank: int, num_micro_batches: int) -> tuple[Action, ...]:
    warmup = min(num_micro_batches, pp - rank)
    actions = [Action(rank, FORWARD, i) for i in range(warmup)]
    for i in range(num_micro_batches):
        actions.append(Action(rank, BACKWARD, i))
        if warmup + i < num_micro_batches:
            actions.append(Action(rank, FORWARD, warmup + i))
    return tuple(actions)
