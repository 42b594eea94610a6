"""ZB-H2: ZB-H1 with more forwards ahead, which leaves no bubble where all three passes take as long.

Source: Qi et al. 2024, arXiv 2401.10241, section 2.2 and table 2: bubble (p − 1)(T_F + T_B − 2·T_W),
with the activations of 2p − 1 micro-batches. Ranks start and end p − 1 forwards apart: the bubble is
gone from each rank's own time, while an optimizer that waits for all ranks waits for the last.
"""

from __future__ import annotations

from parsim.schedule.action import Schedule
from parsim.schedule.zb_h1 import split_one_f_one_b


def zb_h2(pp: int, num_micro_batches: int) -> Schedule:
    """The ZB-H2 schedule on pp ranks, one stage each; fewer micro-batches than ranks are fine.

    >>> [str(action) for action in zb_h2(2, 3).ranks[0]]
    ['0F0', '0F1', '0F2', '0I0', '0W0', '0I1', '0W1', '0I2', '0W2']
    """
    return Schedule(
        name="zb-h2",
        ranks=tuple(
            split_one_f_one_b(rank, num_micro_batches, ahead=2 * (pp - rank) - 1, behind=2 * rank)
            for rank in range(pp)
        ),
    )
