"""Why a plan is not the answer: it is illegal, does not fit, or is slower, and by what."""

from __future__ import annotations

from dataclasses import dataclass

from parsim.cost.memory import MemoryUse
from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.plan import Job, ParallelPlan
from parsim.schedule.check import plan_problems, stack_problems
from parsim.search.fullest import fullest_rank
from parsim.simulate.prediction import Prediction, estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What is to be said of one plan, as far as its first fault."""

    plan: ParallelPlan
    problems: tuple[ParsimError, ...] = ()
    """What makes it illegal; then nothing else is known of it."""
    memory: MemoryUse | None = None
    """Of its fullest rank."""
    over_bytes: float = 0.0
    """What it needs beyond a device's memory, context included."""
    prediction: Prediction | None = None
    """Of a plan that fits."""

    @property
    def verdict(self) -> str:
        """illegal, does not fit, or fits."""
        if self.problems:
            return "illegal"
        return "does not fit" if self.over_bytes > 0 else "fits"

    def memory_items(self) -> list[tuple[str, float]]:
        """What fills the fullest rank, the largest first, in bytes."""
        if self.memory is None:
            return []
        items = self.memory.to_data(0.0)
        kept = ((key, size) for key, size in items.items() if key not in ("peak", "context") and size)
        return sorted(kept, key=lambda item: -item[1])

    def slower_by_s(self, best: Prediction) -> list[tuple[str, float]]:
        """How much longer each term of its step takes than the best plan's, the largest first."""
        if self.prediction is None:
            return []
        mine, theirs = self.prediction.breakdown_s, best.breakdown_s
        more = ((key, mine.get(key, 0.0) - theirs.get(key, 0.0)) for key in {**mine, **theirs})
        return sorted(more, key=lambda item: -item[1])


def explain(job: Job, plan: ParallelPlan, costs: CostModel) -> Explanation:
    """Everything that keeps a plan from being legal; else its memory; else its step."""
    problems = (*plan_problems(job, plan, costs.cluster), *stack_problems(job, plan, costs.stack))
    if problems:
        return Explanation(plan=plan, problems=problems)
    memory = fullest_rank(job, plan, costs)
    needed = memory.peak + costs.stack.context_bytes
    over_bytes = max(0.0, needed - costs.cluster.device.memory_bytes)
    if over_bytes:
        return Explanation(plan=plan, memory=memory, over_bytes=over_bytes)
    return Explanation(plan=plan, memory=memory, prediction=estimate(job, plan, costs))
