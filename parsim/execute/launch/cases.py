"""Running plans on real ranks: timed, or compared with single-process training.

The parent of the ranks needs no torch of its own.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from parsim.errors import ParsimError
from parsim.execute.asynchronous.ps_measurement import served_measurement
from parsim.execute.devices import available_gpus, require_torch
from parsim.execute.launch.attempts import Launch, launch
from parsim.execute.launch.checkpoint_folder import (
    is_claimed,
    prepare,
    starting_again,
    starting_point,
)
from parsim.execute.measurement import (
    Measurement,
    Verification,
    measurement_of,
    verification_of,
)
from parsim.execute.request import Case
from parsim.execute.support import check_executable, check_on_gpus, check_resumable, check_served
from parsim.execute.token_file import TokenFile
from parsim.plan import Job, ParallelPlan
from parsim.schedule.action import Schedule


def execute(
    job: Job,
    plan: ParallelPlan,
    schedule: Schedule,
    *,
    steps: int = 10,
    warmup: int = 2,
    seed: int = 0,
    dtype: str = "fp32",
    how: Launch = Launch(),  # noqa: B008 - immutable
) -> Measurement:
    """Train `steps` steps of a plan on real ranks of this machine and time them.

    `dtype` is fp32, fp64 or bf16 (with fp32 optimizer states). Ranks may exceed the cores of a CPU,
    which they then share, but not the GPUs.
    Raises ParsimError for a plan that the executor refuses, and with the rank where one fails or hangs.
    """
    case = Case(
        job=job, plan=plan, schedule=schedule, steps=steps, warmup=warmup, seed=seed, dtype=dtype
    )
    (result,) = run_cases([case], how)
    assert isinstance(result, Measurement)
    return result


def verification_case(
    job: Job,
    plan: ParallelPlan,
    schedule: Schedule,
    *,
    steps: int = 3,
    seed: int = 0,
    tokens: TokenFile | None = None,
) -> Case:
    """For run_cases(): a plan in float64 on real ranks beside a single process, gradient by gradient.

    A model of more than some millions of parameters is better `shrunken` first.
    """
    return Case(
        job=job, plan=plan, schedule=schedule, steps=steps, seed=seed, dtype="fp64", verify=True,
        tokens=tokens,
    )  # fmt: skip


def run_cases(
    cases: Sequence[Case],
    how: Launch = Launch(),  # noqa: B008 - immutable
) -> list[Measurement | Verification]:
    """Run cases of equal world size one after another on the same ranks, in one launch.

    The list is empty where this process does not have the results: on another machine than number 0, or
    as another rank than 0 of somebody else's launch.
    """
    check(cases, how)
    done = launch(cases, how)
    if not how.answers:
        return []
    return [
        verification_of([rank[i] for rank in done.results])
        if case.verify
        else served_measurement(case, [rank[i] for rank in done.results], done.failures)
        if case.servers is not None
        else measurement_of(case, [rank[i] for rank in done.results], how.device, done.failures)
        for i, case in enumerate(cases)
    ]


def resumed(case: Case, how: Launch, *, resume: bool, look_only: bool = False) -> Case:
    """A case with checkpoints, beginning where it has to, its folder made ready unless `look_only`.

    A rank that torchrun started again goes on from what its launch has written. Of torchrun's ranks only
    the first one decides where to begin, and whether to: all follow it, and end with it.
    Raises ParsimError as checkpoint_folder.starting_point does.
    """
    assert case.checkpoint is not None
    folder, launch = Path(case.checkpoint.folder), how.joined.launch if how.joined is not None else ""
    if launch and not how.answers:
        return case
    again = is_claimed(folder, launch)
    saved = starting_again(case) if again else starting_point(case, resume=resume)
    if how.answers and not look_only:
        prepare(folder, launch)
    if saved is None:
        return case
    how.on_note(f"going on from {saved.path}, written under {saved.plan}")
    start = dataclasses.replace(case.checkpoint, start=saved.step)
    return dataclasses.replace(case, checkpoint=start)


def check(cases: Sequence[Case], how: Launch) -> None:
    """Raise ParsimError where these cases cannot run together on this machine."""
    require_torch()
    if not hasattr(os, "pidfd_open"):
        raise ParsimError("running a plan needs Linux", got=sys.platform)
    if how.device not in ("cpu", "cuda"):
        raise ParsimError("unknown device", where="device", got=how.device, expected="cpu, cuda")
    for case in cases:
        if case.steps < 1 or case.warmup < 0:
            raise ParsimError(
                "a run has at least one step", where="steps", got=f"{case.steps}, warm-up {case.warmup}"
            )
        check_executable(case.job, case.plan, case.schedule, case.dtype)
        if case.servers is not None:
            check_served(case)
        elif case.checkpoint is not None:
            check_resumable(case.plan)
    sizes = {case.world_size for case in cases}
    if len(sizes) != 1:
        raise ParsimError("plans run together need equal numbers of ranks", got=sorted(sizes))
    needed = how.ranks_here(cases[0])
    if how.device == "cuda":
        for case in cases:
            check_on_gpus(case)
        _check_gpus(needed)


def _check_gpus(needed: int) -> None:
    gpus = available_gpus()
    if gpus < needed:
        raise ParsimError(
            "the plan has more ranks than this machine has GPUs",
            where="plan",
            got=f"{needed} ranks on each machine, {gpus} GPUs",
            hint="NCCL gives each rank a GPU of its own; on a CPU ranks may share cores",
        )
