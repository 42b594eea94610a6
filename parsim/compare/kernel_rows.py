"""Tables of measured kernels: GEMMs, attention, collectives; the kind is told by the columns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from parsim.config import csv_rows, read_text
from parsim.errors import ParsimError, shorten
from parsim.plan import MAX_GPUS

COLUMNS = {
    "gemm": ("dtype", "m", "n", "k", "time_ms"),
    "attention": ("batch", "seq_len", "heads", "kv_heads", "head_dim", "time_ms"),
    "collective": ("collective", "gpus", "bytes", "time_ms"),
}
"""Columns that each kind of table needs; others are left alone."""

NAMES_OF_NCCL = {"alltoall": "all_to_all"}
"""Collectives that nccl-tests writes otherwise than parsim."""

_LARGEST = 10**15


@dataclass(frozen=True, slots=True)
class GemmRow:
    """One measured GEMM C[m,n] = A[m,k] B[k,n]."""

    dtype: str
    m: int
    n: int
    k: int
    measured_s: float

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """One measured causal attention forward."""

    batch: int
    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    measured_s: float


@dataclass(frozen=True, slots=True)
class CollectiveRow:
    """One measured collective; bytes as nccl-tests counts them."""

    kind: str
    gpus: int
    num_bytes: int
    measured_s: float


@dataclass(frozen=True, slots=True)
class UnreadableRow:
    """A row that says no kernel; it is counted, not dropped."""

    reason: str
    measured_s: float | None = None


KernelRow = GemmRow | AttentionRow | CollectiveRow | UnreadableRow


def read_kernel_rows(path: Path) -> list[KernelRow]:
    """The rows of a CSV file, plain or gzipped, in its order.

    Raises ParsimError where the file is unreadable, too large, no CSV, or misses a column of its kind.
    """
    table = [cells for _, cells in csv_rows(read_text(path), where=str(path)) if cells]
    if not table:
        raise ParsimError("this file is empty", where=str(path), expected="a header and rows")
    header = [name.strip() for name in table[0]]
    kind = _kind(header, path)
    return [_row(kind, dict(zip(header, cells, strict=False))) for cells in table[1:]]


def _kind(header: list[str], path: Path) -> str:
    """The kind of table whose columns the header has; the nearest one's missing columns otherwise."""

    def missing(kind: str) -> list[str]:
        return [name for name in COLUMNS[kind] if name not in header]

    nearest = min(COLUMNS, key=lambda kind: len(missing(kind)) / len(COLUMNS[kind]))
    if not missing(nearest):
        return nearest
    raise ParsimError(
        f"this table of kernels misses the column {', '.join(missing(nearest))}",
        where=f"{path}, line 1",
        got=", ".join(header[:8]),
        expected="; or ".join(", ".join(columns) for columns in COLUMNS.values()),
    )


def _row(kind: str, cells: dict[str, str]) -> KernelRow:
    try:
        measured_s = _positive(cells, "time_ms") * 1e-3
    except ParsimError as error:
        return UnreadableRow(_reason(error))
    try:
        sizes = {name: _size(cells, name) for name in COLUMNS[kind] if name not in _TEXTS}
    except ParsimError as error:
        return UnreadableRow(_reason(error), measured_s)
    if kind == "gemm":
        dtype = cells.get("dtype", "").strip()
        return GemmRow(dtype, sizes["m"], sizes["n"], sizes["k"], measured_s)
    if kind == "attention":
        if sizes["heads"] % sizes["kv_heads"]:
            return UnreadableRow("heads is no multiple of kv_heads", measured_s)
        return AttentionRow(
            sizes["batch"],
            sizes["seq_len"],
            sizes["heads"],
            sizes["kv_heads"],
            sizes["head_dim"],
            measured_s,
        )
    if sizes["gpus"] > MAX_GPUS:
        return UnreadableRow(f"gpus is {sizes['gpus']:,}, more than {MAX_GPUS:,}", measured_s)
    name = cells.get("collective", "").strip()
    return CollectiveRow(NAMES_OF_NCCL.get(name, name), sizes["gpus"], sizes["bytes"], measured_s)


_TEXTS = ("dtype", "collective", "time_ms")


def _positive(cells: dict[str, str], name: str) -> float:
    text = cells.get(name, "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < _LARGEST:
        raise ParsimError(f"{name} is no positive number", got=text)
    return value


def _size(cells: dict[str, str], name: str) -> int:
    value = _positive(cells, name)
    if not value.is_integer():
        raise ParsimError(f"{name} is no whole number", got=cells[name])
    return int(value)


def _reason(error: ParsimError) -> str:
    return f"{error.what}: {shorten(error.got, 40)}"
