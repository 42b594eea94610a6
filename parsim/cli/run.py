"""`parsim run`: a plan on real ranks, timed beside its prediction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parsim.cli.auto_stages import stage_lines
from parsim.cli.calibrate import DeviceKind, DeviceOption
from parsim.cli.options import (
    GlobalBatchOption,
    HardwareOption,
    JsonOption,
    ModelOption,
    PlanArgument,
    PrecisionOption,
    SeqLenOption,
    StackOption,
)
from parsim.cli.output import document, print_json, print_lines, say
from parsim.cli.output_paths import to_file, to_folder, to_picture
from parsim.cli.report import ReportOption, write_report
from parsim.cli.run_compare import compared
from parsim.cli.run_joined import joined_here, one_voice, require_ranks
from parsim.cli.run_launch import (
    print_dry_run,
    run_all,
    say_shared_cores,
    show_step,
    timed_case,
    with_checkpoints,
    with_tokens,
)
from parsim.cli.run_one_rank import check_alone, one_rank_data, one_rank_lines, one_rank_step
from parsim.cli.run_ps import (
    RunPsOption,
    read_run_ps,
    served_data,
    served_lines,
    simulate_served,
    simulated_timeline,
    with_servers,
)
from parsim.cli.run_verify import (
    only_verified,
    to_verify,
    untimed_data,
    verified_data,
    verified_lines,
)
from parsim.cli.simulate_ps import plan_of_workers
from parsim.cli.validate_step import draw_overlay
from parsim.setup import Flags, Setup, load_plan

if TYPE_CHECKING:
    from parsim.compare.itemised import ItemisedComparison
    from parsim.execute.launch.attempts import Launch
    from parsim.execute.measurement import Measurement
    from parsim.execute.request import Case
    from parsim.plan import ParallelPlan
    from parsim.simulate.parameter_server import PsRun
    from parsim.simulate.prediction import Prediction
    from parsim.timeline import Timeline


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
        Path | None,
        typer.Option("--output", "-o", help="Write the measurement here, as JSON.", callback=to_file),
    ] = None,
    chart: Annotated[
        Path | None,
        typer.Option(
            "--chart", help="Predicted above measured: .png, .svg or .pdf.", callback=to_picture
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", help="Both timelines as one Chrome trace.", callback=to_file),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="Write checkpoints into this folder.", callback=to_folder),
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option("--checkpoint-every", min=1, help="Steps from one checkpoint to the next.")
    ] = 50,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest complete checkpoint.")
    ] = False,
    max_restarts: Annotated[
        int, typer.Option("--max-restarts", min=0, help="Start again so often after losing a rank.")
    ] = 0,
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", min=1, help="Silence after which a rank counts as hung.")
    ] = 300.0,
    tokens: Annotated[
        Path | None, typer.Option("--tokens", help="Train on this .npy or .bin [default: synthetic].")
    ] = None,
    tokens_dtype: Annotated[
        str | None, typer.Option("--tokens-dtype", help="Of a .bin file: uint16, uint32 or int32.")
    ] = None,
    nnodes: Annotated[int, typer.Option("--nnodes", min=1, help="Machines that take part.")] = 1,
    node_rank: Annotated[
        int, typer.Option("--node-rank", min=0, help="Which of them this is, from 0.")
    ] = 0,
    rdzv_endpoint: Annotated[
        str, typer.Option("--rdzv-endpoint", help="host:port of machine 0, where all meet.")
    ] = "",
    ps: RunPsOption = None,
    one_rank: Annotated[
        int | None,
        typer.Option("--one-rank", min=0, help="Run this rank of the plan alone; replay the step."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be started, and start nothing.")
    ] = False,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a plan with torch.distributed on this machine: one process a rank, gloo or NCCL.

    On several machines start the same command on each, with its own --node-rank. Exit status 1 where
    --verify finds a difference from single-process training.

    \b
    Examples:
      parsim run dp=2,tp=1,pp=1,micro_batch=4 --model tiny-llama-8l --steps 20
      parsim run best.json --verify --chart comparison.png -o measurement.json
      parsim run best.json --steps 1000 --checkpoint ckpt --max-restarts 3 --tokens train.npy
      parsim run best.json --nnodes 2 --node-rank 0 --rdzv-endpoint node0:29500 --dry-run
      parsim run micro_batch=2 --model tiny-llama-8l --ps workers=2,servers=1,mode=async --verify
      parsim run dp=16,tp=8,pp=8 --model tiny-llama-8l --one-rank 37 --steps 5
    """
    from parsim.execute.devices import available_gpus
    from parsim.execute.launch.attempts import Launch
    from parsim.execute.launch.torchrun import Nodes

    joined = joined_here(
        nnodes,
        {"--max-restarts": max_restarts > 0, "--ps": ps is not None, "--dry-run": dry_run,
         "--one-rank": one_rank is not None},
    )  # fmt: skip
    use_gpus = device is DeviceKind.CUDA or (device is DeviceKind.AUTO and available_gpus() > 0)
    flags = Flags(
        model=model,
        hardware=hardware or (None if use_gpus else _cpu_profile(plan)),
        global_batch=global_batch,
        seq_len=seq_len,
        stack=stack or "parsim-executor",
        precision=precision,
    )
    how = Launch(
        device="cuda" if use_gpus else "cpu",
        joined=joined,
        nodes=Nodes(count=nnodes, index=node_rank, endpoint=rdzv_endpoint),
        max_restarts=max_restarts,
        timeout_s=timeout_s,
        on_step=show_step,
        on_note=say,
    )
    with one_voice(joined):
        settings = read_run_ps(ps)
        setup, parallel_plan = load_plan(plan_of_workers(plan, settings), flags)
        require_ranks(joined, parallel_plan)
        if one_rank is not None:
            others = {
                "--verify": verify, "--checkpoint": checkpoint, "--nnodes": nnodes > 1, "--ps": ps,
                "--dry-run": dry_run,
            }  # fmt: skip
            check_alone(setup, parallel_plan, how, [flag for flag, given in others.items() if given])
        for line in stage_lines(setup.partitioned):
            say(line.strip())
        case = timed_case(setup, parallel_plan, steps=steps, warmup=warmup, seed=seed)
        case = with_tokens(with_servers(case, settings), tokens, tokens_dtype)
        case = with_checkpoints(
            case, how, checkpoint, checkpoint_every, resume=resume, look_only=dry_run
        )
        inputs = flags.given() | {"plan": plan, "steps": steps, "device": how.device, "ps": ps}
        if dry_run:
            print_dry_run(case, how, inputs, as_json=as_json)
            return
        say_shared_cores(case, how)
        files = _Files(measurement=output, chart=chart, trace=trace, report=report)
        if one_rank is not None:
            inputs |= {"one_rank": one_rank}
            _run_one_rank(setup, case, one_rank, how, inputs, files, as_json=as_json)
            return
        _run(setup, case, how, inputs, files, verify=verify, as_json=as_json)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """What to write."""

    measurement: Path | None
    chart: Path | None
    trace: Path | None
    report: Path | None
    """A folder."""

    @property
    def draws(self) -> bool:
        """Whether a timeline is wanted."""
        return any(path is not None for path in (self.chart, self.trace, self.report))


