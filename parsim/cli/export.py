"""`parsim export`: a plan in another tool's words."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

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
    StackOption,
    load_plan,
    require_flush,
)
from parsim.cli.output import document, print_json, say


class Target(StrEnum):
    """What a plan can be exported to."""

    SCHEDULE_CSV = "schedule-csv"


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
    """Write a plan's pipeline schedule as torch.distributed.pipelining reads it: a row a rank.

    \b
    Examples:
      parsim export best.json --to schedule-csv -o schedule.csv
      parsim export pp=4,schedule=gpipe --to schedule-csv --model gpt-1.7b --hardware a100-sxm-80gb
    """
    from parsim.config import write_file
    from parsim.schedule import make_schedule
    from parsim.schedule.csv_file import schedule_to_csv

    flags = Flags(
        model=model, hardware=hardware, global_batch=global_batch, seq_len=seq_len, stack=stack
    )
    setup, parallel_plan = load_plan(plan, flags)
    for line in stage_lines(setup.partitioned):
        say(line.strip())
    require_flush(parallel_plan, "--to schedule-csv")
    schedule = make_schedule(parallel_plan, parallel_plan.num_micro_batches(setup.job))
    if schedule.chains > 1:
        say("note: torch.distributed.pipelining cannot run this: two ranks hold each stage of the model")
    text = schedule_to_csv(schedule)
    if output is not None:
        write_file(output, text)
        say(f"wrote {output}")
    if as_json:
        answer = {"to": to.value, "output": str(output) if output else None, "text": text}
        print_json(document("export", flags.given() | {"plan": plan}, answer))
    elif output is None:
        typer.echo(text, nl=False)
