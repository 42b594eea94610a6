"""`parsim simulate --mtbf`: goodput of a long run with failures and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parsim.cli.output import Section

if TYPE_CHECKING:
    from parsim.cli.simulated_step import SimulatedStep
    from parsim.cost.checkpoint import Checkpointing, Failures
    from parsim.simulate.faults import LongRun
    from parsim.simulate.prediction import Prediction
    from parsim.stack import Stack

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
        "--goodput-chart", help="Draw goodput over the checkpoint interval: .png, .svg or .pdf."
    ),
]

STORAGE_BYTES_PER_S_PER_GPU = 2e12 / 24_576
"""Meta's cluster for Llama 3: 2 TB/s sustained for 24 thousand GPUs (arXiv 2407.21783, section 3.1)."""
DETECT_S = 600.0
"""Ten minutes to find and diagnose a failure: ByteDance's mean on over 10,000 GPUs is less (MegaScale,
arXiv 2402.15627)."""
REPAIR_S = 86_400.0
DURATION_S = 30 * 86_400.0
LONGEST_MTBF_S = 1e14
RUNS = 20
NO_PROGRESS = 1e-3
"""Goodput below which a job is said to make no progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodputRequest:
    """What `--mtbf` asks for, with the defaults filled in."""

    checkpointing: Checkpointing
    failures: Failures
    gpu_mtbf_s: float
    checkpoint_bytes: float
    write_s: float
    duration_s: float
    runs: int
    seed: int
    assumed: tuple[str, ...]
    """What stands for settings that nobody gave, in words."""


def goodput_section(mtbf: str | None, chart: Path | None, step: SimulatedStep) -> Section:
    """What `--mtbf` and `--goodput-chart` add to a simulated step."""
    from parsim.errors import ParsimError
    from parsim.simulate.faults import simulate_long_run

    if mtbf is None:
        if chart is not None:
            raise ParsimError(
                "goodput needs to know how often something fails",
                where="--goodput-chart",
                hint="--mtbf 50000h",
            )
        return Section()
    prediction = step.prediction
    request = goodput_request(mtbf, prediction, step.request.setup.stack, step.request.seed)
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


def goodput_request(text: str, prediction: Prediction, stack: Stack, seed: int) -> GoodputRequest:
    """The long run that `--mtbf` describes, for a predicted step.

    Raises ParsimError for settings that are unknown, cannot be read, or contradict each other.
    """
    from parsim.cost.checkpoint import Checkpointing, Failures, best_interval_s, checkpoint_bytes

    name, given = _settings(text)
    gpus = prediction.plan.gpus
    mtbf_s = _job_mtbf_s(name, gpus)
    num_bytes = checkpoint_bytes(prediction.job, prediction.plan, stack)
    transfer_s = num_bytes / given.get("storage", STORAGE_BYTES_PER_S_PER_GPU * gpus)
    write_s = given.get("write", transfer_s)
    blocking_s = given.get("blocking", 1.0) * write_s
    least_s = max(prediction.step_time_s, write_s - blocking_s)
    best_s = max(best_interval_s(blocking_s, mtbf_s), least_s)
    detect_s, start_s = given.get("detect", DETECT_S), given.get("restart", 0.0)
    return GoodputRequest(
        checkpointing=Checkpointing(
            interval_s=given.get("checkpoint", best_s),
            blocking_s=blocking_s,
            background_s=write_s - blocking_s,
        ),
        failures=Failures(
            mtbf_s=mtbf_s,
            restart_s=detect_s + start_s + given.get("load", transfer_s),
            spares=given.get("spares"),
            repair_s=given.get("repair", REPAIR_S),
        ),
        gpu_mtbf_s=mtbf_s * gpus,
        checkpoint_bytes=num_bytes,
        write_s=write_s,
        duration_s=given.get("duration", DURATION_S),
        runs=given.get("runs", RUNS),
        seed=seed,
        assumed=_assumed(given),
    )


def _assumed(given: dict[str, Any]) -> tuple[str, ...]:
    """In words, what stands for the settings that nobody gave."""
    words = {
        "detect": "10 min to detect and diagnose a failure",
        "spares": "always a spare node",
        "checkpoint": "checkpoints at the best interval",
        "duration": "a run of 30 days",
    }
    missing = [text for key, text in words.items() if key not in given]
    if "storage" not in given and not {"write", "load"} <= given.keys():
        missing.append("storage as fast, by GPUs, as of Llama 3's cluster")
    if "spares" in given and "repair" not in given:
        missing.append("a day to repair a node")
    return tuple(missing)


def _settings(text: str) -> tuple[str, dict[str, Any]]:
    from parsim.errors import ParsimError
    from parsim.settings_text import parse_settings, positive
    from parsim.units import parse_bandwidth, parse_count, parse_duration

    durations = ("write", "detect", "restart", "load", "repair")
    readers = {key: positive(parse_duration, or_zero=True) for key in durations} | {
        "checkpoint": positive(parse_duration),
        "duration": positive(parse_duration),
        "storage": positive(parse_bandwidth),
        "blocking": _share,
        "spares": positive(parse_count, or_zero=True),
        "runs": positive(parse_count),
    }
    name, given = parse_settings(text, readers, where="--mtbf", named=True)
    if "repair" in given and "spares" not in given:
        raise ParsimError(
            "a repair only matters where spares are counted", where="--mtbf", hint="add spares=N"
        )
    if "storage" in given and "write" in given and "load" in given:
        raise ParsimError("write and load leave nothing for storage to say", where="--mtbf: storage")
    return name, given


def _share(text: str) -> float:
    from parsim.errors import ParsimError

    share = float(text)
    if not 0 <= share <= 1:
        raise ParsimError("this is a share of the write", got=text, expected="0 to 1")
    return share


def _job_mtbf_s(text: str, gpus: int) -> float:
    """Mean time between failures of the job: "50000h" of a GPU, or "419/54days" of the job itself."""
    from parsim.errors import ParsimError
    from parsim.units import parse_count, parse_duration

    count, slash, time = text.rpartition("/")
    try:
        seconds = parse_duration(time) / (parse_count(count) if slash else gpus)
    except ParsimError as error:
        raise error.at("--mtbf") from None
    except ZeroDivisionError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST_MTBF_S:
        raise ParsimError(
            "failures come after some time, but not after millions of years",
            where="--mtbf",
            got=text,
            expected="50000h or 419/54days",
        )
    return seconds


def _item(request: GoodputRequest, run: LongRun, prediction: Prediction) -> dict[str, Any]:
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


def _lines(request: GoodputRequest, run: LongRun, prediction: Prediction) -> list[str]:
    """The long run, for reading."""
    from parsim.units import format_bytes, format_duration

    point, total_s = run.point, run.split.total_s
    between_s, mtbf_s = request.checkpointing.between_s, request.failures.mtbf_s
    lines = [
        f"  long run of {format_duration(total_s)}, {request.runs} times: a failure every "
        f"{format_duration(mtbf_s)}, which is {request.gpu_mtbf_s / 3600:,.0f} h for a GPU",
        f"    goodput       {point.simulated:>10.1%}  (90 % of runs {point.low:.1%} to "
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
