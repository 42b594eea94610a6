"""What a stage costs: contiguous layers of one pipeline chunk on one tensor-parallel rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from parsim.cost.cell import Cell
from parsim.cost.host import HostTime, ends_host, layer_host, split_host_s
from parsim.cost.layer import (
    embedding_operations,
    head_operations,
    layer_operations,
    mtp_operations,
)
from parsim.cost.operation import Elementwise, Gemm, Operation, Transfer
from parsim.cost.price import NO_TIME, PartPasses, PartTime, PassTime, part_passes
from parsim.cost.recompute import recomputed, saved_bytes
from parsim.cost.weights import (
    NOT_PARTIAL,
    Partial,
    StageWeights,
    Tensors,
    layer_partial,
    layer_weights,
    norm_partial,
    table_weights,
    together,
)
from parsim.hardware import Cluster
from parsim.model import (
    ModelSpec,
    embedding_parameters,
    expert_parameters,
    head_parameters,
    layer_parameters,
    mtp_parameters,
    replicated_embedding_parameters,
    replicated_head_parameters,
    replicated_layer_parameters,
)
from parsim.stack import Stack

EMBEDDING, MTP, HEAD = "embedding", "multi-token prediction", "head"
_KEPT = ", kept"


def kept(kind: str) -> str:
    """The kind of a part that keeps its activations where the plan has others of it recomputed.

    >>> kept("dense layer")
    'dense layer, kept'
    """
    return kind + _KEPT


def bare(kind: str) -> str:
    """What a kind of part is, recomputed or kept.

    >>> bare(kept("dense layer")), bare("head")
    ('dense layer', 'head')
    """
    return kind.removesuffix(_KEPT)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCost:
    """One part of the model (a layer, the embedding, the head) for one micro-batch on one rank."""

    is_layer: bool
    time: PartTime
    saved_bytes: float
    """Activations kept from the forward to the backward."""
    recomputed_bytes: float
    """Activations that live only while the backward recomputes and uses this part."""
    dense_parameters: int
    expert_parameters: int
    partial: Partial = NOT_PARTIAL


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """One stage for one micro-batch on one rank."""

    time: PartTime
    num_layers: int
    saved_bytes: float
    recomputed_bytes: float
    dense_parameters: int
    """Parameters outside the routed experts; their gradients are summed over dp·cp."""
    expert_parameters: int
    """Parameters of this rank's routed experts; their gradients are summed over dp·cp·tp/ep."""
    largest_part_parameters: int
    """Of a layer, the embedding or the head: what FSDP gathers at once."""
    distinct_parameters: int
    """Of one layer of each kind, and the head, without routed experts: all shapes of weights that a
    matrix product has a gradient of."""
    partial: Partial = NOT_PARTIAL

    @property
    def parameters(self) -> int:
        return self.dense_parameters + self.expert_parameters


