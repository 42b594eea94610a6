"""One rank of a plan measured alone, and what its counts should be: OneRank and CountRow."""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from parsim.cost.collective import wire_factor
from parsim.cost.stage import CostModel
from parsim.cost.tally import micro_batch_tally
from parsim.errors import ParsimError
from parsim.execute.launch.attempts import Launch, launch
from parsim.execute.launch.cases import check
from parsim.execute.request import Case
from parsim.execute.steps import StepRecord, clean_steps
from parsim.schedule.measured import MeasuredWork
from parsim.schedule.program import Program
from parsim.timeline import CP, DP, PP_STREAMS, TP

PASSES = {"forward": "F", "backward": "B", "input_grad": "I", "weight_grad": "W"}
"""Kinds of actions by their names in a timeline."""
TOLERANCE = 1e-9
"""Relative difference of two sums of whole numbers in float64."""


class ActionTime(NamedTuple):
    """Actions of one stage and kind, without communication."""

    stage: int
    kind: str
    """F, B, I or W."""
    seconds: float
    """Median over steps and micro-batches."""
    spread: float
    """Interquartile range over the median."""
    number: int
    """How many the median is of."""
    whole_s: float = 0.0
    """Median from begin to end: with what the host does to communicate, though nobody answers."""


class Collectives(NamedTuple):
    """Collectives of one kind in the groups of one mesh dimension, in one step."""

    dimension: str
    kind: str
    number: int
    num_bytes: int
    """Of the full buffers together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OneRank:
    """What one rank of a plan did on one device, with nobody to answer it."""

    case: Case
    rank: int
    steps_s: tuple[float, ...]
    """Every step after the warm-up; no step of the plan, for nothing is communicated."""
    disturbed: tuple[bool, ...]
    actions: tuple[ActionTime, ...]
    optimizer_s: float
    action_host_s: float
    """Of every action beyond its own span: torch's pipeline runtime."""
    step_host_s: float
    """Of every step outside actions, optimizer and communication: flattened gradients, zeroing."""
    flops: int
    collectives: tuple[Collectives, ...]
    peak_bytes: int
    """The CUDA allocator's peak; on a CPU, of all tensors together."""
    device: str
    machine: str
    torch_version: str

    def work(self) -> MeasuredWork:
        """The measured times that take the place of modelled ones."""
        return MeasuredWork(
            compute_s={(action.stage, action.kind): action.seconds for action in self.actions},
            optimizer_s=self.optimizer_s,
        )


def measure_one_rank(cases: Sequence[Case], rank: int, how: Launch) -> list[OneRank]:
    """Run one rank of some plans of equal size alone on this machine, one after another.

    Raises ParsimError for a plan that the executor refuses, and for a rank that it does not have.
    """
    how = replace(how, one_rank=rank)
    check(cases, how)
    for case in cases:
        if case.plan.ep > 1:
            raise ParsimError(
                "who computes for which token is known to all ranks together, not to one alone",
                where="--one-rank with ep",
                got=case.plan.ep,
                hint="ep=1 runs all experts on the rank",
            )
    gpus = cases[0].plan.gpus
    if not 0 <= rank < gpus:
        raise ParsimError(
            "the plan has no such rank", where="--one-rank", got=rank, expected=f"0 to {gpus - 1}"
        )
    (results,) = launch(cases, how).results
    return [_one_rank(case, rank, found, how.device) for case, found in zip(cases, results, strict=True)]


def _one_rank(case: Case, rank: int, found: dict[str, Any], device: str) -> OneRank:
    steps = [StepRecord(**step) for step in found["steps"]]
    work = [found["work"][i] for i in clean_steps(steps)]
    return OneRank(
        case=case,
        rank=rank,
        steps_s=tuple(step.time_s for step in steps),
        disturbed=tuple(step.disturbed for step in steps),
        actions=tuple(_actions(work)),
        optimizer_s=statistics.median(step["optimizer_s"] for step in work),
        action_host_s=statistics.median(step["action_host_s"] for step in work),
        step_host_s=statistics.median(step["step_host_s"] for step in work),
        flops=found["counted"]["flops"],
        collectives=tuple(
            Collectives(row["dimension"], row["kind"], row["count"], row["bytes"])
            for row in found["counted"]["collectives"]
        ),
        peak_bytes=found["peak_bytes"],
        device=device,
        machine=f"{found['device']}, {os.cpu_count()} cores",
        torch_version=found["torch"],
    )


