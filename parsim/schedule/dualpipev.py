"""DualPipeV: DualPipe cut in half: two chunks a rank in a V, forwards and backwards in overlapped pairs.

Source: DeepSeek-AI 2024, arXiv 2412.19437 (DeepSeek-V3), section 3.2.1, and the table in the README of
github.com/deepseek-ai/DualPipe. With PP stages on PP/2 ranks: bubble (PP/2 − 1)(F&B + B − 3W), where F&B
is an overlapped pair, B a whole backward and W a weight gradient; activations of PP + 1 chunks.
"""

from __future__ import annotations

from collections import Counter, deque

from parsim.errors import ParsimError
from parsim.schedule.action import (
    BACKWARD,
    FORWARD,
    INPUT_GRAD,
    WEIGHT_GRAD,
    Action,
    Schedule,
    overlapped,
)


def dualpipev(pp: int, num_micro_batches: int) -> Schedule:
    """The DualPipeV schedule: rank r holds the stages r and 2·pp − 1 − r.

    Raises ParsimError for fewer micro-batches than stages.
    """
    check_full_v(pp, num_micro_batches)
    ranks = (
        two_way_actions(
            rank, 2 * pp - 1 - rank, depth=pp, place=rank, num_micro_batches=num_micro_batches
        )
        for rank in range(pp)
    )
    return Schedule(name="dualpipev", ranks=tuple(ranks))


def check_full_v(pp: int, num_micro_batches: int) -> None:
    """Raises ParsimError for fewer micro-batches than DualPipeV's stages."""
    if num_micro_batches < 2 * pp:
        raise ParsimError(
            "DualPipeV needs as many micro-batches as stages",
            where="num_micro_batches",
            got=num_micro_batches,
            expected=f"{2 * pp} or more: two stages on each of {pp} ranks",
            hint="a smaller micro_batch or dp gives more micro-batches; zbv takes any number",
        )


def two_way_actions(
    near: int,
    far: int,
    *,
    depth: int,
    place: int,
    num_micro_batches: int,
    first: dict[int, int] | None = None,
) -> tuple[Action, ...]:
    """A rank between two streams of micro-batches: `near` is the stage that one of them reaches early,
    `far` the one that the other reaches late.

    The rank has `place` ranks before it on the way to where the streams cross, `depth` ranks away from
    the start. Each stage runs `num_micro_batches`, from `first` on (0 where it does not say).
    """
    actions: list[Action] = []
    count: Counter[tuple[int, str]] = Counter()
    waiting: deque[Action] = deque()  # weight gradients that are yet to run

    def take(stage: int, kind: str) -> Action:
        """The stage's next action of a kind; whole and split backwards are counted together."""
        lane = FORWARD if kind == FORWARD else BACKWARD
        action = Action(stage, kind, count[stage, lane] + (first or {}).get(stage, 0))
        count[stage, lane] += 1
        if kind == INPUT_GRAD:
            waiting.append(action._replace(kind=WEIGHT_GRAD))
        return action

    def run(stage: int, kind: str) -> None:
        actions.append(take(stage, kind))

    def run_pair(forward_stage: int, backward_stage: int) -> None:
        actions.append(overlapped(take(forward_stage, FORWARD), take(backward_stage, BACKWARD)))

    def run_waiting() -> None:
        if waiting:
            actions.append(waiting.popleft())

    before, after = place + 1, depth - place - 1
    for _ in range(2 * after):
        run(near, FORWARD)
    for _ in range(before):
        run(near, FORWARD)
        run(far, FORWARD)
    for _ in range(after):
        run(far, INPUT_GRAD)
        run_waiting()
        run(far, FORWARD)
    for k in range(num_micro_batches - 2 * depth + before):
        if k == 0 and after == 0:
            # Where the streams cross, the backward's input is this rank's own: a pair would wait.
            run(near, FORWARD)
            run(far, BACKWARD)
        else:
            run_pair(near, far)
        run_pair(far, near)
    for _ in range(after):
        run(far, BACKWARD)
        run_pair(far, near)
    # The second half of what is left is split, so that weight gradients fill the cool-down.
    whole, end = before, 2 * before
    for k in range(end):
        run(near if k % 2 else far, BACKWARD if k < whole else INPUT_GRAD)
    for _ in range(after):
        run_waiting()
        run(near, INPUT_GRAD)
    while waiting:
        run_waiting()
    return tuple(actions)
