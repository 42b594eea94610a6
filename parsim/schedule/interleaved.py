"""Interleaved 1F1B: every rank holds v chunks of the model and takes turns between them.

Source: Narayanan et al. 2021, arXiv 2104.04473, section 2.2. The bubble shrinks by v, to
(p − 1)/(v·m + p − 1) of the step, at the price of v times the pipeline communication. Micro-batches go
through the chunks in rounds of about p; like torch's ScheduleInterleaved1F1B, a round may be larger than
p where p does not divide m, as long as all rounds are equal.
"""

from __future__ import annotations

from parsim.errors import ParsimError
from parsim.schedule.action import BACKWARD, FORWARD, Action, Schedule


def micro_batches_per_round(pp: int, num_micro_batches: int) -> int:
    """Micro-batches that pass one chunk before the rank turns to the next.

    Raises ParsimError where the micro-batches do not divide into equal rounds.

    >>> micro_batches_per_round(4, 8), micro_batches_per_round(4, 6), micro_batches_per_round(4, 3)
    (4, 6, 3)
    """
    rounds = max(1, num_micro_batches // pp)
    if num_micro_batches % rounds:
        raise ParsimError(
            "interleaved 1F1B needs equal rounds of micro-batches",
            where="num_micro_batches",
            got=num_micro_batches,
            expected=f"a multiple of {rounds} (= {num_micro_batches} // pp)",
            hint=f"a multiple of pp = {pp} always works",
        )
    return num_micro_batches // rounds


def warmup_forwards(pp: int, vpp: int, rank: int, num_micro_batches: int) -> int:
    """Forwards of single chunks that a rank runs before its first backward's partner forward."""
    ahead = (vpp - 1) * micro_batches_per_round(pp, num_micro_batches) + 2 * (pp - 1 - rank)
    return min(ahead, vpp * num_micro_batches)


def interleaved(pp: int, vpp: int, num_micro_batches: int) -> Schedule:
    """The interleaved 1F1B schedule: stage c·pp + r is chunk c of rank r.

    >>> [str(action) for action in interleaved(2, 2, 2).ranks[1]]
    ['1F0', '1F1', '3F0', '3B0', '3F1', '3B1', '1B0', '1B1']
    """
    return Schedule(
        name="interleaved",
        ranks=tuple(_rank_actions(pp, vpp, rank, num_micro_batches) for rank in range(pp)),
    )


def turns(kind: str, pp: int, vpp: int, rank: int, num_micro_batches: int) -> list[Action]:
    """All forwards, or all backwards, of a rank in order: its chunks take turns."""
    per_round = micro_batches_per_round(pp, num_micro_batches)
    chunks = range(vpp) if kind == FORWARD else range(vpp - 1, -1, -1)
    return [
        Action(chunk * pp + rank, kind, start + i)
        for start in range(0, num_micro_batches, per_round)
        for chunk in chunks
        for i in range(per_round)
    ]


def _rank_actions(pp: int, vpp: int, rank: int, num_micro_batches: int) -> tuple[Action, ...]:
    warmup = warmup_forwards(pp, vpp, rank, num_micro_batches)
    forwards = turns(FORWARD, pp, vpp, rank, num_micro_batches)
    backwards = turns(BACKWARD, pp, vpp, rank, num_micro_batches)
    actions = forwards[:warmup]
    for k, backward in enumerate(backwards):
        actions += (*forwards[warmup + k : warmup + k + 1], backward)
    return tuple(actions)
