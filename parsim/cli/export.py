"""`parsim export`: a plan in another tool's words."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parsim.cli.auto_stages import stage_lines
from parsim.cli.options import (
    Flags,
    GlobalBatchOption,
    HardwareOption,
    JsonOption,
    ModelOption,
    PlanArgument,
    SeqLenOption,
    Setup,
    StackOption,
    load_plan,
    require_flush,
)
from parsim.cli.output import document, print_json, say

if TYPE_CHECKING:
    from parsim.plan import ParallelPlan


class Target(StrEnum):
    """What a plan can be exported to."""

    SCHEDULE_CSV = "schedule-csv"
    SLURM = "slurm"


def export(
    plan: PlanArgument,
    to: Annotated[Target, typer.Option("--to", help="The format.")],
    model: ModelOption = None,
    hardware: HardwareOption = None,
    global_batch: GlobalBatchOption = None,
    seq_len: SeqLenOption = None,
    stack: StackOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this file instead of stdout.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a plan in the words of another tool.

    schedule-csv: its pipeline schedule as torch.distributed.pipelining reads it, a row a rank.
    slurm: an sbatch script that starts `parsim run` on the nodes it needs.

    \b
    Examples:
      parsim export best.json --to schedule-csv -o schedule.csv
      parsim export pp=4,schedule=gpipe --to schedule-csv --model gpt-1.7b --hardware a100-sxm-80gb
      parsim export best.json --to slurm -o job.sbatch && sbatch job.sbatch --steps 1000
    """
    from parsim.config import write_file

    flags = Flags(
        model=model,
        hardware=hardware,
        global_batch=global_batch,
        seq_len=seq_len,
        stack=stack or ("parsim-executor" if to is Target.SLURM else None),  # as `parsim run` has it
    )
    setup, parallel_plan = load_plan(plan, flags)
    for line in stage_lines(setup.partitioned):
        say(line.strip())
    write = _schedule_csv if to is Target.SCHEDULE_CSV else _slurm
    text = write(setup, parallel_plan, plan, flags)
    if output is not None:
        write_file(output, text)
        say(f"wrote {output}")
    if as_json:
        answer = {"to": to.value, "output": str(output) if output else None, "text": text}
        print_json(document("export", flags.given() | {"plan": plan}, answer))
    elif output is None:
        typer.echo(text, nl=False)


def _schedule_csv(setup: Setup, plan: ParallelPlan, given: str, flags: Flags) -> str:
    from parsim.schedule import make_schedule
    from parsim.schedule.csv_file import schedule_to_csv

    require_flush(plan, "--to schedule-csv")
    schedule = make_schedule(plan, plan.num_micro_batches(setup.job))
    if schedule.chains > 1:
        say("note: torch.distributed.pipelining cannot run this: two ranks hold each stage of the model")
    return schedule_to_csv(schedule)


def _slurm(setup: Setup, plan: ParallelPlan, given: str, flags: Flags) -> str:
    """Refuses what `parsim run` would refuse, before anyone waits in a queue for it."""
    from parsim.execute.support import check_executable
    from parsim.export.slurm import sbatch_script
    from parsim.schedule import make_schedule

    schedule = make_schedule(plan, plan.num_micro_batches(setup.job))
    check_executable(setup.job, plan, schedule, setup.job.precision)
    on_gpus = not setup.cluster.device.is_host
    arguments = [_absolute(given), "--device", "cuda" if on_gpus else "cpu"]
    for key, value in flags.given().items():
        text = _absolute(value) if key in ("model", "hardware", "stack") else str(value)
        arguments += [f"--{key.replace('_', '-')}", text]
    return sbatch_script(
        plan,
        setup.cluster.gpus_per_node,
        on_gpus=on_gpus,
        name=setup.job.model.name,
        arguments=arguments,
    )


def _absolute(name: str) -> str:
    """The path of a file from wherever the script is started; a shipped name as it is."""
    from parsim.config import is_file

    return str(Path(name).resolve()) if is_file(Path(name)) else name
