"""Layout: which parts of the model lie on which stage and pipeline rank.

It depends on schedule, pp, vpp, stage split and counts of recomputed layers alone, so that one layout
serves thousands of plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parsim.cost.stage import EMBEDDING, HEAD, CostModel
from parsim.plan import ParallelPlan, stage_layers
from parsim.schedule.in_flight import full_moments
from parsim.search.fullest import FULLER_LATER

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

ENDS = EMBEDDING, HEAD


class Holding(NamedTuple):
    """What the fullest of some pipeline ranks with the same stages holds."""

    rank: int
    stages: tuple[int, ...]
    """Kinds of its chunks' stages, first chunk first."""


class FullestMoment(NamedTuple):
    """What a rank keeps at once, and what recomputing layers frees then."""

    kept: Floats
    """(K,): how often the activations of each kind of part are kept."""
    freed: Floats
    """(C + 1,): layers times micro-batches that are freed where the layers of no chunk are recomputed,
    of the chunk with most micro-batches, of two …"""
    layers: Floats
    """(C + 1,): how many layers that are."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Kinds of stages, and where they lie. D kinds of stages, K kinds of parts, n stages."""

    plan: ParallelPlan
    """One of its plans."""
    parts: tuple[str, ...]
    """Kinds of parts of the model."""
    stages: tuple[tuple[str, ...], ...]
    """Kinds of stages: the parts of each in order."""
    kind: Ints
    """(n,): the kind of every stage."""
    counts: Floats
    """(D, K): parts of each kind in a kind of stage."""
    own: Ints
    """(pp, n / pp): the stages of every rank in order."""
    holdings: tuple[Holding, ...]
    """One for each way to hold stages; where later ranks may be fuller, one a rank."""
    _moments: dict[int, Floats] = field(default_factory=dict)
    _fullest: dict[int, tuple[FullestMoment, ...]] = field(default_factory=dict)

    @cached_property
    def has(self) -> Bools:
        """(D, K): whether a kind of stage has parts of a kind."""
        return self.counts > 0

    @cached_property
    def layer_parts(self) -> tuple[int, ...]:
        """The kinds of parts that are layers."""
        return tuple(k for k, part in enumerate(self.parts) if part not in ENDS)

    @cached_property
    def layers(self) -> Floats:
        """(D,): layers in a kind of stage."""
        return np.asarray(self.counts[:, list(self.layer_parts)].sum(axis=1))

    def moments(self, num_micro_batches: int) -> Floats:
        """(H, T, D): micro-batches that each holding keeps of each kind of stage, at each of the T
        moments that may be its fullest.
        """
        if num_micro_batches not in self._moments:
            self._moments[num_micro_batches] = self._full_moments(num_micro_batches)
        return self._moments[num_micro_batches]

    def fullest_moments(self, num_micro_batches: int) -> tuple[FullestMoment, ...]:
        """Of each holding the moment at which it keeps most layers."""
        if num_micro_batches not in self._fullest:
            self._fullest[num_micro_batches] = tuple(
                self._fullest_moment(holding, num_micro_batches) for holding in self.holdings
            )
        return self._fullest[num_micro_batches]

    def _fullest_moment(self, holding: Holding, m: int) -> FullestMoment:
        plan, of = self.plan, list(holding.stages)
        moments = np.array(full_moments(plan.schedule, plan.pp, plan.vpp, holding.rank, m), float)
        layers = self.layers[of]
        moment = moments[(moments @ layers).argmax()]
        kept = moment @ self.counts[of]
        order = np.argsort(-moment, kind="stable")
        freed = np.cumsum([0.0, *(moment * layers)[order]])
        return FullestMoment(kept, freed, np.cumsum([0.0, *layers[order]]))

    def _full_moments(self, m: int) -> Floats:
        plan, rows = self.plan, []
        for holding in self.holdings:
            kept = full_moments(plan.schedule, plan.pp, plan.vpp, holding.rank, m)
            of_kind = np.zeros((len(holding.stages), len(self.stages)))
            of_kind[range(len(holding.stages)), holding.stages] = 1.0
            rows.append(_undominated(np.unique(np.array(kept) @ of_kind, axis=0)))
        found = np.zeros((len(rows), max(map(len, rows)), len(self.stages)))
        for h, row in enumerate(rows):
            found[h, : len(row)] = row
        return found


def _undominated(rows: Floats) -> Floats:
    """Rows that no other row exceeds in every column; all rows differ."""
    if len(rows) == 1:
        return rows
    covered = (rows[None] >= rows[:, None]).all(axis=2)  # (i, j): row j covers row i
    found: Floats = rows[covered.sum(axis=1) == 1]
    return found


def separate_layout(plan: ParallelPlan) -> Layout:
    """Every stage of a kind of its own, for plans that differ in what lies on each."""
    return Layout(
        plan=plan,
        parts=(),
        stages=((),) * plan.num_stages,
        kind=np.arange(plan.num_stages),
        counts=np.zeros((plan.num_stages, 0)),
        own=np.array(plan.rank_stages()),
        holdings=(),
    )


def layout_of(plan: ParallelPlan, costs: CostModel) -> Layout:
    """The layout of a plan."""
    split = stage_layers(costs.model, plan)
    kinds = tuple(costs.kinds(split, plan.recompute_layers)) * plan.chains
    stages = tuple(dict.fromkeys(kinds))
    parts = tuple(dict.fromkeys(part for stage in stages for part in stage))
    kind = [stages.index(stage) for stage in kinds]
    own = plan.rank_stages()
    return Layout(
        plan=plan,
        parts=parts,
        stages=stages,
        kind=np.array(kind),
        counts=np.array([[stage.count(part) for part in parts] for stage in stages], float),
        own=np.array(own),
        holdings=_holdings(plan, [tuple(kind[s] for s in mine) for mine in own]),
    )


def _holdings(plan: ParallelPlan, held: Sequence[tuple[int, ...]]) -> tuple[Holding, ...]:
    """Of ranks with the same stages only the first is looked at, where no later one keeps more."""
    found: dict[tuple[int, tuple[int, ...]], Holding] = {}
    for rank, stages in enumerate(held):
        key = rank if plan.schedule in FULLER_LATER else 0, stages
        found.setdefault(key, Holding(rank, stages))
    return tuple(found.values())


def stage_sums(layout: Layout, parts: Floats) -> Floats:
    """(D, …): sums over the parts of each kind of stage, of figures (K, …) of each kind of part."""
    sums: Floats = np.tensordot(layout.counts, parts, axes=1)
    return sums
