"""`parsim capacity`: days, dollars and energy of a training on clusters of any size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parsim.capacity_cases import (
    GPU_MTBF,
    check_numbers,
    check_prices,
    read_cases,
    read_gpu_counts,
    read_long_runs,
    read_names,
    read_prices,
)
from parsim.cli.capacity_inputs import budget_usd, deadline_s
from parsim.cli.capacity_report import print_report
from parsim.cli.completion import complete_hardware, complete_model
from parsim.cli.constraints import Allowed, with_constraints
from parsim.cli.options import (
    InterNodeOption,
    IntraNodeOption,
    JsonOption,
    MemoryOption,
    PrecisionOption,
    SeqLenOption,
    StackOption,
)
from parsim.cli.output import document, noticing_interrupts, print_json, progress, say
from parsim.cli.output_paths import to_file, to_picture
from parsim.cli.report import ReportOption, write_report
from parsim.setup import Flags

if TYPE_CHECKING:
    from parsim.search.capacities import Capacity


@with_constraints
def capacity(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="Shipped names or files, separated by commas.",
            autocompletion=complete_model,
        ),
    ],
    hardware: Annotated[
        str,
        typer.Option(
            "--hardware",
            help="Shipped profiles or files, separated by commas.",
            autocompletion=complete_hardware,
        ),
    ],
    gpus: Annotated[
        str, typer.Option("--gpus", help="Numbers of GPUs: 512,768 or 256-4096, doubling each time.")
    ],
    tokens: Annotated[
        str, typer.Option("--tokens", help="To train on: 15.6T, or 20x the (active) parameters.")
    ],
    deadline: Annotated[
        str | None, typer.Option("--deadline", help='At most so long: "90 days", "8 weeks".')
    ] = None,
    budget: Annotated[str | None, typer.Option("--budget", help="At most so many USD: 5M.")] = None,
    global_batch: Annotated[
        int | None,
        typer.Option(
            "--global-batch",
            help="Sequences in a step [default: what suits the tokens, by arXiv 2503.04715].",
        ),
    ] = None,
    seq_len: SeqLenOption = None,
    stack: StackOption = None,
    precision: PrecisionOption = None,
    inter_node: InterNodeOption = None,
    intra_node: IntraNodeOption = None,
    memory: MemoryOption = None,
    usd_per_gpu_hour: Annotated[
        float | None, typer.Option("--usd-per-gpu-hour", help="Price [default: the profile's].")
    ] = None,
    prices: Annotated[
        Path | None,
        typer.Option("--prices", help="CSV of hardware,usd_per_gpu_hour,source,date for several."),
    ] = None,
    mtbf: Annotated[
        str,
        typer.Option(
            "--mtbf",
            help="Mean time between failures of a GPU, then settings as of `parsim simulate --mtbf`: "
            "50000h,spares=8. The default is Llama 3's.",
        ),
    ] = GPU_MTBF,
    pue: Annotated[
        float | None, typer.Option("--pue", help="Also energy of a facility of this effectiveness.")
    ] = None,
    *,
    allowed: Allowed,
    top: Annotated[int, typer.Option("--top", min=1, help="Plans for each cluster.")] = 1,
    budget_s: Annotated[
        float, typer.Option("--budget-s", min=0, help="Stop proving a plan after so many seconds.")
    ] = 60.0,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Also weak scaling: the batch grows with the GPUs.")
    ] = False,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="What 10% more or less of each resource would do.")
    ] = False,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Write all rows as a table.", callback=to_file)
    ] = None,
    chart: Annotated[
        Path | None,
        typer.Option("--chart", help="Draw time against cost: .png, .svg or .pdf.", callback=to_picture),
    ] = None,
    scaling_chart: Annotated[
        Path | None,
        typer.Option("--scaling-chart", help="Draw strong and weak scaling.", callback=to_picture),
    ] = None,
    tornado_chart: Annotated[
        Path | None, typer.Option("--tornado-chart", help="Draw the sensitivity.", callback=to_picture)
    ] = None,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Plan a training: how long, what it costs, and which cluster to take.

    For every model, hardware and number of GPUs the best plan is searched for. Exit status 1 where
    nothing fits or nothing meets the deadline and the budget.

    \b
    Examples:
      parsim capacity --model llama-3.1-405b --hardware h100-sxm-80gb --gpus 8192,16384 --tokens 15.6T
      parsim capacity --model llama-3.1-8b --hardware h100-sxm-80gb,b200-sxm-180gb --gpus 64-512 \\
          --tokens 20x --deadline 30days --budget 500k --chart capacity.png
    """
    from parsim.search.capacities import Wanted, find_capacity
    from parsim.search.capacity import Limits
    from parsim.search.capacity_data import capacity_data

    flags = Flags(
        global_batch=global_batch, seq_len=seq_len, stack=stack, precision=precision,
        inter_node=inter_node, intra_node=intra_node, memory=memory,
    )  # fmt: skip
    limits = Limits(deadline_s=deadline_s(deadline), budget_usd=budget_usd(budget))
    check_numbers(pue, usd_per_gpu_hour)
    machines, listed = read_names(hardware, "--hardware"), read_prices(prices)
    cases = list(
        read_cases(
            read_names(model, "--model"), machines, flags, read_gpu_counts(gpus), tokens,
            usd_per_gpu_hour, listed,
        )
    )  # fmt: skip
    check_prices(limits, cases)
    long_run, assumed = read_long_runs(mtbf)
    wanted = Wanted(
        limits=limits,
        constraints=allowed.constraints(),
        long_run=long_run,
        assumed=assumed,
        top=top,
        budget_s=budget_s,
        scaling=scaling or scaling_chart is not None,
        sensitivity=sensitivity or tornado_chart is not None,
        pue=pue,
    )
    with noticing_interrupts() as interrupted, progress() as show:
        found = find_capacity(cases, wanted, progress=show, interrupted=interrupted)
    inputs = flags.given() | {
        "model": model, "hardware": hardware, "gpus": gpus, "tokens": tokens, "deadline": deadline,
        "budget": budget, "mtbf": mtbf, "usd_per_gpu_hour": usd_per_gpu_hour, "pue": pue, "top": top,
        "prices": str(prices) if prices else None,
        "constraints": allowed.given(),
    }  # fmt: skip
    whole = document("capacity", inputs, capacity_data(found))
    _answer(found, whole, _write(found, chart, scaling_chart, tornado_chart, csv), as_json=as_json)
    write_report(report, whole)
    if found.partial:
        say("interrupted: only what was done by then is shown")
        raise typer.Exit(130)
    if not any(limits.met_by(option) for option in found.options):
        raise typer.Exit(1)