@dataclass(slots=True)
class CostModel:
    """Costs of one model on one cluster under one stack; each distinct cell is priced once."""

    model: ModelSpec
    cluster: Cluster
    stack: Stack
    _parts: dict[tuple[Cell, str], PartCost] = field(default_factory=dict)
    _stages: dict[tuple[Cell, tuple[str, ...]], StageCost] = field(default_factory=dict)

    def _kind(self, layer: int) -> str:
        """What layers that cost the same have in common."""
        moe, window = self.model.is_moe_layer(layer), self.model.is_window_layer(layer)
        return f"{'moe' if moe else 'dense'} layer{' with window' if window else ''}"

    def part(self, cell: Cell, kind: str) -> PartCost:
        """A part of the model: one of those in `kinds`, or what `kept` makes of one."""
        cell, kind = _as_priced(cell, kind)
        if (cell, kind) not in self._parts:
            if kind == EMBEDDING:
                replicated = replicated_embedding_parameters(self.model)
                parameters = _on_rank(embedding_parameters(self.model), replicated, cell.tp)
                part = self._end_part(cell, kind, parameters)
            elif kind == HEAD:
                replicated = replicated_head_parameters(self.model)
                parameters = _on_rank(head_parameters(self.model), replicated, cell.tp)
                part = self._end_part(cell, kind, parameters)
            elif kind == MTP:
                part = self._layer(cell, kind, mtp_parameters(self.model))
            else:
                parameters = layer_parameters(self.model, self._layer_of(kind))
                part = self._layer(cell, kind, parameters)
            self._parts[cell, kind] = part
        return self._parts[cell, kind]

    def layer(self, cell: Cell, layer: int) -> PartCost:
        """Layer `layer` (from 0)."""
        return self.part(cell, self._kind(layer))

    def _layer_of(self, kind: str) -> int:
        """The first layer of a kind; of a multi-token prediction module the last, which it is like."""
        last = self.model.layers - 1
        return last if kind == MTP else next(i for i in range(last + 1) if self._kind(i) == kind)

    def operations(self, cell: Cell, kind: str) -> tuple[Cell, tuple[Operation, ...]]:
        """What a part of the model (one of those in `kinds`) does, and the cell that it is priced in."""
        cell, kind = _as_priced(cell, kind)
        return cell, self._operations(cell, kind)

    def _operations(self, cell: Cell, kind: str) -> tuple[Operation, ...]:
        if kind == EMBEDDING:
            return embedding_operations(self.model, cell, self.stack)
        if kind == HEAD:
            return head_operations(self.model, cell, self.stack)
        if kind == MTP:
            return mtp_operations(self.model, cell, self.stack)
        return layer_operations(self.model, self._layer_of(kind), cell, self.stack)

    def passes(self, cell: Cell, kind: str) -> PartPasses:
        """What a part of the model (one of those in `kinds`) does in each pass."""
        cell, kind = _as_priced(cell, kind)
        operations = self._operations(cell, kind)
        if kind not in (EMBEDDING, HEAD):
            moe = self.model.moe if self.model.is_moe_layer(self._layer_of(kind)) else None
            experts = None if moe is None else moe.experts // cell.ep + (moe.shared_ffn_hidden > 0)
            host = layer_host(cell, self.cluster, self.stack, experts=experts)
            return part_passes(operations, cell, self.cluster, self.stack, host=host)
        if self.stack.layer_lead_s:  # timed alone on one device: only layers get their transfers back
            operations = tuple(op for op in operations if not isinstance(op, Transfer))
        host = HostTime(lead_s=self.stack.layer_lead_s)
        if kind == HEAD:  # measured together with the embedding
            host = ends_host(cell, self.cluster, self.stack)
        once = cell._replace(recompute="none")
        return part_passes(operations, once, self.cluster, self.stack, host=host)

    def _layer(self, cell: Cell, kind: str, parameters: int) -> PartCost:
        layer, operations = self._layer_of(kind), self._operations(cell, kind)
        again = recomputed(cell, self.stack)
        kept = saved_bytes(operations, again, cell, compiled=self.stack.fused_elementwise)
        recomputed_bytes = saved_bytes(operations, "nothing", cell) - kept
        if again in ("everything", "every_other_gemm"):
            kept += cell.local_tokens * self.model.hidden * cell.activation_bytes
        experts = 0
        if self.model.moe is not None and self.model.is_moe_layer(layer):
            experts = self.model.moe.experts * expert_parameters(self.model)
        dense = parameters - experts
        time = self.passes(cell, kind).time
        if self.stack.recomputes_for_each_weight and again == "everything":
            time = time._replace(apart=time.recompute.times(_weight_groups(operations)))
        return PartCost(
            is_layer=True,
            time=time,
            saved_bytes=kept,
            recomputed_bytes=recomputed_bytes,
            dense_parameters=_on_rank(dense, replicated_layer_parameters(self.model, layer), cell.tp),
            expert_parameters=experts // (cell.ep * cell.expert_tp),
            partial=layer_partial(self.model, cell),
        )

    def _end_part(self, cell: Cell, kind: str, parameters: int) -> PartCost:
        """Embedding or head; never recomputed."""
        norms = self.model.embedding_norm if kind == EMBEDDING else self.model.final_norm
        return PartCost(
            is_layer=False,
            time=self.passes(cell, kind).time,
            saved_bytes=saved_bytes(self._operations(cell, kind), "nothing", cell),
            recomputed_bytes=0.0,
            dense_parameters=parameters,
            expert_parameters=0,
            partial=norm_partial(self.model, cell) if norms else NOT_PARTIAL,
        )

    def stages(
        self, cell: Cell, split: tuple[int, ...], recompute_layers: tuple[int, ...] = ()
    ) -> tuple[StageCost, ...]:
        """Every stage of a split (layers of each stage in order); embedding first, head last."""
        return tuple(self.stage(cell, kinds) for kinds in self.kinds(split, recompute_layers))

    def kinds(
        self, split: tuple[int, ...], recompute_layers: tuple[int, ...] = ()
    ) -> Iterator[tuple[str, ...]]:
        """The parts of every stage of a split, in order; recompute_layers as in a plan.

        Of the layers (and multi-token prediction modules) of each stage the first so many are recomputed
        as the cell says, and the others are of `kept` kinds; without counts none is.
        """
        first = 0
        for index, num_layers in enumerate(split):
            kinds = [self._kind(layer) for layer in range(first, first + num_layers)]
            first += num_layers
            if index == len(split) - 1:
                kinds += [MTP] * self.model.mtp_layers
            if recompute_layers:
                again = recompute_layers[index]
                kinds[again:] = map(kept, kinds[again:])
            if index == 0:
                kinds.insert(0, EMBEDDING)
            if index == len(split) - 1:
                kinds.append(HEAD)
            yield tuple(kinds)

    def stage_weights(self, cell: Cell, split: tuple[int, ...]) -> tuple[StageWeights, ...]:
        """The tensors of every stage of a split on one rank."""
        return tuple(
            together(self._weights(cell, kind, kinds) for kind in kinds) for kinds in self.kinds(split)
        )

    def _weights(self, cell: Cell, kind: str, kinds: tuple[str, ...]) -> StageWeights:
        """The tensors of a part of a stage; tied ones once, or as a copy on another stage."""
        model = self.model
        if kind == EMBEDDING:
            table = table_weights(model.vocab, model.hidden, cell.tp)
            positions = replicated_embedding_parameters(model)
            return StageWeights(table._replace(num_vectors=1 if positions else 0))
        if kind == HEAD:
            shared = model.tied_embeddings and EMBEDDING in kinds
            table = Tensors() if shared else table_weights(model.vocab, model.hidden, cell.tp)
            return StageWeights(table._replace(num_vectors=int(model.final_norm)))
        operations = self._operations(cell, kind)
        if kind == MTP:  # its head is the model's
            operations = tuple(op for op in operations if op.name != "head")
        return layer_weights(model, operations, merged=self.stack.merged_products)

    def stage(self, cell: Cell, kinds: tuple[str, ...]) -> StageCost:
        """A stage of these parts."""
        key = cell, kinds
        if key not in self._stages:
            parts = [self.part(cell, kind) for kind in kinds]
            # The last stage of a pipeline holds its own copy of tied embeddings.
            tied = self.model.tied_embeddings and HEAD in kinds and EMBEDDING not in kinds
            copy = self.model.vocab * self.model.hidden // cell.tp if tied else 0
            once = dict(zip(map(bare, kinds), parts, strict=True))
            distinct = sum(p.dense_parameters for kind, p in once.items() if kind != EMBEDDING)
            self._stages[key] = _sum(parts, copy, distinct, self.cluster)
        return self._stages[key]


