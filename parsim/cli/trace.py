"""`parsim trace`: what torch's profiler recorded, read as a measured step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parsim.cli.options import JsonOption
from parsim.cli.output import document, print_json, print_lines, progress, say
from parsim.cli.output_paths import to_file, to_picture
from parsim.cli.tables import print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parsim.plan import ParallelPlan
    from parsim.traces.traced_run import TracedRun

RANKS_SHOWN = 16


def trace(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Of torch.profiler, one a rank: .json or .json.gz."),
    ],
    plan: Annotated[
        str | None,
        typer.Option("--plan", help="What ran, a plan file or dp=8,tp=8: tells groups of ranks apart."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Write the step as a measurement, as JSON.", callback=to_file
        ),
    ] = None,
    chart: Annotated[
        Path | None,
        typer.Option("--chart", help="Draw the step: .png, .svg or .pdf.", callback=to_picture),
    ] = None,
    merged: Annotated[
        Path | None,
        typer.Option("--trace", help="All ranks' step as one Chrome trace.", callback=to_file),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read torch.profiler's traces of a real run: the median step of all ranks, and where its time went.

    Clocks of several machines are set by the communication that they share.

    \b
    Examples:
      parsim trace rank*.json --plan dp=2,tp=4 --chart step.png --trace step.json
      parsim trace rank*.json.gz --plan plan.json -o measurement.json
      parsim validate prediction.json rank*.json
    """
    from parsim.plan_file import read_plan

    parallel_plan = read_plan(plan).plan if plan is not None else None
    run = read_run(files, parallel_plan)
    data = traced_data(run, parallel_plan)
    whole = document("trace", {"files": [str(path) for path in files], "plan": plan}, data)
    _write(run, whole, output=output, chart=chart, merged=merged)
    if as_json:
        print_json(whole)
    else:
        _show(run, breakdowns_s(run, parallel_plan))


def read_run(files: Sequence[Path], plan: ParallelPlan | None) -> TracedRun:
    """The traces of a run, with what a reader should know of them on stderr."""
    from parsim.traces.traced_run import read_traces
    from parsim.units import format_duration

    with progress() as report:
        run = read_traces(files, plan, progress=report)
    if run.left_out:
        say(f"{run.left_out} events last less than nothing and are left out")
    if run.step < 0:
        say("no step is marked (profiler.step()): all that was recorded counts as one")
    if run.clock_offsets_s:
        far_s = max(map(abs, run.clock_offsets_s.values()))
        say(f"clocks set by shared communication, by {format_duration(far_s)} at most")
    elif run.unaligned:
        say(
            "the clocks of these hosts share no communication to set them by: gaps between ranks mislead"
        )
    if len(run.ranks) < run.world_size:
        say(f"traces of {len(run.ranks)} of {run.world_size} ranks")
    return run


def traced_data(run: TracedRun, plan: ParallelPlan | None) -> dict[str, Any]:
    """The answer of `parsim trace --json`: a measurement, as `parsim run` gives one."""
    from dataclasses import asdict

    from parsim.export.timeline_json import timeline_to_data
    from parsim.plan import STAGE_LISTS

    by_rank = breakdowns_s(run, plan)
    data = {
        "step_time_s": run.step_time_s,
        "steps_s": list(run.steps_s),
        "step": run.step,
        "world_size": run.world_size,
        "ranks": list(run.ranks),
        "clock_offsets_s": {str(rank): seconds for rank, seconds in run.clock_offsets_s.items()},
        "events_left_out": run.left_out,
        "breakdown_s": _mean_s(by_rank),
        "ranks_s": {str(rank): parts for rank, parts in by_rank.items()},
        "timeline": timeline_to_data(run.timeline),
    }
    if plan is not None:
        fields = asdict(plan)
        data["plan"] = fields | {key: list(fields[key]) for key in STAGE_LISTS}
    return data


def _write(
    run: TracedRun,
    whole: dict[str, Any],
    *,
    output: Path | None,
    chart: Path | None,
    merged: Path | None,
) -> None:
    """The files that were asked for."""
    from parsim.config import dump_json, write_file

    if output is not None:
        write_file(output, dump_json(whole))
    if chart is not None:
        from parsim.charts.gantt import draw_gantt

        draw_gantt(run.timeline, chart)
    if merged is not None:
        from parsim.export.chrome_trace import write_chrome_trace

        write_chrome_trace(merged, [run.timeline])
    for path in filter(None, (output, chart, merged)):
        say(f"wrote {path}")


def breakdowns_s(run: TracedRun, plan: ParallelPlan | None) -> dict[int, dict[str, float]]:
    """Each rank's step by what it was spent on; with a plan, waiting is told from communication."""
    from parsim.compare.waiting import fair_breakdowns_s
    from parsim.timeline import rank_breakdowns_s

    return fair_breakdowns_s(run.timeline, plan) if plan else rank_breakdowns_s(run.timeline)


def _mean_s(by_rank: dict[int, dict[str, float]]) -> dict[str, float]:
    keys = next(iter(by_rank.values()))
    return {key: sum(parts[key] for parts in by_rank.values()) / len(by_rank) for key in keys}


def _show(run: TracedRun, by_rank: dict[int, dict[str, float]]) -> None:
    """The step by what it was spent on, rank by rank."""
    from parsim.units import format_duration

    means = {key: seconds for key, seconds in _mean_s(by_rank).items() if seconds > 0}
    rows = [
        [f"rank {rank}", *(format_duration(by_rank[rank][key]) for key in means)]
        for rank in run.ranks[:RANKS_SHOWN]
    ]
    rows.append(["mean", *map(format_duration, means.values())])
    rows.append(["of the step", *(f"{s / run.timeline.end_s:.1%}" for s in means.values())])
    print_table(["", *means], rows)
    if len(run.ranks) > RANKS_SHOWN:
        say(f"{len(run.ranks) - RANKS_SHOWN} more ranks are in --json")
    what = f"step {run.step}" if run.step >= 0 else "the trace"
    median_of = f", the median of {len(run.steps_s)} steps" if len(run.steps_s) > 1 else ""
    print_lines(
        [
            f"{what} of {len(run.ranks)} ranks on {'GPUs' if run.on_gpu else 'CPUs'}: "
            f"{format_duration(run.step_time_s)}{median_of}"
        ]
    )
