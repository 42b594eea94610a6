"""Fit the [kernels] tables of hardware profiles to tables of measured kernels, and write them.

    python benchmarks/fit_kernels.py h100-sxm-80gb --measured ../shared/measured
    python benchmarks/fit_kernels.py my-gpu.toml --gemm g.csv --attention a.csv.gz --nccl n.csv
    python benchmarks/fit_kernels.py --relatives

The first form finds gemm_H.csv.gz, attention_forward_H.csv.gz and nccl_H.csv.gz in a folder. The last
one gives profiles without measurements the constants of their nearest relative. Kinds of kernels without
a table keep the constants they have. The same input writes the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import math
from dataclasses import fields, replace
from pathlib import Path

from parsim.compare.kernel_fit import (
    POWER_EXPONENT,
    LayoutRow,
    derive_kernels,
    fit_kernels,
    outliers,
)
from parsim.compare.kernel_profile import write_kernels
from parsim.compare.kernel_rows import AttentionRow, CollectiveRow, GemmRow, read_kernel_rows
from parsim.config import find, load_cluster
from parsim.hardware import Cluster
from parsim.kernels import Kernels, Protocol

LAYOUTS_OF = {"a100-sxm-80gb": "a100-pcie-80gb", "gb200-nvl72": "b200-sxm-180gb"}
"""Whose training layouts stand for a device without its own; others: the mean of A100 and B200."""

MI300X_RATE = (668.4 / 1307.4) / (794.5 / 989.4)
"""Best bf16 rate seen over the data sheet's, MI300X over H100 (stas00/ml-engineering, MAMF table)."""


