"""Options that several commands share, and what they go with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from parsim.cli.completion import complete_hardware, complete_model, complete_stack

if TYPE_CHECKING:
    from parsim.plan import ParallelPlan

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A shipped name, a TOML file, a Hugging Face config.json, or hf:org/name.",
        autocompletion=complete_model,
    ),
]
HardwareOption = Annotated[
    str | None,
    typer.Option(
        "--hardware", help="A shipped profile, or a TOML file.", autocompletion=complete_hardware
    ),
]
GlobalBatchOption = Annotated[
    int | None, typer.Option("--global-batch", help="Sequences in a step, over all GPUs.")
]
SeqLenOption = Annotated[
    int | None, typer.Option("--seq-len", help="Tokens in a sequence [default: the model's own].")
]
StackOption = Annotated[
    str | None,
    typer.Option(
        "--stack",
        help="Training software [default: the hardware's own].",
        autocompletion=complete_stack,
    ),
]
PrecisionOption = Annotated[
    str | None, typer.Option("--precision", help="dtype of the GEMMs [default: bf16 where there is].")
]
InterNodeOption = Annotated[
    str | None,
    typer.Option("--inter-node", help='Bandwidth between nodes per GPU and direction, "400Gb/s".'),
]
IntraNodeOption = Annotated[
    str | None,
    typer.Option("--intra-node", help='Bandwidth inside a node per GPU and direction, "450GB/s".'),
]
MemoryOption = Annotated[str | None, typer.Option("--memory", help='Memory of one device, "80GB".')]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
PlanArgument = Annotated[
    str,
    typer.Argument(
        metavar="PLAN", help="A plan file (JSON), or the short form dp=2,tp=4,pp=2,micro_batch=1."
    ),
]


def require_flush(plan: ParallelPlan, *flags: str) -> None:
    """Raises ParsimError where what flags ask for is about a step that ends in a flush."""
    from parsim.errors import ParsimError
    from parsim.plan import ASYNCHRONOUS_SCHEDULES

    if flags and plan.schedule in ASYNCHRONOUS_SCHEDULES:
        raise ParsimError(
            f"{flags[0]} needs steps that end in a flush",
            where=flags[0],
            got=f"schedule={plan.schedule}, which runs on without one",
            hint="leave the flag out, or take a synchronous schedule such as 1f1b",
        )
