"""Goodput of long runs: against Young, Daly and Erlang, and against stepping through a run."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from parsim.cost.checkpoint import (
    Checkpointing,
    Failures,
    best_interval_s,
    checkpoint_bytes,
    daly_interval_s,
    expected_goodput,
    waiting_share,
    young_interval_s,
)
from parsim.errors import ParsimError
from parsim.model import num_parameters
from parsim.plan import Job, ParallelPlan
from parsim.simulate.faults import (
    MAX_FAILURES,
    History,
    LongRun,
    simulate_history,
    simulate_long_run,
    time_split,
)
from tests.builders import plain_stack, small_model

DAY_S, HOUR_S, MINUTE_S = 86400.0, 3600.0, 60.0
LLAMA_GPUS, LLAMA_S = 16_384, 54 * DAY_S


def long_run(checkpointing: Checkpointing, failures: Failures, **changes: float) -> LongRun:
    settings = {"duration_s": 400 * failures.mtbf_s, "runs": 40, "seed": 1} | changes
    return simulate_long_run(checkpointing, failures, **settings)  # type: ignore[arg-type]


def standard_error(run: LongRun) -> float:
    goodputs = [time_split(history, run.checkpointing).goodput for history in run.histories]
    return float(np.std(goodputs, ddof=1)) / math.sqrt(len(goodputs))


@pytest.mark.parametrize(
    ("mtbf_min", "interval_min"),
    [(24 * 60, 117), (6 * 60, 57), (15, 9.1)],
    ids=["24 h", "6 h", "15 min"],
)
def test_intervals_that_daly_prints(mtbf_min: float, interval_min: float) -> None:
    """Daly 2006, figures 3 to 5: R = 10 min, δ = 5 min."""
    digits = 1 if interval_min < 10 else 0
    assert round(daly_interval_s(5.0, mtbf_min), digits) == interval_min
    assert best_interval_s(5.0, mtbf_min) == pytest.approx(interval_min, rel=0.01)


def test_young_and_daly_are_approximations_of_the_best_interval() -> None:
    mtbf_s = HOUR_S
    errors = []
    for write_s in (1.0, 10.0, 100.0, 1000.0):
        exact_s = best_interval_s(write_s, mtbf_s)
        young, daly = young_interval_s(write_s, mtbf_s), daly_interval_s(write_s, mtbf_s)
        errors.append((abs(young / exact_s - 1), abs(daly / exact_s - 1)))
    for first_order, higher_order in errors:
        assert higher_order < first_order / 20
    assert errors == sorted(errors)
    assert daly_interval_s(2 * mtbf_s, mtbf_s) == mtbf_s


@given(st.floats(1e-6, 3.0), st.floats(0.0, 2.0), st.floats(0.0, 0.5), st.sampled_from([None, 0, 3]))
def test_the_best_interval_is_where_the_expected_goodput_is_greatest(
    share: float, restart: float, background: float, spares: int | None
) -> None:
    """Restarts, background writes and waiting do not move it."""
    mtbf_s = HOUR_S
    failures = Failures(mtbf_s=mtbf_s, restart_s=restart * mtbf_s, spares=spares, repair_s=DAY_S)
    best_s = best_interval_s(share * mtbf_s, mtbf_s)

    def waste(log_s: float) -> float:
        # As a longer restart, so that no interval is too short for it.
        longer = replace(failures, restart_s=failures.restart_s + background * mtbf_s)
        interval = Checkpointing(interval_s=math.exp(log_s), blocking_s=share * mtbf_s)
        return -math.log(expected_goodput(interval, longer))

    near = math.log(best_s)
    found = minimize_scalar(
        waste, bounds=(near - 1, near + 1), method="bounded", options={"xatol": 1e-9}
    )
    assert waste(near) <= found.fun + 1e-12
    assert math.exp(found.x) == pytest.approx(best_s, rel=1e-3)


def test_a_background_write_costs_what_a_longer_restart_would() -> None:
    """After a failure the run falls back one checkpoint further, for the time that the write takes."""
    failures = Failures(mtbf_s=3000.0, restart_s=100.0)
    behind = Checkpointing(interval_s=400.0, blocking_s=20.0, background_s=150.0)
    longer = replace(failures, restart_s=250.0)
    assert expected_goodput(behind, failures) == pytest.approx(
        expected_goodput(replace(behind, background_s=0.0), longer), rel=1e-12
    )


@pytest.mark.parametrize(
    ("checkpointing", "failures"),
    [
        (Checkpointing(interval_s=1100.0, blocking_s=60.0), Failures(mtbf_s=1e4, restart_s=600.0)),
        (Checkpointing(interval_s=300.0, blocking_s=60.0), Failures(mtbf_s=1e3, restart_s=400.0)),
        (
            Checkpointing(interval_s=300.0, blocking_s=10.0, background_s=200.0),
            Failures(mtbf_s=1e3, restart_s=100.0),
        ),
        (
            Checkpointing(interval_s=50.0, blocking_s=10.0, background_s=200.0),
            Failures(mtbf_s=1e3, restart_s=100.0),
        ),
        (
            Checkpointing(interval_s=300.0, blocking_s=10.0),
            Failures(mtbf_s=1e3, restart_s=100.0, spares=2, repair_s=3e3),
        ),
    ],
    ids=["rare", "frequent", "background", "background longer than the interval", "spares"],
)
def test_simulated_goodput_is_the_closed_form(checkpointing: Checkpointing, failures: Failures) -> None:
    run = long_run(checkpointing, failures)
    assert run.point.simulated == pytest.approx(run.point.expected, abs=4 * standard_error(run))
    assert standard_error(run) < 0.01
    assert run.point.low < run.point.simulated < run.point.high


def test_the_simulated_best_interval_is_dalys() -> None:
    failures = Failures(mtbf_s=6 * HOUR_S, restart_s=10 * MINUTE_S)
    checkpointing = Checkpointing(interval_s=HOUR_S, blocking_s=5 * MINUTE_S)
    run = long_run(checkpointing, failures, runs=100, duration_s=500 * HOUR_S)
    assert run.best.interval_s == pytest.approx(57 * MINUTE_S, rel=0.15)
    daly = Checkpointing(interval_s=57 * MINUTE_S, blocking_s=5 * MINUTE_S)
    assert run.best.simulated == pytest.approx(expected_goodput(daly, failures), abs=0.01)
    assert run.curve[0].simulated < run.best.simulated > run.curve[-1].simulated


def test_waiting_for_nodes_is_erlangs_loss_formula() -> None:
    """B(10, 5) = 0.0184 in Erlang's tables; B(1, a) = a / (1 + a)."""
    one = Failures(mtbf_s=100.0, restart_s=0.0, spares=0, repair_s=300.0)
    assert waiting_share(one) == pytest.approx(3 / 4)
    ten = Failures(mtbf_s=100.0, restart_s=10.0, spares=9, repair_s=500.0)
    assert waiting_share(ten) == pytest.approx(0.018385, abs=1e-6)
    assert waiting_share(replace(ten, spares=None)) == 0.0
    assert waiting_share(replace(ten, spares=10**12)) == 0.0
    checkpointing = Checkpointing(interval_s=50.0, blocking_s=1.0)
    for failures in (one, replace(one, spares=2)):
        run = long_run(checkpointing, failures, duration_s=3e5, runs=8)
        assert run.split.waiting / run.split.total_s == pytest.approx(waiting_share(failures), rel=0.03)


