"""Capacity planning: days, dollars and energy to train a model, and which cluster to take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any, Literal

from parsim.cost.checkpoint import Checkpointing, Failures, expected_goodput
from parsim.cost.energy import Energy, training_energy
from parsim.cost.memory import ENOUGH_HEADROOM
from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.hardware import Price
from parsim.model import ModelSpec, num_parameters
from parsim.plan import Job
from parsim.search.pareto import Objectives, pareto_front
from parsim.search.relax import Question, explained
from parsim.search.search import OUT_OF_MEMORY, NoPlan, Progress, search
from parsim.search.sensitivity import CHANGE, sensitivity, speed_gains, what_binds
from parsim.search.space import Constraints, check_constraints
from parsim.simulate.prediction import Prediction
from parsim.stack import Stack

LongRunOf = Callable[[Prediction, Stack], tuple[Checkpointing, Failures]]
"""How a job checkpoints and fails, given its step and software."""
Objective = Literal["smallest", "cheapest", "fastest"]

NORMAL_90 = NormalDist().inv_cdf(0.95)
"""Half width of a 90% interval in standard deviations."""
NO_PROGRESS = 1e-3
"""Goodput below which a run does not come to an end."""


def chinchilla_tokens(model: ModelSpec, per_parameter: float) -> int:
    """Tokens for so many a parameter that a token meets; 20 are compute-optimal.

    Active parameters: of a model with experts those of top_k experts, of a dense one all. Source:
    Hoffmann et al. 2022, arXiv 2203.15556 (70 billion parameters, 1.4 trillion tokens).
    """
    return round(per_parameter * num_parameters(model, active=True))


def usual_batch(tokens: int, seq_len: int) -> int:
    """Sequences in a step where nobody says: the power of two nearest to the best batch size.

    B = 0.58·D^0.571 tokens for a training of D tokens, whatever the model: Li et al. 2025 ("Step Law"),
    arXiv 2503.04715, where smaller models trained on up to 10¹² tokens or so. For Llama 3.1 405B it is
    Meta's own 16 million tokens.

    >>> usual_batch(15_600_000_000_000, 8192)
    2048
    """
    best = 0.58 * tokens**0.571 / seq_len
    return 1 << max(0, round(math.log2(best)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model to train on so many GPUs of one kind."""

    job: Job
    tokens: int
    """To train on, in all."""
    costs: CostModel
    hardware: str
    """As the user named it."""
    gpus: int
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What a plan file needs beside the prediction: the names of hardware and stack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A plan for a case, and what training with it takes."""

    case: Case
    prediction: Prediction
    proven: bool
    """No other plan of the space is faster (than the first of a case)."""
    checkpointing: Checkpointing
    failures: Failures
    goodput: float
    """Expected share of the time that trains and is kept."""
    gains: dict[str, float]
    """Speed that CHANGE more of each resource gives: the same plan re-simulated, but for more memory the
    best plan searched for anew (only for the fastest plan of a case)."""

    @property
    def ideal_s(self) -> float:
        """Time to train without failures and checkpoints: tokens over tokens a second."""
        return self.case.tokens / self.case.job.tokens * self.prediction.step_time_s

    @property
    def wall_s(self) -> float:
        """Time to train; infinite where failures let no progress be made."""
        return self.ideal_s / self.goodput if self.goodput >= NO_PROGRESS else math.inf

    @property
    def spread(self) -> float:
        """Factor from the middle of the 90% interval of time, cost and energy to its ends."""
        return self.prediction.interval_s[1] / self.prediction.step_time_s

    @property
    def rented_gpus(self) -> int:
        """GPUs that train, and those of spare nodes that are paid for meanwhile."""
        return self.case.gpus + (self.failures.spares or 0) * self.case.costs.cluster.gpus_per_node

    @property
    def gpu_hours(self) -> float:
        return self.rented_gpus * self.wall_s / 3600

    @property
    def price(self) -> Price | None:
        return self.case.costs.cluster.price

    @property
    def usd(self) -> float | None:
        """Rent of the GPUs; None where nobody has said what they cost."""
        return None if self.price is None else self.gpu_hours * self.price.usd_per_gpu_hour

    @property
    def energy(self) -> Energy:
        """Of the GPUs that train, at the step's own utilisation also while work is repeated."""
        parts = self.prediction.breakdown_s
        return training_energy(
            power_w=self.case.costs.cluster.device.power_w,
            gpus=self.case.gpus,
            seconds=self.wall_s,
            busy_share=(parts["compute"] + parts["optimizer"]) / self.prediction.step_time_s,
        )

    @property
    def headroom(self) -> float:
        """Share of device memory that the fullest rank leaves free."""
        used = self.prediction.memory.peak + self.prediction.context_bytes
        return 1 - used / self.prediction.device_memory_bytes

    @property
    def binds(self) -> str:
        """What holds it back, in one sentence."""
        return what_binds(self.gains, self.prediction.breakdown_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoOption:
    """A case that no plan serves."""

    case: Case
    why: str


def options_of(
    case: Case,
    long_run: LongRunOf,
    *,
    constraints: Constraints | None = None,
    top: int = 1,
    budget_s: float = 60.0,
    progress: Progress | None = None,
) -> tuple[Option, ...] | NoOption:
    """The `top` fastest plans of a case, fastest first, or why there is none."""
    try:
        check_constraints(case.gpus, constraints or Constraints())
    except ParsimError as no:
        return NoOption(case=case, why=no.what)
    try:
        result = search(
            case.job,
            case.gpus,
            case.costs,
            constraints=constraints,
            top=top,
            budget_s=budget_s,
            progress=progress,
        )
    except NoPlan as no:
        return NoOption(case=case, why=_why(no, case, constraints or Constraints()))
    options = [_option(case, plan, result.optimal, long_run) for plan in result.plans]
    memory = 0.0
    if result.space.rejected.get(OUT_OF_MEMORY):
        other = sensitivity(
            options[0].prediction,
            case.costs,
            "memory_size",
            CHANGE,
            constraints=constraints,
            budget_s=budget_s,
            progress=progress,
        )
        memory = other.gain or 0.0
    first = replace(options[0], gains=options[0].gains | {"memory_size": memory})
    return (first, *options[1:])


def _option(case: Case, prediction: Prediction, proven: bool, long_run: LongRunOf) -> Option:
    checkpointing, failures = long_run(prediction, case.costs.stack)
    return Option(
        case=case,
        prediction=prediction,
        proven=proven,
        checkpointing=checkpointing,
        failures=failures,
        goodput=expected_goodput(checkpointing, failures),
        gains=speed_gains(prediction, case.costs),
    )


def _why(no: NoPlan, case: Case, constraints: Constraints) -> str:
    """Why no plan serves, in a line."""
    if no.space.legal:
        return no.what
    asked = Question(job=case.job, gpus=case.gpus, costs=case.costs, constraints=constraints)
    error = explained(asked, no)
    reasons = (error.what, error.got and f"({error.got})", error.expected, error.hint)
    return "; ".join(str(reason) for reason in reasons if reason).replace("; (", " (")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an option must keep to; None where it is free."""

    deadline_s: float | None = None
    budget_usd: float | None = None

    def __post_init__(self) -> None:
        for key, limit in (("deadline_s", self.deadline_s), ("budget_usd", self.budget_usd)):
            if limit is not None and not limit > 0:
                raise ParsimError("a limit is more than nothing", where=key, got=limit)

    def met_by(self, option: Option) -> bool:
        """Whether predicted time and cost are within the limits; an unknown cost is in no budget."""
        if not math.isfinite(option.wall_s):
            return False
        if self.deadline_s is not None and option.wall_s > self.deadline_s:
            return False
        return self.budget_usd is None or (option.usd is not None and option.usd <= self.budget_usd)


def probability_within(option: Option, value: float | None, limit: float | None) -> float | None:
    """Probability that a time or cost of an option stays within a limit, given the model's error.

    The logarithm of the truth over the prediction is taken as normal, with the prediction's own 90%
    interval. None where either is unknown.
    """
    if value is None or limit is None:
        return None
    if not math.isfinite(value) or limit <= 0:
        return 0.0
    width = math.log(option.spread) / NORMAL_90
    if width == 0:
        return float(value <= limit)
    return NormalDist(sigma=width).cdf(math.log(limit / value))


def objectives(option: Option) -> Objectives:
    """What to make small: time, cost, GPUs, and memory in use."""
    return (option.wall_s, option.usd, option.case.gpus, -option.headroom)


def front(options: Sequence[Option]) -> tuple[int, ...]:
    """Indices of the options that no other for the same model beats in time, cost, GPUs and headroom."""
    kept: list[int] = []
    for model in dict.fromkeys(option.case.job.model for option in options):
        own = [i for i, option in enumerate(options) if option.case.job.model == model]
        kept += [own[i] for i in pareto_front([objectives(options[i]) for i in own])]
    return tuple(sorted(kept))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The option for one objective, within the limits."""

    objective: Objective
    best: Option
    """By the figures as predicted."""
    tied: tuple[Option, ...]
    """Others that cannot be told apart from it: their 90% intervals overlap."""
    choice: Option
    """The most robust of all these."""

    @property
    def reason(self) -> str:
        """Why the choice is not the best by the figures, or that nothing comes near it."""
        if not self.tied:
            return "nothing else within the limits comes near"
        others = f"{len(self.tied)} other option" + ("s" if len(self.tied) > 1 else "")
        if self.choice is self.best:
            return (
                f"{others} cannot be told apart from it given the model's error; it is the most robust"
            )
        mine, other = self.choice, self.best
        if mine.case.gpus >= other.case.gpus or other.headroom < ENOUGH_HEADROOM <= mine.headroom:
            why = f"it leaves {mine.headroom:.0%} of the memory free instead of {other.headroom:.0%}"
        else:
            why = f"it needs {mine.case.gpus:,} GPUs instead of {other.case.gpus:,}"
        return f"cannot be told apart from the best by figures, but more robust: {why}"


def answers(options: Sequence[Option], limits: Limits) -> tuple[Answer, ...]:
    """The smallest, cheapest and fastest option within the limits, of one model.

    Options whose prices are unknown have no part in the cheapest; nothing where no option is within
    the limits. Intervals count as if errors were independent; options that share hardware and software
    also share much of their error, and are ordered better than that.
    """
    within = [option for option in options if limits.met_by(option)]
    priced = [option for option in within if option.usd is not None]
    found = []
    if within:
        found.append(_answer("smallest", within, lambda option: float(option.case.gpus), exact=True))
    if priced:
        found.append(_answer("cheapest", priced, lambda option: option.usd or 0.0))
    if within:
        found.append(_answer("fastest", within, lambda option: option.wall_s))
    return tuple(found)


def _answer(
    objective: Objective,
    options: Sequence[Option],
    value: Callable[[Option], float],
    *,
    exact: bool = False,
) -> Answer:
    best = min(options, key=lambda option: (value(option), option.wall_s))

    def reach(option: Option) -> float:
        return 1.0 if exact else option.spread

    highest = value(best) * reach(best)
    tied = tuple(o for o in options if o is not best and value(o) / reach(o) <= highest)
    return Answer(
        objective=objective,
        best=best,
        tied=tied,
        choice=min((best, *tied), key=lambda option: (_fragility(option), value(option))),
    )


def _fragility(option: Option) -> tuple[bool, int, float]:
    """Order of robustness: enough memory free, then fewer GPUs (fewer failures), then more free."""
    return option.headroom < ENOUGH_HEADROOM, option.case.gpus, -round(option.headroom, 2)


def recommended(found: Sequence[Answer], limits: Limits) -> Answer | None:
    """The answer to the question that the limits put.

    With a deadline alone the smallest cluster, else the cheapest; the fastest where costs are unknown.
    """
    by_objective = {answer.objective: answer for answer in found}
    deadline_only = limits.deadline_s is not None and limits.budget_usd is None
    wanted: Objective = "smallest" if deadline_only else "cheapest"
    return by_objective.get(wanted) or by_objective.get("fastest")
