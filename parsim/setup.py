"""What a question is about: names, paths and numbers, as given, become the nouns that answer it.

The command line and the Python API both load models, hardware, software and plan files here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parsim.cost.stage import CostModel
    from parsim.hardware import Cluster
    from parsim.model import ModelSpec
    from parsim.plan import Job, ParallelPlan
    from parsim.search.partition.chosen import Partitioned
    from parsim.stack import Stack

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

    model: str | ModelSpec | None = None
    """By name or path; only Python passes nouns."""
    hardware: str | Cluster | None = None
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
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {key: value for key, value in values.items() if value is not None}


def load_setup(flags: Flags) -> Setup:
    """Nouns from names and numbers; raises ParsimError where one is missing or wrong."""
    from parsim.hardware import default_precision, peak_flops_per_s
    from parsim.plan import Job

    spec = model_of(flags)
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
    hardware = flags.hardware if isinstance(flags.hardware, str) else cluster.name
    origin: dict[str, Any] = {"hardware": hardware, "stack": flags.stack or cluster.default_stack}
    overrides = flags.overrides()
    return origin | ({"hardware_overrides": overrides} if overrides else {})


def model_of(flags: Flags) -> ModelSpec:
    """The model; raises ParsimError where it is missing or unknown."""
    from parsim.config import load_model

    if flags.model is None:
        raise _missing("--model", hint="`parsim models` lists the shipped ones")
    return load_model(flags.model) if isinstance(flags.model, str) else flags.model


def load_machine(flags: Flags) -> tuple[Cluster, Stack]:
    """The cluster with what the flags say better, and the software on it."""
    from parsim.config import load_cluster, load_stack
    from parsim.cost.host import stack_on
    from parsim.hardware import with_overrides

    if flags.hardware is None:
        raise _missing("--hardware", hint="`parsim hardware` lists the shipped ones")
    named = flags.hardware
    cluster = load_cluster(named) if isinstance(named, str) else named
    cluster = with_overrides(
        cluster, inter_node=flags.inter_node, intra_node=flags.intra_node, memory=flags.memory
    )
    return cluster, stack_on(load_stack(flags.stack or cluster.default_stack), cluster)


def load_plan(
    given: str | ParallelPlan,
    flags: Flags,
    *,
    schedule: str | None = None,
    rank_hardware: Sequence[str] | None = None,
) -> tuple[Setup, ParallelPlan]:
    """A plan (a file, a short form or a noun) with its job: flags win over what a plan file says.

    `schedule` is another one than the plan's, rank_hardware other devices of some pipeline ranks. What a
    short form leaves to parsim is chosen.

    Without a global batch in either, each pipeline runs 2·pp micro-batches. A short form that does not
    name tp_overlap has the stack's usual one. The plan is legal.
    """
    from parsim.plan_file import PlanFile, read_plan
    from parsim.schedule import with_schedule
    from parsim.schedule.check import check_plan

    file, asked = read_plan(given) if isinstance(given, str) else PlanFile(plan=given), flags
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
        if isinstance(given, str) and "tp_overlap" not in given:
            plan = replace(plan, tp_overlap=plan.tp > 1 and setup.stack.default_tp_overlap)
    check_plan(setup.job, plan, setup.cluster)
    _check_size(setup.job, plan)
    setup = replace(setup, rank_hardware=tuple(rank_hardware or file.rank_hardware))
    if file.auto:
        from parsim.search.partition.chosen import partitioned

        chosen = partitioned(
            setup.job,
            plan,
            rank_costs(setup.rank_hardware, setup, asked, plan) or (setup.costs(),) * plan.pp,
            split="stage_split" in file.auto,
            counts="recompute_layers" in file.auto,
        )
        return replace(setup, partitioned=chosen), chosen.plan
    return setup, plan


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
    cluster, stack = load_machine(flags)
    given = {key: getattr(flags, key) for key in ("global_batch", "seq_len", "precision")}
    changes = {key: value for key, value in given.items() if value is not None}
    if flags.model is not None:
        changes["model"] = model_of(flags)
    return Setup(
        job=replace(job, **changes), cluster=cluster, stack=stack, origin=_origin(flags, cluster)
    )


def _missing(flag: str, hint: str | None = None) -> Exception:
    from parsim.errors import ParsimError

    return ParsimError(f"{flag} is missing", where=flag, hint=hint)


def rank_costs(
    texts: Sequence[str] | None, setup: Setup, flags: Flags, plan: ParallelPlan
) -> tuple[CostModel, ...]:
    """The cost model of every pipeline rank; none where all have the same devices.

    Raises ParsimError for ranks that the plan does not have, or devices that cannot train in the job's
    precision.
    """
    from parsim.cost.stage import CostModel
    from parsim.errors import ParsimError
    from parsim.hardware import peak_flops_per_s

    if not texts:
        return ()
    by_rank = [setup.costs()] * plan.pp
    for text in texts:
        ranks, equals, hardware = (piece.strip() for piece in text.partition("="))
        first, dash, last = ranks.partition("-")
        if not equals or not first.isdecimal() or not (last.isdecimal() or not dash):
            raise ParsimError(
                "devices are given for pipeline ranks",
                where="--rank-hardware",
                got=text,
                expected="8-15=a100-sxm-80gb or 3=a100-sxm-80gb",
            )
        low, high = int(first), int(last or first)
        if not low <= high < plan.pp:
            raise ParsimError(
                "there are no such pipeline ranks",
                where=f"--rank-hardware {text}",
                got=ranks,
                expected=f"0 to {plan.pp - 1}",
            )
        cluster, _ = load_machine(replace(flags, hardware=hardware, stack=setup.stack.name))
        peak_flops_per_s(cluster.device, setup.job.precision)
        by_rank[low : high + 1] = [CostModel(setup.job.model, cluster, setup.stack)] * (high - low + 1)
    return tuple(by_rank)
