"""Predictions of single kernels against measured ones, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from parsim.compare.kernel_rows import (
    AttentionRow,
    CollectiveRow,
    GemmRow,
    KernelRow,
    UnreadableRow,
    read_kernel_rows,
)
from parsim.compare.statistics import Summary, summarize
from parsim.cost.attention import attention_s
from parsim.cost.collective import collective_s, group_of
from parsim.cost.gemm import gemm_s
from parsim.errors import ParsimError
from parsim.hardware import Cluster

LONG_KERNEL_S = 50e-6
"""Kernels from here on are what a training step is made of; shorter ones are mostly launch."""
LONG_MESSAGE_BYTES = 1e6
"""The same for collectives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelResult:
    """One row of a table of kernels: measured and predicted."""

    row: int
    """Place in the file, from 1 after the header."""
    status: Literal["ok", "unsupported"]
    reason: str = ""
    measured_s: float | None = None
    predicted_s: float | None = None
    is_long: bool = False
    """The kernel runs 50 us or longer, or the message is over 1 MB."""

    @property
    def error(self) -> float | None:
        """predicted / measured - 1, as a fraction."""
        if self.measured_s is None or self.predicted_s is None:
            return None
        return self.predicted_s / self.measured_s - 1

    def to_data(self) -> dict[str, Any]:
        return {
            "row": self.row,
            "status": self.status,
            "reason": self.reason,
            "measured_ms": None if self.measured_s is None else self.measured_s * 1e3,
            "predicted_ms": None if self.predicted_s is None else self.predicted_s * 1e3,
            "error": self.error,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelReport:
    """All rows of a table in its order, and how far off parsim is over them."""

    rows: tuple[KernelResult, ...]

    @property
    def summary(self) -> Summary:
        return summarize([row.error for row in self.rows])

    @property
    def long_summary(self) -> Summary:
        """The same over kernels of 50 us or more, or messages over 1 MB."""
        return summarize([row.error for row in self.rows if row.is_long])

    def to_data(self) -> dict[str, Any]:
        """The document of the JSON contract; errors are fractions."""
        return {
            "rows": [row.to_data() for row in self.rows],
            "summary": self.summary.to_data(),
            "summary_long": self.long_summary.to_data()
            | {"kernels_from_s": LONG_KERNEL_S, "messages_from_bytes": LONG_MESSAGE_BYTES},
        }

    def to_lines(self) -> list[str]:
        """The report for reading: both summaries, why rows are unsupported, the worst rows."""
        lines = [
            f"all rows:             {_line(self.summary)}",
            f"from 50 us or 1 MB:   {_line(self.long_summary)}",
        ]
        reasons: dict[str, int] = {}
        for row in self.rows:
            if row.status == "unsupported":
                reasons[row.reason] = reasons.get(row.reason, 0) + 1
        lines += [f"unsupported: {count} rows: {reason}" for reason, count in sorted(reasons.items())]
        worst = sorted((r for r in self.rows if r.error is not None), key=lambda r: -abs(r.error or 0))[
            :5
        ]
        lines += [
            f"row {r.row}: measured {(r.measured_s or 0) * 1e3:.4g} ms, "
            f"predicted {(r.predicted_s or 0) * 1e3:.4g} ms ({r.error:+.0%})"
            for r in worst
        ]
        return lines


def validate_kernels(path: Path, cluster: Cluster) -> KernelReport:
    """Predict every kernel of a CSV file (plain or gzipped) on one device of `cluster`.

    A row that cannot be predicted is "unsupported", with the reason; none is dropped.

    Raises ParsimError where the file cannot be read or misses a column.
    """
    rows = read_kernel_rows(path)
    return KernelReport(
        rows=tuple(_result(place, row, cluster) for place, row in enumerate(rows, start=1))
    )


def predict_s(row: GemmRow | AttentionRow | CollectiveRow, cluster: Cluster) -> float:
    """Seconds that parsim expects of a measured kernel, bare, as its table was measured."""
    if isinstance(row, GemmRow):
        return gemm_s(cluster, row.m, row.n, row.k, dtype=row.dtype)
    if isinstance(row, CollectiveRow):
        group = group_of(cluster, size=row.gpus, stride=1, gpus=row.gpus)
        return collective_s(cluster, row.kind, row.num_bytes, group)
    return attention_s(
        cluster,
        batch=row.batch,
        seq_q=row.seq_len,
        seq_kv=row.seq_len,
        heads=row.heads,
        kv_heads=row.kv_heads,
        head_dim=row.head_dim,
        dtype="bf16",
        serving=True,
    )


def _result(place: int, row: KernelRow, cluster: Cluster) -> KernelResult:
    if isinstance(row, UnreadableRow):
        return KernelResult(
            row=place, status="unsupported", reason=row.reason, measured_s=row.measured_s
        )
    if isinstance(row, CollectiveRow):
        is_long = row.num_bytes >= LONG_MESSAGE_BYTES
    else:
        is_long = row.measured_s >= LONG_KERNEL_S
    try:
        predicted_s = predict_s(row, cluster)
    except ParsimError as error:
        return KernelResult(
            row=place,
            status="unsupported",
            reason=error.what,
            measured_s=row.measured_s,
            is_long=is_long,
        )
    return KernelResult(
        row=place,
        status="ok",
        measured_s=row.measured_s,
        predicted_s=predicted_s,
        is_long=is_long,
    )


def _line(summary: Summary) -> str:
    if summary.mape is None or summary.median_ape is None or summary.p90_ape is None:
        return f"{summary.rows} rows, none predicted"
    return (
        f"{summary.ok} of {summary.rows} rows; error median {summary.median_ape:.1%}, "
        f"90th percentile {summary.p90_ape:.1%}, mean {summary.mape:.1%}, bias {summary.bias:+.1%}"
    )
