"""Charts of goodput and of parameter servers: what they draw and what their titles say."""

from __future__ import annotations

from pathlib import Path

import pytest

from parsim.charts.goodput import draw_goodput, goodput_figure
from parsim.charts.parameter_server import (
    PsComparison,
    PsCurve,
    draw_parameter_servers,
    parameter_server_figure,
)
from parsim.cost.checkpoint import Checkpointing, Failures, expected_goodput
from parsim.errors import ParsimError
from parsim.simulate.faults import LongRun, simulate_long_run
from parsim.units import format_duration


def long_run(interval_s: float) -> LongRun:
    return simulate_long_run(
        Checkpointing(interval_s=interval_s, blocking_s=60.0),
        Failures(mtbf_s=1e4, restart_s=600.0),
        duration_s=1e6,
        runs=5,
        seed=0,
    )


def test_goodput_chart() -> None:
    run = long_run(6000.0)
    figure = goodput_figure(run, title="a job")
    (axes,) = figure.axes
    curve = axes.lines[0]
    expected = [
        expected_goodput(Checkpointing(interval_s=float(x), blocking_s=60.0), run.failures)
        for x in curve.get_xdata()
    ]
    assert list(curve.get_ydata()) == pytest.approx(expected)
    assert format_duration(run.best.interval_s) in figure.texts[0].get_text()
    legend = axes.get_legend()
    assert legend is not None
    words = [text.get_text() for text in legend.get_texts()]
    assert any(word.startswith("asked for: 1.7 h") for word in words)
    near = goodput_figure(long_run(run.best.interval_s), title="a job").axes[0].get_legend()
    assert near is not None
    assert not any("asked for" in text.get_text() for text in near.get_texts())


def test_rare_failures_are_drawn_below_what_most_runs_reach() -> None:
    # One of 40 runs fails and lies idle for the rest: the mean is not among the middle 90%.
    run = simulate_long_run(
        Checkpointing(interval_s=1000.0, blocking_s=1.0),
        Failures(mtbf_s=2e7, restart_s=1e6),
        duration_s=1e6,
        runs=40,
        seed=0,
    )
    assert sum(history.failures > 0 for history in run.histories) in (1, 2)
    assert run.point.simulated < run.point.low
    (axes,) = goodput_figure(run, title="a job").axes
    means = next(line for line in axes.lines if "mean" in str(line.get_label()))
    (bars,) = axes.collections
    by_interval = {point.interval_s: point for point in run.curve}
    for x, mean in zip(means.get_xdata(), means.get_ydata(), strict=True):
        assert mean == by_interval[float(x)].simulated
    for (x, low), (_, high) in bars.get_segments():  # type: ignore[attr-defined]
        assert (low, high) == pytest.approx((by_interval[x].low, by_interval[x].high))


def comparison(asynchronous: float, staleness: float = 7.0) -> PsComparison:
    return PsComparison(
        title="a job",
        note="",
        workers=(1, 2, 8),
        all_reduce=PsCurve("all-reduce", (10.0, 18.0, 64.0)),
        servers=(
            PsCurve("asynchronous", (9.0, 18.0, asynchronous), staleness),
            PsCurve("synchronous", (9.0, 15.0, 40.0)),
        ),
        compute_samples_per_s=12.0,
    )


@pytest.mark.parametrize(
    ("asynchronous", "words"),
    [
        (128.0, "asynchronous servers are 2 × as fast as all-reduce, on gradients 7 updates old"),
        (32.0, "all-reduce is 1.6 × as fast as synchronous servers"),
        (64.5, "are as fast as each other"),
    ],
)
def test_the_title_says_who_is_ahead(asynchronous: float, words: str) -> None:
    figure = parameter_server_figure(comparison(asynchronous))
    title = " ".join(text.get_text() for text in figure.texts)
    assert words in title
    assert "8 workers" in title


def test_throughput_is_drawn_by_worker() -> None:
    (axes,) = parameter_server_figure(comparison(128.0)).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["all-reduce"] == [10.0, 9.0, 8.0]
    assert lines["asynchronous servers"] == [9.0, 9.0, 16.0]


def test_unknown_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ParsimError, match="type of picture"):
        draw_goodput(long_run(600.0), tmp_path / "x.txt", title="")
    with pytest.raises(ParsimError, match="type of picture"):
        draw_parameter_servers(comparison(1.0), tmp_path / "x.txt")
