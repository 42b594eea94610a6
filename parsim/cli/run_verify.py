"""`parsim run --verify`: the plan beside a single process, on a shrunken model where it is large."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from parsim.cli.output import say
from parsim.cli.run_launch import require_memory
from parsim.errors import ParsimError

if TYPE_CHECKING:
    from parsim.execute.launch.attempts import Launch
    from parsim.execute.measurement import Verification
    from parsim.execute.request import Case
    from parsim.model import ModelSpec
    from parsim.simulate.prediction import Prediction

VERIFIED_STEPS = 3
VERIFIED_WHOLE = 2e10
"""Parameters × tokens of a step up to which the whole model is verified: seconds in float64."""
RANK_BYTES = 4e8
"""What a rank takes before it holds anything: Python and torch."""


def to_verify(case: Case, how: Launch) -> Case:
    """What --verify runs for a case: in float64, and small where the model or its ranks are many."""
    from parsim.execute.devices import available_memory_bytes
    from parsim.execute.launch.cases import verification_case
    from parsim.execute.shrink import fewer_replicas, shrunken
    from parsim.execute.support import check_executable
    from parsim.model import num_parameters
    from parsim.schedule import running_schedule
    from parsim.units import format_bytes, format_count

    job, plan, tokens = case.job, case.plan, case.tokens
    check_executable(job, plan, case.schedule, "fp64")
    if num_parameters(job.model) * job.tokens > VERIFIED_WHOLE:
        job, tokens = shrunken(job, plan), None  # its vocabulary is too small for a file's tokens
        say(f"verifying on a shrunken model of {format_count(num_parameters(job.model))} parameters: "
            f"{structure(job.model)}")  # fmt: skip
    there = available_memory_bytes() * how.nodes.count
    most = max(1, int(there / RANK_BYTES))
    if how.device == "cpu" and how.joined is None and case.servers is None and plan.gpus > most:
        before = plan
        job, plan = fewer_replicas(job, plan, most)
        if plan.gpus > most:
            raise ParsimError(
                "this machine cannot hold the ranks that would verify this plan",
                got=f"{plan.gpus} ranks of at least {format_bytes(RANK_BYTES)}",
                expected=f"at most {format_bytes(there)} in all",
                hint="a plan of the same schedule with smaller tp or pp verifies the same code",
            )
        say(f"verifying {plan.dp} of {before.dp} data-parallel replicas, {plan.gpus} ranks")
    schedule = running_schedule(plan, plan.num_micro_batches(job), VERIFIED_STEPS)
    checked = verification_case(job, plan, schedule, steps=VERIFIED_STEPS, seed=case.seed, tokens=tokens)
    return dataclasses.replace(checked, servers=case.servers)


def only_verified(case: Case, how: Launch, prediction: Prediction, *, verify: bool, draws: bool) -> bool:
    """Whether the plan cannot be timed on this machine, but is to be verified all the same.

    False where this process does not answer: its ranks time what the first rank times.
    Raises ParsimError where it cannot be timed and nothing else, or a drawing, is asked for.
    """
    try:
        require_memory(case, how, prediction)
    except ParsimError as problem:
        if not verify or draws:
            raise
        if not how.answers:
            return False  # the first rank decides, by the memory that it sees
        say(f"not timed: {problem.what} ({problem.got}; {problem.expected})")
        return True
    return False


def untimed_data(case: Case, prediction: Prediction) -> dict[str, Any]:
    """The answer of `run --json` where the plan was verified and not timed."""
    from parsim.plan import STAGE_LISTS

    plan, job = dataclasses.asdict(case.plan), dataclasses.asdict(case.job)
    return {
        "model": {k: v for k, v in job.pop("model").items() if v is not None},
        "job": job,
        "plan": plan | {key: list(plan[key]) for key in STAGE_LISTS},
        "world_size": case.world_size,
        "step_time_s": None,
        "steps_s": [],
        "loss": [],
        "predicted_s": prediction.step_time_s,
        "error": None,
        "not_timed": "the ranks of this plan do not fit into this machine's memory",
    }


def structure(model: ModelSpec) -> str:
    """A model's shape in a line."""
    parts = [
        f"{model.layers} layers",
        f"hidden {model.hidden}",
        f"{model.heads} heads",
        f"{model.kv_heads} KV heads",
    ]
    if model.moe is not None:
        parts.append(f"{model.moe.experts} experts of which {model.moe.top_k} are chosen")
    if model.tied_embeddings:
        parts.append("tied embeddings")
    return ", ".join(parts)


def verified_data(case: Case, checked: Case, found: Verification) -> dict[str, Any]:
    """`verify` of `run --json`."""
    from parsim.model import num_parameters

    return {
        "equal": found.equal,
        "max_gradient_error": found.max_gradient_error,
        "max_loss_error": found.max_loss_error,
        "steps": found.steps,
        "against": found.against,
        "worst_parameter": found.parameter,
        "parameters": num_parameters(checked.job.model),
        "shrunken": checked.job.model != case.job.model,
        "dp": checked.plan.dp,
    }


def verified_lines(data: dict[str, Any]) -> list[str]:
    """The answer for reading."""
    from parsim.units import format_count

    what = "equal to" if data["equal"] else "DIFFERENT from"
    lines = [
        f"verified   {what} {data['against']} "
        f"in float64 over {data['steps']} steps: gradients within "
        f"{data['max_gradient_error']:.1e}, loss within {data['max_loss_error']:.1e}"
    ]
    if data["shrunken"]:
        lines.append(
            f"           on a model of the same structure with {format_count(data['parameters'])} "
            f"parameters, dp {data['dp']}"
        )
    if not data["equal"]:
        lines.append(f"           worst in {data['worst_parameter']}")
    return lines
