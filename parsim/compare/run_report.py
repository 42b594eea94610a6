"""What is reported of a table of measured runs: every row, summaries, the ranking of plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from parsim.compare.order import OrderError, RankedRow, order_errors
from parsim.compare.ranking import Ranking, rank_groups
from parsim.compare.row_stack import NEAREST
from parsim.compare.statistics import Summary, summarize
from parsim.units import format_duration


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One row: what was measured, and what parsim says."""

    id: str
    status: str
    """ok or unsupported. (does_not_fit is never said of a measured run: it did fit.)"""
    reason: str = ""
    measured_s: float | None = None
    predicted_s: float | None = None
    score_s: float | None = None
    """The same by the search's arrays, which order plans before any is replayed."""
    layers: object = None
    """Equal for plans of one job whose layers run the same kernels."""
    interval_s: tuple[float, float] | None = None
    """90% interval of the prediction."""
    predicted_peak_bytes: float | None = None
    """The allocator's peak of the fullest rank."""
    measured_peak_bytes: float | None = None
    memory_warning: str = ""
    """Where parsim would say that the run does not fit."""
    assumed: tuple[str, ...] = ()
    stack: str = ""
    hardware: str = ""
    strict: bool = False
    is_moe: bool = False
    source: str = ""
    precision: str = ""
    group: str = ""
    """Rows that differ only in the plan share it."""
    leans_on: tuple[str, ...] = ()
    """What the prediction leans on that widens its interval (cost.interval)."""

    @property
    def error(self) -> float | None:
        """predicted / measured - 1, as a fraction."""
        if self.measured_s is None or self.predicted_s is None:
            return None
        return self.predicted_s / self.measured_s - 1

    @property
    def memory_error(self) -> float | None:
        """The same of the peak memory, where it was measured."""
        if self.measured_peak_bytes is None or self.predicted_peak_bytes is None:
            return None
        return self.predicted_peak_bytes / self.measured_peak_bytes - 1

    def to_data(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "id": self.id,
            "status": self.status,
            "reason": self.reason,
            "measured_s": self.measured_s,
            "predicted_s": self.predicted_s,
            "error": self.error,
            "interval_s": None if self.interval_s is None else list(self.interval_s),
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "assumed": list(self.assumed),
            "stack": self.stack,
            "hardware": self.hardware,
        }
        if self.measured_peak_bytes is not None:
            data["measured_peak_bytes"] = self.measured_peak_bytes
            data["memory_error"] = self.memory_error
        if self.leans_on:
            data["leans_on"] = list(self.leans_on)
        if self.memory_warning:
            data["memory_warning"] = self.memory_warning
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """All rows of a table in its order, and how far off parsim is over them."""

    rows: tuple[RunResult, ...]
    ranking: tuple[Ranking, ...]
    search_ranking: tuple[Ranking, ...]
    """The same groups by the search's own scores."""
    order: tuple[OrderError, ...]
    """How sure the order of two plans is."""

    @property
    def summary(self) -> Summary:
        return summary_of(self.rows)

    @property
    def memory(self) -> Summary:
        """The same of the peak memory, over the rows that state it."""
        measured = [row for row in self.rows if row.measured_peak_bytes is not None]
        return summarize([row.memory_error for row in measured])

    @property
    def coverage(self) -> float | None:
        """Share of the measured times that lie in the 90% interval of their prediction."""
        inside = [
            row.interval_s[0] <= row.measured_s <= row.interval_s[1]
            for row in self.rows
            if row.interval_s is not None and row.measured_s is not None
        ]
        return sum(inside) / len(inside) if inside else None

    def by(self, key: Callable[[RunResult], str]) -> dict[str, Summary]:
        """A summary of the rows of each key, in order of key."""
        groups: dict[str, list[RunResult]] = {}
        for row in self.rows:
            groups.setdefault(key(row), []).append(row)
        return {name: summary_of(groups[name]) for name in sorted(groups)}

    def summaries(self) -> dict[str, dict[str, Summary]]:
        """Summaries by stack, hardware, kind of model, and whether all settings are stated."""
        return {
            "stack": self.by(lambda row: row.stack),
            "hardware": self.by(lambda row: row.hardware),
            "model": self.by(lambda row: "moe" if row.is_moe else "dense"),
            "settings": self.by(lambda row: "strict" if row.strict else "assumed"),
        }

    def to_data(self) -> dict[str, Any]:
        """The document of the JSON contract; errors are fractions."""
        return {
            "rows": [row.to_data() for row in self.rows],
            "summary": self.summary.to_data() | {"interval_coverage": self.coverage},
            "summary_by": {key: _to_data(parts) for key, parts in self.summaries().items()},
            "memory": self.memory.to_data(),
            "ranking": [
                by_time.to_data()
                | {"search_regret": by_score.regret, "search_kendall_tau": by_score.kendall_tau}
                for by_time, by_score in zip(self.ranking, self.search_ranking, strict=True)
            ],
            "order": [error.to_data() for error in self.order],
        }

    def to_lines(self, worst: int = 10) -> list[str]:
        """The report for reading: summaries, the ranking of plans, the worst rows."""
        lines = [summary_line("all rows", self.summary)]
        for parts in self.summaries().values():
            if len(parts) > 1:
                lines.extend(summary_line(name, summary) for name, summary in parts.items())
        if self.memory.ok:
            lines.append(summary_line("peak memory", self.memory))
        if self.coverage is not None:
            lines.append(f"{self.coverage:.0%} of the measured times lie in the 90% interval")
        lines.extend(ranking_line(self.ranking))
        lines.extend(ranking_line(self.search_ranking, "by the search's own scores"))
        lines.extend(error.to_line() for error in self.order)
        lines.extend(_worst_lines(self.rows, worst))
        reasons = Counter(row.reason for row in self.rows if row.status != "ok")
        lines.extend(f"unsupported, {count} rows: {reason}" for reason, count in reasons.most_common())
        stand_ins = Counter(text for row in self.rows for text in row.assumed if NEAREST in text)
        lines.extend(f"{count} rows on a {text}" for text, count in stand_ins.most_common())
        return lines