def _actions(work: Sequence[dict[str, Any]]) -> list[ActionTime]:
    """Medians over all steps and micro-batches."""
    seconds: dict[tuple[int, str], list[float]] = defaultdict(list)
    whole: dict[tuple[int, str], list[float]] = defaultdict(list)
    for step in work:
        for row in step["actions"]:
            seconds[row["stage"], PASSES[row["kind"]]] += row["seconds"]
            whole[row["stage"], PASSES[row["kind"]]] += row["whole"]
    times = []
    for (stage, kind), each in sorted(seconds.items()):
        middle = statistics.median(each)
        low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else (middle,) * 3
        spread, whole_s = (high - low) / middle, statistics.median(whole[stage, kind])
        times.append(ActionTime(stage, kind, middle, spread, len(each), whole_s))
    return times


class CountRow(NamedTuple):
    """One number of a step of one rank, counted as it ran and by the cost model."""

    what: str
    unit: str
    counted: float
    modelled: float

    @property
    def equal(self) -> bool:
        return abs(self.counted - self.modelled) <= TOLERANCE * max(self.counted, self.modelled)


def count_rows(measured: OneRank, program: Program, costs: CostModel) -> list[CountRow]:
    """FLOPs, tensor-parallel collectives by kind, and what the rank sends on each mesh dimension.

    `program` is the modelled step of `measured.case`. Bytes sent follow nccl-tests' bus bandwidth: of an
    all-reduce 2(n−1)/n of its buffer, of a gather or a reduce-scatter (n−1)/n.
    """
    case = measured.case
    mine = case.plan.coordinate(measured.rank).pp
    stages = [s for s, owner in sorted(case.schedule.stage_ranks().items()) if owner == mine]
    micro_batches = case.plan.num_micro_batches(case.job)
    tally = micro_batch_tally(case.job, case.plan, costs, stages)
    rows = [CountRow("FLOPs", "", measured.flops, micro_batches * tally.flops)]
    counted = {(c.dimension, c.kind): c for c in measured.collectives}
    norms = sum(t.stream == TP and t.name == NORMS for t in program.tasks if t.rank == mine)
    for kind in ("all_gather", "reduce_scatter", "all_reduce"):
        seen, modelled = counted.get((TP, kind)), tally.collectives.get((TP, kind))
        if kind == "all_reduce" and norms:
            continue  # their sums are tasks of their own: compared in bytes below
        if seen is not None or modelled is not None:
            rows.append(
                CountRow(
                    f"tp {kind}",
                    "",
                    seen.number if seen else 0,
                    micro_batches * modelled.number if modelled else 0,
                )
            )
    for dimension, streams in (
        (TP, (TP,)),
        ("pp", tuple(s for s in PP_STREAMS if s.startswith("pp_send"))),
        (DP, (DP, CP)),  # with one replica the same ranks sum gradients and share sequences
    ):
        sent = sum(t.num_bytes for t in program.tasks if t.rank == mine and t.stream in streams)
        found = _sent_bytes(measured, dimension)
        if dimension == DP:
            found += _sent_bytes(measured, CP) + _sent_bytes(measured, "tied")
        name = "dp, cp" if CP in streams and case.plan.cp > 1 else dimension
        rows.append(CountRow(f"{name} sent", "bytes", found, sent))
    return rows


NORMS = "gradients of norms"


def _sent_bytes(measured: OneRank, dimension: str) -> float:
    plan = measured.case.plan
    size = {TP: plan.tp, DP: plan.dp * plan.cp, CP: plan.cp}.get(dimension, 2)
    return sum(
        c.num_bytes * (1.0 if c.kind == "send" else wire_factor(c.kind, size))
        for c in measured.collectives
        if c.dimension == dimension and c.kind != "recv"
    )
