"""Tables of measured kernels: GEMMs, attention, collectives; the kind is told by the columns."""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

from parsim.config import MAX_FILE_BYTES
from parsim.errors import ParsimError, shorten

COLUMNS = {
    "gemm": ("dtype", "m", "n", "k", "time_ms"),
    "attention": ("batch", "seq_len", "heads", "kv_heads", "head_dim", "time_ms"),
    "collective": ("collective", "gpus", "bytes", "time_ms"),
}
"""Columns that each kind of table needs; others are left alone."""

NAMES_OF_NCCL = {"alltoall": "all_to_all"}
"""Collectives that nccl-tests writes otherwise than parsim."""

_GZIP = b"\x1f\x8b"
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
    lines = csv.reader(io.StringIO(_text(path), newline=""))
    try:
        table = [cells for cells in lines if cells]
    except csv.Error as error:
        where = f"{path}, line {lines.line_num}"
        raise ParsimError("this is no valid CSV", where=where, got=str(error)) from None
    if not table:
        raise ParsimError("this file is empty", where=str(path), expected="a header and rows")
    header = [name.strip() for name in table[0]]
    kind = _kind(header, path)
    return [_row(kind, dict(zip(header, cells, strict=False))) for cells in table[1:]]


def _text(path: Path) -> str:
    """The file's text, unpacked where it is gzip by its first bytes."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ParsimError(
                "this file is too large", where=str(path), expected=f"at most {MAX_FILE_BYTES} bytes"
            )
        data = path.read_bytes()
        if data[:2] == _GZIP:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as unpacked:
                data = unpacked.read(MAX_FILE_BYTES + 1)
            if len(data) > MAX_FILE_BYTES:
                raise ParsimError(
                    "this file is too large once unpacked",
                    where=str(path),
                    expected=f"at most {MAX_FILE_BYTES} bytes",
                )
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ParsimError("this file is not UTF-8 text", where=str(path), got=str(error)) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ParsimError("this gzip file is damaged", where=str(path), got=str(error)) from None
    except OSError as error:
        raise ParsimError("cannot read this file", where=str(path), got=error.strerror) from None


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
