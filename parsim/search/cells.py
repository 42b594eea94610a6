"""Priced cells as arrays: what the parts of the model cost under each choice of a family's plans."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from parsim.cost.cell import Cell, cell_of
from parsim.cost.memory import boundary_bytes, working_bytes
from parsim.cost.price import PassTime
from parsim.cost.stage import CostModel, PartCost, StageCost
from parsim.cost.step import send_between
from parsim.mesh import mesh_axes
from parsim.plan import Job
from parsim.search.layout import Bools, Floats
from parsim.search.space import Family


class PartFigures(NamedTuple):
    """A part of the model for one micro-batch on one rank; arrays of the same shape."""

    forward_s: Floats
    hand_back_s: Floats
    """Recomputation and the gradient of its input."""
    weight_grad_s: Floats
    forward_exchange_s: Floats
    """Of that: tensor- and expert-parallel communication."""
    hand_back_exchange_s: Floats
    weight_grad_exchange_s: Floats
    saved_bytes: Floats
    recomputed_bytes: Floats
    kept_bytes: Floats
    """Saved more where it is not recomputed after all; as are the seconds below, 0 unless that is left
    to be chosen. Passes are without them then, and bytes those of a part that is recomputed."""
    recompute_s: Floats
    recompute_exchange_s: Floats


class CellFigures(NamedTuple):
    """What a micro-batch costs whatever the stage; arrays of the same shape."""

    working_bytes: Floats
    boundary_bytes: Floats
    send_local_s: Floats
    """Transfer to a pipeline rank in the same scale-up domain."""
    send_far_s: Floats


class Priced(NamedTuple):
    """The cells of a family: M sizes of micro-batches, C other choices; NaN where no plan is legal."""

    parts: PartFigures
    """(K, M, C) each, of K kinds of parts."""
    cells: CellFigures
    """(M, C) each."""


_Key = tuple[Cell, tuple[str, ...], tuple[object, ...]]


@dataclass(slots=True)
class CellTable:
    """Cells of one job, each priced once, by the functions that price them for the replay."""

    job: Job
    costs: CostModel
    _rows: dict[tuple[_Key, int, bool], tuple[Floats, Floats]] = field(default_factory=dict)

    def priced(self, family: Family, parts: tuple[str, ...], legal: Bools) -> Priced:
        """The cells of a family whose parts are of these kinds; `legal`, (M, C), says which are asked
        for.
        """
        common = cell_of(self.job, family.base)
        key = common, parts, (family.tp_overlap, family.recompute)
        part_rows, cell_rows = [], []
        by_choice = legal.reshape(len(family.micro_batch), len(family.sequence_parallel), -1)
        asked: Bools = np.asarray(by_choice.any(axis=2))
        for i, size in enumerate(family.micro_batch):
            for s, parallel in enumerate(family.sequence_parallel):
                if not asked[i, s]:
                    row = _nothing(len(parts), len(family.tp_overlap) * len(family.recompute))
                else:
                    if (key, size, parallel) not in self._rows:
                        self._rows[key, size, parallel] = self._row(family, parts, size, parallel)
                    row = self._rows[key, size, parallel]
                part_rows.append(row[0])
                cell_rows.append(row[1])
        sizes = len(family.micro_batch)
        by_part = np.array(part_rows)  # (M·S, O·R, K, figures)
        by_cell = np.array(cell_rows).reshape(sizes, -1, len(CellFigures._fields))
        by_part = by_part.reshape(sizes, -1, len(parts), len(PartFigures._fields))
        return Priced(
            PartFigures(*np.ascontiguousarray(by_part.transpose(3, 2, 0, 1))),
            CellFigures(*np.ascontiguousarray(by_cell.transpose(2, 0, 1))),
        )

    def _row(
        self, family: Family, parts: tuple[str, ...], size: int, parallel: bool
    ) -> tuple[Floats, Floats]:
        """Figures of one micro-batch size, by tp_overlap and recompute."""
        part_rows, cell_rows = [], []
        tp_axes = mesh_axes(family.base, "tp")
        for overlap in family.tp_overlap:
            for recompute in family.recompute:
                cell = cell_of(self.job, family.base)._replace(
                    micro_batch=size,
                    sequence_parallel=parallel,
                    tp_overlap=overlap,
                    recompute="full" if recompute == "partial" else recompute,
                )
                model = self.job.model
                kept = cell._replace(recompute="none") if recompute == "partial" else cell
                part_rows.append(
                    [figures_of(self.costs.part(cell, p), self.costs.part(kept, p)) for p in parts]
                )
                cell_rows.append(
                    (
                        working_bytes(model, cell),
                        boundary_bytes(model, cell),
                        send_between(cell, tp_axes, self.costs, local=True)[0],
                        send_between(cell, tp_axes, self.costs, local=False)[0],
                    )
                )
        return np.array(part_rows), np.array(cell_rows)


def _nothing(parts: int, choices: int) -> tuple[Floats, Floats]:
    return (
        np.full((choices, parts, len(PartFigures._fields)), np.nan),
        np.full((choices, len(CellFigures._fields)), np.nan),
    )


def figures_of(part: PartCost | StageCost, kept: PartCost | StageCost) -> tuple[float, ...]:
    """Passes of a part that is kept, bytes of one that is recomputed, and what is between them."""
    hand_back = _hand_back(kept)
    passes = kept.time.forward, hand_back, kept.time.weight_grad
    return (
        *(p.total_s for p in passes),
        *(_exchange_s(p) for p in passes),
        part.saved_bytes,
        part.recomputed_bytes,
        kept.saved_bytes - part.saved_bytes,
        _hand_back(part).total_s - hand_back.total_s,
        _exchange_s(_hand_back(part)) - _exchange_s(hand_back),
    )


def _hand_back(part: PartCost | StageCost) -> PassTime:
    return part.time.recompute.plus(part.time.input_grad)


def _exchange_s(time: PassTime) -> float:
    return time.tp_s + time.ep_s
