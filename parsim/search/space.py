"""The space of plans: everything that N GPUs allow, within what the user fixed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from parsim.errors import ParsimError
from parsim.hardware import Cluster
from parsim.plan import (
    ASYNCHRONOUS_SCHEDULES,
    MAX_GPUS,
    RECOMPUTE_MODES,
    V_SHAPED_SCHEDULES,
    Job,
    ParallelPlan,
    Recompute,
)
from parsim.schedule import SYNCHRONOUS_SCHEDULES
from parsim.schedule.check import divisors
from parsim.search.placements import orders, placed

RecomputeChoice = Recompute | Literal["partial"]
RECOMPUTE_CHOICES: tuple[RecomputeChoice, ...] = (*RECOMPUTE_MODES, "partial")
"""partial: as few layers of each stage in full as memory asks for."""
SplitChoice = Literal["auto", "even"]
SPLIT_CHOICES: tuple[SplitChoice, ...] = ("auto", "even")
"""auto: stages that suit the plan; even: as even as can be (parsim.plan.stage_layers)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """Values that the user allows for a dimension; empty: all that the space holds (of cp: 1)."""

    tp: tuple[int, ...] = ()
    pp: tuple[int, ...] = ()
    dp: tuple[int, ...] = ()
    cp: tuple[int, ...] = ()
    ep: tuple[int, ...] = ()
    vpp: tuple[int, ...] = ()
    micro_batch: tuple[int, ...] = ()
    zero: tuple[int, ...] = ()
    recompute: tuple[RecomputeChoice, ...] = ()
    schedule: tuple[str, ...] = ()
    sequence_parallel: tuple[bool, ...] = ()
    tp_overlap: tuple[bool, ...] = ()
    """Empty: as the stack does."""
    stage_split: tuple[SplitChoice, ...] = ()
    """Empty: auto."""
    placement: tuple[str, ...] = ()
    """Orders of mesh dimensions, or "any" for all; empty: the usual one."""
    max_sizes: dict[str, int] = field(default_factory=dict)
    """The most that is allowed of any of dp, tp, pp, cp, ep, vpp and micro_batch."""

    def allowed(self, key: str, values: Sequence[int]) -> list[int]:
        """Those of a dimension's values that the user allows."""
        wanted, most = getattr(self, key), self.max_sizes.get(key, math.inf)
        return [v for v in values if (not wanted or v in wanted) and v <= most]