def _run(
    setup: Setup,
    case: Case,
    how: Launch,
    inputs: dict[str, Any],
    files: _Files,
    *,
    verify: bool,
    as_json: bool,
) -> None:
    """Predict, run, verify if asked, and answer."""
    from parsim.execute.measurement import Measurement, Verification

    prediction, predicted = _predict(setup, case, how)
    served = simulate_served(setup, case) if case.servers is not None else None
    checked = to_verify(case, how) if verify else None
    timed = not only_verified(case, how, prediction, verify=verify, draws=files.draws)
    cases = ([case] if timed else []) + ([checked] if checked is not None else [])
    found = run_all(cases, how)
    if not how.answers:
        say(f"machine {how.nodes.index} is done; machine 0 has the measurement")
        if as_json:
            print_json(document("run", inputs, {"node_rank": how.nodes.index}, seed=case.seed))
        return
    measurement = next((each for each in found if isinstance(each, Measurement)), None)
    comparison = None
    verification = next((each for each in found if isinstance(each, Verification)), None)
    if measurement is None:
        data = untimed_data(case, prediction)
    else:
        data = _measured_data(setup, case, measurement, prediction, served)
        if served is not None:
            predicted = simulated_timeline(served, measurement.timeline.title)
        if (cores := how.cores_shared(case)) is not None:
            data["cores"] = cores
        comparison = compared(setup, case, predicted, measurement, cores)
        if comparison is not None and comparison.because:
            data["because"] = comparison.because
    if checked is not None and verification is not None:
        data["verify"] = verified_data(case, checked, verification)
    timeline = None if measurement is None else measurement.timeline
    whole = document("run", inputs, data | _timeline_data(timeline), seed=case.seed)
    if as_json:
        print_json(whole)
    else:
        print_lines(_lines(data))
    # After the answer, which a full disk should not take along.
    _write(files, whole, predicted, timeline, case.plan, comparison)
    if verification is not None and not verification.equal:
        raise typer.Exit(1)


def _measured_data(
    setup: Setup,
    case: Case,
    measurement: Measurement,
    prediction: Prediction,
    served: PsRun | None,
) -> dict[str, Any]:
    """The measurement beside what was predicted for it."""
    from parsim.execute.measurement_file import measurement_data

    data = measurement_data(
        measurement,
        predicted_s=prediction.step_time_s if served is None else case.plan.dp / served.steps_per_s,
        predicted_gradient_bytes=_gradient_bytes(setup, case),
    )
    if served is not None:
        data["parameter_server"] = served_data(case, measurement, served)
    return data


def _timeline_data(timeline: Timeline | None) -> dict[str, Any]:
    from parsim.export.timeline_json import timeline_to_data

    return {} if timeline is None else {"timeline": timeline_to_data(timeline)}


