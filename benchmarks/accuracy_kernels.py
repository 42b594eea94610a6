"""Errors of single kernels against measured tables, for the accuracy report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from parsim.charts.accuracy import Error, draw_errors
from parsim.charts.style import percent
from parsim.compare.kernel_rows import AttentionRow, CollectiveRow, GemmRow, read_kernel_rows
from parsim.compare.kernels import LONG_KERNEL_S, LONG_MESSAGE_BYTES, predict_s
from parsim.config import load_cluster
from parsim.errors import ParsimError

MOST_POINTS = 4000
"""Points in a chart, drawn evenly over a larger table."""
GOALS = {
    "GEMM bf16": "4 / 10%",
    "GEMM bf16, A100": "6 / 15%",
    "GEMM fp8": "10 / 30%",
    "attention forward": "8 / 22%",
    "NCCL": "5 / 15%",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One measured kernel against its prediction."""

    kind: str
    """A key of GOALS."""
    hardware: str
    size: float
    """FLOPs of a GEMM or an attention, bytes of a message."""
    is_long: bool
    ratio: float
    """predicted / measured"""


def kernels_in(folder: Path) -> Iterator[Kernel]:
    """Every kernel of the tables STEM_HARDWARE.csv.gz in a folder."""
    for path in sorted(folder.glob("*.csv.gz")):
        hardware = path.name.removesuffix(".csv.gz").rsplit("_", 1)[-1]
        cluster = load_cluster(hardware)
        for row in read_kernel_rows(path):
            if not isinstance(row, GemmRow | AttentionRow | CollectiveRow):
                continue
            try:
                predicted_s = predict_s(row, cluster)
            except ParsimError:
                continue
            kind, size = _kind(row, hardware)
            is_message = isinstance(row, CollectiveRow)
            is_long = size >= LONG_MESSAGE_BYTES if is_message else row.measured_s >= LONG_KERNEL_S
            yield Kernel(
                kind=kind,
                hardware=hardware,
                size=size,
                is_long=is_long,
                ratio=predicted_s / row.measured_s,
            )


def _kind(row: GemmRow | AttentionRow | CollectiveRow, hardware: str) -> tuple[str, float]:
    if isinstance(row, CollectiveRow):
        return "NCCL", float(row.num_bytes)
    if isinstance(row, AttentionRow):
        return "attention forward", 2.0 * row.batch * row.heads * row.seq_len**2 * row.head_dim
    narrow = "fp8" in row.dtype
    name = "GEMM fp8" if narrow else "GEMM bf16"
    if not narrow and hardware.startswith("a100"):
        name += ", A100"
    return name, 2.0 * row.m * row.n * row.k


def kernel_lines(kernels: Sequence[Kernel]) -> list[str]:
    """Lines of the headline table."""
    lines = []
    for kind, goal in GOALS.items():
        errors = [abs(k.ratio - 1) for k in kernels if k.kind == kind and k.is_long]
        if errors:
            text = f"{median(errors):.1%} / {float(np.percentile(errors, 90)):.1%} ({len(errors)} rows)"
            what = "over 1 MB" if kind == "NCCL" else "over 50 µs"
            lines.append(
                f"| {kind} {what}, median / p90 | {text} | [docs/kernels.md](KERNELS) | {goal} |"
            )
    return lines


def kernel_section(kernels: Sequence[Kernel], out: Path) -> Iterator[str]:
    """Tables and charts by kind of kernel."""
    yield "## Kernels"
    yield ""
    yield (
        "Bare kernels of the tables that the profiles' constants were fitted to; on shapes kept out of "
        "those fits the errors stand in [docs/kernels.md](../docs/kernels.md)."
    )
    yield ""
    yield "| kernel | hardware | long rows | median | p90 |"
    yield "|---|---|---|---|---|"
    cells: Mapping[tuple[str, str], list[float]] = defaultdict(list)
    for kernel in kernels:
        if kernel.is_long:
            cells[kernel.kind, kernel.hardware].append(abs(kernel.ratio - 1))
    for (kind, hardware), errors in sorted(cells.items()):
        p90 = float(np.percentile(errors, 90))
        yield f"| {kind} | {hardware} | {len(errors)} | {median(errors):.1%} | {p90:.1%} |"
    yield ""
    for kind, name in (("GEMM", "gemm"), ("attention", "attention"), ("NCCL", "nccl")):
        own = [kernel for kernel in kernels if kernel.kind.startswith(kind)]
        if own:
            yield f"![error of {kind} over its size]({_draw(own, kind, out / f'accuracy-{name}.png')})"
            yield ""


def _draw(kernels: Sequence[Kernel], kind: str, path: Path) -> str:
    by_type = len({kernel.kind for kernel in kernels}) > 1
    rows: list[Error] = []
    for kernel in kernels[:: 1 + len(kernels) // MOST_POINTS]:
        group = kernel.hardware.split("-")[0].upper()
        rows.append((kernel.kind if by_type else group, kernel.size, kernel.ratio))
    short, long = ([abs(k.ratio - 1) for k in kernels if k.is_long is want] for want in (False, True))
    what = "messages over 1 MB" if kind == "NCCL" else "kernels over 50 µs"
    long_text, short_text = percent(median(long)), percent(median(short))
    name = kind[:1].upper() + kind[1:]
    title = f"{name}: {what} are off by {long_text} (median), shorter ones by {short_text}"
    draw_errors(
        rows,
        path,
        title=title,
        sizes="bytes of the full buffer" if kind == "NCCL" else "FLOPs of the kernel",
        size_text=_decimal,
    )
    return path.name


def _decimal(size: float) -> str:
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= scale:
            return f"{size / scale:g} {prefix}"
    return f"{size:g}"
