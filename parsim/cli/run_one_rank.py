"""`parsim run --one-rank`: one rank measured alone, the whole step replayed with what it took."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

from parsim.cli.output import say
from parsim.setup import Setup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parsim.cost.memory import MemoryUse
    from parsim.cost.stage import CostModel
    from parsim.execute.launch.attempts import Launch, Progress
    from parsim.execute.one_rank.one_rank import CountRow, OneRank
    from parsim.execute.request import Case
    from parsim.plan import ParallelPlan
    from parsim.simulate.prediction import Prediction
    from parsim.timeline import Timeline


class OneRankStep(NamedTuple):
    """A step predicted twice: from the model alone, and with one rank's measured work."""

    measured: OneRank
    predicted: Prediction
    predicted_timeline: Timeline
    """Of pipeline ranks."""
    replayed: Prediction
    replayed_timeline: Timeline
    modelled_s: dict[tuple[int, str], float]
    """Compute of the measured actions by the model, by stage and kind."""
    ratios: dict[str, float]
    """Measured over modelled, by kind of action; `optimizer`."""
    counts: Sequence[CountRow]
    memory: MemoryUse
    """Of the rank, by the model."""


def one_rank_step(setup: Setup, case: Case, rank: int, how: Launch) -> OneRankStep:
    """Measure one rank of the plan on this machine and replay the step with it."""
    from parsim.cost.price import PassTime
    from parsim.cost.step import step_cost
    from parsim.execute.one_rank.one_rank import count_rows, measure_one_rank
    from parsim.schedule.lower import pass_times
    from parsim.schedule.measured import measured_cost
    from parsim.simulate.prediction import predict, program_of

    job, plan, costs = setup.job, case.plan, setup.costs()
    program, memory = program_of(job, plan, costs, case.schedule)
    mine = plan.coordinate(rank).pp if rank < plan.gpus else 0
    _check_memory(memory[mine], how)
    (measured,) = measure_one_rank([case], rank, dataclasses.replace(how, on_step=_show))
    predicted, timeline = predict(job, plan, costs, case.schedule)
    cost, work = step_cost(job, plan, costs), measured.work()
    hosted = _with_host(costs, measured)
    replayed, replayed_timeline = predict(job, plan, hosted, case.schedule, work=work)
    return OneRankStep(
        measured=measured,
        predicted=predicted,
        predicted_timeline=timeline,
        replayed=replayed,
        replayed_timeline=dataclasses.replace(
            replayed_timeline, title=f"{replayed_timeline.title}, with rank {rank} measured"
        ),
        modelled_s={
            (stage, kind): pass_times(cost.stages[stage].time, PassTime())[kind].compute_s
            for stage, kind in work.compute_s
        },
        ratios=measured_cost(work, cost, job, plan, costs).ratios,
        counts=count_rows(measured, program, costs),
        memory=memory[mine],
    )


def check_alone(setup: Setup, plan: ParallelPlan, how: Launch, others: list[str]) -> None:
    """Raise ParsimError for flags and plans that need all ranks, and for a profile of another kind of
    device.
    """
    from parsim.errors import ParsimError
    from parsim.plan import ASYNCHRONOUS_SCHEDULES

    if plan.schedule in ASYNCHRONOUS_SCHEDULES or plan.compression != "none":
        raise ParsimError(
            "one rank alone runs neither a pipeline without a flush nor compressed sums of gradients",
            where="--one-rank",
            got=plan.short(),
        )
    if others:
        raise ParsimError("--one-rank runs one rank alone", where=others[0], got=", ".join(others))
    cluster = setup.cluster
    if cluster.device.is_host != (how.device == "cpu"):
        raise ParsimError(
            "one rank's measured compute and the modelled communication must be of the same hardware",
            where="--hardware",
            got=f"{cluster.name}, and the rank runs on a {'CPU' if how.device == 'cpu' else 'GPU'}",
            hint="a profile of this machine comes from `parsim calibrate -o here.toml`",
        )


def _show(step: Progress) -> None:
    from parsim.units import format_duration

    name = f"step {step.step}" if step.step >= 0 else "warm-up"
    say(f"{name}: {format_duration(step.time_s)} without communication")


def _check_memory(use: MemoryUse, how: Launch) -> None:
    """Refuse what this machine's memory cannot hold; of a GPU the allocator says it."""
    from parsim.errors import ParsimError
    from parsim.execute.devices import available_memory_bytes
    from parsim.units import format_bytes

    there = available_memory_bytes()
    if how.device == "cpu" and use.peak > there:
        raise ParsimError(
            "this rank does not fit into this machine's memory",
            got=f"about {format_bytes(use.peak)}",
            expected=f"at most {format_bytes(there)}",
            hint="a smaller model or micro-batch, a larger tp or pp, or a device with more memory",
        )


