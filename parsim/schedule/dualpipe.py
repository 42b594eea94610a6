"""DualPipe: micro-batches enter at both ends of the pipeline, and each rank holds two stages.

Source: DeepSeek-AI 2024, arXiv 2412.19437 (DeepSeek-V3), section 3.2.1 and table 2, and the table in the
README of github.com/deepseek-ai/DualPipe: bubble (PP/2 − 1)(F&B + B − 3W), twice the parameters,
activations of PP + 1 micro-batches. The two copies of a stage sum their gradients before the update.
"""

from __future__ import annotations

from parsim.errors import ParsimError
from parsim.schedule.action import Action, Schedule
from parsim.schedule.dualpipev import two_way_actions


def dualpipe(pp: int, num_micro_batches: int) -> Schedule:
    """The DualPipe schedule on pp ranks, as two chains of pp stages.

    Stage s of the model is stage s on rank s, for the first half of the micro-batches, and stage pp + s
    on rank pp − 1 − s for the other half.

    Raises ParsimError for an odd number of ranks or of micro-batches, and for fewer micro-batches than
    keep both directions busy.
    """
    check_two_ways(pp, num_micro_batches)
    each = num_micro_batches // 2
    return Schedule(
        name="dualpipe",
        ranks=tuple(_rank_actions(pp, rank, each) for rank in range(pp)),
        chains=2,
    )


def check_two_ways(pp: int, num_micro_batches: int) -> None:
    """Raises ParsimError for sizes that DualPipe does not take."""
    if pp % 2:
        raise ParsimError(
            "DualPipe's two directions meet between the ranks in the middle",
            where="pp",
            got=pp,
            expected="an even number of pipeline ranks",
            hint="dualpipev takes any number",
        )
    if num_micro_batches % 2 or num_micro_batches < 2 * pp:
        raise ParsimError(
            "DualPipe sends half of the micro-batches in from each end, pp or more",
            where="num_micro_batches",
            got=num_micro_batches,
            expected=f"an even number from 2·pp = {2 * pp} on",
            hint="a smaller micro_batch or dp gives more micro-batches",
        )


def _rank_actions(pp: int, rank: int, each: int) -> tuple[Action, ...]:
    forth, back = rank, 2 * pp - 1 - rank
    near, far = (forth, back) if rank < pp // 2 else (back, forth)
    place = min(rank, pp - 1 - rank)
    return two_way_actions(
        near, far, depth=pp // 2, place=place, num_micro_batches=each, first={back: each}
    )
