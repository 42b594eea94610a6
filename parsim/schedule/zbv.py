"""ZB-V: two chunks a rank, the second back up the pipeline, split backwards, and 1F1B's memory.

Source: Qi et al. 2024, arXiv 2401.10241, section 6 (ZB-V), and the same authors' Pipeline Parallelism
with Controllable Memory, arXiv 2405.15362, where it is the V-shaped schedule V-ZB. The first rank holds
the first and the last stage, so backwards start early; no bubble is left where F, I and W take as long,
and no rank keeps more than 2p chunks' activations, as much as 1F1B's first rank.
"""

from __future__ import annotations

from collections import Counter

from parsim.schedule.action import FORWARD, INPUT_GRAD, WEIGHT_GRAD, Action, Schedule


def zbv(pp: int, num_micro_batches: int) -> Schedule:
    """The ZB-V schedule: rank r holds the stages r and 2·pp − 1 − r.

    Fewer micro-batches than fill the pipeline (2·pp − 1) run as the first ones of so many.

    >>> [str(action) for action in zbv(1, 1).ranks[0]]
    ['0F0', '1F0', '1I0', '1W0', '0I0', '0W0']
    """
    return Schedule(
        name="zbv", ranks=tuple(_rank_actions(pp, rank, num_micro_batches) for rank in range(pp))
    )


def _rank_actions(pp: int, rank: int, num_micro_batches: int) -> tuple[Action, ...]:
    down, up = rank, 2 * pp - 1 - rank
    total = max(num_micro_batches, 2 * pp - 1)
    actions: list[Action] = []
    count: Counter[tuple[int, str]] = Counter()

    def run(stage: int, *kinds: str) -> None:
        """The stage's next action of each kind."""
        for kind in kinds:
            actions.append(Action(stage, kind, count[stage, kind]))
            count[stage, kind] += 1

    # Warm-up: the first chunk until the second one's input is there, both in turn, then its backwards.
    for _ in range(2 * (pp - rank) - 1):
        run(down, FORWARD)
    for _ in range(rank):
        run(up, FORWARD)
        run(down, FORWARD)
    for _ in range(pp - rank):
        run(up, FORWARD, INPUT_GRAD, WEIGHT_GRAD)
    while count[up, FORWARD] < total:
        if count[down, FORWARD] < total:
            run(down, FORWARD)
        run(down, INPUT_GRAD, WEIGHT_GRAD)
        run(up, FORWARD, INPUT_GRAD, WEIGHT_GRAD)
    # Cool-down: input gradients, which others wait for, before weight gradients.
    for _ in range(rank):
        run(down, INPUT_GRAD)
        run(up, INPUT_GRAD)
    for _ in range(pp - rank):
        run(down, INPUT_GRAD, WEIGHT_GRAD)
    for stage in (up, down):
        for _ in range(total - count[stage, WEIGHT_GRAD]):
            run(stage, WEIGHT_GRAD)
    return tuple(action for action in actions if action.micro_batch < num_micro_batches)