def test_without_failures_only_checkpoints_cost() -> None:
    checkpointing = Checkpointing(interval_s=1800.0, blocking_s=30.0)
    failures = Failures(mtbf_s=math.inf, restart_s=600.0)
    assert expected_goodput(checkpointing, failures) == 1800 / 1830
    history = simulate_history(failures, 100 * 1830.0, np.random.default_rng(0))
    split = time_split(history, checkpointing)
    assert split.checkpointing / split.total_s == pytest.approx(30 / 1830, rel=1e-12)
    assert split.goodput == pytest.approx(1800 / 1830, rel=1e-12)
    assert history.failures == 0


def test_a_job_that_always_fails_ends_without_progress() -> None:
    """A failure every 20 s and ten minutes to restart: e^-30 of the restarts succeed."""
    failures = Failures(mtbf_s=20.0, restart_s=600.0)
    run = long_run(Checkpointing(interval_s=300.0, blocking_s=4.0), failures, duration_s=LLAMA_S, runs=2)
    assert run.point.simulated == 0.0
    assert run.point.expected < 1e-15
    assert run.split.total_s == MAX_FAILURES * 20.0
    assert run.split.restarting > 0.99 * run.split.total_s


@given(
    st.lists(st.integers(0, 60), max_size=5),
    st.integers(0, 60),
    st.integers(1, 12),
    st.integers(0, 5),
    st.integers(0, 15),
)
def test_time_is_split_as_stepping_through_it_shows(
    runs: list[int], last: int, interval: int, blocking: int, background: int
) -> None:
    """Second by second: a second trains, or stops for a checkpoint; a failure falls back."""
    checkpointing = Checkpointing(interval_s=interval, blocking_s=blocking, background_s=background)
    training = lost = stopped = 0
    for seconds in [*runs, last]:
        worked, saved, marks, clock = 0, 0, [], 0
        while clock < seconds:
            for _ in range(max(interval, background)):
                worked += clock < seconds
                clock += 1
            for _ in range(blocking):
                stopped += clock < seconds
                clock += 1
            marks.append((clock + background, worked))
        saved = max((work for done, work in marks if done <= seconds), default=0)
        training, lost = training + saved, lost + worked - saved
    training, lost = training + worked - saved, lost - (worked - saved)
    history = History(
        duration_s=sum(runs) + last + 7,
        runs_s=tuple(map(float, runs)),
        last_run_s=float(last),
        restarting_s=4.0,
        waiting_s=3.0,
        failures=len(runs),
    )
    split = time_split(history, checkpointing)
    assert (split.training, split.lost_work, split.checkpointing) == (training, lost, stopped)
    assert split.total_s == history.duration_s


