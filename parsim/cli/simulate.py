"""`parsim simulate`: one plan, replayed; its timeline as chart, trace and figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parsim.cli.options import (
    Flags,
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
    load_plan,
    require_flush,
)
from parsim.cli.output import document, print_json, print_prediction, say
from parsim.cli.simulate_detail import (
    DetailChartOption,
    DetailMicroBatchesOption,
    DetailOption,
    DetailRankOption,
    read_detail,
    simulate_detail,
)
from parsim.cli.simulate_goodput import GoodputChartOption, MtbfOption, simulate_goodput
from parsim.cli.simulate_network import (
    FabricChartOption,
    FabricOption,
    network_section,
    simulate_over,
)
from parsim.cli.simulate_ps import (
    PsChartOption,
    PsOption,
    plan_of_workers,
    read_ps,
    simulate_ps,
)
from parsim.cli.simulate_uneven import (
    JitterOption,
    RankHardwareOption,
    SeedOption,
    StragglerOption,
    rank_costs,
    read_unevenness,
    unevenness_section,
    worth_drawing,
)

if TYPE_CHECKING:
    from parsim.plan import ParallelPlan
    from parsim.schedule.action import Schedule


def simulate(
    plan: Annotated[
        str, typer.Option("--plan", help="A plan file, or dp=8,tp=8,pp=8,micro_batch=1,schedule=1f1b.")
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
    chart: Annotated[
        Path | None, typer.Option("--chart", help="Draw the schedule: .png, .svg or .pdf.")
    ] = None,
    memory_chart: Annotated[
        Path | None, typer.Option("--memory-chart", help="Draw memory over time: .png, .svg or .pdf.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write a Chrome trace, to open in Perfetto.")
    ] = None,
    schedule_csv: Annotated[
        Path | None,
        typer.Option(
            "--schedule-csv",
            help="A schedule as torch.distributed.pipelining's CSV: a file that exists is replayed "
            "instead of the plan's own schedule, a new one is written.",
        ),
    ] = None,
    detail: DetailOption = None,
    detail_rank: DetailRankOption = None,
    detail_micro_batches: DetailMicroBatchesOption = None,
    detail_chart: DetailChartOption = None,
    straggler: StragglerOption = None,
    jitter: JitterOption = 0.0,
    rank_hardware: RankHardwareOption = None,
    seed: SeedOption = 0,
    fabric: FabricOption = None,
    fabric_chart: FabricChartOption = None,
    mtbf: MtbfOption = None,
    goodput_chart: GoodputChartOption = None,
    ps: PsOption = None,
    ps_chart: PsChartOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replay one step of a plan: step time, breakdown, memory, timeline.

    Exit status 1 where the plan does not fit in memory.

    \b
    Examples:
      parsim simulate --model gpt3-175b --hardware a100-sxm-80gb --plan dp=8,tp=8,pp=8 --chart step.png
      parsim simulate --plan best.json --trace step.json
    """
    from parsim.simulate.prediction import predict

    wanted = read_detail(detail, detail_rank, detail_micro_batches, detail_chart)
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
    ps_settings = read_ps(ps)
    setup, parallel_plan = load_plan(plan_of_workers(plan, ps_settings), flags)
    of_one_step = {"--fabric": fabric, "--ps": ps, "--straggler": straggler, "--jitter": jitter}
    require_flush(parallel_plan, *(flag for flag, value in of_one_step.items() if value))
    num_micro_batches = parallel_plan.num_micro_batches(setup.job)
    schedule = _schedule(schedule_csv, parallel_plan, num_micro_batches)
    costs, others = setup.costs(), rank_hardware or setup.rank_hardware
    by_rank = rank_costs(others, setup, flags, parallel_plan)
    uneven = read_unevenness(straggler, jitter, seed, parallel_plan)
    contention = None
    if fabric is not None:
        prediction, timeline, contention = simulate_over(
            fabric, setup, parallel_plan, schedule, uneven=uneven is not None or bool(by_rank)
        )
    else:
        prediction, timeline = predict(
            setup.job, parallel_plan, costs, schedule, uneven=uneven, costs_by_rank=by_rank
        )
    drawn = timeline if uneven is None else worth_drawing(timeline, parallel_plan.pp)
    closer, timeline = simulate_detail(
        wanted, timeline, setup.job, parallel_plan, costs, schedule, by_rank
    )
    written = []
    if chart is not None:
        from parsim.charts.gantt import draw_gantt

        draw_gantt(drawn, chart)
        written.append(chart)
    if memory_chart is not None:
        from parsim.charts.memory import draw_memory

        capacity = prediction.device_memory_bytes - prediction.context_bytes
        draw_memory(drawn, memory_chart, capacity_bytes=capacity)
        written.append(memory_chart)
    if trace is not None:
        from parsim.export.chrome_trace import write_chrome_trace

        write_chrome_trace(trace, [timeline])
        written.append(trace)
    network = network_section(contention, fabric_chart, timeline.title)
    goodput = simulate_goodput(mtbf, goodput_chart, prediction, setup.stack, seed)
    unevenness = unevenness_section(uneven, prediction, costs, by_rank, others, schedule)
    servers = simulate_ps(
        ps_settings, ps_chart, setup.job, parallel_plan, costs, schedule,
        uneven=uneven, costs_by_rank=by_rank, seed=seed,
    )  # fmt: skip
    sections = (closer, network, unevenness, goodput, servers)
    item = prediction.to_item() | setup.origin
    for section in sections:
        item |= section.item
    if as_json:
        inputs = flags.given() | {"plan": plan, "schedule_csv": schedule_csv and str(schedule_csv)}
        inputs |= {"mtbf": mtbf, "ps": ps, "straggler": straggler, "jitter": jitter or None}
        inputs |= {"rank_hardware": rank_hardware, "fabric": fabric, "detail": detail}
        print_json(document("simulate", inputs, item, seed=seed))
    else:
        print_prediction(prediction, [line for section in sections for line in section.lines])
    for path in [*written, *(path for section in sections for path in section.written)]:
        say(f"wrote {path}")
    if not prediction.fits:
        raise typer.Exit(1)


