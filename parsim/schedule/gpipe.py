"""GPipe: all forwards, then all backwards.

Source: Huang et al. 2019, arXiv 1811.06965. Bubble (p − 1)/(m + p − 1) of the step when a
micro-batch costs the same on every rank; every rank keeps the activations of all m micro-batches.
"""

from __future__ import annotations

from parsim.schedule.action import BACKWARD, FORWARD, Action, Schedule


def gpipe(pp: int, num_micro_batches: int) -> Schedule:
    """The GPipe schedule on pp ranks, one stage each.

    >>> [str(action) for action in gpipe(2, 2).ranks[1]]
    ['1F0', '1F1', '1B0', '1B1']
    """
    ranks = tuple(
        tuple(Action(rank, kind, i) for kind in (FORWARD, BACKWARD) for i in range(num_micro_batches))
        for rank in range(pp)
    )
    return Schedule(name="gpipe", ranks=ranks)