def check_constraints(gpus: int, constraints: Constraints) -> None:
    """Raises ParsimError where no plan at all can satisfy what the user fixed."""
    if not 1 <= gpus <= MAX_GPUS:
        raise ParsimError(
            "the number of GPUs is out of range",
            where="--gpus",
            got=gpus,
            expected=f"1 to {MAX_GPUS}",
        )
    for key in ("tp", "pp", "dp", "cp"):
        sizes = getattr(constraints, key)
        if sizes and all(gpus % size for size in sizes):
            raise ParsimError(
                f"{key}={', '.join(map(str, sizes))} does not divide {gpus} GPUs",
                where=f"--{key}",
                expected=f"a divisor of {gpus}",
                hint=f"legal: {', '.join(map(str, divisors(gpus)[:16]))}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Plans that differ only in the choices below: all combinations of them.

    Their order is that of arrays of shape (zero, micro_batch, sequence_parallel, tp_overlap, recompute).
    """

    base: ParallelPlan
    """A plan with every other field."""
    zero: tuple[int, ...]
    micro_batch: tuple[int, ...]
    sequence_parallel: tuple[bool, ...]
    tp_overlap: tuple[bool, ...]
    recompute: tuple[RecomputeChoice, ...]
    even_split: bool = True

    @property
    def free_split(self) -> bool:
        """Whether the stages of a plan are chosen for it: where each rank has one."""
        base = self.base
        return not self.even_split and base.pp > 1 and base.vpp == 1 and not base.stage_split

    @property
    def cells(self) -> tuple[object, ...]:
        """What families have in common whose layers are priced alike."""
        return self.base.tp, self.base.cp, self.base.ep

    @property
    def shape(self) -> tuple[int, int, int]:
        """(zero, micro_batch, all other choices)."""
        others = len(self.sequence_parallel) * len(self.tp_overlap) * len(self.recompute)
        return len(self.zero), len(self.micro_batch), others

    def plan(self, index: int) -> ParallelPlan:
        """The plan at a place in their order: with even stages, and everything recomputed where that is
        left to be chosen.
        """
        values = {}
        for key in ("recompute", "tp_overlap", "sequence_parallel", "micro_batch", "zero"):
            choices = getattr(self, key)
            index, place = divmod(index, len(choices))
            values[key] = choices[place]
        if values["recompute"] == "partial":
            values["recompute"] = "full"
        return replace(self.base, **values)

    def num_micro_batches(self, job: Job, index: int) -> int:
        """Micro-batches in a step of the plan at a place in their order."""
        _, sizes, others = self.shape
        return job.global_batch // (self.base.dp * self.micro_batch[index // others % sizes])

    def is_partial(self, index: int) -> bool:
        """Whether the layers that a plan recomputes are chosen for it."""
        return self.recompute[index % len(self.recompute)] == "partial"

    def plans(self) -> Iterator[ParallelPlan]:
        """All of them, one by one."""
        zero, micro_batch, others = self.shape
        return map(self.plan, range(zero * micro_batch * others))


def families(
    job: Job,
    gpus: int,
    constraints: Constraints,
    *,
    tp_overlap: bool = False,
    cluster: Cluster | None = None,
) -> Iterator[Family]:
    """Every split of `gpus` over dp, tp, pp and cp, with every micro-batch, schedule, vpp, ZeRO stage,
    recompute mode, with and without sequence parallelism.

    Illegal plans are part of the space: the search counts them by reason. Options without effect are
    left out: ZeRO where dp·cp = 1, schedules and chunks where pp = 1, sequence parallelism and
    tp_overlap where tp = 1, micro-batches beyond the batch of a dp rank; placements that differ in no
    group of ranks on the `cluster`, if it is known. tp_overlap is as given where the constraints say
    nothing. Sequences stay whole (cp = 1) unless the constraints allow more.
    """
    allowed = constraints.allowed
    for tp in allowed("tp", divisors(gpus)):
        for pp in allowed("pp", divisors(gpus // tp)):
            cps = divisors(gpus // (tp * pp)) if "cp" in constraints.max_sizes or constraints.cp else [1]
            for cp in allowed("cp", cps):
                for dp in allowed("dp", [gpus // (tp * pp * cp)]):
                    split = ParallelPlan(dp=dp, tp=tp, pp=pp, cp=cp)
                    for meshed in _meshes(job, constraints, split, cluster):
                        yield from _splits(job, constraints, meshed, tp_overlap=tp_overlap)


def _meshes(
    job: Job, constraints: Constraints, split: ParallelPlan, cluster: Cluster | None
) -> Iterator[ParallelPlan]:
    """One (dp, tp, pp, cp) with every ep, in every placement."""
    experts = job.model.moe.experts if job.model.moe else 1
    ranks = split.dp * split.tp * split.cp
    eps = [ep for ep in divisors(experts) if ranks % ep == 0]
    for ep in constraints.allowed("ep", eps):
        yield from placed(replace(split, ep=ep), orders(constraints.placement), cluster)


def _splits(
    job: Job, constraints: Constraints, split: ParallelPlan, *, tp_overlap: bool
) -> Iterator[Family]:
    """Plans of one mesh."""
    sizes = constraints.micro_batch or divisors(max(1, job.global_batch // split.dp))
    sharded, cut = split.dp * split.cp > 1, split.tp > 1
    zeros = constraints.zero or (0, 1, 2, 3)
    for schedule, vpp in _chunks(job, constraints, split.pp):
        family = Family(
            base=replace(split, vpp=vpp, schedule=schedule),
            zero=zeros if sharded else zeros[:1],
            micro_batch=tuple(constraints.allowed("micro_batch", sizes)),
            sequence_parallel=(constraints.sequence_parallel or (True, False)) if cut else (False,),
            tp_overlap=(constraints.tp_overlap or (tp_overlap,)) if cut else (False,),
            recompute=constraints.recompute or RECOMPUTE_CHOICES,
            even_split=constraints.stage_split == ("even",),
        )
        if family.micro_batch:
            yield family


def _chunks(job: Job, constraints: Constraints, pp: int) -> Iterator[tuple[str, int]]:
    """(schedule, vpp) choices: as many chunks as the schedule has, or several that are all equal.

    Equal with embedding, multi-token prediction and head counted as a layer each or not, as frameworks
    ask for.
    """
    layers = job.model.layers
    ends = 2 + job.model.mtp_layers
    even = [
        v
        for v in range(2, (layers + ends) // pp + 1)
        if pp > 1 and (not layers % (pp * v) or not (layers + ends) % (pp * v))
    ]
    whole = False
    schedules = constraints.schedule or SYNCHRONOUS_SCHEDULES
    for schedule in sorted(schedules, key=lambda name: name != "1f1b"):
        if schedule in ("interleaved", "interleaved-zb", "looped-bfs"):
            chunks = even
        elif schedule in V_SHAPED_SCHEDULES:
            chunks = [2] if pp > 1 else []
        elif pp == 1 and schedule not in ASYNCHRONOUS_SCHEDULES:
            # Without a pipeline they all run the same passes: one stands for the others.
            chunks, whole = [] if whole else [1], True
        else:
            chunks = [1]
        yield from ((schedule, vpp) for vpp in constraints.allowed("vpp", chunks))
