"""How sure the order of two plans is: the law, its fit, and what the published runs say."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parsim.compare.order import Pair, RankedRow, order_errors, order_scale_of
from parsim.cost.order import (
    OTHER_LAYERS,
    SAME_LAYERS,
    SURE,
    order_scale,
    probability_faster,
    tie_ratio,
)
from parsim.plan import Job, ParallelPlan
from tests.builders import small_model

JOB = Job(model=small_model(), seq_len=256, global_batch=16)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(0.005, 0.2))
def test_one_of_two_plans_is_the_faster(a: float, b: float, scale: float) -> None:
    p = probability_faster(a, b, scale)
    assert p + probability_faster(b, a, scale) == pytest.approx(1)
    assert (p >= 0.5) == (a <= b)
    assert probability_faster(a * 7, b * 7, scale) == pytest.approx(p)  # errors common to both cancel


def test_a_tie_ends_where_the_order_is_sure() -> None:
    for scale in (SAME_LAYERS, OTHER_LAYERS):
        assert probability_faster(1.0, tie_ratio(scale), scale) == pytest.approx(SURE)


def test_plans_with_the_same_layers_are_told_apart_more_easily() -> None:
    plan = ParallelPlan(dp=2, pp=4, schedule="1f1b")
    for other in (ParallelPlan(dp=4, pp=2), ParallelPlan(dp=2, pp=4, schedule="zb-h1", zero=2)):
        assert order_scale(JOB, plan, other) == SAME_LAYERS
    for other in (ParallelPlan(tp=2, pp=4), ParallelPlan(dp=2, pp=4, micro_batch=2)):
        assert order_scale(JOB, plan, other) == OTHER_LAYERS
    assert SAME_LAYERS < OTHER_LAYERS


@pytest.mark.parametrize("scale", [0.01, 0.05, 0.2])
def test_the_scale_of_simulated_errors_is_found(scale: float) -> None:
    rng = np.random.default_rng(1)
    predicted = rng.uniform(-0.5, 0.5, 20_000)
    true = predicted + rng.logistic(scale=scale, size=predicted.size)
    pairs = [Pair("g", float(p * np.sign(t)), True) for p, t in zip(predicted, true, strict=True)]
    assert order_scale_of(pairs) == pytest.approx(scale, rel=0.1)


def test_every_group_weighs_alike() -> None:
    """A group of 60 pairs that are all right and one of three of which one is wrong."""
    sure = [Pair("many", 0.05, True)] * 60
    doubtful = [Pair("few", 0.05, True)] * 2 + [Pair("few", -0.05, True)]
    # Half the weight is right for certain, two thirds of the other half: P(right) = 5/6 at 0.05.
    assert order_scale_of([*sure, *doubtful]) == pytest.approx(0.05 / math.log(5), rel=1e-3)


def test_pairs_by_hand() -> None:
    rows = [
        RankedRow("g", 1.0, 1.00, "a"),
        RankedRow("g", 2.0, 1.02, "a"),  # tied with the first, in the right order
        RankedRow("g", 3.0, 0.50, "b"),  # far from both, on the wrong side
        RankedRow("h", 1.0, 1.00, "a"),
        RankedRow("h", 2.0, 2.00, "a"),  # two rows are no group
    ]
    same, other = order_errors(rows)
    assert (same.number, same.groups, same.tied, same.right_tied, same.right_apart) == (
        1,
        1,
        1,
        1.0,
        None,
    )
    assert (other.number, other.tied, other.right_apart) == (2, 0, 0.0)


def test_repeats_of_a_run_have_no_order() -> None:
    rows = [RankedRow("g", s, 1.0, "a") for s in (1.0, 1.1, 1.2)]
    assert order_errors(rows) == ()


@pytest.mark.slow
def test_the_constants_are_those_of_left_out_runs() -> None:
    """Rows of reports/left_out.csv in the groups of the whole tables, which lie beside a checkout."""
    from parsim.compare.library import Library
    from parsim.compare.run_models import shipped_models
    from parsim.compare.run_rows import run_of
    from parsim.compare.runs import group_of, measured_s, read_runs
    from parsim.cost.cell import cell_of
    from parsim.errors import ParsimError

    root = Path(__file__).parents[2]
    tables = sorted((root.parent / "shared" / "published").glob("*.csv"))
    if not tables:
        pytest.skip("the tables of published runs are not beside this checkout")
    with (root / "reports" / "left_out.csv").open() as file:
        left_out = {row["id"]: float(row["left_out_s"]) for row in csv.DictReader(file)}
    library = Library(models=shipped_models())
    rows = []
    for row in (row for path in tables for row in read_runs(path) if row["id"] in left_out):
        try:
            run = run_of(row, library)
        except ParsimError:
            continue
        cell = cell_of(run.job, run.plan)
        rows.append(RankedRow(group_of(row), measured_s(row), left_out[row["id"]], cell))
    same, other = order_errors(rows)
    assert same.number + other.number > 6000
    assert same.scale == pytest.approx(SAME_LAYERS, abs=0.003)
    assert other.scale == pytest.approx(OTHER_LAYERS, abs=0.003)
    for kind in (same, other):
        assert kind.right_apart is not None
        assert kind.right_tied is not None
        assert kind.right_tied < SURE < kind.right_apart
