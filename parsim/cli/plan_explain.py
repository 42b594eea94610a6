"""`parsim plan --explain`: why a plan is not the best."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from parsim.cli.auto_stages import stages_section
from parsim.cli.output import Section, document, print_json, print_lines
from parsim.cli.tables import print_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from parsim.plan import Job
    from parsim.plan_file import PlanFile
    from parsim.search.explain import Explanation
    from parsim.search.partition.chosen import Partitioned
    from parsim.setup import Setup
    from parsim.simulate.prediction import Prediction


def explain_plan(
    setup: Setup,
    text: str,
    gpus: int,
    best_plan: Callable[[], Prediction],
    inputs: dict[str, Any],
    *,
    as_json: bool,
) -> bool:
    """Print what speaks against a plan; `best_plan` is asked for only where the plan fits. Returns
    whether it does.
    """
    from parsim.search.explain import explain

    file = _read(text, gpus, setup)
    chosen = _chosen(file, setup)
    explanation = explain(setup.job, chosen.plan if chosen else file.plan, setup.costs())
    best = best_plan() if explanation.prediction is not None else None
    stages = stages_section(chosen)
    if as_json:
        print_json(document("plan", inputs, {"explain": to_data(explanation, best) | stages.item}))
    else:
        _print(explanation, best, setup, stages)
    return explanation.verdict == "fits"


def _read(text: str, gpus: int, setup: Setup) -> PlanFile:
    from dataclasses import replace

    from parsim.errors import ParsimError
    from parsim.plan_file import read_plan

    file = read_plan(text)
    plan = file.plan
    if file.job is not None and file.job != setup.job:
        raise ParsimError(
            "the plan file is for another job",
            where="--explain",
            got=f"{file.job.model.name}, {_job_text(file.job)}",
            expected=f"{setup.job.model.name}, {_job_text(setup.job)}",
        )
    if plan.gpus != gpus:
        raise ParsimError(
            "the plan to explain is for another number of GPUs",
            where="--explain",
            got=f"dp·tp·pp·cp = {plan.gpus}",
            expected=f"--gpus {gpus}",
        )
    if file.job is None and "tp_overlap" not in text:
        plan = replace(plan, tp_overlap=plan.tp > 1 and setup.stack.default_tp_overlap)
    return replace(file, plan=plan)


def _job_text(job: Job) -> str:
    return f"global batch {job.global_batch}, {job.seq_len} tokens, {job.precision}"


def _chosen(file: PlanFile, setup: Setup) -> Partitioned | None:
    """The plan with its stages chosen, where that is asked of parsim and the plan is legal."""
    from parsim.schedule.check import plan_problems
    from parsim.search.partition.chosen import partitioned

    plan = file.plan
    if not file.auto or any(plan_problems(setup.job, plan, setup.cluster)):
        return None
    return partitioned(
        setup.job,
        plan,
        (setup.costs(),) * plan.pp,
        split="stage_split" in file.auto,
        counts="recompute_layers" in file.auto,
    )


def to_data(explanation: Explanation, best: Prediction | None) -> dict[str, Any]:
    """The `explain` table of `plan --json`."""
    prediction = explanation.prediction
    return {
        "plan": asdict(explanation.plan),
        "verdict": explanation.verdict,
        "problems": [str(problem) for problem in explanation.problems],
        "memory_bytes": dict(explanation.memory_items()),
        "over_bytes": explanation.over_bytes,
        "step_time_s": prediction.step_time_s if prediction else None,
        "best": best.to_item() if best else None,
        "slower_by_s": dict(explanation.slower_by_s(best)) if best else {},
    }


def _print(explanation: Explanation, best: Prediction | None, setup: Setup, stages: Section) -> None:
    from parsim.units import format_bytes, format_duration

    name, device = explanation.plan.short(), setup.cluster.device
    if explanation.problems:
        print_lines([f"{name} is illegal:", *(f"  {problem}" for problem in explanation.problems)])
        return
    if best is None or explanation.prediction is None:
        rows = [[key, format_bytes(size)] for key, size in explanation.memory_items()]
        rows.append(["outside the allocator", format_bytes(setup.stack.context_bytes)])
        over, most = format_bytes(explanation.over_bytes), format_bytes(device.memory_bytes)
        print_table(["on the fullest rank", ""], rows)
        largest = explanation.memory_items()[0][0]
        print_lines([
            f"{name} does not fit: it needs {over} more than the {most} of {device.name}; most of all "
            f"for {largest}",
            *stages.lines,
        ])  # fmt: skip
        return
    mine, theirs = explanation.prediction, best
    rows = [
        [
            key,
            format_duration(mine.breakdown_s.get(key, 0.0)),
            format_duration(theirs.breakdown_s.get(key, 0.0)),
            _difference(more, mine.step_time_s),
        ]
        for key, more in explanation.slower_by_s(best)
        if mine.breakdown_s.get(key) or theirs.breakdown_s.get(key)
    ]
    rows.append(["step", format_duration(mine.step_time_s), format_duration(theirs.step_time_s), ""])
    in_its = "" if theirs.job == mine.job else f" in {theirs.job.precision}"
    print_lines([f"{name} against", f"{theirs.plan.short()}{in_its}, the best"])
    print_table(["", "this plan", "the best", ""], rows)
    more_s = mine.step_time_s - theirs.step_time_s
    key, by_s = explanation.slower_by_s(best)[0]
    print_lines([
        f"slower by {format_duration(more_s)} ({more_s / theirs.step_time_s:.1%}), most of all by "
        f"{key} (+{format_duration(by_s)})"
        if more_s > 0
        else "nothing in the space is faster",
        *stages.lines,
    ])  # fmt: skip


def _difference(more_s: float, step_s: float) -> str:
    """With its sign; nothing where only the rounding of sums differs."""
    from parsim.units import format_duration

    if abs(more_s) < 1e-9 * step_s:
        return ""
    return ("+" if more_s > 0 else "−") + format_duration(abs(more_s))
