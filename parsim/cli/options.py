"""Options that several commands share, and how they become nouns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parsim.cli.completion import complete_hardware, complete_model, complete_stack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parsim.cost.stage import CostModel
    from parsim.hardware import Cluster
    from parsim.plan import Job, ParallelPlan
    from parsim.search.partition.chosen import Partitioned
    from parsim.stack import Stack

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


MOST_ACTIONS = 2_000_000
"""Forwards and backwards of a step: a minute or two, and some gigabytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a command works on."""

    job: Job
    cluster: Cluster
    stack: Stack
    origin: dict[str, Any]
    """Names or paths of hardware and stack as given, and what the user knew better than the profile."""
    rank_hardware: tuple[str, ...] = ()
    """Other devices of some pipeline ranks."""
    partitioned: Partitioned | None = None
    """The plan's stages, where they were chosen."""

    def costs(self) -> CostModel:
        """The cost model of this model, cluster and stack."""
        from parsim.cost.stage import CostModel

        return CostModel(self.job.model, self.cluster, self.stack)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The flags that say what to work on, as given; None where the user left one out."""

    model: str | None = None
    hardware: str | None = None
    global_batch: int | None = None
    seq_len: int | None = None
    stack: str | None = None
    precision: str | None = None
    inter_node: str | None = None
    intra_node: str | None = None
    memory: str | None = None

    def overrides(self) -> dict[str, str]:
        """What the user knows better than the hardware profile."""
        keys = ("inter_node", "intra_node", "memory")
        return {key: value for key, value in self.given().items() if key in keys}

    def given(self) -> dict[str, Any]:
        """The flags that were given, for the `inputs` of a JSON document."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def load_setup(flags: Flags) -> Setup:
    """Nouns from names and numbers; raises ParsimError where one is missing or wrong."""
    from parsim.config import load_model
    from parsim.hardware import default_precision, peak_flops_per_s
    from parsim.plan import Job

    spec = load_model(_required(flags.model, "--model", "parsim models"))
    cluster, stack = load_machine(flags)
    if flags.global_batch is None:
        raise _missing("--global-batch")
    precision = flags.precision or default_precision(cluster.device)
    peak_flops_per_s(cluster.device, precision)
    job = Job(
        model=spec,
        seq_len=spec.max_seq_len if flags.seq_len is None else flags.seq_len,
        global_batch=flags.global_batch,
        precision=precision,
    )
    return Setup(job=job, cluster=cluster, stack=stack, origin=_origin(flags, cluster))


def _origin(flags: Flags, cluster: Cluster) -> dict[str, Any]:
    origin: dict[str, Any] = {"hardware": flags.hardware, "stack": flags.stack or cluster.default_stack}
    overrides = flags.overrides()
    return origin | ({"hardware_overrides": overrides} if overrides else {})


def load_machine(flags: Flags) -> tuple[Cluster, Stack]:
    """The cluster with what the flags say better, and the software on it."""
    from parsim.config import load_cluster, load_stack
    from parsim.cost.host import stack_on
    from parsim.hardware import with_overrides

    cluster = load_cluster(_required(flags.hardware, "--hardware", "parsim hardware"))
    cluster = with_overrides(
        cluster, inter_node=flags.inter_node, intra_node=flags.intra_node, memory=flags.memory
    )
    return cluster, stack_on(load_stack(flags.stack or cluster.default_stack), cluster)


def load_plan(
    text: str,
    flags: Flags,
    *,
    schedule: str | None = None,
    rank_hardware: Sequence[str] | None = None,
) -> tuple[Setup, ParallelPlan]:
    """A plan with the job it is for: flags win over what the plan file says.

    `schedule` is another one than the plan's, rank_hardware other devices of some pipeline ranks. What a
    short form leaves to parsim is chosen.

    Without a global batch in either, each pipeline runs 2·pp micro-batches. A short form that does not
    name tp_overlap has the stack's usual one. The plan is legal.
    """
    from parsim.plan_file import read_plan
    from parsim.schedule import with_schedule
    from parsim.schedule.check import check_plan

    file, given = read_plan(text), flags
    plan = file.plan if schedule is None else with_schedule(file.plan, schedule)
    if flags.hardware is None and file.hardware is not None:
        known = {**file.hardware_overrides, **flags.overrides()}
        flags = replace(
            flags,
            hardware=file.hardware,
            inter_node=known.get("inter_node"),
            intra_node=known.get("intra_node"),
            memory=known.get("memory"),
        )
    flags = replace(flags, stack=flags.stack or file.stack)
    if file.job is not None:
        setup = _setup_of_file(file.job, flags)
    else:
        if flags.global_batch is None:
            flags = replace(flags, global_batch=2 * plan.pp * plan.dp * plan.micro_batch)
        setup = load_setup(flags)
        if "tp_overlap" not in text:
            plan = replace(plan, tp_overlap=plan.tp > 1 and setup.stack.default_tp_overlap)
    check_plan(setup.job, plan, setup.cluster)
    _check_size(setup.job, plan)
    setup = replace(setup, rank_hardware=tuple(rank_hardware or file.rank_hardware))
    if file.auto:
        from parsim.cli.simulate_uneven import rank_costs
        from parsim.search.partition.chosen import partitioned

        chosen = partitioned(
            setup.job,
            plan,
            rank_costs(setup.rank_hardware, setup, given, plan) or (setup.costs(),) * plan.pp,
            split="stage_split" in file.auto,
            counts="recompute_layers" in file.auto,
        )
        return replace(setup, partitioned=chosen), chosen.plan
    return setup, plan


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


def _check_size(job: Job, plan: ParallelPlan) -> None:
    """Raises ParsimError for a step of more actions than one waits for."""
    from parsim.errors import ParsimError

    actions = 2 * plan.num_stages * plan.num_micro_batches(job)
    if actions > MOST_ACTIONS:
        raise ParsimError(
            "this step has too many actions to be replayed",
            where="global_batch",
            got=f"{plan.num_micro_batches(job):,} micro-batches on {plan.num_stages} stages",
            expected=f"at most {MOST_ACTIONS // (2 * plan.num_stages):,} micro-batches",
            hint="a larger micro_batch or dp, or a part of the batch",
        )


def _setup_of_file(job: Job, flags: Flags) -> Setup:
    """The job of a plan file with what the flags say instead."""
    from parsim.config import load_model

    cluster, stack = load_machine(flags)
    given = {key: getattr(flags, key) for key in ("global_batch", "seq_len", "precision")}
    changes = {key: value for key, value in given.items() if value is not None}
    if flags.model is not None:
        changes["model"] = load_model(flags.model)
    return Setup(
        job=replace(job, **changes), cluster=cluster, stack=stack, origin=_origin(flags, cluster)
    )


def _required(value: str | None, flag: str, lister: str) -> str:
    if value is None:
        raise _missing(flag, hint=f"`{lister}` lists the shipped ones")
    return value


def _missing(flag: str, hint: str | None = None) -> Exception:
    from parsim.errors import ParsimError

    return ParsimError(f"{flag} is missing", where=flag, hint=hint)
