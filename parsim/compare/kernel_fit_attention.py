"""Fitting parsim.cost.attention to measured forwards, which is linear in its constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from parsim.compare.kernel_fit_common import DATE, SOURCE, Vector, fit_residuals, held_out_text
from parsim.compare.kernel_rows import AttentionRow
from parsim.compare.kernels import LONG_KERNEL_S
from parsim.cost.attention import AttentionWork, attention_work, serving_s
from parsim.cost.interpolation import residual_factor
from parsim.hardware import Device
from parsim.kernels import AttentionFit

KNOTS_OF_SEQ = (512, 2048, 8192)
SHORT_WEIGHT = 0.5
FALLBACK = 0.6
"""A head dimension below this share of the best one's efficiency runs on a slower kind of kernel."""

_LOG_SCALE = 0.05


def fit_attention(device: Device, rows: Sequence[AttentionRow]) -> tuple[AttentionFit, ...]:
    """The constants of every head dimension that was measured, and the error on rows not used."""
    fits = []
    for head_dim in sorted({row.head_dim for row in rows}):
        some = [row for row in rows if row.head_dim == head_dim]
        fits.append(_fit_with_error(device, some, head_dim))
    best = max(fit.efficiency for fit in fits)
    return tuple(replace(fit, flash=fit.efficiency >= FALLBACK * best) for fit in fits)


def predict_attention_s(fit: AttentionFit, device: Device, row: AttentionRow) -> float:
    """Seconds of a serving framework's op by a fit with its residuals."""
    factor = residual_factor(fit.residuals, row.heads, row.kv_heads, row.seq_len)
    return serving_s(fit, _work(device, row)) * factor


def _fit_with_error(device: Device, rows: Sequence[AttentionRow], head_dim: int) -> AttentionFit:
    def make(some: Sequence[AttentionRow]) -> AttentionFit:
        return _fit(device, some, head_dim)

    def predict(fit: AttentionFit, row: AttentionRow) -> float:
        return predict_attention_s(fit, device, row)

    def counts(row: AttentionRow) -> bool:
        return row.measured_s >= LONG_KERNEL_S

    unseen = (
        held_out_text(
            rows, make, predict, group=lambda r: r, name="a random fifth of the rows", counts=counts
        ),
        held_out_text(
            rows,
            make,
            predict,
            group=lambda r: (r.heads, r.kv_heads),
            name="a fifth of the (heads, kv_heads)",
            counts=counts,
        ),
    )
    text = (
        f"{len(rows)} causal forwards in bf16. Median / 90th percentile of the error of kernels over "
        f"50 us that a fit has not seen: {'; '.join(unseen)}"
    )
    return replace(make(rows), fitted_to=text)


def _work(device: Device, row: AttentionRow) -> AttentionWork:
    return attention_work(
        device,
        batch=row.batch,
        seq_q=row.seq_len,
        seq_kv=row.seq_len,
        heads=row.heads,
        kv_heads=row.kv_heads,
        head_dim=row.head_dim,
        dtype="bf16",
    )


def _fit(device: Device, rows: Sequence[AttentionRow], head_dim: int) -> AttentionFit:
    """Non-negative coefficients of launch, even share, longest block, and both kinds of traffic."""
    from scipy.optimize import least_squares

    works = [_work(device, row) for row in rows]
    terms = np.array([(1e-6, w.compute_s, w.tail_s, w.query_s, w.kv_s) for w in works])
    seconds = np.array([row.measured_s for row in rows])
    weight = np.where(seconds >= LONG_KERNEL_S, 1.0, SHORT_WEIGHT)

    def residuals(x: Vector) -> Vector:
        found: Vector = weight * np.log(terms @ np.exp(x) / seconds)
        return found

    start = np.log([8.0, 1.6, 1.0, 1.5, 3.0])
    found = least_squares(residuals, start, loss="soft_l1", f_scale=_LOG_SCALE, max_nfev=100)
    launch, compute, tail, query, kv = (float(f"{value:.4g}") for value in np.exp(found.x))
    fit = AttentionFit(
        dtype="bf16",
        head_dim=head_dim,
        launch_s=float(f"{launch * 1e-6:.4g}"),
        efficiency=min(1.0, float(f"{1 / compute:.4g}")),
        tail=float(f"{tail / compute:.4g}"),
        query_traffic=query,
        kv_traffic=kv,
        source=SOURCE,
        date=DATE,
        fitted_to="",
    )
    ratio = np.log(seconds / np.array([serving_s(fit, work) for work in works]))
    heads, kv_heads, seq = np.array([(r.heads, r.kv_heads, r.seq_len) for r in rows], dtype=np.float64).T
    return replace(fit, residuals=fit_residuals(heads, kv_heads, seq, ratio, weight, knots=KNOTS_OF_SEQ))
