"""A scenario of a sweep: one question, as nouns, and its answer as plain data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from parsim import __version__
from parsim.cost.host import stack_on
from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.hardware import Cluster
from parsim.plan import Job, ParallelPlan
from parsim.search.search import NoPlan, search
from parsim.search.space import Constraints
from parsim.simulate.prediction import predict
from parsim.stack import Stack
from parsim.units import format_bytes

Settings = Mapping[str, Any]
"""What a user would type for one `plan` or `simulate`, by flag."""
Status = Literal["ok", "does_not_fit", "no_plan", "refused", "failed"]
"""does_not_fit: the given plan. no_plan: none is legal, or none fits. refused: the input is wrong.
failed: a defect of parsim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked of a model on a cluster: the best plan for some GPUs, or how good a plan is."""

    job: Job
    cluster: Cluster
    stack: Stack
    origin: dict[str, Any]
    """What a plan file says of hardware and stack, as the user named them."""
    gpus: int = 0
    plan: ParallelPlan | None = None
    """To be simulated; None: search."""
    constraints: Constraints = field(default_factory=Constraints)
    top: int = 1
    budget_s: float = 60.0
    digests: Mapping[str, str]
    """Of what model, hardware, stack and plan hold, whatever their names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One line of a sweep."""

    settings: Settings
    question: Question | ParsimError
    """Or why it cannot be asked."""

    @property
    def key(self) -> str:
        """What tells it from the other scenarios of a sweep."""
        return key_of(self.settings)

    def made_of(self) -> dict[str, str]:
        """What the answer depends on beside the settings: the version, and the content of the inputs."""
        if isinstance(self.question, ParsimError):
            return {"version": __version__}
        return {"version": __version__, **self.question.digests}


def key_of(settings: Settings) -> str:
    """Settings as text, the same in whatever order they were given.

    >>> key_of({"model": "a", "gpus": 8}) == key_of({"gpus": 8, "model": "a"})
    True
    """
    return json.dumps(settings, sort_keys=True, ensure_ascii=False)


def digest(noun: Any) -> str:
    """A short hash of a dataclass's content."""
    text = json.dumps(asdict(noun), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def answer(scenario: Scenario) -> dict[str, Any]:
    """The row of a scenario: its settings, and its plans or the reason why there is none.

    Never raises but for an interrupt: whatever goes wrong is a row. The same scenario gives the same
    row, unless a search ran out of its budget (`optimal` is false).
    """
    row = {"scenario": dict(scenario.settings), "made_of": scenario.made_of()}
    if isinstance(scenario.question, ParsimError):
        return row | _refusal("refused", scenario.question)
    try:
        return row | (_simulated if scenario.question.plan else _searched)(scenario.question)
    except NoPlan as no:
        return row | _refusal("no_plan", no) | {"space": asdict(no.space)}
    except ParsimError as error:
        return row | _refusal("refused", error)
    except Exception as error:
        # One defect among thousands of scenarios is told, and does not cost the others.
        return row | _no("failed", f"a defect in parsim: {type(error).__name__}: {error}")


def _refusal(status: Status, error: ParsimError) -> dict[str, Any]:
    detail = error.where if error.got is None else error.got
    return _no(status, error.what if detail is None else f"{error.what} ({detail})")


def _no(status: Status, reason: str) -> dict[str, Any]:
    return {"status": status, "reason": reason, "plans": []}


def _searched(question: Question) -> dict[str, Any]:
    costs = CostModel(question.job.model, question.cluster, stack_on(question.stack, question.cluster))
    result = search(
        question.job,
        question.gpus,
        costs,
        constraints=question.constraints,
        top=question.top,
        budget_s=question.budget_s,
    )
    return {
        "status": "ok",
        "reason": None,
        "space": asdict(result.space),
        "optimal": result.optimal,
        "plans": [prediction.to_item() | question.origin for prediction in result.plans],
    }


def _simulated(question: Question) -> dict[str, Any]:
    assert question.plan is not None
    costs = CostModel(question.job.model, question.cluster, stack_on(question.stack, question.cluster))
    prediction, _ = predict(question.job, question.plan, costs)
    row = {"status": "ok", "reason": None, "plans": [prediction.to_item() | question.origin]}
    if prediction.fits:
        return row
    over = prediction.memory.peak + prediction.context_bytes - prediction.device_memory_bytes
    return row | {"status": "does_not_fit", "reason": f"{format_bytes(over)} more than a device has"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What a chart shows of an answer."""

    model: str
    series: str
    """What else tells it from others of the model, such as the hardware."""
    gpus: int
    tokens_per_s_per_gpu: float
    mfu: float
