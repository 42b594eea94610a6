"""The headline table: each goal, what was reached on rows fitted and left out, others' figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from parsim.compare.ranking import Ranking
from parsim.compare.run_report import RunResult, ranking_of
from parsim.compare.statistics import Summary, summarize

Rows = Sequence[RunResult]
Unseen = Mapping[str, float]
"""Predicted seconds by row, from fits that had not seen the row's model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """Mean and 90th percentile of the error of some rows that is aimed at."""

    name: str
    mean: float
    p90: float | None
    chosen: Callable[[RunResult], bool]
    others: str = ""


def _of_source(start: str) -> Callable[[RunResult], bool]:
    return lambda row: start in row.source


GOALS = (
    Goal(
        name="vTrain, 64–512 A100",
        mean=0.05,
        p90=0.10,
        chosen=_of_source("ground_truth_multi"),
        others="vTrain 14.7%, Calculon 15.3%",
    ),
    Goal(
        name="vTrain, one node of A100",
        mean=0.10,
        p90=0.20,
        chosen=_of_source("ground_truth_single"),
        others="vTrain 8.4%, Calculon 38.9%",
    ),
    Goal(
        name="Korthikanti et al., table 5",
        mean=0.04,
        p90=None,
        chosen=lambda row: row.stack == "megatron-lm-2022",
        others="Calculon 3.65%, fitted to it",
    ),
    Goal(name="BLOOM's trials", mean=0.05, p90=0.09, chosen=_of_source("bigscience")),
    Goal(name="llm-foundry", mean=0.06, p90=0.14, chosen=lambda row: row.stack == "llm-foundry"),
    Goal(
        name="SimuMax's runs on B200",
        mean=0.04,
        p90=0.08,
        chosen=_of_source("SimuMax"),
        others="SimuMax 5.6%",
    ),
    Goal(
        name="NeMo and DGX Cloud on H100, dense",
        mean=0.08,
        p90=0.15,
        chosen=lambda row: row.stack == "nemo" and row.hardware.startswith("h100") and not row.is_moe,
    ),
    Goal(
        name="torchtitan, bf16",
        mean=0.08,
        p90=0.15,
        chosen=lambda row: row.stack.startswith("torchtitan") and row.precision == "bf16",
    ),
    Goal(
        name="Megatron-Bridge on B200, GB200, GB300, dense",
        mean=0.10,
        p90=0.20,
        chosen=lambda row: (
            "Megatron-Bridge" in row.source
            and not row.is_moe
            and row.hardware.split("-")[0] in ("b200", "gb200", "gb300")
        ),
    ),
    Goal(name="mixtures of experts", mean=0.15, p90=0.30, chosen=lambda row: row.is_moe),
    Goal(name="all strict rows", mean=0.06, p90=0.13, chosen=lambda row: row.strict),
)


def unseen_of(rows: Rows, unseen: Unseen) -> list[RunResult]:
    """The rows that were left out of a fit, as that fit predicts them."""
    return [replace(row, predicted_s=unseen[row.id]) for row in rows if row.id in unseen]


def headline(
    rows: Rows, unseen: Unseen, coverage: float | None, kernels: Sequence[str]
) -> Iterator[str]:
    """The table that the report and the README share."""
    left_out = unseen_of(rows, unseen)
    yield "| measured runs | rows | fitted: mean / p90 | left out: mean / p90 | goal | others (mean) |"
    yield "|---|---|---|---|---|---|"
    for goal in GOALS:
        own = [row for row in rows if goal.chosen(row)]
        wanted = f"{_percent(goal.mean)} / {_percent(goal.p90)}"
        found = _figures(summary_of([row for row in left_out if goal.chosen(row)]))
        fitted = _figures(summary_of(own))
        yield f"| {goal.name} | {len(own)} | {fitted} | {found} | {wanted} | {goal.others} |"
    yield ""
    yield "| beside step times | fitted | left out | goal |"
    yield "|---|---|---|---|"
    ranked = ranking_figures(ranking_of(rows)), ranking_figures(ranking_of(left_out))
    names = ("mean regret of the plan it likes best", "worst regret", "mean Kendall tau")
    goals = ("≤ 2.5%", "≤ 12%", "≥ 0.85")
    for name, wanted, fitted, found in zip(names, goals, *ranked, strict=True):
        yield f"| {name} | {fitted} | {found} | {wanted} |"
    yield f"| peak memory, median error / furthest under | {_memory(rows)} | the same | 3% / 5% |"
    share = "–" if coverage is None else f"{coverage:.0%}"
    yield f"| measured times inside the 90% interval | – | {share} | 85–95% |"
    yield from kernels


def summary_of(rows: Rows) -> Summary:
    return summarize([row.error for row in rows])


def ranking_figures(ranking: Sequence[Ranking]) -> tuple[str, str, str]:
    """Mean regret, worst regret and mean tau as text."""
    if not ranking:
        return ("–",) * 3
    regrets = [group.regret for group in ranking]
    taus = [group.kendall_tau for group in ranking if group.kendall_tau is not None]
    tau = f"{sum(taus) / len(taus):.2f}" if taus else "–"
    return f"{sum(regrets) / len(regrets):.1%}", f"{max(regrets):.1%}", tau


def _memory(rows: Rows) -> str:
    errors = [row.memory_error for row in rows if row.memory_error is not None]
    if not errors:
        return "–"
    return f"{median(map(abs, errors)):.1%} / {max(0.0, -min(errors)):.1%} ({len(errors)} rows)"


def _figures(summary: Summary) -> str:
    if summary.mape is None or summary.p90_ape is None:
        return "–"
    return f"{summary.mape:.1%} / {summary.p90_ape:.1%}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:g}%"
