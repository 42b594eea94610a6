"""`parsim compare-schedules`: one job under all schedules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parsim.cli.completion import complete_schedule
from parsim.cli.options import (
    GlobalBatchOption,
    HardwareOption,
    InterNodeOption,
    IntraNodeOption,
    JsonOption,
    MemoryOption,
    ModelOption,
    PrecisionOption,
    SeqLenOption,
    StackOption,
)
from parsim.cli.output import document, print_json, print_lines, progress, say
from parsim.cli.output_paths import to_picture
from parsim.cli.tables import print_table
from parsim.setup import Flags, load_plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parsim.plan import ParallelPlan
    from parsim.simulate.schedules import Refused, Simulated


def compare_schedules(
    plan: Annotated[
        str, typer.Option("--plan", help="A plan file, or dp=8,tp=8,pp=8,micro_batch=1; any schedule.")
    ],
    model: ModelOption = None,
    hardware: HardwareOption = None,
    global_batch: GlobalBatchOption = None,
    seq_len: SeqLenOption = None,
    stack: StackOption = None,
    precision: PrecisionOption = None,
    inter_node: InterNodeOption = None,
    intra_node: IntraNodeOption = None,
    memory: MemoryOption = None,
    schedules: Annotated[
        str | None,
        typer.Option(
            "--schedule",
            help="Only these, such as 1f1b,zbv [default: all].",
            autocompletion=complete_schedule,
        ),
    ] = None,
    vpp: Annotated[
        int, typer.Option("--vpp", min=2, help="Chunks a rank of the schedules that take any number.")
    ] = 2,
    chart: Annotated[
        Path | None,
        typer.Option(
            "--chart", help="Draw them one above the other: .png, .svg or .pdf.", callback=to_picture
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Simulate one plan under every schedule: step time, bubble, peak memory.

    Exit status 1 where it fits in memory under none of them.

    \b
    Examples:
      parsim compare-schedules --model llama-3.1-70b --hardware h100-sxm-80gb --plan dp=2,tp=8,pp=8
      parsim compare-schedules --model gpt3-175b --hardware a100-sxm-80gb --plan best.json --chart s.png
    """
    from parsim.simulate.schedules import Refused, Simulated, under_schedules

    flags = Flags(
        model=model,
        hardware=hardware,
        global_batch=global_batch,
        seq_len=seq_len,
        stack=stack,
        precision=precision,
        inter_node=inter_node,
        intra_node=intra_node,
        memory=memory,
    )
    setup, parallel_plan = load_plan(plan, flags)
    names = _names(schedules)
    with progress() as report:
        outcomes = list(
            under_schedules(setup.job, parallel_plan, setup.costs(), names, vpp=vpp, progress=report)
        )
    refused = [outcome for outcome in outcomes if isinstance(outcome, Refused)]
    steps = sorted(
        (outcome for outcome in outcomes if isinstance(outcome, Simulated)),
        key=lambda step: (not step.prediction.fits, step.prediction.step_time_s),
    )
    if chart is not None:
        from parsim.charts.schedules import Panel, draw_schedules

        panels = [
            Panel(p.plan.schedule, timeline, p.memory.peak + p.context_bytes, p.fits, p.plan.vpp)
            for p, timeline in steps
        ]
        draw_schedules(panels, chart, name=_title(steps))
    if as_json:
        answer = {
            "schedules": [step.prediction.to_item() | setup.origin for step in steps],
            "refused": [{"schedule": r.schedule, "reason": _reason(r)} for r in refused],
        }
        inputs = flags.given() | {"plan": plan, "schedule": schedules, "vpp": vpp}
        print_json(document("compare-schedules", inputs, answer))
    else:
        _print(steps, refused, parallel_plan)
    if chart is not None:
        say(f"wrote {chart}")
    if not any(step.prediction.fits for step in steps):
        raise typer.Exit(1)


def _names(text: str | None) -> Sequence[str]:
    """The schedules that `--schedule` lists, or all."""
    from parsim.schedule import SCHEDULES, unknown_schedule

    if text is None:
        return SCHEDULES
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in SCHEDULES:
            raise unknown_schedule(name)
    return tuple(dict.fromkeys(names)) or SCHEDULES


def _title(steps: Sequence[Simulated]) -> str:
    """The job, and what is the same under all schedules."""
    if not steps:
        return ""
    prediction = steps[0].prediction
    plan, job = prediction.plan, prediction.job
    sizes = ", ".join(f"{key} {getattr(plan, key)}" for key in ("dp", "tp", "pp", "cp", "ep"))
    return (
        f"{job.model.name} on {plan.gpus} × {prediction.hardware}, {sizes}, "
        f"{plan.num_micro_batches(job)} micro-batches of {plan.micro_batch}"
    )


def _reason(refused: Refused) -> str:
    problem = refused.problem
    return problem.what + (f" (expected {problem.expected})" if problem.expected else "")


def _print(steps: Sequence[Simulated], refused: Sequence[Refused], given: ParallelPlan) -> None:
    from parsim.plan import STAGE_LISTS
    from parsim.units import format_bytes, format_duration

    rows = []
    for p, _ in steps:
        rows.append(
            (
                p.plan.schedule,
                str(p.plan.vpp),
                format_duration(p.step_time_s),
                f"{p.step_time_s / steps[0].prediction.step_time_s:.3f}",
                f"{p.breakdown_s['bubble'] / p.step_time_s:.1%}",
                format_bytes(p.memory.peak + p.context_bytes),
                "yes" if p.fits else "NO",
                f"{p.mfu:.1%}",
            )
        )
    headers = ("schedule", "vpp", "step", "× first", "bubble", "peak memory", "fits", "MFU")
    print_table(headers, rows, title=_title(steps))
    lines = []
    for key in STAGE_LISTS:
        without = [p.plan.schedule for p, _ in steps if getattr(p.plan, key) != getattr(given, key)]
        if without:
            stages = f"{given.model_stages} stages of the model"
            lines.append(f"{key} is for {stages}: left out of {', '.join(without)}")
    print_lines([*lines, *(f"{r.schedule} cannot run this plan: {_reason(r)}" for r in refused)])
