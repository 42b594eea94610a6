"""Time of one bare GEMM on one device.

Tiles of the result are dealt out to the SMs in waves; the library picks the tile shape, and whether SMs
share a tile's k, by what is fastest. Compute and memory traffic overlap, and a long kernel slows its
clock down. Sources: NVIDIA, "Matrix Multiplication Background User's Guide" (tile and wave
quantisation); Osama et al., "Stream-K", PPoPP 2023, arXiv 2301.03598 (work shared evenly over SMs).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from parsim.cost.interpolation import among_points, residual_factor
from parsim.errors import ParsimError
from parsim.hardware import DTYPE_BYTES, Cluster, Device, peak_flops_per_s
from parsim.kernels import GemmFit, MeasuredGemm

LAYOUTS = ("TN", "NN", "NT")
"""Forward, gradient of the input, gradient of the weight (added to a result kept in fp32)."""

DEFAULT_GEMM_EFFICIENCY = 0.7
"""Share of the data sheet's peak that a large GEMM reaches where nothing was measured."""
DEFAULT_MEMORY_EFFICIENCY = 0.8
"""The same for memory bandwidth."""
DEFAULT_LAUNCH_S = 3e-6
"""Time of a kernel that does next to nothing, where nothing was measured."""

ALIGNED_BYTES = 16
"""Rows that tensor cores read at full speed start at multiples of this."""
UNALIGNED_SLOWDOWN = 2.0
"""Of a GEMM whose rows do not: padding nanoGPT's vocabulary from 50257 to 50304 columns, with a quarter
of the FLOPs in the head, made its whole step 25% faster (A. Karpathy, 3 February 2023)."""
UNALIGNED_BATCHED_SLOWDOWN = 11.0
"""Of a batched one, which then leaves the tensor cores: BLOOM's trials with head_dim 150 ran 22% slower
than those with 224, and attention's products are 2.4% of their FLOPs (bigscience-workshop)."""

_SAME_KERNELS = {"fp16": "bf16", "mxfp8": "fp8"}


class Arithmetic(NamedTuple):
    """What the formulas need beyond operators: of numbers, or of arrays when a table is fitted."""

    ceil: Callable[[Any], Any]
    greater: Callable[[Any, Any], Any]
    lesser: Callable[[Any, Any], Any]


SCALAR = Arithmetic(math.ceil, max, min)


def gemm_s(
    cluster: Cluster,
    m: int,
    n: int,
    k: int,
    *,
    dtype: str,
    layout: str = "TN",
    batch: int = 1,
    stream_k: bool = True,
    training: bool = False,
) -> float:
    """Seconds of `batch` bare GEMMs C[m,n] = A[m,k] B[k,n] that run as one kernel.

    Without `stream_k` a library shares a tile's k among SMs only where there are fewer tiles than SMs;
    in `training` a fp8 product finds A in fp8 (inference frameworks hand it over in 16 bits) and the
    clock yields to the power limit.
    Raises ParsimError for an unknown layout or a dtype that the device does not have.
    """
    if layout not in LAYOUTS:
        raise ParsimError("unknown layout", got=layout, expected=", ".join(LAYOUTS))
    return _gemm_s(cluster, m, n, k, dtype, layout, batch, stream_k, training)


@lru_cache(maxsize=1 << 16)
def _gemm_s(
    cluster: Cluster,
    m: int,
    n: int,
    k: int,
    dtype: str,
    layout: str,
    batch: int,
    stream_k: bool,
    training: bool,
) -> float:
    """One shape: plans by the million have the same few thousand."""
    flops = 2.0 * batch * m * n * k
    if flops == 0:
        return 0.0
    table = _measured(cluster, dtype, layout)
    if table is not None:
        rates = [((m_, n_, k_), 2.0 * m_ * n_ * k_ / s) for m_, n_, k_, s in table.points]
        return flops / among_points(rates, (m * batch, n, k))
    floor_s = flops / peak_flops_per_s(cluster.device, dtype)
    seconds = _aligned_s(
        cluster, m, n, k, dtype=dtype, layout=layout, batch=batch, stream_k=stream_k, cast=not training
    )
    if training:
        seconds *= training_slowdown(cluster.device, dtype)
    # Rows in memory are as long as k and n; of dYᵀ X, whose k runs over tokens, as m and n.
    rows = (m, n) if layout == "NT" else (n, k)
    return max(floor_s, seconds * _unaligned_slowdown(rows, dtype, batch))


def training_slowdown(device: Device, dtype: str) -> float:
    """What the device's profile says of products in training, for a dtype or one like it."""
    slowdown = device.training_slowdown
    return slowdown.get(dtype, slowdown.get(_SAME_KERNELS.get(dtype, dtype), 1.0))


def gemm_fit(cluster: Cluster, dtype: str) -> GemmFit | None:
    """The fit for a dtype, or for the one that runs on the same kernels at the same rate."""
    for wanted in (dtype, _SAME_KERNELS.get(dtype)):
        for fit in cluster.kernels.gemm:
            if fit.dtype == wanted:
                return fit
    return None


