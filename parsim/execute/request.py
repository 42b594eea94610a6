"""What the parent asks of the ranks, as JSON between the two. Standard library only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from parsim.model import ModelSpec
from parsim.plan import STAGE_LISTS, Job, ParallelPlan
from parsim.schedule.action import Schedule, parse_action


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
    """What the ranks compute in: fp64, fp32 or bf16 (with fp32 optimizer states)."""
    verify: bool = False
    """Compare gradients and loss with single-process training instead of timing."""


def encode_case(case: Case) -> dict[str, Any]:
    """A Case as plain data for JSON."""
    data = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
    data["job"] = dataclasses.asdict(case.job)
    data["plan"] = dataclasses.asdict(case.plan)
    data["schedule"] = {
        "name": case.schedule.name,
        "ranks": [[str(action) for action in rank] for rank in case.schedule.ranks],
    }
    return data


def decode_case(data: dict[str, Any]) -> Case:
    """The Case that `encode_case` made plain; models with parts that never run are refused earlier."""
    job, plan, schedule = dict(data["job"]), dict(data["plan"]), data["schedule"]
    assert job["model"]["moe"] is None
    assert job["model"]["mla"] is None
    job["model"] = ModelSpec(**job["model"])
    plan |= {key: tuple(plan[key]) for key in STAGE_LISTS}
    ranks = tuple(tuple(map(parse_action, rank)) for rank in schedule["ranks"])
    nouns = {
        "job": Job(**job),
        "plan": ParallelPlan(**plan),
        "schedule": Schedule(name=schedule["name"], ranks=ranks),
    }
    return Case(**(data | nouns))
