"""Cell: the few facts of a plan that the cost of a layer depends on."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from parsim.hardware import DTYPE_BYTES
from parsim.mesh import Axis, mesh_axes, part_of
from parsim.plan import USUAL_PLACEMENT, Job, ParallelPlan


class Cell(NamedTuple):
    """All that the cost of a layer depends on beside model, cluster and stack.

    Every plan combines a few hundred such cells.
    """

    seq_len: int
    micro_batch: int
    tp: int
    cp: int
    ep: int
    sequence_parallel: bool
    recompute: str
    precision: str
    tp_overlap: bool
    expert_tp: int = 1
    gpus: int = 1
    """Devices of the whole plan: a synchronous step goes at the pace of the slowest."""
    groups: tuple[tuple[Axis, ...], ...] = ()
    """Axes of the groups of tp, cp and ep, where they are not placed one after the other from rank 0."""

    @property
    def tokens(self) -> int:
        """T: tokens of a micro-batch on one context-parallel rank."""
        return self.micro_batch * self.seq_len // self.cp

    @property
    def local_tokens(self) -> int:
        """Tokens that norms and residuals of one tensor-parallel rank work on."""
        return self.tokens // self.tp if self.sequence_parallel else self.tokens

    @property
    def activation_bytes(self) -> int:
        """e: bytes of one activation; tf32 and what is narrower than 16 bits are for GEMMs alone."""
        return int(max(2, DTYPE_BYTES[self.precision]))

    @property
    def activation_dtype(self) -> str:
        """dtype of everything outside the narrow GEMMs."""
        return "bf16" if self.low_precision else self.precision

    @property
    def low_precision(self) -> bool:
        """Whether GEMMs read operands narrower than the activations."""
        return DTYPE_BYTES[self.precision] < self.activation_bytes


def cell_of(job: Job, plan: ParallelPlan) -> Cell:
    """The cell that a plan's layers lie in."""
    return Cell(
        seq_len=job.seq_len,
        micro_batch=plan.micro_batch,
        tp=plan.tp,
        cp=plan.cp,
        ep=plan.ep,
        sequence_parallel=plan.sequence_parallel and plan.tp > 1,
        recompute=plan.recompute,
        precision=job.precision,
        tp_overlap=plan.tp_overlap,
        expert_tp=plan.expert_tp,
        gpus=plan.gpus,
        groups=_groups(plan),
    )


def _groups(plan: ParallelPlan) -> tuple[tuple[Axis, ...], ...]:
    """Nothing where another placement leaves them as the usual one has them."""
    if plan.placement == USUAL_PLACEMENT:
        return ()
    groups, usual = _axes(plan), _axes(replace(plan, placement=USUAL_PLACEMENT))
    return () if groups == usual else groups


def _axes(plan: ParallelPlan) -> tuple[tuple[Axis, ...], ...]:
    replicas = mesh_axes(plan, "tp", "cp", "dp")
    experts = part_of(replicas, size=plan.ep, skip=plan.expert_tp)
    return mesh_axes(plan, "tp"), mesh_axes(plan, "cp"), experts