def _schedule(path: Path | None, plan: ParallelPlan, num_micro_batches: int) -> Schedule:
    """The schedule from an existing CSV file, or the plan's own, written to a new one."""
    from parsim.config import read_text, write_file
    from parsim.errors import ParsimError
    from parsim.schedule import make_schedule
    from parsim.schedule.check_actions import check_schedule
    from parsim.schedule.csv_file import schedule_from_csv, schedule_to_csv

    if path is not None:
        require_flush(plan, "--schedule-csv")
    if path is None or not path.exists():
        schedule = make_schedule(plan, num_micro_batches)
        if path is not None:
            write_file(path, schedule_to_csv(schedule))
            say(f"wrote {path}")
        return schedule
    schedule = schedule_from_csv(read_text(path), name=path.stem, where=str(path), chains=plan.chains)
    found = (schedule.pp, schedule.num_stages, schedule.num_micro_batches)
    wanted = (plan.pp, plan.num_stages, num_micro_batches)
    if found != wanted:
        raise ParsimError(
            "the schedule is for another plan",
            where=str(path),
            got="{} ranks, {} stages, {} micro-batches".format(*found),
            expected="{} ranks, {} stages, {} micro-batches".format(*wanted),
        )
    check_schedule(schedule)
    for stage, rank in schedule.stage_ranks().items():
        if rank != plan.stage_rank(stage):
            raise ParsimError(
                "the schedule places stages elsewhere than the plan",
                where=str(path),
                got=f"stage {stage} on rank {rank}",
                expected=f"stage {stage} on rank {plan.stage_rank(stage)}",
            )
    return schedule
