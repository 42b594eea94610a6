"""Fitting parsim.cost.gemm to measured GEMMs of one dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from parsim.compare.kernel_fit_common import DATE, SOURCE, Vector, fit_residuals, held_out_text
from parsim.compare.kernel_rows import GemmRow
from parsim.compare.kernels import LONG_KERNEL_S
from parsim.cost.gemm import Arithmetic, fitted_gemm_s
from parsim.cost.interpolation import residual_factor
from parsim.hardware import DTYPE_BYTES, Device
from parsim.kernels import GemmFit

ARRAYS = Arithmetic(np.ceil, np.maximum, np.minimum)

TILE_SHAPES = ((256, 256), (256, 128), (128, 128), (256, 64), (128, 64), (64, 64))
"""Tile shapes that cuBLAS and CUTLASS ship; those that no row is fastest with are left out of a fit."""
KNOTS_OF_K = (64, 256, 1024, 4096, 8192, 16384)
SHORT_WEIGHT = 0.4
"""Weight of a kernel under LONG_KERNEL_S, where launch and timer decide."""

_STARTS = 8
_SAMPLE = 1000
_LOG_SCALE = 0.04
"""Errors from here on pull less than quadratically."""


@dataclass(frozen=True, slots=True)
class _Table:
    """Measured GEMMs of one dtype as arrays."""

    m: Vector
    n: Vector
    k: Vector
    seconds: Vector
    weight: Vector

    def only(self, mask: NDArray[np.bool_]) -> _Table:
        return _Table(self.m[mask], self.n[mask], self.k[mask], self.seconds[mask], self.weight[mask])

    def form_s(self, fit: GemmFit, device: Device) -> Vector:
        """Seconds of every row by the form alone."""
        form: Vector = fitted_gemm_s(fit, device, self.m, self.n, self.k, of=ARRAYS)
        return form


def fit_gemm(device: Device, rows: Sequence[GemmRow], *, dtype: str) -> GemmFit:
    """The constants of one dtype with a table of residuals, and the error on rows not used."""
    rows = [row for row in rows if row.dtype == dtype]

    def make(some: Sequence[GemmRow]) -> GemmFit:
        return _fit(device, some, dtype)

    def without_residuals(some: Sequence[GemmRow]) -> GemmFit:
        return replace(make(some), residuals=None)

    def predict(fit: GemmFit, row: GemmRow) -> float:
        return predict_gemm_s(fit, device, row)

    def counts(row: GemmRow) -> bool:
        return row.measured_s >= LONG_KERNEL_S

    unseen = (
        held_out_text(
            rows, make, predict, group=lambda r: r, name="a random fifth of the rows", counts=counts
        ),
        held_out_text(
            rows, make, predict, group=lambda r: (r.n, r.k), name="a fifth of the (n, k)", counts=counts
        ),
        held_out_text(
            rows,
            without_residuals,
            predict,
            group=lambda r: (r.m, r.n),
            name="a fifth of the (m, n), where no residual helps",
            counts=counts,
        ),
    )
    text = (
        f"{len(rows)} rows, m from 256. Median / 90th percentile of the error of kernels over 50 us "
        f"that a fit has not seen: {'; '.join(unseen)}"
    )
    if DTYPE_BYTES[dtype] == 1:
        text += ". Recipe: A arrives in bf16 and is cast on the way, B is cast before"
    return replace(make(rows), fitted_to=text)


def predict_gemm_s(fit: GemmFit, device: Device, row: GemmRow) -> float:
    """Seconds by a fit with its residuals."""
    seconds = fitted_gemm_s(fit, device, row.m, row.n, row.k)
    return float(seconds * residual_factor(fit.residuals, row.m, row.n, row.k))


def _fit(device: Device, rows: Sequence[GemmRow], dtype: str) -> GemmFit:
    m, n, k, seconds = np.array([(r.m, r.n, r.k, r.measured_s) for r in rows], dtype=np.float64).T
    table = _Table(m, n, k, seconds, np.where(seconds >= LONG_KERNEL_S, 1.0, SHORT_WEIGHT))
    random = np.random.default_rng(0)
    sample = table.only(random.random(len(rows)) < _SAMPLE / len(rows))
    centre, width = _start(casts=DTYPE_BYTES[dtype] == 1)
    found = [_descend(centre, device, dtype, sample)]
    for _ in range(_STARTS - 1):
        x = centre + width * random.normal(size=len(centre))
        found.append(_descend(x, device, dtype, sample))
    _, x = min(found, key=lambda pair: pair[0])
    _, x = _descend(x, device, dtype, table)
    fit = _rounded(_without_idle_tiles(_to_fit(x, dtype), device, table))
    ratio = np.log(table.seconds / table.form_s(fit, device))
    return replace(fit, residuals=fit_residuals(m, n, k, ratio, table.weight, knots=KNOTS_OF_K))


def _start(*, casts: bool) -> tuple[Vector, Vector]:
    """Where the search starts, and how far apart its starts lie, in the coordinates of _to_fit."""
    centre = [1.0, 5.0, 7.0, 0.0, 0.0, 1.0, -2.0, 7.0, *([1.8, -1.0] if casts else [])]
    width = [0.5, 0.5, 0.7, 1.0, 1.5, 0.5, 1.0, 1.0, *([0.5, 0.5] if casts else [])]
    tiles = len(TILE_SHAPES)
    return np.array(centre + tiles * [1.2]), np.array(width + tiles * [0.8])


def _to_fit(x: Vector, dtype: str) -> GemmFit:
    """A fit from unbounded coordinates: logs of what is positive, logits of shares."""
    tiles = len(TILE_SHAPES)
    launch, ramp, split, overlap, quantised, memory, droop, droop_us, *casts = x[:-tiles]
    return GemmFit(
        dtype=dtype,
        tiles=tuple((a, b, _share(v)) for (a, b), v in zip(TILE_SHAPES, x[-tiles:], strict=True)),
        launch_s=_positive(launch) * 1e-6,
        ramp_k=_positive(ramp),
        split_k=_positive(split),
        wave_quantisation=_share(quantised),
        memory_efficiency=_share(memory),
        overlap_exponent=1 + 7 * _share(overlap),
        droop=_positive(droop),
        droop_s=_positive(droop_us) * 1e-6,
        quantize_bytes=_positive(casts[0]) if casts else 0.0,
        quantize_unaligned=_positive(casts[1]) if casts else 0.0,
        source=SOURCE,
        date=DATE,
        fitted_to="",
    )


def _share(x: float) -> float:
    return float(1e-3 + 0.998 / (1 + np.exp(-np.clip(x, -30, 30))))


def _positive(x: float) -> float:
    return float(np.exp(np.clip(x, -30, 15)))


def _descend(x: Vector, device: Device, dtype: str, table: _Table) -> tuple[float, Vector]:
    """(cost, coordinates) of the nearest minimum."""
    from scipy.optimize import least_squares

    def residuals(x: Vector) -> Vector:
        return table.weight * np.log(table.form_s(_to_fit(x, dtype), device) / table.seconds)

    steps = np.full(len(x), 1e-4)
    found = least_squares(residuals, x, loss="soft_l1", f_scale=_LOG_SCALE, diff_step=steps, max_nfev=25)
    return float(found.cost), found.x


def _without_idle_tiles(fit: GemmFit, device: Device, table: _Table) -> GemmFit:
    """The fit with the tile shapes that at least one row in a thousand is fastest with."""
    times = np.stack([table.form_s(replace(fit, tiles=(tile,)), device) for tile in fit.tiles])
    fastest = np.bincount(times.argmin(axis=0), minlength=len(fit.tiles))
    used = fastest > len(table.m) / 1000
    return replace(fit, tiles=tuple(t for t, keep in zip(fit.tiles, used, strict=True) if keep))


def _rounded(fit: GemmFit) -> GemmFit:
    """The fit with four digits a constant, as it is written to a file."""

    def four(value: float) -> float:
        return float(f"{value:.4g}")

    return replace(
        fit,
        tiles=tuple((a, b, four(e)) for a, b, e in fit.tiles),
        launch_s=four(fit.launch_s),
        ramp_k=four(fit.ramp_k),
        split_k=four(fit.split_k),
        wave_quantisation=four(fit.wave_quantisation),
        memory_efficiency=four(fit.memory_efficiency),
        overlap_exponent=four(fit.overlap_exponent),
        droop=four(fit.droop),
        droop_s=four(fit.droop_s),
        quantize_bytes=four(fit.quantize_bytes),
        quantize_unaligned=four(fit.quantize_unaligned),
    )
