"""`parsim run`: a plan on real ranks, timed beside its prediction."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parsim.cli.auto_stages import stage_lines
from parsim.cli.calibrate import DeviceKind, DeviceOption
from parsim.cli.options import (
    Flags,
    GlobalBatchOption,
    HardwareOption,
    JsonOption,
    ModelOption,
    PlanArgument,
    PrecisionOption,
    SeqLenOption,
    Setup,
    StackOption,
    load_plan,
)
from parsim.cli.output import document, print_json, print_lines, say

if TYPE_CHECKING:
    from parsim.execute.measurement import Measurement, Verification
    from parsim.plan import ParallelPlan
    from parsim.schedule.action import Schedule
    from parsim.simulate.prediction import Prediction


def run(
    plan: PlanArgument,
    model: ModelOption = None,
    hardware: HardwareOption = None,
    global_batch: GlobalBatchOption = None,
    seq_len: SeqLenOption = None,
    stack: StackOption = None,
    precision: PrecisionOption = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps to time.")] = 10,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps before them.")] = 2,
    seed: Annotated[int, typer.Option("--seed", help="Of the weights and the data.")] = 0,
    device: DeviceOption = DeviceKind.AUTO,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Also train in float64 beside a single process and compare."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the measurement here, as JSON.")
    ] = None,
    chart: Annotated[
        Path | None, typer.Option("--chart", help="Predicted above measured: .png, .svg or .pdf.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Both timelines as one Chrome trace.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a plan with torch.distributed on this machine: one process a rank, gloo or NCCL.

    Exit status 1 where --verify finds a difference from single-process training.

    \b
    Examples:
      parsim run dp=2,tp=1,pp=1,micro_batch=4 --model tiny-llama-8l --steps 20
      parsim run best.json --verify --chart comparison.png -o measurement.json
    """
    from parsim.config import dump_json, write_file
    from parsim.execute.devices import available_gpus
    from parsim.execute.measurement_file import measurement_data
    from parsim.schedule import make_schedule

    use_gpus = device is DeviceKind.CUDA or (device is DeviceKind.AUTO and available_gpus() > 0)
    kind = "cuda" if use_gpus else "cpu"
    flags = Flags(
        model=model,
        hardware=hardware or (None if use_gpus else _cpu_profile(plan)),
        global_batch=global_batch,
        seq_len=seq_len,
        stack=stack or "parsim-executor",
        precision=precision,
    )
    setup, parallel_plan = load_plan(plan, flags)
    for line in stage_lines(setup.partitioned):
        say(line.strip())
    schedule = make_schedule(parallel_plan, parallel_plan.num_micro_batches(setup.job))
    prediction, predicted = _predict(setup, parallel_plan, schedule)
    measurement = measure(
        setup, parallel_plan, schedule, prediction, kind, steps=steps, warmup=warmup, seed=seed
    )
    verification = _verify(setup, parallel_plan, schedule, kind, seed) if verify else None
    data = measurement_data(measurement, predicted_s=prediction.step_time_s, verification=verification)
    inputs = flags.given() | {"plan": plan, "steps": steps, "device": kind}
    whole = document("run", inputs, data, seed=seed)
    if output is not None:
        write_file(output, dump_json(whole))
        say(f"wrote {output}")
    if chart is not None:
        from parsim.charts.comparison import draw_comparison

        draw_comparison(predicted, measurement.timeline, chart)
        say(f"wrote {chart}")
    if trace is not None:
        from parsim.export.chrome_trace import write_chrome_trace

        write_chrome_trace(trace, [predicted, measurement.timeline])
        say(f"wrote {trace}")
    if as_json:
        print_json(whole)
    else:
        print_lines(_lines(data))
    if verification is not None and not verification.equal:
        raise typer.Exit(1)


def _cpu_profile(plan: str) -> str:
    """The profile to predict CPU ranks with: the plan file's own if it is of a CPU, else the shipped."""
    from parsim.config import load_cluster
    from parsim.plan_file import read_plan

    named = read_plan(plan).hardware
    return named if named and load_cluster(named).device.is_host else "local-cpu"


def _predict(setup: Setup, plan: ParallelPlan, schedule: Schedule) -> tuple[Prediction, Any]:
    """The prediction, and its timeline with a row for every real rank."""
    from parsim.simulate.fold import unfolded
    from parsim.simulate.prediction import predict

    prediction, timeline = predict(setup.job, plan, setup.costs(), schedule)
    return prediction, unfolded(timeline, plan)


def measure(
    setup: Setup,
    plan: ParallelPlan,
    schedule: Schedule,
    prediction: Prediction,
    device: str,
    *,
    steps: int,
    warmup: int,
    seed: int,
) -> Measurement:
    """Execute with progress on stderr, unless the ranks cannot fit into this machine's memory."""
    from parsim.errors import ParsimError
    from parsim.execute.devices import available_memory_bytes
    from parsim.execute.launch import Progress, execute
    from parsim.units import format_bytes, format_duration

    needed, there = prediction.memory.peak * plan.gpus, available_memory_bytes()
    if device == "cpu" and needed > there:
        raise ParsimError(
            "the ranks of this plan do not fit into this machine's memory",
            got=f"{plan.gpus} ranks of about {format_bytes(prediction.memory.peak)}",
            expected=f"at most {format_bytes(there)} in all",
            hint="a smaller model: `parsim models` lists some whose name contains 'tiny'",
        )

    def show(step: Progress) -> None:
        name = f"step {step.step}" if step.step >= 0 else "warm-up"
        say(f"{name}: {format_duration(step.time_s)}, loss {step.loss:.6f}")

    return execute(
        setup.job,
        plan,
        schedule,
        steps=steps,
        warmup=warmup,
        seed=seed,
        device=device,
        dtype=setup.job.precision,
        on_step=show,
    )


def _verify(
    setup: Setup, plan: ParallelPlan, schedule: Schedule, device: str, seed: int
) -> Verification:
    """Compare with single-process training, on a shrunken model where the full one is large."""
    from parsim.execute.launch import verify
    from parsim.execute.support import shrunken
    from parsim.model import num_parameters
    from parsim.units import format_count

    job = setup.job
    if num_parameters(job.model) * job.tokens > VERIFIED_WHOLE:
        job = shrunken(job, plan)
        say(f"verifying on a shrunken model of {format_count(num_parameters(job.model))} parameters")
    return verify(job, plan, schedule, seed=seed, device=device)


VERIFIED_WHOLE = 2e10
"""Parameters × tokens of a step up to which the whole model is verified: seconds in float64."""


def _lines(data: dict[str, Any]) -> list[str]:
    from parsim.units import format_duration

    quiet = len(data["steps_s"]) - sum(data["disturbed"])
    lines = [
        f"measured   {format_duration(data['step_time_s'])}   median of {quiet} undisturbed steps of "
        f"{len(data['steps_s'])}, spread {data['spread']:.1%}, {data['world_size']} ranks",
        f"predicted  {format_duration(data['predicted_s'])}   error {data['error']:+.1%}",
        f"loss       {data['loss'][0]:.6f} to {data['loss'][-1]:.6f}",
    ]
    if "verify" in data:
        found = data["verify"]
        lines.append(
            f"verified   {'equal to' if found['equal'] else 'DIFFERENT from'} single-process training "
            f"in float64 over {found['steps']} steps: gradients within "
            f"{found['max_gradient_error']:.1e}, loss within {found['max_loss_error']:.1e}"
        )
    return lines
