"""Fitting the constants of all kernel models of a device to measured kernels.

Every fit is made several times: without a fifth of the rows, or without a fifth of the shapes, to see
how far off it is where it was not fitted, and once with all rows. Losses are robust (soft L1 of the log
of predicted over measured), so that rows which break their neighbours' trend pull little; they stay in
the statistics. Generators are seeded: the same rows give the same constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np

from parsim.compare.kernel_fit_attention import fit_attention
from parsim.compare.kernel_fit_collective import fit_collectives
from parsim.compare.kernel_fit_gemm import fit_gemm, predict_gemm_s
from parsim.compare.kernel_rows import AttentionRow, CollectiveRow, GemmRow
from parsim.cost.gemm import LAYOUTS, fitted_gemm_s
from parsim.hardware import Cluster, Device
from parsim.kernels import AttentionFit, CollectiveFit, GemmFit, Kernels, MemoryBoundFit

Taken = TypeVar("Taken", GemmFit, AttentionFit, MemoryBoundFit, CollectiveFit)

ROWS_FOR_A_FIT = 100
"""A dtype with fewer GEMMs is not fitted."""
OUTLIER = 0.3
"""Relative error from which a row, seen by the fit, is called an outlier."""
POWER_EXPONENT = 0.25
"""Of the power limit in the rate of GEMMs on the same chip: best seen 252.9 TFLOP/s on A100 PCIe (300 W)
and 271.2 on A100 SXM (400 W), stas00/ml-engineering, MAMF table."""


class LayoutRow(NamedTuple):
    """One GEMM measured in a layout that training uses."""

    dtype: str
    layout: str
    m: int
    n: int
    k: int
    flops_per_s: float


def fit_kernels(
    cluster: Cluster,
    gemm_rows: Sequence[GemmRow],
    attention_rows: Sequence[AttentionRow] = (),
    nccl_rows: Sequence[CollectiveRow] = (),
    layout_rows: Sequence[LayoutRow] = (),
) -> Kernels:
    """The constants of one device, each with the rows it was fitted to and its error on unseen ones.

    `layout_rows` compare the layouts of a backward pass with the forward's; without them no layout is
    slower than another.
    """
    gemm = []
    for dtype in sorted({row.dtype for row in gemm_rows}):
        if sum(row.dtype == dtype for row in gemm_rows) >= ROWS_FOR_A_FIT:
            fit = fit_gemm(cluster.device, gemm_rows, dtype=dtype)
            gemm.append(with_layouts(fit, cluster.device, layout_rows))
    return Kernels(
        gemm=tuple(gemm),
        attention=fit_attention(cluster.device, attention_rows) if attention_rows else (),
        memory_bound=_memory_bound(gemm),
        collective=fit_collectives(cluster.intra_node, nccl_rows) if nccl_rows else (),
    )


def with_layouts(fit: GemmFit, device: Device, rows: Sequence[LayoutRow]) -> GemmFit:
    """The fit with each layout's median of measured over predicted, over that of layout TN."""
    medians = {}
    for layout in LAYOUTS:
        ratios = [
            2.0 * r.m * r.n * r.k / r.flops_per_s
            / fitted_gemm_s(fit, device, r.m, r.n, r.k, layout=layout)
            for r in rows
            if r.layout == layout and r.dtype == fit.dtype
        ]  # fmt: skip
        if ratios:
            medians[layout] = float(np.median(ratios))
    if "TN" not in medians:
        return fit
    slower = {name: round(medians[name] / medians["TN"], 3) for name in medians if name != "TN"}
    text = f"{fit.fitted_to}. Layouts: {len(rows)} rows, TN {medians['TN']:.2f} x the bare kernel there"
    return replace(fit, layout_slowdown=slower, fitted_to=text)


def _memory_bound(fits: Sequence[GemmFit]) -> MemoryBoundFit | None:
    """Launch and bandwidth of a kernel that streams, as the GEMMs with little to compute show them."""
    for fit in fits:
        if not fit.quantize_bytes:
            return MemoryBoundFit(
                launch_s=fit.launch_s,
                efficiency=fit.memory_efficiency,
                source=fit.source,
                date=fit.date,
                fitted_to=f"launch and memory traffic of the {fit.dtype} GEMMs",
            )
    return None


def derive_kernels(
    kernels: Kernels,
    *,
    relative: str,
    rate: float = 1.0,
    dtypes: Mapping[str, str] | None = None,
) -> Kernels:
    """Constants for a device that was not measured, from its nearest relative's.

    Efficiencies are shares of the data sheet's figures, so they carry over; the library's choices
    (residuals) do not. `rate` scales the efficiencies of GEMM and attention, `dtypes` keeps some dtypes
    under new names ({"bf16": "fp16"}).
    """

    def taken(noun: Taken) -> Taken:
        scaled = "" if rate == 1.0 else f", matrix rates x {rate:.3g}"
        source = f"no measurement of this device: {relative}'s constants{scaled}; {noun.source}"
        return replace(noun, source=source, fitted_to=f"{relative}: {noun.fitted_to}")

    names = dtypes if dtypes is not None else {fit.dtype: fit.dtype for fit in kernels.gemm}
    return Kernels(
        relative=relative,
        gemm=tuple(
            replace(
                taken(fit),
                dtype=names[fit.dtype],
                tiles=tuple((a, b, round(min(1.0, e * rate), 4)) for a, b, e in fit.tiles),
                residuals=None,
            )
            for fit in kernels.gemm
            if fit.dtype in names
        ),
        attention=tuple(
            replace(
                taken(fit),
                dtype=names[fit.dtype],
                efficiency=round(min(1.0, fit.efficiency * rate), 4),
                residuals=None,
            )
            for fit in kernels.attention
        ),
        memory_bound=taken(kernels.memory_bound) if kernels.memory_bound else None,
        collective=tuple(taken(fit) for fit in kernels.collective),
    )


def outliers(fit: GemmFit, device: Device, rows: Sequence[GemmRow]) -> list[tuple[GemmRow, str]]:
    """Rows that beat the data sheet, or that break their neighbours' trend by OUTLIER, and why."""
    peak = device.peak_flops_per_s[fit.dtype]
    found = []
    for row in rows:
        if row.dtype != fit.dtype:
            continue
        error = predict_gemm_s(fit, device, row) / row.measured_s - 1
        if row.flops / row.measured_s > peak:
            found.append((row, f"{row.flops / row.measured_s / peak:.2f} of the data sheet's peak"))
        elif abs(error) > OUTLIER:
            found.append((row, f"predicted {error:+.0%}, out of its neighbours' trend"))
    return found
