"""What the parent asks of the ranks, as JSON between the two. Standard library only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from parsim.execute.token_file import TokenFile
from parsim.model import ModelSpec, MoeSpec
from parsim.plan import STAGE_LISTS, Job, ParallelPlan
from parsim.schedule.action import Schedule, parse_action

RESTARTS_FILE = "restarts.txt"
"""In a launch's folder, from when its ranks have met: the most restarts that a machine had counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """Where and how often a run writes checkpoints, and where it begins."""

    folder: str
    """Absolute; on a disk that all machines share."""
    every: int
    """Steps from one to the next; there is always one after the last step."""
    start: int = 0
    """Steps of the checkpoint that the run goes on from; 0: from the beginning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterServers:
    """Ranks beyond those of the plan, which hold the parameters for its replicas."""

    shares: tuple[float, ...]
    """How much of the model each holds, in relation to each other."""
    bound: float
    """Clocks that a worker may be ahead of the slowest: 0 synchronous, infinite asynchronous."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One plan to run: timed, or compared with single-process training."""

    job: Job
    plan: ParallelPlan
    schedule: Schedule
    steps: int
    """Steps that count."""
    warmup: int = 0
    """Steps before them, run and left out."""
    seed: int = 0
    """Of the parameters and of the tokens."""
    dtype: str = "fp32"
    """What the ranks compute in: fp64, fp32, or bf16 or fp16 with fp32 optimizer states."""
    loss_scale: float = 65536.0
    """What an fp16 loss is multiplied by at first."""
    verify: bool = False
    """Compare gradients and loss with single-process training instead of timing."""
    tokens: TokenFile | None = None
    """What is trained on; None: synthetic tokens by seed."""
    checkpoint: Checkpoints | None = None
    servers: ParameterServers | None = None
    """With them the replicas of the plan are workers; None: they sum gradients among themselves."""

    @property
    def world_size(self) -> int:
        """Ranks: those of the plan, and servers."""
        return self.plan.gpus + (len(self.servers.shares) if self.servers is not None else 0)

    @property
    def total_steps(self) -> int:
        """Warm-up and steps that count."""
        return self.warmup + self.steps


def encode_case(case: Case) -> dict[str, Any]:
    """A Case as plain data for JSON."""
    data = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
    data["job"] = dataclasses.asdict(case.job)
    data["plan"] = dataclasses.asdict(case.plan)
    data["schedule"] = {
        "name": case.schedule.name,
        "ranks": [[str(action) for action in rank] for rank in case.schedule.ranks],
        "update_every": case.schedule.update_every,
        "steps": case.schedule.steps,
        "steps_after": case.schedule.steps_after,
    }
    for key in ("tokens", "checkpoint", "servers"):
        data[key] = data[key] and dataclasses.asdict(data[key])
    return data


def decode_case(data: dict[str, Any]) -> Case:
    """The Case that `encode_case` made plain; models with parts that never run are refused earlier."""
    job, plan, schedule = dict(data["job"]), dict(data["plan"]), data["schedule"]
    model = dict(job["model"])
    assert model["mla"] is None
    job["model"] = ModelSpec(**(model | {"moe": model["moe"] and MoeSpec(**model["moe"])}))
    plan |= {key: tuple(plan[key]) for key in STAGE_LISTS}
    ranks = tuple(tuple(map(parse_action, rank)) for rank in schedule["ranks"])
    nouns = {
        "tokens": data["tokens"] and TokenFile(**data["tokens"]),
        "checkpoint": data["checkpoint"] and Checkpoints(**data["checkpoint"]),
        "servers": _servers(data["servers"]),
        "job": Job(**job),
        "plan": ParallelPlan(**plan),
        "schedule": Schedule(**(schedule | {"ranks": ranks})),
    }
    return Case(**(data | nouns))


def _servers(data: dict[str, Any] | None) -> ParameterServers | None:
    if data is None:
        return None
    return ParameterServers(shares=tuple(data["shares"]), bound=data["bound"])
