"""ZB-H1: 1F1B whose backwards are split, so that weight gradients fill a part of the bubble.

Source: Qi et al. 2024 (Zero Bubble Pipeline Parallelism), arXiv 2401.10241, section 2.1 and table 2:
bubble (p − 1)(T_F + T_B − T_W), T_B the gradient of the input and T_W that of the weights, with the
activations that 1F1B keeps at most: p micro-batches (here on every rank).
"""

from __future__ import annotations

from parsim.schedule.action import FORWARD, INPUT_GRAD, WEIGHT_GRAD, Action, Schedule


def zb_h1(pp: int, num_micro_batches: int) -> Schedule:
    """The ZB-H1 schedule on pp ranks, one stage each; fewer micro-batches than ranks are fine.

    >>> [str(action) for action in zb_h1(2, 3).ranks[1]]
    ['1F0', '1I0', '1F1', '1I1', '1W0', '1F2', '1I2', '1W1', '1W2']
    """
    return Schedule(
        name="zb-h1",
        ranks=tuple(
            split_one_f_one_b(rank, num_micro_batches, ahead=pp - rank, behind=rank)
            for rank in range(pp)
        ),
    )


def split_one_f_one_b(
    stage: int, num_micro_batches: int, *, ahead: int, behind: int
) -> tuple[Action, ...]:
    """1F1B of one stage with `ahead` forwards before the first backward, and weight gradients that
    follow `behind` micro-batches after their input gradients.

    ahead + behind micro-batches are kept at most.
    """
    m = num_micro_batches
    actions = [Action(stage, FORWARD, i) for i in range(min(ahead, m))]
    for i in range(m):
        actions.append(Action(stage, INPUT_GRAD, i))
        if i >= behind:
            actions.append(Action(stage, WEIGHT_GRAD, i - behind))
        if ahead + i < m:
            actions.append(Action(stage, FORWARD, ahead + i))
    actions += (Action(stage, WEIGHT_GRAD, i) for i in range(max(0, m - behind), m))
    return tuple(actions)
