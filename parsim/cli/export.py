"""`parsim export`: a plan in another tool's words."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parsim.cli.auto_stages import stage_lines
from parsim.cli.options import (
    GlobalBatchOption,
    HardwareOption,
    JsonOption,
    ModelOption,
    PlanArgument,
    SeqLenOption,
    StackOption,
    require_flush,
)
from parsim.cli.output import document, print_json, say
from parsim.cli.output_paths import to_file
from parsim.setup import Flags, Setup, load_plan

if TYPE_CHECKING:
    from parsim.export.target import Exported
    from parsim.plan import ParallelPlan


class Target(StrEnum):
    """What a plan can be exported to."""

    DEEPSPEED = "deepspeed"
    MEGATRON = "megatron"
    SCHEDULE_CSV = "schedule-csv"
    SLURM = "slurm"
    TORCHTITAN = "torchtitan"


def export(
    plan: PlanArgument,
    to: Annotated[Target, typer.Option("--to", help="The format.")],
    model: ModelOption = None,
    hardware: HardwareOption = None,
    global_batch: GlobalBatchOption = None,
    seq_len: SeqLenOption = None,
    stack: StackOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write to this file instead of stdout.", callback=to_file),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a plan in the words of another tool.

    megatron: a script that starts Megatron-LM's pretrain_gpt.py with model, plan and batch.
    torchtitan: a config module (Python) of model, plan and batch; with -o also a schedule's CSV.
    deepspeed: the JSON for --deepspeed_config; the model stays in your script.
    slurm: an sbatch script that starts `parsim run` on the nodes it needs.
    schedule-csv: its pipeline schedule as torch.distributed.pipelining reads it, a row a rank.

    What the tool does in its own way is listed ("not expressed: …"); a plan that it would run as
    something else is refused.

    \b
    Examples:
      parsim export best.json --to megatron -o train.sh
      parsim export best.json --to torchtitan -o parsim_plan.py
      parsim export dp=8,zero=3 --to deepspeed --model llama-3.1-8b --hardware h100-sxm-80gb -o ds.json
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
    exported = _export(to, setup, parallel_plan, plan, flags)
    files = {} if output is None else _files(exported, output)
    for path, text in files.items():
        write_file(path, text)
        say(f"wrote {path}")
    for sentence in exported.not_expressed:
        say(f"not expressed: {sentence}")
    if exported.schedule_csv is not None and output is None:
        say("note: this reads its schedule from a file beside it; -o FILE.py writes both")
    if as_json:
        answer: dict[str, Any] = {
            "to": to.value,
            "output": str(output) if output else None,
            "files": [str(path) for path in files],
            "text": exported.text,
            "schedule_csv": exported.schedule_csv,
            "not_expressed": list(exported.not_expressed),
        }
        print_json(document("export", flags.given() | {"plan": plan}, answer))
    elif output is None:
        typer.echo(exported.text, nl=False)


def _export(to: Target, setup: Setup, plan: ParallelPlan, given: str, flags: Flags) -> Exported:
    from dataclasses import replace

    from parsim.export.target import Exported

    if to is Target.SLURM:
        return Exported(text=_slurm(setup, plan, given, flags))
    if to is Target.SCHEDULE_CSV:
        return _schedule_csv(setup, plan)
    require_flush(plan, f"--to {to.value}")
    if to is Target.MEGATRON:
        from parsim.export.megatron import megatron_script as write
    elif to is Target.TORCHTITAN:
        from parsim.export.torchtitan import torchtitan_module as write
    else:
        from parsim.export.deepspeed import deepspeed_config as write
    exported = write(setup.job, plan, setup.stack, devices_per_node=setup.cluster.gpus_per_node)
    if not setup.rank_hardware:
        return exported
    mixed = (
        f"other devices of some pipeline ranks ({', '.join(setup.rank_hardware)}): place them yourself"
    )
    return replace(exported, not_expressed=(*exported.not_expressed, mixed))


def _files(exported: Exported, output: Path) -> dict[Path, str]:
    """The files to write, by path."""
    from parsim.errors import ParsimError

    files = {output: exported.text}
    if exported.schedule_csv is not None:
        if output.suffix == ".csv":
            raise ParsimError("the schedule beside it is called so", where="--output", got=str(output),
                              expected="a name that ends with .py")  # fmt: skip
        files[output.with_suffix(".csv")] = exported.schedule_csv
    return files


def _schedule_csv(setup: Setup, plan: ParallelPlan) -> Exported:
    from parsim.export.target import Exported
    from parsim.schedule import make_schedule
    from parsim.schedule.csv_file import schedule_to_csv

    require_flush(plan, "--to schedule-csv")
    schedule = make_schedule(plan, plan.num_micro_batches(setup.job))
    two_chains = ("stages that two ranks hold each: torch.distributed.pipelining cannot run this",)
    return Exported(
        text=schedule_to_csv(schedule), not_expressed=two_chains if schedule.chains > 1 else ()
    )


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
