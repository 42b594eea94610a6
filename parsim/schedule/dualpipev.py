"""DualPipeV: DualPipe cut in half: two chunks a rank in a V, forwards and backwards in overlapped pairs.

Source: DeepSeek-AI 2024, arXiv 2412.19437 (DeepSeek-V3), section 3.2.1, and the table in the README of
github.com/deepseek-ai/DualPipe. With PP stages on PP/2 ranks: bubble (PP/2 − 1)(F&B + B − 3W), where F&B
is an overlapped pair, B a whole backward and W a weight gradient; activations of PP + 1 chunks.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

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
    rank = _Rank(first=first or {})
    before, after = place + 1, depth - place - 1
    for _ in range(2 * after):
        rank.run(near, FORWARD)
    for _ in range(before):
        rank.run(near, FORWARD)
        rank.run(far, FORWARD)
    for _ in range(after):
        rank.run(far, INPUT_GRAD)
        rank.run_waiting()
        rank.run(far, FORWARD)
    for k in range(num_micro_batches - 2 * depth + before):
        if k == 0 and after == 0:
            # Where the streams cross, the backward's input is this rank's own: a pair would wait.
            rank.run(near, FORWARD)
            rank.run(far, BACKWARD)
        else:
            rank.run_pair(near, far)
        rank.run_pair(far, near)
    for _ in range(after):
        rank.run(far, BACKWARD)
        rank.run_pair(far, near)
    # The second half of what is left is split, so that weight gradients fill the cool-down.
    for k in range(2 * before):
        rank.run(near if k % 2 else far, BACKWARD if k < before else INPUT_GRAD)
    for _ in range(after):
        rank.run_waiting()
        rank.run(near, INPUT_GRAD)
    while rank.waiting:
        rank.run_waiting()
    return tuple(rank.actions)


@dataclass(slots=True, kw_only=True)
class _Rank:
    """The actions of a rank so far."""

    first: dict[int, int]
    actions: list[Action] = field(default_factory=list)
    count: Counter[tuple[int, bool]] = field(default_factory=Counter)
    """Forwards and backwards (whole or split) of each stage."""
    waiting: deque[Action] = field(default_factory=deque)
    """Weight gradients that are yet to run."""

    def run(self, stage: int, kind: str) -> None:
        """A stage's next forward, backward or input gradient."""
        self.actions.append(self._next(stage, kind))

    def run_pair(self, forward_stage: int, backward_stage: int) -> None:
        """The next forward of one stage and backward of another at once."""
        pair = self._next(forward_stage, FORWARD), self._next(backward_stage, BACKWARD)
        self.actions.append(overlapped(*pair))

    def run_waiting(self) -> None:
        """The oldest weight gradient that waits, if any does."""
        if self.waiting:
            self.actions.append(self.waiting.popleft())

    def _next(self, stage: int, kind: str) -> Action:
        lane = stage, kind == FORWARD
        action = Action(stage, kind, self.first.get(stage, 0) + self.count[lane])
        self.count[lane] += 1
        if kind == INPUT_GRAD:
            self.waiting.append(action._replace(kind=WEIGHT_GRAD))
        return action