def _answer(found: Capacity, whole: dict[str, Any], written: list[Path], *, as_json: bool) -> None:
    """The answer on stdout, what was left out or written on stderr."""
    for note in found.notes:
        say(note)
    if as_json:
        print_json(whole)
    else:
        print_report(found)
    for path in written:
        say(f"wrote {path}")


def _write(
    found: Capacity,
    chart: Path | None,
    scaling_chart: Path | None,
    tornado_chart: Path | None,
    table: Path | None,
) -> list[Path]:
    """The charts that were asked for and that there is something to draw of, and the table."""
    written = []
    if chart is not None and found.options:
        from parsim.charts.pareto import draw_pareto

        draw_pareto(found.options, found.wanted.limits, chart)
        written.append(chart)
    if scaling_chart is not None and found.strong:
        from parsim.charts.scaling import draw_scaling

        draw_scaling(found.strong, found.weak, scaling_chart)
        written.append(scaling_chart)
    if tornado_chart is not None and found.sensitivity:
        from parsim.charts.tornado import draw_tornado

        draw_tornado(found.sensitivity, tornado_chart)
        written.append(tornado_chart)
    for path in (chart, scaling_chart, tornado_chart):
        if path is not None and path not in written:
            say(f"nothing to draw in {path}")
    if table is not None:
        from parsim.config import write_file
        from parsim.search.capacity_data import capacity_csv

        write_file(table, capacity_csv(found))
        written.append(table)
    return written
