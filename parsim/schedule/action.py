"""Action and Schedule: what each pipeline rank does, in order.

The grammar is that of torch.distributed.pipelining: `{stage}{kind}{micro_batch}`, such as `2F0`.
Standard library only: the executor's workers import it where nothing but torch is installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from parsim.errors import ParsimError

FORWARD = "F"
BACKWARD = "B"
"""The whole backward of a stage: gradients of its input and of its weights."""
INPUT_GRAD = "I"
WEIGHT_GRAD = "W"
KINDS = (FORWARD, BACKWARD, INPUT_GRAD, WEIGHT_GRAD)
"""What computes."""

SEND_FORWARD, RECEIVE_FORWARD = "SEND_F", "RECV_F"
SEND_BACKWARD, RECEIVE_BACKWARD = "SEND_B", "RECV_B"
TRANSFER_KINDS = (SEND_FORWARD, RECEIVE_FORWARD, SEND_BACKWARD, RECEIVE_BACKWARD)
"""One end of a transfer between stages: `1RECV_F0` brings what `1F0` needs, `1SEND_B0` takes away what
`1B0` or `1I0` made."""

UNSHARD, RESHARD, REDUCE_GRAD = "UNSHARD", "RESHARD", "REDUCE_GRAD"
"""Of a stage as a whole: gather its parameters, let them go, reduce its gradients."""

OVERLAP = "OVERLAP_F_B"
"""A forward and a backward of two micro-batches at once: `(0F1;3B0)OVERLAP_F_B`."""

_ACTION = re.compile(
    r"(\d{1,9})(?:(F|B|I|W|SEND_F|RECV_F|SEND_B|RECV_B)(\d{1,9})|(UNSHARD|RESHARD|REDUCE_GRAD))"
)
_PAIR = re.compile(rf"\(([^();]+);([^();]+)\){OVERLAP}")


class Action(NamedTuple):
    """One step of one pipeline rank."""

    stage: int
    kind: str
    micro_batch: int = -1
    """-1 where the kind is of a stage as a whole."""
    parts: tuple[Action, ...] = ()
    """The forward and the backward of an overlapped pair, whose own stage is -1; else nothing."""

    def __str__(self) -> str:
        if self.parts:
            return f"({';'.join(map(str, self.parts))}){self.kind}"
        return f"{self.stage}{self.kind}" + (str(self.micro_batch) if self.micro_batch >= 0 else "")


def overlapped(one: Action, other: Action) -> Action:
    """A forward and a backward (in either order) as one action.

    >>> str(overlapped(Action(0, "F", 1), Action(3, "B", 0)))
    '(0F1;3B0)OVERLAP_F_B'
    """
    return Action(-1, OVERLAP, -1, (one, other))


def computations(actions: Iterable[Action]) -> Iterator[Action]:
    """The forwards and backwards among a rank's actions, those of overlapped pairs too, in order.

    >>> [str(a) for a in computations(map(parse_action, ["0SEND_F0", "(0F1;3B0)OVERLAP_F_B", "3W0"]))]
    ['0F1', '3B0', '3W0']
    """
    for action in actions:
        if action.kind in KINDS:
            yield action
        else:
            yield from action.parts


def parse_action(text: str) -> Action:
    """An Action from its text.

    Raises ParsimError for a text that torch.distributed.pipelining does not write either.

    >>> parse_action("2F0")[:3], parse_action("1UNSHARD")[:2]
    ((2, 'F', 0), (1, 'UNSHARD'))
    """
    stripped = text.strip()
    pair = _PAIR.fullmatch(stripped)
    if pair is not None:
        parts = parse_action(pair[1]), parse_action(pair[2])
        if sorted(part.kind for part in parts) in ([BACKWARD, FORWARD], [FORWARD, INPUT_GRAD]):
            return overlapped(*parts)
    match = _ACTION.fullmatch(stripped)
    if match is None:
        raise ParsimError(
            "cannot read this pipeline action",
            got=text,
            expected="{stage}{kind}{micro_batch}, such as 2F0: kind F, B, I, W, SEND_F, RECV_F, SEND_B "
            "or RECV_B; {stage}UNSHARD, RESHARD or REDUCE_GRAD; or (0F1;3B0)OVERLAP_F_B",
        )
    if match[4]:
        return Action(int(match[1]), match[4])
    return Action(int(match[1]), match[2], int(match[3]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One list of Actions for each pipeline rank.

    Stages form chains: a micro-batch runs through all stages of one chain. Where there are several
    (DualPipe), each is the whole model once and takes an equal share of the micro-batches, in order:
    stages 0 to n − 1 and micro-batches 0 to m/2 − 1 are the first of two chains.
    """

    name: str
    ranks: tuple[tuple[Action, ...], ...]
    chains: int = 1
    update_every: int = 0
    """Micro-batches between two updates of a stage's weights, without a flush (PipeDream); 0: one update
    after all of them."""
    steps: int = 1
    """Steps back to back, of equal numbers of micro-batches."""
    steps_after: int = 0
    """Of these, steps at the end in which the pipeline begins to run empty."""
    num_stages: int = field(init=False)
    """Of all chains together."""
    num_micro_batches: int = field(init=False)
    """Of all chains together."""

    def __post_init__(self) -> None:
        stages = 1 + max((action.stage for action in self.actions()), default=-1)
        micro_batches = 1 + max((action.micro_batch for action in self.actions()), default=-1)
        object.__setattr__(self, "num_stages", stages)
        object.__setattr__(self, "num_micro_batches", micro_batches)

    @property
    def pp(self) -> int:
        return len(self.ranks)

    def actions(self) -> Iterator[Action]:
        """The forwards and backwards of all ranks, those of overlapped pairs one by one."""
        for rank in self.ranks:
            yield from computations(rank)

    def stage_ranks(self) -> dict[int, int]:
        """The pipeline rank of every stage that has actions."""
        return {a.stage: rank for rank, actions in enumerate(self.ranks) for a in computations(actions)}

    def next_stage(self, stage: int) -> int | None:
        """The stage that takes this one's output; None after the last of a chain."""
        return None if (stage + 1) % (self.num_stages // self.chains) == 0 else stage + 1

    def previous_stage(self, stage: int) -> int | None:
        """The stage whose output this one takes; None for the first of a chain."""
        return None if stage % (self.num_stages // self.chains) == 0 else stage - 1

    def micro_batches(self, stage: int) -> range:
        """The micro-batches that run through a stage."""
        chain = stage // max(1, self.num_stages // self.chains)
        each = self.num_micro_batches // self.chains
        return range(chain * each, (chain + 1) * each)

    def is_explicit(self) -> bool:
        """Whether the transfers between stages are actions too."""
        return any(action.kind in TRANSFER_KINDS for rank in self.ranks for action in rank)
