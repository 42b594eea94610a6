"""Runs: the sequences of layers that a stage of a pipeline may hold, alike ones counted once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parsim.cost.stage import EMBEDDING, HEAD, MTP, CostModel

Ints = NDArray[np.int64]


class Ends(NamedTuple):
    """Whether a stage begins with the embedding, and ends with the head."""

    first: bool
    last: bool

    @property
    def kinds(self) -> tuple[str, ...]:
        """The parts at its ends."""
        return (EMBEDDING,) * self.first + (HEAD,) * self.last


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs:
    """The sequences of kinds of layers that a stage may hold; G of them, of up to C layers."""

    kinds: tuple[str, ...]
    """Kinds of layers there are, and the multi-token prediction module."""
    runs: tuple[tuple[str, ...], ...]
    index: Ints
    """(L + 1, C + 1): the run of so many layers from one on; −1 where there are not so many."""
    modules: int
    """Multi-token prediction modules behind the last layer."""

    @cached_property
    def numbers(self) -> Ints:
        """(G, C): places in `kinds` of the layers of each run; beyond them one past the end."""
        longest = self.index.shape[1] - 1
        found = np.full((len(self.runs), longest), len(self.kinds))
        for g, run in enumerate(self.runs):
            found[g, : len(run)] = [self.kinds.index(kind) for kind in run]
        return found

    @cached_property
    def lengths(self) -> Ints:
        """(G,)"""
        return np.array([len(run) for run in self.runs])

    def parts(self, ends: Ends) -> tuple[Ints, Ints]:
        """(G, R): places in `kinds` of what such a stage may recompute; (G,) how many there are."""
        if not (ends.last and self.modules):
            return self.numbers, self.lengths
        past = np.full((len(self.runs), self.modules), len(self.kinds))
        numbers = np.concatenate([self.numbers, past], axis=1)
        rows = np.arange(len(self.runs))
        for k in range(self.modules):
            numbers[rows, self.lengths + k] = self.kinds.index(MTP)
        return numbers, self.lengths + self.modules

    def stage_kinds(self, g: int, ends: Ends) -> tuple[str, ...]:
        """The parts of a stage."""
        begin = (EMBEDDING,) if ends.first else ()
        return begin + self.runs[g] + ((*(MTP,) * self.modules, HEAD) if ends.last else ())


def runs_of(costs: CostModel, longest: int) -> Runs:
    """The runs of up to so many layers of a model."""
    layers = costs.model.layers
    (whole,) = costs.kinds((layers,))
    order = whole[1 : 1 + layers]
    found: dict[tuple[str, ...], int] = {}
    index = np.full((layers + 1, longest + 1), -1)
    for first in range(layers + 1):
        for count in range(min(longest, layers - first) + 1):
            index[first, count] = found.setdefault(order[first : first + count], len(found))
    kinds = (*dict.fromkeys(order), *(MTP,) * bool(costs.model.mtp_layers))
    return Runs(kinds=kinds, runs=tuple(found), index=index, modules=costs.model.mtp_layers)