@settings(max_examples=25)
@given(st.floats(0.05, 10.0), st.floats(0.0, 1.0), st.sampled_from([None, 0, 2]), st.integers(0, 9))
def test_the_parts_add_up_to_the_wall_time(
    mtbf: float, restart: float, spares: int | None, seed: int
) -> None:
    failures = Failures(mtbf_s=mtbf, restart_s=restart, spares=spares, repair_s=1.0)
    run = long_run(
        Checkpointing(interval_s=0.3, blocking_s=0.1), failures, duration_s=20.0, runs=2, seed=seed
    )
    assert run.split.total_s == pytest.approx(20.0)
    assert all(seconds >= 0 for seconds in run.split.seconds().values())
    again = long_run(
        Checkpointing(interval_s=0.3, blocking_s=0.1), failures, duration_s=20.0, runs=2, seed=seed
    )
    assert again == run


def test_llama_3_over_54_days() -> None:
    """arXiv 2407.21783, section 3.3.4: 466 interruptions, 419 of them unexpected, on 16,384 GPUs, and
    more than 90% effective training time. Section 3.1: storage sustains 2 TB/s.

    What that takes: a GPU fails every 50 thousand hours; with checkpoints of 14 bytes a parameter every
    five minutes there are up to 12 minutes to be back at work, and half an hour would be too much
    whatever the checkpoints.
    """
    gpu_hours = LLAMA_GPUS * LLAMA_S / HOUR_S
    assert gpu_hours / 419 == pytest.approx(50.7e3, rel=0.01)
    mtbf_s = LLAMA_S / 466
    write_s = 405.9e9 * 14 / 2e12
    often = Checkpointing(interval_s=300.0, blocking_s=write_s)
    for restart_min, enough in ((5, True), (12, True), (14, False), (30, False)):
        failures = Failures(mtbf_s=mtbf_s, restart_s=restart_min * MINUTE_S)
        run = long_run(often, failures, duration_s=LLAMA_S, runs=10)
        assert (run.point.simulated > 0.9) is enough
        assert run.failures_per_history == pytest.approx(466, abs=3 * math.sqrt(466 / 10))
        assert (run.best.simulated > 0.9) is enough
    hourly = replace(often, interval_s=HOUR_S)
    assert expected_goodput(hourly, Failures(mtbf_s=mtbf_s, restart_s=0.0)) < 0.9


def test_bytes_of_a_checkpoint() -> None:
    """16-bit weights, and 12 bytes of AdamW's states in fp32 (ZeRO, section 3.1), once for the model."""
    model = small_model()
    job = Job(model=model, seq_len=256, global_batch=8)
    for plan in (ParallelPlan(), ParallelPlan(dp=4, tp=2, zero=1)):
        assert checkpoint_bytes(job, plan, plain_stack()) == 14 * num_parameters(model)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Checkpointing(interval_s=0.0, blocking_s=1.0),
        lambda: Checkpointing(interval_s=1.0, blocking_s=-1.0),
        lambda: Failures(mtbf_s=0.0, restart_s=1.0),
        lambda: Failures(mtbf_s=1.0, restart_s=-1.0),
        lambda: Failures(mtbf_s=1.0, restart_s=1.0, spares=-1),
    ],
)
def test_nonsense_is_refused(wrong: object) -> None:
    with pytest.raises(ParsimError):
        wrong()  # type: ignore[operator]