def fitted_gemm_s(
    fit: GemmFit,
    device: Device,
    m: Any,
    n: Any,
    k: Any,
    *,
    batch: int = 1,
    layout: str = "TN",
    stream_k: bool = True,
    cast: bool = True,
    of: Arithmetic = SCALAR,
) -> Any:
    """Seconds by the fitted form alone, without residuals and layout factor.

    launch + (compute^p + memory^p)^(1/p), stretched by the droop of the clock, for the best tile shape;
    p and every other constant as parsim.kernels.GemmFit says. Sizes are numbers, or arrays with `of`.
    """
    best: Any = math.inf
    for rows, columns, efficiency in fit.tiles:
        sm_flops_per_s = efficiency * peak_flops_per_s(device, fit.dtype) / device.num_sms
        tile_s = 2.0 * rows * columns / sm_flops_per_s
        for high, wide in {(rows, columns), (columns, rows)}:
            down, across = of.ceil(m / high), of.ceil(n / wide)
            waves = batch * down * across / device.num_sms
            compute_s = tile_s * _steps_of_k(fit, waves, k, of, stream_k)
            # A batch runs matrix by matrix: a wave works on one as far as its tiles go round.
            wave = (device.num_sms, down, across, high, wide)
            traffic = _traffic_bytes(fit, m, n, k, wave, layout, of) * batch
            memory_s = traffic / (fit.memory_efficiency * device.memory_bandwidth_bytes_per_s)
            p = fit.overlap_exponent
            best = of.lesser(best, (compute_s**p + memory_s**p) ** (1 / p))
    if fit.droop:
        best = best * (1 + fit.droop * best / (best + fit.droop_s))
    cast_s = 0.0
    if cast and fit.quantize_bytes:  # of A, padded first where m is no multiple of 16
        padded = 1 + fit.quantize_unaligned * (m % 16 != 0)
        cast_s = batch * m * k * fit.quantize_bytes * padded / device.memory_bandwidth_bytes_per_s
    return fit.launch_s + best + cast_s


def _steps_of_k(fit: GemmFit, waves: Any, k: Any, of: Arithmetic, stream_k: bool) -> Any:
    """Steps of k on the busiest SM: whole tiles in waves, or k shared evenly, whatever is less.

    An SM whose even share is w tiles works on parts of about 1 + 2w and exchanges sums for each.
    """
    q = fit.wave_quantisation
    whole = (q * of.ceil(waves) + (1 - q) * of.greater(waves, 1.0)) * (k + fit.ramp_k)
    if not stream_k and waves > 1:
        return whole
    return of.lesser(whole, waves * k + fit.split_k * (1 + 2 * waves))


def _traffic_bytes(
    fit: GemmFit, m: Any, n: Any, k: Any, wave: tuple[Any, ...], layout: str, of: Arithmetic
) -> Any:
    """Bytes through device memory.

    Every wave, as square as it can be, reads its rows of A and columns of B once; L2 serves the repeats
    within a wave, nothing survives to the next. The result is written, or read, added to and written.
    """
    num_sms, down, across, high, wide = wave
    tiles = down * across
    in_wave = of.lesser(num_sms, tiles)
    side = of.lesser(across, of.greater(1.0, (in_wave * high / wide) ** 0.5))
    other = of.lesser(down, in_wave / side)
    side = of.lesser(across, in_wave / other)
    read = of.greater(tiles / in_wave * (other * high + side * wide), m + n) * k
    value_bytes = DTYPE_BYTES[fit.dtype]
    result_bytes = 8 if layout == "NT" else max(2, value_bytes)
    return read * value_bytes + m * n * result_bytes


def _aligned_s(
    cluster: Cluster,
    m: int,
    n: int,
    k: int,
    *,
    dtype: str,
    layout: str,
    batch: int,
    stream_k: bool,
    cast: bool,
) -> float:
    fit = gemm_fit(cluster, dtype)
    if fit is None:
        return _roofline_s(cluster.device, m, n, k, dtype=dtype, batch=batch)
    seconds: float = fitted_gemm_s(
        fit, cluster.device, m, n, k, batch=batch, layout=layout, stream_k=stream_k, cast=cast
    )
    if batch == 1:
        seconds *= residual_factor(fit.residuals, m, n, k)
    return seconds * fit.layout_slowdown.get(layout, 1.0)


def _unaligned_slowdown(rows: tuple[int, int], dtype: str, batch: int) -> float:
    """Factor for 16-bit and 8-bit matrices whose rows (values) are no multiple of 16 bytes."""
    value_bytes = DTYPE_BYTES[dtype]
    if value_bytes not in (1, 2) or not any(row * value_bytes % ALIGNED_BYTES for row in rows):
        return 1.0
    return UNALIGNED_SLOWDOWN if batch == 1 else UNALIGNED_BATCHED_SLOWDOWN


def _measured(cluster: Cluster, dtype: str, layout: str) -> MeasuredGemm | None:
    """The machine's own table for a layout, or its forward table where the layout was not timed."""
    tables = [t for t in cluster.kernels.measured_gemm if t.dtype == dtype]
    for wanted in (layout, "TN"):
        for table in tables:
            if table.layout == wanted:
                return table
    return None


def _roofline_s(device: Device, m: int, n: int, k: int, *, dtype: str, batch: int) -> float:
    compute_s = 2.0 * batch * m * n * k / (DEFAULT_GEMM_EFFICIENCY * peak_flops_per_s(device, dtype))
    moved = batch * (m * k + k * n + m * n) * DTYPE_BYTES[dtype]
    memory_s = moved / (DEFAULT_MEMORY_EFFICIENCY * device.memory_bandwidth_bytes_per_s)
    return DEFAULT_LAUNCH_S + max(compute_s, memory_s)