def _with_host(costs: CostModel, measured: OneRank) -> CostModel:
    """The costs with the host's measured share of actions and of the step."""
    from parsim.cost.stage import CostModel

    in_pipeline = measured.case.plan.pp > 1
    count = sum(action.number for action in measured.actions) / len(measured.steps_s)
    loose_s = 0.0 if in_pipeline else count * measured.action_host_s
    stack = dataclasses.replace(
        costs.stack,
        action_host_s=measured.action_host_s if in_pipeline else 0.0,
        step_overhead_s=measured.step_host_s + loose_s,
    )
    return CostModel(costs.model, costs.cluster, stack)


def one_rank_data(step: OneRankStep) -> dict[str, Any]:
    """The answer of `run --one-rank --json`."""
    measured, replayed = step.measured, step.replayed
    at = measured.case.plan.coordinate(measured.rank)
    return replayed.to_item() | {
        "predicted_s": step.predicted.step_time_s,
        "predicted_breakdown_s": step.predicted.breakdown_s,
        "one_rank": {
            "rank": measured.rank,
            "pp": at.pp,
            "dp": at.dp,
            "tp": at.tp,
            "world_size": measured.case.plan.gpus,
            "actions": [
                {
                    "stage": a.stage,
                    "kind": a.kind,
                    "measured_s": a.seconds,
                    "predicted_s": step.modelled_s[a.stage, a.kind],
                    "spread": a.spread,
                    "number": a.number,
                }
                for a in measured.actions
            ],
            "optimizer_s": measured.optimizer_s,
            "action_host_s": measured.action_host_s,
            "step_host_s": measured.step_host_s,
            "ratios": step.ratios,
            "counts": [row._asdict() | {"equal": row.equal} for row in step.counts],
            "collectives": [row._asdict() for row in measured.collectives],
            "peak_memory_bytes": measured.peak_bytes,
            "predicted_memory_bytes": step.memory.to_data(replayed.context_bytes),
            "steps_s": list(measured.steps_s),
            "disturbed": list(measured.disturbed),
        },
        "device": measured.device,
        "dtype": measured.case.dtype,
        "machine": measured.machine,
        "torch": measured.torch_version,
    }


def one_rank_lines(step: OneRankStep) -> list[str]:
    """The same for reading."""
    from parsim.units import format_bytes, format_duration

    measured, plan = step.measured, step.measured.case.plan
    at, timed = plan.coordinate(measured.rank), len(measured.steps_s)
    ratio = step.replayed.step_time_s / step.predicted.step_time_s
    lines = [
        f"rank       {measured.rank} of {plan.gpus} (pp {at.pp}, dp {at.dp}, tp {at.tp}) on "
        f"{measured.machine}",
        f"step       {format_duration(step.replayed.step_time_s)}   its work as measured, other ranks "
        "after it, communication modelled",
        f"predicted  {format_duration(step.predicted.step_time_s)}   by the model alone; the other is "
        f"{ratio:.2f} times as long",
        f"actions    without communication, medians of {timed - sum(measured.disturbed) or timed} of "
        f"{timed} steps",
    ]
    for a in measured.actions:
        modelled_s = step.modelled_s[a.stage, a.kind]
        lines.append(
            f"  {a.stage}{a.kind:<8} measured {format_duration(a.seconds)} (spread {a.spread:.0%} of "
            f"{a.number}), predicted {format_duration(modelled_s)}, ratio {a.seconds / modelled_s:.2f}"
        )
    lines += [
        f"  optimizer measured {format_duration(measured.optimizer_s)}, "
        f"ratio {step.ratios['optimizer']:.2f}",
        f"host       {format_duration(measured.action_host_s)} an action, "
        f"{format_duration(measured.step_host_s)} a step",
        f"memory     peak measured {format_bytes(measured.peak_bytes)}, predicted "
        f"{format_bytes(step.memory.peak)}",
        "counted    in one step of this rank, against the cost model",
    ]
    return lines + [_count_line(row) for row in step.counts]


def _count_line(row: CountRow) -> str:
    from parsim.units import format_bytes

    if row.unit == "bytes":
        counted, modelled = format_bytes(row.counted), format_bytes(row.modelled)
    else:
        counted, modelled = f"{row.counted:,.0f}", f"{row.modelled:,.0f}"
    answer = "equal" if row.equal else f"the model says {modelled}"
    return f"  {row.what:<18} {counted}, {answer}"
