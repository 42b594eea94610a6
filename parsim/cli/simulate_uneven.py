"""`parsim simulate --straggler --jitter --rank-hardware`: ranks that are not alike."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Annotated

import typer

from parsim.cli.output import Section

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parsim.cli.simulated_step import SimulatedStep
    from parsim.plan import ParallelPlan
    from parsim.simulate.uneven import Straggler, Unevenness

StragglerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--straggler",
        help="A slow device: rank=7,slow=1.3 (compute) or rank=7,link=2 (its transfers to other stages "
        "and replicas); count=100,slow=1.3 draws ranks by --seed. Can be repeated.",
    ),
]
JitterOption = Annotated[
    float,
    typer.Option(
        "--jitter", help="Relative standard deviation of every device's compute time, such as 0.02."
    ),
]
RankHardwareOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rank-hardware",
        help="Other devices for some pipeline ranks: 8-15=a100-sxm-80gb. Can be repeated.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything that is drawn.")]


def read_unevenness(
    stragglers: Sequence[str] | None, jitter: float, seed: int, plan: ParallelPlan
) -> Unevenness | None:
    """What the flags say, checked against the plan; None where nothing is uneven."""
    from parsim.simulate.uneven import Unevenness, check_unevenness

    found: list[Straggler] = []
    for text in stragglers or ():
        found += _stragglers(text, seed, plan)
    uneven = Unevenness(stragglers=tuple(found), jitter=jitter, seed=seed)
    check_unevenness(uneven, plan)
    return None if uneven.is_even else uneven


def _stragglers(text: str, seed: int, plan: ParallelPlan) -> list[Straggler]:
    from parsim.errors import ParsimError
    from parsim.settings_text import parse_settings
    from parsim.simulate.uneven import Straggler

    where = "--straggler"
    known = {"rank": int, "count": int, "slow": float, "link": float}
    given = parse_settings(text, known, where=where).values
    factors = {key: given[key] for key in ("slow", "link") if key in given}
    if ("rank" in given) == ("count" in given) or not factors:
        raise ParsimError(
            "a straggler has a rank (or a count of ranks to draw) and how much slower it is",
            where=where,
            got=text,
            expected="rank=7,slow=1.3 or count=100,slow=1.3",
        )
    if "rank" in given:
        return [Straggler(given["rank"], **factors)]
    if not 1 <= given["count"] <= plan.gpus:
        raise ParsimError(
            "there are not so many ranks",
            where=f"{where} count",
            got=given["count"],
            expected=f"1 to {plan.gpus}",
        )
    ranks = random.Random(f"{seed} {text}").sample(range(plan.gpus), given["count"])
    return [Straggler(rank, **factors) for rank in sorted(ranks)]


def unevenness_section(step: SimulatedStep) -> Section:
    """What uneven ranks add to a simulated step, beside the same step with ranks that are alike."""
    from parsim.schedule.program import step_time_s
    from parsim.simulate.prediction import program_of
    from parsim.simulate.uneven import replicas_of
    from parsim.units import format_duration

    request, uneven, plan = step.request, step.request.uneven, step.request.plan
    section = Section()
    if request.rank_hardware:
        section.item["rank_hardware"] = list(request.rank_hardware)
    if uneven is None:
        return section
    even, _ = program_of(
        request.setup.job,
        plan,
        request.costs,
        request.schedule,
        costs_by_rank=request.costs_by_rank,
    )
    even_s = step_time_s(even)
    slowdown, groups = step.prediction.step_time_s / even_s, len(replicas_of(plan, uneven))
    section.item["unevenness"] = {
        "stragglers": [straggler._asdict() for straggler in uneven.stragglers],
        "jitter": uneven.jitter,
        "seed": uneven.seed,
        "replica_groups": groups,
        "even_step_time_s": even_s,
        "slowdown": slowdown,
    }
    count = len(uneven.stragglers)
    what = [f"{count} slow device{'s' * (count > 1)}"] if count else []
    what += [f"jitter of {uneven.jitter:.1%}"] if uneven.jitter else []
    section.lines.append(
        f"  uneven        {' and '.join(what)}: {slowdown:.3f} × the even step of "
        f"{format_duration(even_s)}; pipelines of {groups} kind{'s' * (groups > 1)}"
    )
    return section
