"""Which sizes `parsim calibrate` times, in order of need.

A calibration walks one list of points from the front and stops when its time is spent, so the list is
sorted by level: level 0 is what a valid profile cannot do without, each further level refines it.
Standard library only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

ESSENTIAL = 0
"""Level of the points without which there is no profile."""
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "send_recv", "all_to_all", "broadcast")
DTYPES = {"cpu": ("fp32", "fp64"), "cuda": ("bf16", "fp16", "fp32")}
"""What is timed on each kind of device, the dtype of training first."""


class Point(NamedTuple):
    """One thing to time."""

    level: int
    family: str
    """gemm, attention, memory_bound, optimizer, host or collective."""
    dtype: str
    variant: str
    """gemm: layout; attention: forward or backward; host: op, forward or backward; collective: kind;
    optimizer: its name."""
    size: tuple[int, ...]
    """gemm: (m, n, k); attention: (batch, seq_len, heads, kv_heads, head_dim); memory_bound: bytes
    moved; optimizer: parameters; host: how many; collective: (bytes of the full buffer, ranks)."""


def points(device: str, ranks: int, dtypes: tuple[str, ...]) -> tuple[Point, ...]:
    """All points for a kind of device ("cpu" or "cuda") with `ranks` devices, most needed first."""
    main, *others = dtypes
    found = [
        *_gemms(device, main, others),
        *_attentions(device, main),
        *_memory_bound(device, main),
        *_optimizers(device, main),
        *(Point(0, "host", main, variant, (1,)) for variant in ("op", "forward", "backward")),
        *_collectives(device, ranks),
    ]
    return _interleaved(found)


def _interleaved(found: list[Point]) -> tuple[Point, ...]:
    """By level, and within a level the families abreast: time that runs out thins them all alike."""
    totals = Counter((point.level, point.family) for point in found)
    seen: Counter[tuple[int, str]] = Counter()
    keyed = []
    for index, point in enumerate(found):
        family = point.level, point.family
        keyed.append(((point.level, seen[family] / totals[family], index), point))
        seen[family] += 1
    return tuple(point for _, point in sorted(keyed))


def linear_gemms(tokens: int, width_in: int, width_out: int) -> tuple[tuple[str, int, int, int], ...]:
    """The three GEMMs of a linear layer as (layout, m, n, k) with C[m,n] = A[m,k] B[k,n].

    Forward y = x Wᵀ (TN), gradient of the input g W (NN), gradient of the weight gᵀ x (NT).

    >>> linear_gemms(8, 2, 4)
    (('TN', 8, 4, 2), ('NN', 8, 2, 4), ('NT', 4, 2, 8))
    """
    return (
        ("TN", tokens, width_out, width_in),
        ("NN", tokens, width_in, width_out),
        ("NT", width_out, width_in, tokens),
    )


def _gemms(device: str, main: str, others: list[str]) -> Iterator[Point]:
    """Squares, up and down projections, and the narrow shards that tensor parallelism leaves."""
    scale = 1 if device == "cpu" else 8
    widths = [  # level, width in, width out
        (0, 256, 256), (0, 512, 2048),
        (1, 128, 128), (1, 512, 512), (1, 1024, 1024), (1, 256, 1024), (1, 1024, 256), (1, 2048, 512),
        (1, 512, 64), (1, 64, 512), (1, 256, 8192),
        (2, 64, 64), (2, 384, 384), (2, 768, 768), (2, 2048, 2048), (2, 1024, 4096), (2, 4096, 1024),
    ]  # fmt: skip
    most_flops = 5e9 if device == "cpu" else 2e13
    for at, tokens in enumerate((512, 128, 2048, 32)):
        for level, width_in, width_out in widths:
            gemms = linear_gemms(tokens * scale, width_in * scale, width_out * scale)
            for layout, m, n, k in gemms:
                if 2 * m * n * k <= most_flops:
                    yield Point(
                        0 if level == at == 0 else max(level, 1), "gemm", main, layout, (m, n, k)
                    )
    for dtype in others:
        for tokens, width_in, width_out in ((512, 512, 512), (512, 256, 1024), (128, 256, 256)):
            for layout, m, n, k in linear_gemms(tokens * scale, width_in * scale, width_out * scale):
                yield Point(1, "gemm", dtype, layout, (m, n, k))


def _attentions(device: str, dtype: str) -> Iterator[Point]:
    shapes = [  # level, batch, seq_len, heads, head_dim
        (0, 2, 128, 4, 64),
        (1, 2, 512, 4, 64), (1, 2, 32, 4, 64), (1, 2, 128, 4, 32), (1, 2, 128, 4, 128),
        (2, 1, 2048, 2, 64), (2, 8, 128, 4, 64), (2, 2, 256, 8, 64), (2, 2, 512, 4, 32),
        (2, 2, 512, 4, 128), (2, 2, 64, 4, 16), (2, 2, 256, 1, 64),
    ]  # fmt: skip
    if device == "cuda":
        shapes = [
            (0, 1, 4096, 32, 128),
            (1, 4, 1024, 32, 128), (1, 1, 8192, 32, 128), (1, 1, 4096, 8, 128), (1, 1, 4096, 32, 64),
            (2, 16, 512, 16, 64), (2, 1, 16384, 8, 128), (2, 2, 2048, 64, 128), (2, 8, 2048, 16, 64),
        ]  # fmt: skip
    for level, batch, seq_len, heads, head_dim in shapes:
        for variant in ("forward", "backward"):
            yield Point(level, "attention", dtype, variant, (batch, seq_len, heads, heads, head_dim))


def _memory_bound(device: str, dtype: str) -> Iterator[Point]:
    """Bytes moved: from what fits the nearest cache to what fits none."""
    first = 12 if device == "cpu" else 16
    for power in range(first, first + 14):
        level = 0 if power - first in (3, 7, 12) else 1
        yield Point(level, "memory_bound", dtype, "", (3 * 2**power,))


def _optimizers(device: str, dtype: str) -> Iterator[Point]:
    for level, power in ((0, 20), (1, 23), (1, 17)):
        count = 2 ** (power + (7 if device == "cuda" else 0))
        yield Point(level, "optimizer", dtype, "adamw", (count,))


def _collectives(device: str, ranks: int) -> Iterator[Point]:
    groups = [size for size in (2, 4, 8, 16, 32, 64) if size < ranks and ranks % size == 0]
    for group in [*groups, ranks] if ranks > 1 else []:
        for kind in COLLECTIVES:
            if kind == "send_recv" and group > 2:
                continue
            for power in range(10, 27 if device == "cpu" else 31):
                level = 0 if power in (10, 18, 24) and group == ranks else (1 if power % 2 == 0 else 2)
                yield Point(level, "collective", "fp32", kind, (2**power, group))
