"""Action and Schedule: what each pipeline rank does, in order.

The grammar is that of torch.distributed.pipelining: `{stage}{kind}{micro_batch}`, such as `2F0`.
Standard library only: the executor's workers import it where nothing but torch is installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from parsim.errors import ParsimError

FORWARD = "F"
BACKWARD = "B"
"""The whole backward of a stage: gradients of its input and of its weights."""
INPUT_GRAD = "I"
WEIGHT_GRAD = "W"
KINDS = (FORWARD, BACKWARD, INPUT_GRAD, WEIGHT_GRAD)

_ACTION = re.compile(r"(\d{1,9})(F|B|I|W)(\d{1,9})")


class Action(NamedTuple):
    """One step of one pipeline rank."""

    stage: int
    kind: str
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


def parse_action(text: str) -> Action:
    """An Action from its text.

    >>> parse_action("2F0")
    Action(stage=2, kind='F', micro_batch=0)
    """
    match = _ACTION.fullmatch(text.strip())
    if match is None:
        raise ParsimError(
            "cannot read this pipeline action",
            got=text,
            expected="{stage}{F|B|I|W}{micro_batch}, such as 2F0",
        )
    return Action(int(match[1]), match[2], int(match[3]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One list of Actions for each pipeline rank."""

    name: str
    ranks: tuple[tuple[Action, ...], ...]

    @property
    def pp(self) -> int:
        return len(self.ranks)

    @property
    def num_stages(self) -> int:
        return 1 + max((a.stage for a in self.actions()), default=-1)

    @property
    def num_micro_batches(self) -> int:
        return 1 + max((a.micro_batch for a in self.actions()), default=-1)

    def actions(self) -> Iterator[Action]:
        for rank in self.ranks:
            yield from rank

    def stage_ranks(self) -> dict[int, int]:
        """The pipeline rank of every stage that has actions."""
        return {a.stage: rank for rank, actions in enumerate(self.ranks) for a in actions}