def summary_line(name: str, summary: Summary) -> str:
    """A summary as one line of text."""
    text = f"{name[:24]:<24} {summary.ok:>5} of {summary.rows:<5}"
    if summary.mape is None or summary.median_ape is None or summary.p90_ape is None:
        return f"{text} not predicted"
    return (
        f"{text} error: mean {summary.mape:6.1%}  median {summary.median_ape:6.1%}  "
        f"p90 {summary.p90_ape:6.1%}  bias {summary.bias:+6.1%}"
    )


def ranking_line(ranking: tuple[Ranking, ...], how: str = "") -> Iterator[str]:
    """Means over the ranked groups, as one line where there are any."""
    if ranking:
        regret = sum(group.regret for group in ranking) / len(ranking)
        taus = [group.kendall_tau for group in ranking if group.kendall_tau is not None]
        tau = f", Kendall tau {sum(taus) / len(taus):.2f}" if taus else ""
        by = f" {how}" if how else ""
        yield f"plans ranked{by} in {len(ranking)} groups: mean regret {regret:.1%}{tau}"


def _worst_lines(rows: Iterable[RunResult], number: int) -> Iterator[str]:
    known = [row for row in rows if row.error is not None]
    for row in sorted(known, key=lambda row: -abs(row.error or 0.0))[:number]:
        measured_s, predicted_s = row.measured_s or 0.0, row.predicted_s or 0.0
        yield (
            f"worst: {row.id:<20} measured {format_duration(measured_s)}, "
            f"predicted {format_duration(predicted_s)} ({row.error:+.1%})"
        )


def summary_of(rows: Iterable[RunResult]) -> Summary:
    """How far off the predictions of some rows are."""
    return summarize([row.error for row in rows])


def _to_data(summaries: Mapping[str, Summary]) -> dict[str, Any]:
    return {name: summary.to_data() for name, summary in summaries.items()}


def report_of(results: Iterable[RunResult]) -> RunReport:
    """A report of rows that were predicted, ranking included."""
    rows = tuple(results)
    return RunReport(
        rows=rows,
        ranking=ranking_of(rows),
        search_ranking=ranking_of(rows, lambda row: row.score_s),
        order=order_of(rows),
    )


def ranking_of(
    rows: Iterable[RunResult], figure: Callable[[RunResult], float | None] = lambda row: row.predicted_s
) -> tuple[Ranking, ...]:
    """The rankings of all groups by a figure of their rows."""
    known = [(row.group, row.measured_s, figure(row)) for row in rows]
    return rank_groups((g, m, p) for g, m, p in known if m is not None and p is not None)


def order_of(rows: Iterable[RunResult]) -> tuple[OrderError, ...]:
    """How sure the order of two plans of a group is."""
    return order_errors(
        RankedRow(row.group, row.measured_s, row.predicted_s, row.layers)
        for row in rows
        if row.measured_s is not None and row.predicted_s is not None
    )
