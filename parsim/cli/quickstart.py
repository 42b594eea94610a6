"""`parsim quickstart`: the whole chain on this machine, from calibration to comparison."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parsim.cli.calibrate import DeviceKind, DeviceOption, run_calibration, summary
from parsim.cli.options import JsonOption
from parsim.cli.output import document, noticing_interrupts, print_json, print_lines, progress, say
from parsim.cli.output_paths import to_folder
from parsim.cli.tables import print_table
from parsim.setup import Setup

if TYPE_CHECKING:
    from parsim.execute.measurement import Measurement
    from parsim.search.search import SearchResult
    from parsim.simulate.prediction import Prediction
    from parsim.timeline import Timeline

CPU_MODEL, GPU_MODEL = "tiny-llama-16l", "llama-3.2-1b"
PLANS_TO_RUN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One plan, simulated and run."""

    name: str
    prediction: Prediction
    predicted: Timeline
    measurement: Measurement

    @property
    def error(self) -> float:
        """predicted / measured − 1."""
        return self.prediction.step_time_s / self.measurement.step_time_s - 1


def quickstart(
    folder: Annotated[
        Path,
        typer.Option("--folder", help="Where charts, traces, plans and figures go.", callback=to_folder),
    ] = Path("reports/quickstart"),
    device: DeviceOption = DeviceKind.AUTO,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="Cores or GPUs to use [default: all, up to 8].")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="[default: a small Llama for the device]")
    ] = None,
    calibration_s: Annotated[
        float, typer.Option("--calibration-s", min=1, help="Seconds to spend on calibration.")
    ] = 90.0,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps to time for each plan.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Calibrate this machine, plan a small Llama on it, simulate and run the best plans, and compare.

    \b
    Examples:
      parsim quickstart
      parsim quickstart --folder out --steps 20
    """
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        with noticing_interrupts() as interrupted:
            # Alone, each of them would be content with what it has by then.
            setup, devices, kind = _calibrated(folder, device, ranks, model, calibration_s)
            result = None if interrupted() else _searched(setup, devices, folder)
            if result is None or interrupted():
                raise KeyboardInterrupt
        trials = [
            _tried(setup, prediction, kind, steps, folder, number)
            for number, prediction in enumerate(_to_run(result), start=1)
        ]
        answer = _report(setup, result, trials, folder)
    if as_json:
        inputs = {"model": setup.job.model.name, "ranks": devices, "device": kind, "steps": steps}
        print_json(document("quickstart", inputs, answer))


def _calibrated(
    folder: Path, device: DeviceKind, ranks: int | None, model: str | None, calibration_s: float
) -> tuple[Setup, int, str]:
    """This machine's profile and the job to plan on it."""
    import os

    from parsim.config import load_model, load_stack
    from parsim.cost.host import stack_on
    from parsim.execute.calibrate.profile import write_profile
    from parsim.execute.devices import available_gpus
    from parsim.hardware import default_precision
    from parsim.plan import Job

    gpus = 0 if device is DeviceKind.CPU else available_gpus()
    kind = "cuda" if gpus or device is DeviceKind.CUDA else "cpu"
    devices = ranks or min(8, gpus or len(os.sched_getaffinity(0)))
    say(f"1/4  calibrating {devices} {'GPUs' if kind == 'cuda' else 'cores'}, {calibration_s:.0f} s …")
    calibration = run_calibration(DeviceKind(kind), devices, calibration_s)
    profile = folder / "hardware.toml"
    write_profile(calibration.cluster, profile)
    print_table(["this machine", ""], summary(calibration))
    spec = load_model(model or (CPU_MODEL if kind == "cpu" else GPU_MODEL))
    cluster = calibration.cluster
    job = Job(
        model=spec,
        seq_len=min(spec.max_seq_len, 4096),
        global_batch=4 * devices,
        precision=default_precision(cluster.device),
    )
    stack = stack_on(load_stack(cluster.default_stack), cluster)
    origin = {"hardware": str(profile), "stack": cluster.default_stack}
    return Setup(job=job, cluster=cluster, stack=stack, origin=origin), devices, kind


def _searched(setup: Setup, devices: int, folder: Path) -> SearchResult:
    """The ranking of all plans, printed and written."""
    from parsim.cli.plan import print_result, to_data
    from parsim.config import dump_json, write_file
    from parsim.search.search import search
    from parsim.search.space import Constraints

    # What the executor runs whatever the rest of the plan is.
    space = Constraints(schedule=("1f1b", "interleaved"), zero=(0, 1), sequence_parallel=(True,))
    say(f"2/4  searching the plans of {setup.job.model.name} on {devices} ranks …")
    with progress() as report:
        result = search(setup.job, devices, setup.costs(), constraints=space, top=60, progress=report)
    inputs = {"model": setup.job.model.name, "hardware": setup.origin["hardware"], "gpus": devices}
    text = dump_json(document("plan", inputs, to_data(result, setup.origin)))
    write_file(folder / "plans.json", text)
    print_result(result, setup.job.model.name, "this machine", devices, show=10)
    return result


