"""Weights of a stage by tensor, and how their gradients are grouped into reductions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from parsim.cost.cell import Cell
from parsim.cost.operation import Gemm, Operation
from parsim.model import ModelSpec
from parsim.plan import Aggregation


class Matrix(NamedTuple):
    """A weight matrix of one tensor-parallel rank, `copies` times."""

    rows: int
    columns: int
    copies: float = 1.0

    @property
    def values(self) -> float:
        """Numbers in all of them."""
        return self.rows * self.columns * self.copies


class Tensors(NamedTuple):
    """Weights that the same ranks sum the gradients of."""

    matrices: tuple[Matrix, ...] = ()
    num_vectors: int = 0
    """Norms and biases: tensors that share what parameters the matrices leave."""


class StageWeights(NamedTuple):
    """The tensors of one stage on one rank."""

    dense: Tensors = Tensors()
    experts: Tensors = Tensors()


NO_WEIGHTS = StageWeights()


class Partial(NamedTuple):
    """Weights of whose gradients every tensor-parallel rank has a part, to be summed over tp."""

    tensors: int
    parameters: int


NOT_PARTIAL = Partial(0, 0)


def layer_partial(model: ModelSpec, cell: Cell) -> Partial:
    """Norms of a layer: under sequence parallelism a rank sees 1/tp of the tokens (Korthikanti et al.
    2022, section 4.2.2), and of norms on heads it always has some of the heads.
    """
    tensors, parameters = norm_partial(model, cell)
    inner = 2 if model.qk_norm and cell.tp > 1 else 0
    norms = model.norms_per_layer
    return Partial(norms * tensors + inner, norms * parameters + inner * model.head_dim)


def norm_partial(model: ModelSpec, cell: Cell) -> Partial:
    """Of one norm outside the heads."""
    if cell.tp == 1 or not cell.sequence_parallel:
        return NOT_PARTIAL
    tensors = 2 if model.norm == "layernorm" and model.norm_bias else 1
    return Partial(tensors, tensors * model.hidden)


class Gradients(NamedTuple):
    """Gradients that are reduced together."""

    values: float
    matrices: tuple[Matrix, ...] = ()
    """Those among the values that have two dimensions."""


class Message(NamedTuple):
    """One reduction, which takes place so many `times`."""

    gradients: Gradients
    times: float


def messages(
    parameters: float, tensors: Tensors, buckets: int, aggregation: Aggregation
) -> Iterator[Message]:
    """The reductions of so many parameters: of equal buckets (or layers), or of every tensor alone."""
    if aggregation != "tensor":
        shares = tuple(m._replace(copies=m.copies / buckets) for m in tensors.matrices)
        yield Message(Gradients(parameters / buckets, shares), buckets)
        return
    rest = parameters - sum(matrix.values for matrix in tensors.matrices)
    for matrix in tensors.matrices:
        one = matrix._replace(copies=1.0)
        yield Message(Gradients(one.values, (one,)), matrix.copies)
    if rest > 0:
        num_vectors = max(1, tensors.num_vectors)
        yield Message(Gradients(rest / num_vectors), num_vectors)


def layer_weights(model: ModelSpec, operations: Iterable[Operation], *, merged: bool) -> StageWeights:
    """The tensors of one layer, read off its matrix products.

    `merged`: q, k and v (and the two that enter a gated feed-forward) are one tensor each.
    """
    dense: list[Matrix] = []
    experts: list[Matrix] = []
    for op in operations:
        if isinstance(op, Gemm):
            widths = op.columns if op.columns and not merged else (op.n,)
            (experts if op.expert else dense).extend(Matrix(n, op.k, float(op.batch)) for n in widths)
    norms = model.norms_per_layer * (2 if model.norm == "layernorm" and model.norm_bias else 1)
    num_vectors = norms + (2 if model.qk_norm else 0)
    if model.linear_bias:
        num_vectors += len(dense)
    elif model.qkv_bias:
        num_vectors += 1 if merged else 3
    biases = model.moe is not None and model.moe.expert_bias
    return StageWeights(
        Tensors(tuple(dense), num_vectors),
        Tensors(tuple(experts), int(sum(m.copies for m in experts)) if biases else 0),
    )


def table_weights(rows: int, hidden: int, tp: int) -> Tensors:
    """An embedding, or an output matrix, cut by its rows."""
    return Tensors((Matrix(math.ceil(rows / tp), hidden),))


def together(parts: Iterable[StageWeights]) -> StageWeights:
    """All tensors of some parts, those of one shape as one entry."""
    parts = list(parts)
    return StageWeights(
        _joined([part.dense for part in parts]), _joined([part.experts for part in parts])
    )


def _joined(parts: list[Tensors]) -> Tensors:
    counts: dict[tuple[int, int], float] = {}
    for part in parts:
        for rows, columns, copies in part.matrices:
            counts[rows, columns] = counts.get((rows, columns), 0.0) + copies
    matrices = tuple(Matrix(*shape, copies) for shape, copies in counts.items())
    return Tensors(matrices, sum(part.num_vectors for part in parts))