def _run_one_rank(
    setup: Setup,
    case: Case,
    rank: int,
    how: Launch,
    inputs: dict[str, Any],
    files: _Files,
    *,
    as_json: bool,
) -> None:
    """Measure one rank, replay the step with it, and answer."""
    step = one_rank_step(setup, case, rank, how)
    whole = document("run", inputs, one_rank_data(step), seed=case.seed)
    if as_json:
        print_json(whole)
    else:
        print_lines(one_rank_lines(step))
    _write(files, whole, step.predicted_timeline, step.replayed_timeline, case.plan)


def _write(
    files: _Files,
    whole: dict[str, Any],
    predicted: Timeline,
    measured: Timeline | None,
    plan: ParallelPlan,
    comparison: ItemisedComparison | None = None,
) -> None:
    """The files that were asked for."""
    from parsim.config import dump_json, write_file

    if files.measurement is not None:
        write_file(files.measurement, dump_json(whole))
        say(f"wrote {files.measurement}")
    if files.chart is not None and measured is not None:
        if comparison is not None:
            draw_overlay(files.chart, predicted, measured, plan, comparison)
        else:
            from parsim.charts.comparison import draw_comparison

            draw_comparison(predicted, measured, files.chart)
        say(f"wrote {files.chart}")
    if files.trace is not None and measured is not None:
        from parsim.export.chrome_trace import write_chrome_trace

        write_chrome_trace(files.trace, [predicted, measured])
        say(f"wrote {files.trace}")
    if measured is not None:
        write_report(files.report, whole, [predicted, measured])


def _cpu_profile(plan: str) -> str:
    """The profile to predict CPU ranks with: the plan file's own if it is of a CPU, else the shipped."""
    from parsim.config import load_cluster
    from parsim.plan_file import read_plan

    named = read_plan(plan).hardware
    return named if named and load_cluster(named).device.is_host else "local-cpu"


def _predict(setup: Setup, case: Case, how: Launch) -> tuple[Prediction, Any]:
    """The prediction, and its timeline with a row for every real rank."""
    from parsim.simulate.fold import unfolded
    from parsim.simulate.prediction import predict

    cores = None if case.servers is not None else how.cores_shared(case)
    prediction, timeline = predict(setup.job, case.plan, setup.costs(), cores=cores)
    return prediction, unfolded(timeline, case.plan)


def _gradient_bytes(setup: Setup, case: Case) -> list[float]:
    """What each rank is predicted to send in a step to sum its gradients."""
    from parsim.cost.step import step_cost

    by_pipeline_rank = [0.0] * case.plan.pp
    for stage, sync in enumerate(step_cost(case.job, case.plan, setup.costs()).syncs):
        by_pipeline_rank[case.plan.stage_rank(stage)] += sync.reduce_bytes
    return [by_pipeline_rank[case.plan.coordinate(rank).pp] for rank in range(case.plan.gpus)]


def _lines(data: dict[str, Any]) -> list[str]:
    from parsim.execute.steps import MIN_CLEAN_STEPS
    from parsim.units import format_bytes, format_duration

    if not data["steps_s"]:
        return [f"not timed  {data['not_timed']}", *verified_lines(data["verify"])]
    quiet = len(data["steps_s"]) - sum(data["disturbed"])
    steps = len(data["steps_s"])
    among = f"{quiet} undisturbed steps of {steps}"
    if quiet < MIN_CLEAN_STEPS:
        among = f"all {steps} steps, {steps - quiet} of them disturbed by other load"
    lines = [
        f"measured   {format_duration(data['step_time_s'])}   median of {among}, "
        f"spread {data['spread']:.1%}, {data['world_size']} ranks",
        f"predicted  {format_duration(data['predicted_s'])}   error {data['error']:+.1%}",
        f"loss       {data['loss'][0]:.6f} to {data['loss'][-1]:.6f}",
    ]
    if "because" in data:
        lines.insert(2, f"           {data['because']}")
    if "gradient_sent_bytes" in data:
        sent = format_bytes(max(data["gradient_sent_bytes"]))
        foreseen = format_bytes(max(data["predicted_gradient_sent_bytes"]))
        lines.append(f"gradients  {sent} sent by a rank in each step (predicted {foreseen})")
    if "parameter_server" in data:
        lines += served_lines(data["parameter_server"])
    elif "staleness" in data:
        late = ", ".join(str(each["max"]) for each in data["staleness"])
        kept = ", ".join(map(str, data["weight_versions"]))
        lines.append(f"weights    gradients {late} updates late, {kept} versions kept, by rank")
    if "loss_scale" in data:
        scale = data["loss_scale"]
        lines.append(f"loss scale {scale['final']:g}, {scale['skipped_steps']} steps left out")
    lines += [f"restarted  {what}" for what in data["restarts"]]
    if "verify" in data:
        lines += verified_lines(data["verify"])
    return lines
