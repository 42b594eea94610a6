"""`parsim simulate --mtbf`: goodput of a long run with failures and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parsim.cli.output import Section
from parsim.cli.output_paths import to_picture

if TYPE_CHECKING:
    from parsim.cli.simulated_step import SimulatedStep
    from parsim.simulate.faults import LongRun
    from parsim.simulate.long_run import LongRunRequest
    from parsim.simulate.prediction import Prediction

MtbfOption = Annotated[
    str | None,
    typer.Option(
        "--mtbf",
        help="Goodput of a long run: mean time between failures of a GPU (50000h), or failures of the "
        "whole job in a time (419/54days), then settings: 50000h,checkpoint=30min,write=30s,spares=8.",
    ),
]
GoodputChartOption = Annotated[
    Path | None,
    typer.Option(
        "--goodput-chart",
        help="Draw goodput over the checkpoint interval: .png, .svg or .pdf.",
        callback=to_picture,
    ),
]

NO_PROGRESS = 1e-3
"""Goodput below which a job is said to make no progress."""


def goodput_section(mtbf: str | None, chart: Path | None, step: SimulatedStep) -> Section:
    """What `--mtbf` and `--goodput-chart` add to a simulated step."""
    from parsim.errors import ParsimError
    from parsim.simulate.faults import simulate_long_run
    from parsim.simulate.long_run import read_long_run

    if mtbf is None:
        if chart is not None:
            raise ParsimError(
                "goodput needs to know how often something fails",
                where="--goodput-chart",
                hint="--mtbf 50000h",
            )
        return Section()
    prediction = step.prediction
    request = read_long_run(mtbf, prediction, step.request.setup.stack, step.request.seed)
    run = simulate_long_run(
        request.checkpointing,
        request.failures,
        duration_s=request.duration_s,
        runs=request.runs,
        seed=request.seed,
        shortest_interval_s=prediction.step_time_s,
    )
    if chart is not None:
        from parsim.charts.goodput import draw_goodput

        draw_goodput(run, chart, title=f"{prediction.job.model.name}, {prediction.plan.short()}")
    return Section(
        item={"goodput": _item(request, run, prediction)},
        lines=_lines(request, run, prediction),
        written=[] if chart is None else [chart],
    )


def _item(request: LongRunRequest, run: LongRun, prediction: Prediction) -> dict[str, Any]:
    """The `goodput` field of the JSON ITEM."""
    from parsim.cost.checkpoint import best_interval_s, daly_interval_s, young_interval_s

    checkpointing, failures = request.checkpointing, request.failures
    stop = checkpointing.blocking_s, failures.mtbf_s
    return {
        "goodput": run.point.simulated,
        "interval": [run.point.low, run.point.high],
        "expected": run.point.expected,
        "tokens_per_s_per_gpu": run.point.simulated * _tokens_per_s_per_gpu(prediction),
        "time_s": run.split.seconds(),
        "failures": run.failures_per_history,
        "mtbf_s": failures.mtbf_s,
        "gpu_mtbf_s": request.gpu_mtbf_s,
        "restart_s": failures.restart_s,
        "spares": failures.spares,
        "repair_s": failures.repair_s,
        "checkpoint": {
            "bytes": request.checkpoint_bytes,
            "interval_s": checkpointing.between_s,
            "write_s": request.write_s,
            "blocking_s": checkpointing.blocking_s,
        },
        "best_interval_s": {
            "simulated": run.best.interval_s,
            "exact": best_interval_s(*stop),
            "daly": daly_interval_s(*stop),
            "young": young_interval_s(*stop),
        },
        "best_goodput": run.best.simulated,
        "simulated_s": run.split.total_s,
        "runs": request.runs,
        "seed": request.seed,
        "assumed": list(request.assumed),
    }


def _lines(request: LongRunRequest, run: LongRun, prediction: Prediction) -> list[str]:
    """The long run, for reading."""
    from parsim.units import format_bytes, format_duration

    point, total_s = run.point, run.split.total_s
    between_s, mtbf_s = request.checkpointing.between_s, request.failures.mtbf_s
    lines = [
        f"  long run of {format_duration(total_s)}, {request.runs} times: a failure every "
        f"{format_duration(mtbf_s)}, which is {request.gpu_mtbf_s / 3600:,.0f} h for a GPU",
        f"    goodput       {point.simulated:>10.1%}  (90% of runs {point.low:.1%} to "
        f"{point.high:.1%}, closed form {point.expected:.1%})",
        f"    effective     {point.simulated * _tokens_per_s_per_gpu(prediction):>10,.0f}  tokens/s/GPU",
        f"    checkpoints   {format_duration(between_s):>10}  apart "
        f"({between_s / prediction.step_time_s:,.0f} steps), {format_bytes(request.checkpoint_bytes)} "
        f"in {format_duration(request.write_s)}",
        f"    best          {format_duration(run.best.interval_s):>10}  apart, "
        f"goodput {run.best.simulated:.1%}",
    ]
    for key, seconds in run.split.seconds().items():
        if seconds > 0:
            share = seconds / total_s
            lines.append(f"    {key.replace('_', ' '):<14}{format_duration(seconds):>10}  {share:6.1%}")
    if point.simulated < NO_PROGRESS:
        lines.append(
            "    THE JOB MAKES NO PROGRESS: it fails before it has restarted and saved its work"
        )
    if request.assumed:
        lines.append(f"    assumed: {'; '.join(request.assumed)}")
    return lines


def _tokens_per_s_per_gpu(prediction: Prediction) -> float:
    return prediction.job.tokens / (prediction.step_time_s * prediction.plan.gpus)
