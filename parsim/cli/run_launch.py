"""What `parsim run` asks of the executor: the case, its tokens and checkpoints, and the dry run."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parsim.cli.output import document, print_json, print_lines, say
from parsim.setup import Setup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parsim.execute.launch.attempts import Launch, Progress
    from parsim.execute.measurement import Measurement, Verification
    from parsim.execute.request import Case
    from parsim.plan import ParallelPlan
    from parsim.simulate.prediction import Prediction

RANKS_SHOWN = 64


def timed_case(setup: Setup, plan: ParallelPlan, *, steps: int, warmup: int, seed: int) -> Case:
    """What the ranks are to do."""
    from parsim.execute.request import Case
    from parsim.schedule import running_schedule

    return Case(
        job=setup.job,
        plan=plan,
        schedule=running_schedule(plan, plan.num_micro_batches(setup.job), warmup + steps),
        steps=steps,
        warmup=warmup,
        seed=seed,
        dtype=setup.job.precision,
    )


def with_tokens(case: Case, path: Path | None, dtype: str | None) -> Case:
    """The case trained on a file of tokens, if one is given."""
    from parsim.errors import ParsimError

    if path is None:
        if dtype is not None:
            raise ParsimError("--tokens-dtype goes with --tokens", where="--tokens-dtype", got=dtype)
        return case
    from parsim.execute.token_file import open_tokens

    file = open_tokens(path, dtype, case.job, case.total_steps)
    sequences = case.total_steps * case.job.global_batch
    if sequences > (there := file.num_sequences(case.job.seq_len)):
        say(f"{path} has {there:,} sequences, which are read {sequences / there:.1f} times")
    return dataclasses.replace(case, tokens=file)


def with_checkpoints(
    case: Case, how: Launch, folder: Path | None, every: int, *, resume: bool, look_only: bool
) -> Case:
    """The case with checkpoints, beginning at the newest if it resumes; `look_only` writes nothing."""
    from parsim.errors import ParsimError
    from parsim.execute.launch.cases import resumed
    from parsim.execute.request import Checkpoints

    if folder is None:
        if resume:
            raise ParsimError("--resume needs the folder of the checkpoints", where="--checkpoint")
        return case
    policy = Checkpoints(folder=str(folder.resolve()), every=every)
    case = dataclasses.replace(case, checkpoint=policy)
    return resumed(case, how, resume=resume, look_only=look_only)


def say_shared_cores(case: Case, how: Launch) -> None:
    """That there are more ranks than cores, on stderr."""
    if (cores := how.cores_shared(case)) is not None:
        say_shared(how.ranks_here(case), cores)


def say_shared(ranks: int, cores: int) -> None:
    """That so many ranks share so many cores, on stderr."""
    these = f"{cores} core{'s'[: cores > 1]}"
    say(f"note: {ranks} ranks share {these}, in what is predicted too; real devices do not")


def show_step(step: Progress) -> None:
    """A line on stderr for each step."""
    from parsim.units import format_duration

    name = f"step {step.step}" if step.step >= 0 else "warm-up"
    say(f"{name}: {format_duration(step.time_s)}, loss {step.loss:.6f}")


def require_memory(case: Case, how: Launch, prediction: Prediction) -> None:
    """Raise ParsimError where the ranks cannot fit into this machine's memory."""
    from parsim.errors import ParsimError
    from parsim.execute.devices import available_memory_bytes
    from parsim.units import format_bytes

    ranks = how.ranks_here(case)
    needed, there = prediction.memory.peak * ranks, available_memory_bytes()
    if how.device == "cpu" and needed > there:
        raise ParsimError(
            "the ranks of this plan do not fit into this machine's memory",
            got=f"{ranks} ranks of about {format_bytes(prediction.memory.peak)}",
            expected=f"at most {format_bytes(there)} in all",
            hint="a smaller model: `parsim models` lists some whose name contains 'tiny'; --verify "
            "alone shrinks it",
        )


def measure(case: Case, how: Launch, prediction: Prediction) -> Measurement | None:
    """Execute, unless the ranks cannot fit into this machine's memory; None where others answer."""
    from parsim.execute.launch.cases import run_cases
    from parsim.execute.measurement import Measurement

    require_memory(case, how, prediction)
    found = run_cases([case], how)
    if not found:
        return None
    assert isinstance(found[0], Measurement)
    return found[0]


def run_all(cases: Sequence[Case], how: Launch) -> list[Measurement | Verification]:
    """What run_cases finds, in one launch where all cases have as many ranks."""
    from parsim.execute.launch.cases import run_cases

    if len({case.world_size for case in cases}) == 1:
        return run_cases(cases, how)
    return [found for case in cases for found in run_cases([case], how)]


def print_dry_run(case: Case, how: Launch, inputs: dict[str, Any], *, as_json: bool) -> None:
    """What would be started, on stdout."""
    from parsim.execute.launch.dry_run import dry_run

    data = dry_run(case, how)
    if as_json:
        print_json(document("run", inputs, {"dry_run": data}, seed=case.seed))
        return
    per_node = data["world_size"] // data["nnodes"]
    lines = [
        f"{data['world_size']} ranks on {data['nnodes']} machine{'s'[: data['nnodes'] > 1]}, {per_node} "
        f"each; this is machine {data['node_rank']}; {data['backend']}",
        f"steps {data['first_step']} to {data['total_steps'] - 1}, {case.warmup} of them warm-up",
        "command",
        f"  {shlex.join(data['command'])}",
        "environment, beside what is already set",
        *(f"  {key}={shlex.quote(value)}" for key, value in data["environment"].items()),
        "files",
        *(f"  {key:<12}{path}" for key, path in data["files"].items()),
        "ranks",
    ]
    for rank in data["ranks"][:RANKS_SHOWN]:
        place = f"  {rank['rank']:>5}  machine {rank['node']}  {rank['device']:<8} "
        if "server" in rank:
            lines.append(f"{place}parameter server {rank['server']}")
            continue
        stages = ", ".join(map(str, rank["stages"]))
        context = f"cp {rank['cp']}  " if case.plan.cp > 1 else ""
        lines.append(
            f"{place}pp {rank['pp']}  dp {rank['dp']}  {context}tp {rank['tp']}  stages {stages}"
        )
    more = data["world_size"] - RANKS_SHOWN
    print_lines(lines + ([f"  … and {more} more, which --json lists"] if more > 0 else []))
