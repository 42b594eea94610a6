"""`parsim simulate`: one plan, replayed; its timeline as chart, trace and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parsim.cli.auto_stages import stages_section
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
    require_flush,
)
from parsim.cli.output import document, print_json, print_prediction, say
from parsim.cli.output_paths import to_file, to_picture
from parsim.cli.report import ReportOption, write_report
from parsim.cli.simulate_charts import RooflineOption, WaterfallOption, parts_section
from parsim.cli.simulate_detail import (
    DetailChartOption,
    DetailMicroBatchesOption,
    DetailOption,
    DetailRankOption,
    detail_section,
    read_detail,
)
from parsim.cli.simulate_goodput import GoodputChartOption, MtbfOption, goodput_section
from parsim.cli.simulate_network import (
    FabricChartOption,
    FabricOption,
    network_section,
)
from parsim.cli.simulate_ps import (
    PsChartOption,
    PsOption,
    plan_of_workers,
    ps_section,
    read_ps,
)
from parsim.cli.simulate_uneven import (
    JitterOption,
    RankHardwareOption,
    SeedOption,
    StragglerOption,
    read_unevenness,
    unevenness_section,
)
from parsim.cli.simulated_step import StepRequest, pictures_section, read_schedule, simulate_step
from parsim.setup import Flags, load_plan, rank_costs


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
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule",
            help="Another schedule than the plan's, such as zbv.",
            autocompletion=complete_schedule,
        ),
    ] = None,
    chart: Annotated[
        Path | None,
        typer.Option("--chart", help="Draw the schedule: .png, .svg or .pdf.", callback=to_picture),
    ] = None,
    memory_chart: Annotated[
        Path | None,
        typer.Option(
            "--memory-chart", help="Draw memory over time: .png, .svg or .pdf.", callback=to_picture
        ),
    ] = None,
    waterfall: WaterfallOption = None,
    roofline: RooflineOption = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", help="Write a Chrome trace, to open in Perfetto.", callback=to_file),
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
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replay one step of a plan: step time, breakdown, memory, timeline.

    Exit status 1 where the plan does not fit in memory.

    \b
    Examples:
      parsim simulate --model gpt3-175b --hardware a100-sxm-80gb --plan dp=8,tp=8,pp=8 --chart step.png
      parsim simulate --plan best.json --trace step.json
    """
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
    setup, parallel_plan = load_plan(
        plan_of_workers(plan, ps_settings), flags, schedule=schedule, rank_hardware=rank_hardware
    )
    of_one_step = {"--fabric": fabric, "--ps": ps, "--straggler": straggler, "--jitter": jitter}
    require_flush(parallel_plan, *(flag for flag, value in of_one_step.items() if value))
    request = StepRequest(
        setup=setup,
        plan=parallel_plan,
        schedule=read_schedule(schedule_csv, parallel_plan, setup.job),
        costs=setup.costs(),
        rank_hardware=setup.rank_hardware,
        costs_by_rank=rank_costs(setup.rank_hardware, setup, flags, parallel_plan),
        uneven=read_unevenness(straggler, jitter, seed, parallel_plan),
        seed=seed,
    )
    step = simulate_step(request, fabric)
    closer, timeline = detail_section(wanted, step)
    sections = (
        stages_section(setup.partitioned),
        closer,
        network_section(fabric_chart, step),
        unevenness_section(step),
        goodput_section(mtbf, goodput_chart, step),
        ps_section(ps_settings, ps_chart, request),
        parts_section(step, waterfall=waterfall, roofline=roofline),
        pictures_section(step, timeline, chart=chart, memory_chart=memory_chart, trace=trace),
    )
    item = step.prediction.to_item() | setup.origin
    for section in sections:
        item |= section.item
    inputs = flags.given() | {
        "plan": plan,
        "schedule": schedule,
        "schedule_csv": schedule_csv and str(schedule_csv),
        "straggler": straggler,
        "jitter": jitter or None,
        "rank_hardware": rank_hardware,
        "fabric": fabric,
        "mtbf": mtbf,
        "ps": ps,
        "detail": detail,
    }
    whole = document("simulate", inputs, item, seed=seed)
    if as_json:
        print_json(whole)
    else:
        print_prediction(step.prediction, [line for section in sections for line in section.lines])
    for path in (path for section in sections for path in section.written):
        say(f"wrote {path}")
    write_report(report, whole, [timeline])
    if not step.prediction.fits:
        say(
            "does not fit: a larger tp, pp or zero, a smaller micro_batch, or recompute=full; "
            "`parsim plan` finds the plans that do"
        )
        raise typer.Exit(1)