def _to_run(result: SearchResult) -> list[Prediction]:
    """The best plan, and the best of each other split of the ranks."""
    chosen: dict[tuple[int, int, int], Prediction] = {}
    for prediction in result.plans:
        plan = prediction.plan
        chosen.setdefault((plan.dp, plan.tp, plan.pp), prediction)
    return list(chosen.values())[:PLANS_TO_RUN]


def _tried(
    setup: Setup, prediction: Prediction, device: str, steps: int, folder: Path, number: int
) -> Trial:
    """Simulate and run one plan, with its charts and traces."""
    from parsim.charts.comparison import draw_comparison
    from parsim.charts.gantt import draw_gantt
    from parsim.cli.run_launch import measure, show_step, timed_case
    from parsim.config import dump_json, write_file
    from parsim.execute.launch.attempts import Launch
    from parsim.execute.measurement_file import measurement_data
    from parsim.export.chrome_trace import write_chrome_trace
    from parsim.simulate.fold import unfolded
    from parsim.simulate.prediction import predict

    plan = prediction.plan
    name = f"{number}-dp{plan.dp}-tp{plan.tp}-pp{plan.pp}"
    say(f"3/4  plan {number}: {plan.short()}: simulating, then running on {plan.gpus} ranks …")
    case = timed_case(setup, plan, steps=steps, warmup=2, seed=0)
    prediction, timeline = predict(setup.job, plan, setup.costs(), case.schedule)
    draw_gantt(timeline, folder / f"{name}-schedule.png")
    write_file(folder / f"{name}-plan.json", dump_json(prediction.to_item() | setup.origin))
    measurement = measure(case, Launch(device=device, on_step=show_step, on_note=say), prediction)
    assert measurement is not None  # on one machine there is one
    predicted = unfolded(timeline, plan)
    data = measurement_data(measurement, predicted_s=prediction.step_time_s)
    write_file(folder / f"{name}-measurement.json", dump_json(data))
    draw_comparison(predicted, measurement.timeline, folder / f"{name}-comparison.png")
    write_chrome_trace(folder / f"{name}-trace.json", [predicted, measurement.timeline])
    return Trial(name=name, prediction=prediction, predicted=predicted, measurement=measurement)


def _report(setup: Setup, result: SearchResult, trials: list[Trial], folder: Path) -> dict[str, Any]:
    """Predicted against measured, printed and written; returns the answer of --json."""
    from parsim.compare.steps import compare_steps
    from parsim.config import dump_json, write_file
    from parsim.timeline import breakdown_s
    from parsim.units import format_duration

    rows, lines, entries = [], [], []
    for trial in trials:
        predicted_s, measured_s = trial.prediction.step_time_s, trial.measurement.step_time_s
        found = compare_steps(
            predicted_s,
            trial.prediction.breakdown_s,
            measured_s,
            breakdown_s(trial.measurement.timeline),
        )
        worst = found.parts[0]
        rows.append([
            trial.prediction.plan.short(), format_duration(predicted_s), format_duration(measured_s),
            f"{trial.error:+.1%}", f"{trial.measurement.spread:.1%}",
            f"{worst.what} {worst.difference_s / measured_s:+.1%}",
        ])  # fmt: skip
        entries.append({"name": trial.name, "plan": trial.prediction.plan.short()} | found.to_data())
    say("4/4  predicted against measured")
    print_table(["plan", "predicted", "measured", "error", "spread", "largest part of it"], rows)
    disturbed = sum(sum(trial.measurement.disturbed) for trial in trials)
    if disturbed:
        lines.append(
            f"{disturbed} steps ran while other processes used the cores; close them and repeat"
        )
    best = min(trials, key=lambda trial: trial.measurement.step_time_s)
    regret = trials[0].measurement.step_time_s / best.measurement.step_time_s - 1
    place = "the fastest" if best is trials[0] else f"{regret:.1%} slower than the fastest"
    lines.append(f"the plan parsim likes best is {place} of the {len(trials)} that ran")
    lines.append(f"charts, traces (open in ui.perfetto.dev), plans and measurements: {folder}")
    print_lines(lines)
    answer = {"folder": str(folder), "optimal": result.optimal, "regret": regret, "runs": entries}
    write_file(folder / "comparison.json", dump_json(answer))
    return answer
