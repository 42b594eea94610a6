"""Looped, breadth-first: all micro-batches go through a rank's first chunk, then all through its next.

Source: Lamy-Poirier 2022, arXiv 2211.05953, section 4. The bubble is that of interleaving,
(p − 1)/(v·m) of the work from m = p micro-batches on, and a stage's gradients are ready to be reduced
(and its parameters gathered) once for all micro-batches; but every chunk keeps the activations of all
of them. As in torch's ScheduleLoopedBFS, backwards take the micro-batches last first.
"""

from __future__ import annotations

from parsim.schedule.action import BACKWARD, FORWARD, Action, Schedule


def looped_bfs(pp: int, vpp: int, num_micro_batches: int) -> Schedule:
    """The breadth-first schedule: stage c·pp + r is chunk c of rank r. One chunk a rank is GPipe.

    >>> [str(action) for action in looped_bfs(2, 2, 2).ranks[1]]
    ['1F0', '1F1', '3F0', '3F1', '3B1', '3B0', '1B1', '1B0']
    """
    return Schedule(
        name="looped-bfs",
        ranks=tuple(
            tuple(_rank_actions(range(rank, pp * vpp, pp), num_micro_batches)) for rank in range(pp)
        ),
    )


def _rank_actions(stages: range, num_micro_batches: int) -> list[Action]:
    forwards = [Action(stage, FORWARD, i) for stage in stages for i in range(num_micro_batches)]
    return forwards + [action._replace(kind=BACKWARD) for action in reversed(forwards)]
