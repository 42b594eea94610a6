"""What a parameter server allows its workers, and in which order things happened. Standard library only.

A worker at clock c (it has pushed c times) may pull once every other has pushed c − bound times: bound 0
is synchronous, infinite asynchronous, what lies between stale synchronous (Ho et al. 2013, "More
Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", NIPS 2013, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

PULL, PUSH = 0, 1
"""Kinds of requests."""


class Event(NamedTuple):
    """A pull that was answered, or a push that was applied."""

    kind: int
    worker: int
    version: int
    """Of a pull: updates that the parameters had had. Of a push: those since its worker's pull."""


@dataclass(slots=True)
class Ledger:
    """The clocks of all workers at one server."""

    workers: int
    bound: float
    version: int = 0
    """Updates so far."""
    max_lead: int = 0
    """Clocks that a worker was ahead of the slowest at most, right after a push."""
    events: list[Event] = field(default_factory=list)
    """In the order in which they happened."""
    _clocks: list[int] = field(init=False)
    _pulled: dict[int, int] = field(default_factory=dict)
    """Version of the last pull, by worker."""
    _waiting: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._clocks = [0] * self.workers

    @property
    def is_synchronous(self) -> bool:
        """Nobody reads between two steps: all gradients are summed, and one update follows."""
        return self.bound == 0

    def ask(self, worker: int) -> None:
        """A worker asks for the parameters; whether it gets them now, `allowed` says."""
        self._waiting.append(worker)

    def allowed(self) -> list[int]:
        """The workers whose pulls are to be answered now, in the order in which they asked."""
        slowest = min(self._clocks)
        ready = [w for w in self._waiting if self._clocks[w] - self.bound <= slowest]
        self._waiting = [w for w in self._waiting if w not in ready]
        for worker in ready:
            self._pulled[worker] = self.version
            self.events.append(Event(PULL, worker, self.version))
        return ready

    def push(self, worker: int) -> tuple[bool, int]:
        """A gradient has come: whether an update follows now, and how many updates old it was."""
        staleness = self.version - self._pulled[worker]
        self.events.append(Event(PUSH, worker, staleness))
        self._clocks[worker] += 1
        slowest = min(self._clocks)
        self.max_lead = max(self.max_lead, self._clocks[worker] - slowest)
        # Synchronous: the last one of a step brings all clocks to the same value.
        updates = not self.is_synchronous or max(self._clocks) == slowest
        self.version += updates
        return updates, staleness
