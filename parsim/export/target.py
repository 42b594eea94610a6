"""What an export to a training framework is: a text, and what that framework cannot be told.

What a framework has no word for is listed where the training stays the same (its own kernels, its own
order of transfers). Where the framework would train something else than the plan says, the export is
refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from parsim.errors import ParsimError
from parsim.plan import ParallelPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A job and its plan in a framework's words."""

    text: str
    """The whole file."""
    not_expressed: tuple[str, ...] = ()
    """What the framework does in its own way, or has to be told elsewhere; a sentence each."""
    schedule_csv: str | None = None
    """The pipeline schedule, where `text` reads it from a CSV file of its own name beside it."""


def refused(
    target: str,
    part: str,
    *,
    where: str,
    got: object,
    expected: str | None = None,
    hint: str | None = None,
) -> ParsimError:
    """The error for a part of a job or plan that a framework would run as something else."""
    return ParsimError(f"{target} cannot run {part}", where=where, got=got, expected=expected, hint=hint)


def require_plain_reduction(
    target: str, plan: ParallelPlan, *, compressions: tuple[str, ...] = ()
) -> None:
    """Raises ParsimError for sums of gradients that are not by buckets and of equal weight, or that are
    compressed in another way than one of `compressions`.
    """
    allowed = {"aggregation": ("bucket",), "weighted": (False,), "compression": ("none", *compressions)}
    for key, values in allowed.items():
        got = getattr(plan, key)
        if got not in values:
            raise refused(
                target,
                "gradients that are summed in this way",
                where=key,
                got=str(got).lower(),
                expected=" or ".join(f"{key}={str(value).lower()}" for value in values),
            )


def nodes_of(plan: ParallelPlan, devices_per_node: int) -> tuple[int, int]:
    """Nodes, and ranks on each: all the same, as launchers start them.

    Raises ParsimError where the plan's ranks do not fill whole nodes: more would start than it has.

    >>> nodes_of(ParallelPlan(dp=16), 8), nodes_of(ParallelPlan(dp=3), 8)
    ((2, 8), (1, 3))
    """
    per_node = min(plan.gpus, devices_per_node)
    if plan.gpus % per_node:
        raise ParsimError(
            "every node has the same number of ranks",
            where="plan",
            got=f"{plan.gpus} ranks on nodes of {devices_per_node}",
            expected=f"a multiple of {devices_per_node}, or fewer ranks than that",
        )
    return plan.gpus // per_node, per_node


def one_line(text: str) -> str:
    """A text from outside as one printable line, for a comment.

    >>> one_line("llama\\n#SBATCH --evil\\0")
    'llama #SBATCH --evil?'
    """
    return " ".join("".join(c if c.isprintable() or c.isspace() else "?" for c in text).split())


def same_ranks(plan: ParallelPlan, placement: str) -> bool:
    """Whether a plan's ranks lie as they would under another order of mesh dimensions.

    >>> same_ranks(ParallelPlan(tp=4, dp=2, placement="tp-dp-cp-pp"), "tp-cp-dp-pp")
    True
    """
    other = replace(plan, placement=placement)
    return all(
        getattr(plan.strides, name) == getattr(other.strides, name)
        for name in ("pp", "dp", "cp", "tp")
        if getattr(plan, name) > 1
    )
