"""Charts of capacity planning: what they draw, and what their titles say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from parsim.charts.pareto import draw_pareto, pareto_figure
from parsim.charts.scaling import draw_scaling, scaling_figure
from parsim.charts.tornado import draw_tornado, tornado_figure
from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.hardware import Price
from parsim.plan import Job, ParallelPlan
from parsim.search.capacity import Case, Limits, Option
from parsim.search.scaling import scaling_curve
from parsim.search.sensitivity import Sensitivity
from parsim.simulate.prediction import estimate
from parsim.units import format_duration
from tests.builders import plain_stack, round_cluster, small_model
from tests.unit.test_capacity import CHECKPOINTS, FAILURES


def options(*counts: int, price: bool = True) -> tuple[Option, ...]:
    """One for each number of GPUs: replicas of the same plan."""
    model = small_model(hidden=2048)
    job = Job(model=model, seq_len=256, global_batch=64)
    dollars = Price(usd_per_gpu_hour=2.0, source="", date="") if price else None
    costs = CostModel(model, round_cluster(price=dollars), plain_stack(relative_error=0.2))
    return tuple(
        Option(
            case=Case(job=job, tokens=10**12, costs=costs, hardware="round", gpus=gpus),
            prediction=estimate(job, ParallelPlan(dp=gpus), costs),
            proven=True,
            checkpointing=CHECKPOINTS,
            failures=FAILURES,
            goodput=0.9,
            gains={"compute": 0.05},
        )
        for gpus in counts
    )


def titles(figure: object) -> str:
    return " ".join(text.get_text() for text in figure.texts)  # type: ignore[attr-defined]


def test_pareto_chart() -> None:
    found = options(8, 16, 32)
    figure = pareto_figure(found, Limits(deadline_s=1e9, budget_usd=1e6))
    (axes,) = figure.axes
    points = [line for line in axes.lines if line.get_marker() == "o" and line.get_markersize() < 10]
    drawn = [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in points]  # type: ignore[index, arg-type]
    assert drawn == [(option.wall_s / 86400, option.usd) for option in found]
    words = [text.get_text() for text in axes.texts]
    assert {"8", "16", "32", "deadline", "budget"} <= set(words)
    assert f"8 × round train it in {format_duration(found[0].wall_s)}" in titles(figure)
    assert axes.get_ylabel().startswith("cost, USD")


def test_what_is_dominated_is_drawn_hollow() -> None:
    few, more = options(8, 16)
    worse = replace(few, case=replace(few.case, gpus=24))
    axes = pareto_figure((few, more, worse), Limits()).axes[0]
    points = [line for line in axes.lines if line.get_marker() == "o" and line.get_markersize() < 10]
    hollow = [line.get_markerfacecolor() == "white" for line in points]
    assert hollow == [False, False, True]


def test_without_prices_the_axis_is_gpu_hours_and_without_answers_the_title_says_so() -> None:
    figure = pareto_figure(options(8, price=False), Limits(deadline_s=1.0))
    assert figure.axes[0].get_ylabel().startswith("GPU-hours")
    assert "no cluster keeps to the limits" in titles(figure).lower()


def test_every_model_has_a_panel() -> None:
    (option,) = options(8)
    model = replace(option.case.job.model, name="another")
    other = replace(option, case=replace(option.case, job=replace(option.case.job, model=model)))
    figure = pareto_figure((option, other), Limits())
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "small, 1.0T tokens",
        "another, 1.0T tokens",
    ]


def test_scaling_chart() -> None:
    curve = scaling_curve([option.prediction for option in options(8, 16, 32, 64)])
    figure = scaling_figure({"small on round": curve}, {})
    (axes,) = figure.axes
    line = next(line for line in axes.lines if line.get_marker() == "o")
    assert list(line.get_xdata()) == [8, 16, 32, 64]
    assert list(line.get_ydata()) == [point.efficiency for point in curve]
    assert curve[-1].efficiency < 0.9
    assert "64 GPUs keep" in titles(figure)
    assert "most is lost to exposed data-parallel communication" in titles(figure).replace("\n", " ")
    assert any(text.get_text().startswith("dp +") for text in axes.texts)
    assert len(scaling_figure({"a": curve}, {"a": curve}).axes) == 2


def effect(resource: str, change: float, gain: float | None) -> Sensitivity:
    return Sensitivity(resource=resource, change=change, gain=gain, plan=None, replanned=False)


def test_tornado_chart() -> None:
    effects = (
        effect("compute", 0.1, 0.02),
        effect("compute", -0.1, -0.03),
        effect("memory_size", 0.1, 0.01),
        effect("memory_size", -0.1, None),
        effect("inter_node", 0.1, 0.05),
        effect("inter_node", -0.1, -0.06),
    )
    figure = tornado_figure({"small on 8 × round": effects})
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["device memory", "network between domains", "matrix FLOP/s"]
    assert [bar.get_width() for bar in axes.patches] == [0.02, -0.03, 0.01, 0.0, 0.05, -0.06]
    assert "nothing fits" in [text.get_text() for text in axes.texts]
    assert "10% more network between domains would help most, by 5.0%" in titles(figure)


def test_files(tmp_path: Path) -> None:
    found = options(8, 16)
    curve = scaling_curve([option.prediction for option in found])
    draw_pareto(found, Limits(), tmp_path / "pareto.png")
    draw_scaling({"a": curve}, {}, tmp_path / "scaling.svg")
    draw_tornado({"a": (effect("compute", 0.1, 0.1),)}, tmp_path / "tornado.pdf")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pareto.png",
        "scaling.svg",
        "tornado.pdf",
    ]
    with pytest.raises(ParsimError, match="unknown type of picture"):
        draw_pareto(found, Limits(), tmp_path / "pareto.gif")
