"""What is said of an empty space: checked against the spaces without each of the constraints."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.plan import Job
from parsim.schedule.check import plan_problems
from parsim.search.relax import Question, conflict, explained, given, relaxations, without
from parsim.search.search import NoPlan, search
from parsim.search.space import Constraints, families
from tests.builders import plain_stack, round_cluster, small_model


def asked(gpus: int = 8, batch: int = 16, memory_bytes: float = 80e9, **allowed: Any) -> Question:
    cluster = round_cluster()
    cluster = replace(cluster, device=replace(cluster.device, memory_bytes=memory_bytes))
    model = small_model()
    return Question(
        job=Job(model=model, seq_len=256, global_batch=batch),
        gpus=gpus,
        costs=CostModel(model, cluster, plain_stack()),
        constraints=Constraints(**allowed),
    )


def refused(question: Question) -> ParsimError:
    with pytest.raises(NoPlan) as no:
        search(question.job, question.gpus, question.costs, constraints=question.constraints)
    return explained(question, no.value)


def legal_plans(question: Question, *dropped: str) -> list[Any]:
    """One by one, by the checks of a single plan."""
    spaces = families(question.job, question.gpus, without(question.constraints, *dropped))
    return [
        plan
        for family in spaces
        for plan in family.plans()
        if next(plan_problems(question.job, plan, question.costs.cluster), None) is None
    ]


@pytest.mark.parametrize(
    ("allowed", "names"),
    [
        ({"dp": (4,), "tp": (4,)}, {"dp", "tp"}),
        ({"vpp": (2,), "schedule": ("1f1b",), "micro_batch": (1,)}, {"vpp", "schedule"}),
        ({"schedule": ("zbv",), "pp": (1,), "zero": (0,)}, {"schedule", "pp"}),
        ({"zero": (3,), "schedule": ("pipedream",)}, {"zero", "schedule"}),
        ({"dp": (2,), "tp": (2,), "pp": (4,)}, {"dp", "tp", "pp"}),
        ({"dp": (8,), "micro_batch": (4,), "recompute": ("full",)}, {"dp", "micro_batch"}),
        ({"pp": (4,), "max_sizes": {"dp": 4, "vpp": 1}, "schedule": ("zbv",)}, {"max_vpp", "schedule"}),
        ({"tp": (8,), "zero": (1,)}, {"tp"}),  # four KV heads
        ({"ep": (2,), "tp": (4,)}, {"ep"}),  # a dense model
    ],
)
def test_the_fewest_constraints_that_exclude_each_other(allowed: Any, names: set[str]) -> None:
    question = asked(**allowed)
    assert not legal_plans(question)
    found = conflict(question)
    assert set(found) == names
    others = set(given(question.constraints)) - names
    assert not legal_plans(question, *others)
    for some in combinations(found, len(found) - 1):
        assert legal_plans(question, *(others | set(found) - set(some)))
    error = refused(question)
    assert error.exit_code == (2 if len(names) > 1 else 1)
    for name in names:
        assert f"--{name.replace('_', '-')}" in (error.where or "")
        # What it may be instead is what legal plans have.
        key = name.removeprefix("max_")
        values = sorted({getattr(plan, key) for plan in legal_plans(question, name, *others)})
        said = error.expected if len(names) > 1 else error.hint
        assert f": {key} {', '.join(map(str, values))}".lower() in (said or "").lower()


def test_a_job_that_no_constraint_spoils_is_told_of_other_sizes() -> None:
    question = asked(gpus=11, batch=12)  # more stages than layers, and 12 is no multiple of 11
    error = refused(question)
    assert error.exit_code == 1
    assert "--global-batch 22" in (error.hint or "")
    assert legal_plans(asked(gpus=11, batch=22))
    assert "--gpus 10" in (error.hint or "")
    assert legal_plans(asked(gpus=10, batch=12))


def test_what_giving_up_a_constraint_would_give() -> None:
    question = asked(memory_bytes=200e6, zero=(0,), recompute=("none",), dp=(8,), micro_batch=(2,))
    hint = refused(question).hint or ""
    fitting = {}
    for name in given(question.constraints):
        constraints = without(question.constraints, name)
        try:
            result = search(question.job, 8, question.costs, constraints=constraints, top=1)
        except NoPlan:
            assert f"without --{name}" not in hint
            continue
        fitting[name] = result.plans[0].step_time_s
        plans = f"{result.space.fits} plans fit" if result.space.fits > 1 else "1 plan fits"
        assert f"{plans}, the fastest in" in hint.split(f"without --{name} ")[1].split(";")[0]
    assert 0 < len(fitting) < 4
    said = [text.split()[1].removeprefix("--") for text in hint.split("; ")]
    assert said == sorted(fitting, key=lambda name: fitting[name])  # the fastest first


def test_where_no_constraint_is_to_blame_more_gpus_are_tried() -> None:
    question = asked(gpus=1, memory_bytes=150e6)
    (text,) = relaxations(question)
    gpus = int(text.split()[1])
    assert gpus > 1
    assert search(question.job, gpus, question.costs, top=1).plans
    with pytest.raises(NoPlan):
        search(question.job, gpus // 2, question.costs, top=1)