def _as_priced(cell: Cell, kind: str) -> tuple[Cell, str]:
    """A kept part is the same part where nothing is recomputed, as embedding and head always are."""
    if bare(kind) == kind and kind not in (EMBEDDING, HEAD):
        return cell, kind
    return cell._replace(recompute="none"), bare(kind)


def _on_rank(parameters: int, replicated: int, tp: int) -> int:
    """Parameters that one tensor-parallel rank holds."""
    return replicated + math.ceil((parameters - replicated) / tp)


def _weight_groups(operations: tuple[Operation, ...]) -> int:
    """Walks over a layer's graph for the gradients of its weights: a product's each, and a norm's."""
    products = sum(len(op.columns) or 1 for op in operations if isinstance(op, Gemm))
    return products + sum(isinstance(op, Elementwise) and "norm" in op.name for op in operations)


def _sum(parts: list[PartCost], tied_copy: int, distinct: int, cluster: Cluster) -> StageCost:
    time = NO_TIME
    for part in parts:
        time = time.plus(part.time)
    layers = sum(p.is_layer for p in parts)
    host_s = split_host_s(layers, cluster)
    return StageCost(
        time=time._replace(apart=time.apart.plus(PassTime(host_s))),
        num_layers=layers,
        saved_bytes=sum(p.saved_bytes for p in parts),
        recomputed_bytes=max((p.recomputed_bytes for p in parts), default=0.0),
        dense_parameters=sum(p.dense_parameters for p in parts) + tied_copy,
        expert_parameters=sum(p.expert_parameters for p in parts),
        largest_part_parameters=max(
            (p.dense_parameters + p.expert_parameters for p in parts), default=0
        ),
        distinct_parameters=distinct,
        partial=Partial(sum(p.partial.tensors for p in parts), sum(p.partial.parameters for p in parts)),
    )
