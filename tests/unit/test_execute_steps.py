"""Which timed steps count."""

from __future__ import annotations

import pytest

from parsim.execute.measurement import Verification, measurement_of
from parsim.execute.request import Case, Checkpoints
from parsim.execute.steps import Speeds, StepRecord, clean_steps, median_step
from parsim.model import ModelSpec
from parsim.plan import Job, parse_plan
from parsim.schedule import make_schedule


def steps(*times: float, foreign: tuple[float, ...] = ()) -> list[StepRecord]:
    others = foreign or (0.0,) * len(times)
    return [StepRecord(t, 1.0, f) for t, f in zip(times, others, strict=True)]


def test_a_step_is_disturbed_when_others_use_more_than_a_twentieth_of_it() -> None:
    assert [s.disturbed for s in steps(1.0, 1.0, foreign=(0.04, 0.06))] == [False, True]


def test_below_three_clock_ticks_nothing_can_be_told() -> None:
    assert [s.disturbed for s in steps(0.01, 0.01, foreign=(0.03, 0.04))] == [False, True]


def test_disturbed_steps_are_left_out_while_three_clean_ones_remain() -> None:
    timed = steps(1.0, 9.0, 1.1, 1.2, foreign=(0.0, 8.0, 0.0, 0.0))
    assert clean_steps(timed) == [0, 2, 3]
    assert median_step(timed) == 2


def test_all_steps_count_where_too_few_are_clean() -> None:
    assert clean_steps(steps(1.0, 2.0, 3.0, foreign=(1.0, 1.0, 0.0))) == [0, 1, 2]


def test_the_median_step_of_an_even_number_is_one_of_the_two_in_the_middle() -> None:
    assert median_step(steps(4.0, 1.0, 2.0, 3.0)) in (2, 3)


def test_equal_means_gradients_and_loss() -> None:
    found = {"parameter": "w", "steps": 3, "against": "one process"}
    assert Verification(max_gradient_error=1e-13, max_loss_error=1e-16, **found).equal  # type: ignore[arg-type]
    assert not Verification(max_gradient_error=1e-9, max_loss_error=0.0, **found).equal  # type: ignore[arg-type]
    assert not Verification(max_gradient_error=0.0, max_loss_error=1e-9, **found).equal  # type: ignore[arg-type]


def test_the_first_steps_after_a_start_count_only_where_there_are_few_others() -> None:
    timed = [StepRecord(t, 1.0, 0.0, settling=t > 5) for t in (9.0, 1.0, 1.2, 1.4, 8.0)]
    assert clean_steps(timed) == [1, 2, 3]
    assert clean_steps(timed[:2] + timed[4:]) == [0, 1, 2]


def test_the_step_shown_is_one_of_those_that_are_still_there() -> None:
    assert median_step(steps(3.0, 1.0, 2.0, 9.0), among=2) == 2
    assert median_step(steps(3.0, 2.0, 1.0, 9.0), among=1) == 3
    restarted = [*steps(1.0, 1.1, 1.2), StepRecord(9.0, 1.0, 0.0, settling=True)]
    assert median_step(restarted, among=1) == 3


def test_a_rank_is_slow_beside_those_with_the_same_work() -> None:
    speeds = Speeds(4)
    assert speeds.slow([1.0, 1.1, 0.9, 1.0, 4.0, 4.1, 4.2, 4.0]) == {}
    assert speeds.slow([1.0, 1.0, 10.0, 1.0, 4.0, 4.0, 4.0, 4.0]) == {2: 10.0}


def test_a_rank_alone_on_its_stage_is_slow_beside_what_it_was() -> None:
    speeds = Speeds(1)
    assert speeds.slow([1.0, 9.0]) == {}
    assert speeds.slow([1.1, 9.0]) == {}
    assert speeds.slow([1.05, 90.0]) == {1: 10.0}
    for _ in range(40):
        speeds.slow([1.05, 90.0])
    assert speeds.slow([1.05, 90.0]) == {}  # it is its usual speed by now


def test_milliseconds_are_nothing_to_speak_of() -> None:
    assert Speeds(2).slow([0.001, 0.015]) == {}


def test_steps_that_another_plan_took_are_listed_and_not_measured() -> None:
    plan = parse_plan("dp=2")
    model = ModelSpec(
        name="m", layers=2, hidden=8, heads=2, kv_heads=2, ffn_hidden=8, gated_mlp=True, vocab=16,
        max_seq_len=8,
    )  # fmt: skip
    case = Case(
        job=Job(model=model, seq_len=8, global_batch=4), plan=plan, schedule=make_schedule(plan, 2),
        steps=5, checkpoint=Checkpoints(folder="/c", every=2, start=2),
    )  # fmt: skip
    taken = steps(9.0, 9.1, 1.0, 1.1, 1.3)
    rank = {
        "steps": [step._asdict() for step in taken], "timed_from": 2, "spans": [], "peak_bytes": None,
        "gradient_payload_bytes": {}, "device": "d", "torch": "t",
    }  # fmt: skip
    found = measurement_of(case, [rank, rank], "cpu", ("rank 1 died",))
    assert found.steps_s == (9.0, 9.1, 1.0, 1.1, 1.3)
    assert found.step_time_s == 1.1
    assert found.spread == pytest.approx(0.3 / 1.1)
    assert (found.resumed_at, found.failures) == (2, ("rank 1 died",))