def main() -> None:
    """Read the command line, fit, write, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("hardware", nargs="*", help="a profile's name or path")
    parser.add_argument("--measured", type=Path, help="folder with tables by hardware name")
    parser.add_argument("--gemm", type=Path, help="table of GEMMs")
    parser.add_argument("--attention", type=Path, help="table of attention forwards")
    parser.add_argument("--nccl", type=Path, help="table of collectives")
    parser.add_argument("--layouts", type=Path, help="GEMMs in training layouts (SimuMax's columns)")
    parser.add_argument(
        "--relatives", action="store_true", help="derive profiles that were not measured"
    )
    given = parser.parse_args()
    for name in given.hardware:
        _fit(name, given)
    if given.relatives:
        _derive_relatives()


def _fit(name: str, given: argparse.Namespace) -> None:
    cluster = load_cluster(name)

    def table(path: Path | None, stem: str) -> Path | None:
        if path is not None or given.measured is None:
            return path
        found = Path(given.measured) / f"{stem}_{cluster.name}.csv.gz"
        return found if found.exists() else None

    layouts = given.layouts or (given.measured and given.measured / "gemm_training_layouts.csv")
    gemm_path = table(given.gemm, "gemm")
    attention_path = table(given.attention, "attention_forward")
    nccl_path = table(given.nccl, "nccl")
    gemm = [r for r in read_kernel_rows(gemm_path) if isinstance(r, GemmRow)] if gemm_path else []
    attention = (
        [r for r in read_kernel_rows(attention_path) if isinstance(r, AttentionRow)]
        if attention_path
        else []
    )
    nccl = [r for r in read_kernel_rows(nccl_path) if isinstance(r, CollectiveRow)] if nccl_path else []
    rows = _layout_rows(layouts, LAYOUTS_OF.get(cluster.name, cluster.name)) if layouts else []
    kernels = fit_kernels(cluster, gemm, attention, nccl, rows)
    kernels = _with_the_rest(kernels, cluster.kernels)
    write_kernels(find("hardware_profiles", name, what="hardware"), kernels)
    _tell(cluster, kernels, gemm)


def _with_the_rest(fitted: Kernels, before: Kernels) -> Kernels:
    """The new constants, and of kinds that no table was given for those that the profile has."""
    kept = {f.name: getattr(before, f.name) for f in fields(Kernels) if not getattr(fitted, f.name)}
    return replace(fitted, **kept)


def _layout_rows(path: Path, hardware: str) -> list[LayoutRow]:
    with path.open(newline="", encoding="utf-8") as file:
        return [
            LayoutRow(
                r["dtype"], r["layout"], int(r["m"]), int(r["n"]), int(r["k"]), float(r["tflops"]) * 1e12
            )
            for r in csv.DictReader(file)
            if r["hardware"] == hardware
        ]


def _tell(cluster: Cluster, kernels: Kernels, rows: list[GemmRow]) -> None:
    for fit in kernels.gemm:
        print(f"{cluster.name} GEMM {fit.dtype}: {fit.fitted_to}; layouts {fit.layout_slowdown}")
        odd = outliers(fit, cluster.device, rows)
        print(f"  {len(odd)} outliers, kept in the statistics:")
        for row, why in odd[:20]:
            print(f"    {row.m} x {row.n} x {row.k}, {row.measured_s * 1e3:.4f} ms: {why}")
    for attention in kernels.attention:
        print(f"{cluster.name} attention head_dim {attention.head_dim}: {attention.fitted_to}")
    if kernels.collective:
        print(f"{cluster.name} collectives: {kernels.collective[0].fitted_to}")


def _derive_relatives() -> None:
    """Profiles without measurements, and what a measured one lacks, from their nearest relatives."""
    a100, h100, b200, gb200 = (
        load_cluster(name)
        for name in ("a100-sxm-80gb", "h100-sxm-80gb", "b200-sxm-180gb", "gb200-nvl72")
    )
    for name in ("h100-sxm-80gb", "h200-sxm-141gb"):
        _write(name, _with_mean_layouts(load_cluster(name).kernels, a100.kernels, b200.kernels))
    eight = tuple(
        replace(
            fit,
            source=f"b200-sxm-180gb's eight GPUs, the same NVLink 5 and switches; {fit.source}",
        )
        for fit in b200.kernels.collective
        if fit.gpus == 8
    )
    own = tuple(fit for fit in gb200.kernels.collective if fit.gpus < 8)
    _write("gb200-nvl72", replace(gb200.kernels, collective=own + eight))
    h100, gb200 = load_cluster("h100-sxm-80gb"), load_cluster("gb200-nvl72")
    for name, relative in (
        ("a100-sxm-40gb", a100),
        ("a100-pcie-80gb", a100),
        ("h100-sxm-96gb-500w", h100),
        ("b300-sxm-288gb", b200),
        ("gb300-nvl72", gb200),
    ):
        power = load_cluster(name).device.power_w / relative.device.power_w
        kernels = derive_kernels(relative.kernels, relative=relative.name, rate=power**POWER_EXPONENT)
        _write(name, _over_pcie(kernels) if "pcie" in name else kernels)
    volta = derive_kernels(a100.kernels, relative=a100.name, dtypes={"bf16": "fp16"})
    _write("v100-sxm-32gb", volta)
    amd = derive_kernels(h100.kernels, relative=h100.name, rate=MI300X_RATE)
    # No switch adds numbers up between MI300X, nor between A100.
    links = derive_kernels(a100.kernels, relative=a100.name).collective
    _write("mi300x", replace(amd, collective=links))


def _with_mean_layouts(kernels: Kernels, one: Kernels, other: Kernels) -> Kernels:
    def mean(layout: str) -> float:
        slow = [f.layout_slowdown[layout] for k in (one, other) for f in k.gemm if f.dtype == "bf16"]
        return round(math.sqrt(slow[0] * slow[1]), 3)

    layouts = {layout: mean(layout) for layout in ("NN", "NT")}
    return replace(
        kernels,
        gemm=tuple(
            replace(fit, layout_slowdown=layouts) if fit.dtype == "bf16" else fit for fit in kernels.gemm
        ),
    )


def _over_pcie(kernels: Kernels) -> Kernels:
    """Collectives through PCIe switches: bus efficiencies that SimuMax measured on eight A100 PCIe."""
    share = {2: 0.66, 4: 0.66, 8: 0.4}  # of PCIe 4's 31.5 GB/s; its table is of 30 GB/s
    return replace(
        kernels,
        collective=tuple(
            replace(
                fit,
                tiny_bytes=0.0,
                tiny=None,
                switch_bytes=0.0,
                short=None,
                long=Protocol(
                    latency_s=fit.long.latency_s, bus_efficiency=share[fit.gpus], exponent=1.0
                ),
                source="MooreThreads/SimuMax, configs/system/a100_pcie.json; latency as over NVLink",
                fitted_to="SimuMax's efficiencies of all_reduce and all_gather among 2, 4 and 8 GPUs",
            )
            for fit in kernels.collective
        ),
    )


def _write(name: str, kernels: Kernels) -> None:
    write_kernels(find("hardware_profiles", name, what="hardware"), kernels)
    print(f"{name}: written, relative {kernels.relative or 'none'}")


if __name__ == "__main__":
    main()
