"""Tables of measured kernels: how they are read, predicted, fitted and written into profiles."""

from __future__ import annotations

import dataclasses
import gzip
import math
from pathlib import Path

import numpy as np
import pytest

from parsim.compare.kernel_fit import LayoutRow, derive_kernels, fit_kernels, with_layouts
from parsim.compare.kernel_fit_attention import fit_attention
from parsim.compare.kernel_fit_collective import fit_collectives
from parsim.compare.kernel_fit_common import fit_residuals
from parsim.compare.kernel_fit_gemm import fit_gemm, predict_gemm_s
from parsim.compare.kernel_profile import kernels_toml, write_kernels
from parsim.compare.kernel_rows import AttentionRow, CollectiveRow, GemmRow
from parsim.compare.kernels import predict_s, validate_kernels
from parsim.config import load_cluster
from parsim.cost.collective import Group, collective_s
from parsim.cost.gemm import fitted_gemm_s, gemm_s
from parsim.errors import ParsimError
from parsim.kernels import AttentionFit, CollectiveFit, GemmFit, Kernels, Protocol
from parsim.shipped import data_folder, shipped

SHARED = Path(__file__).parents[2] / "../shared/measured"
GEMM = "dtype,m,n,k,time_ms,sources\n"


def test_rows_come_back_in_order_with_what_is_wrong_with_them(tmp_path: Path) -> None:
    path = tmp_path / "gemm.csv"
    path.write_text(
        GEMM
        + "bf16,4096,4096,4096,0.2,6\n"
        + "fp4,4096,4096,4096,0.2,6\n"
        + "bf16,many,4096,4096,0.2,6\n"
        + "bf16,4096,4096,4096,soon,6\n"
        + "bf16,256,32,32.5,0.003,7\n"
        + "bf16,256,32,32,-1,7\n"
        + "bf16,256,32\n"
        + "bf16,256,32,32,0.003,7\n"
    )
    cluster = load_cluster("h100-sxm-80gb")
    report = validate_kernels(path, cluster)
    assert [row.status == "ok" for row in report.rows] == [True] + 6 * [False] + [True]
    assert [row.row for row in report.rows] == list(range(1, 9))
    first = report.rows[0]
    assert first.predicted_s == gemm_s(cluster, 4096, 4096, 4096, dtype="bf16")
    assert first.error == pytest.approx(first.predicted_s / 2e-4 - 1)
    reasons = [row.reason for row in report.rows]
    assert "fp4" in reasons[1]
    assert reasons[2].startswith("m is no positive number")
    assert reasons[3].startswith("time_ms")
    assert reasons[4].startswith("k is no whole number")
    assert report.rows[2].measured_s == pytest.approx(2e-4)
    assert report.summary.rows == 8
    assert report.summary.ok == 2
    assert report.long_summary.ok == 1
    data = report.to_data()
    assert set(data["rows"][0]) == {"row", "status", "reason", "measured_ms", "predicted_ms", "error"}
    assert data["rows"][0]["measured_ms"] == pytest.approx(0.2)
    assert data["summary"]["mape"] == pytest.approx(
        (abs(first.error or 0) + abs(report.rows[7].error or 0)) / 2
    )
    assert any("fp4" in line for line in report.to_lines())


def test_the_columns_tell_the_kind_of_table(tmp_path: Path) -> None:
    cluster = load_cluster("h100-sxm-80gb")
    nccl = tmp_path / "nccl.csv"
    nccl.write_text("collective,gpus,bytes,time_ms\nalltoall,8,1048576,0.016\nall_mean,8,10,0.1\n")
    report = validate_kernels(nccl, cluster)
    assert report.rows[0].predicted_s == collective_s(cluster, "all_to_all", 2**20, Group(8, 8))
    assert report.rows[1].status == "unsupported"
    attention = tmp_path / "attention.csv"
    attention.write_text(
        "batch,seq_len,heads,kv_heads,head_dim,time_ms\n1,4096,32,8,128,0.5\n1,4096,32,5,128,0.5\n"
    )
    rows = validate_kernels(attention, cluster).rows
    assert rows[0].predicted_s == predict_s(AttentionRow(1, 4096, 32, 8, 128, 5e-4), cluster)
    assert rows[1].reason == "heads is no multiple of kv_heads"


def test_gzip_is_told_by_its_bytes(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.csv", tmp_path / "b.csv"
    plain.write_text(GEMM + "bf16,4096,4096,4096,0.2,6\n")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    cluster = load_cluster("h100-sxm-80gb")
    assert validate_kernels(packed, cluster) == validate_kernels(plain, cluster)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"dtype,m,n,time_ms\nbf16,1,1,1\n", "misses the column k"),
        (b"gpus,bytes,time_ms\n8,8,1\n", "misses the column collective"),
        (b"", "empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (gzip.compress(b"dtype,m,n,k,time_ms\n" * 100)[:-12], "damaged"),
        (gzip.compress(b"0" * (65 * 2**20)), "too large"),
    ],
    # Not by their bytes: gzip writes the time into them.
    ids=["lacks-k", "lacks-collective", "empty", "not-utf-8", "damaged", "too-large"],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ParsimError, match=message):
        validate_kernels(path, load_cluster("h100-sxm-80gb"))
    with pytest.raises(ParsimError, match="cannot read"):
        validate_kernels(tmp_path / "none.csv", load_cluster("h100-sxm-80gb"))


def test_attention_constants_come_back_from_what_they_predict() -> None:
    """Rows made with known constants, 3% of noise: the fit finds the constants."""
    device = load_cluster("h100-sxm-80gb").device
    truth = AttentionFit(
        dtype="bf16", head_dim=128, launch_s=1e-5, efficiency=0.6, tail=0.4, query_traffic=2.0,
        kv_traffic=3.0, source="", date="", fitted_to="",
    )  # fmt: skip
    cluster = load_cluster("h100-sxm-80gb")
    random = np.random.default_rng(0)
    rows = []
    for batch in (1, 4, 16):
        for seq in (128, 512, 2048, 8192):
            for heads, kv_heads in ((8, 1), (8, 8), (32, 4), (32, 32), (64, 8)):
                row = AttentionRow(batch, seq, heads, kv_heads, 128, 1.0)
                with_truth = Kernels(attention=(truth,))

                seconds = predict_s(row, dataclasses.replace(cluster, kernels=with_truth))
                noise = math.exp(0.03 * random.normal())
                rows.append(AttentionRow(batch, seq, heads, kv_heads, 128, seconds * noise))
    (found,) = fit_attention(device, rows)
    assert found.efficiency == pytest.approx(truth.efficiency, rel=0.03)
    assert found.launch_s == pytest.approx(truth.launch_s, rel=0.05)
    assert found.query_traffic == pytest.approx(truth.query_traffic, rel=0.1)
    assert found.kv_traffic == pytest.approx(truth.kv_traffic, rel=0.1)


def test_collective_constants_come_back_from_what_they_predict() -> None:
    cluster = load_cluster("h100-sxm-80gb")
    truth = CollectiveFit(
        kind="all_reduce",
        gpus=8,
        switch_bytes=3e6,
        short=Protocol(latency_s=1.5e-5, bus_efficiency=0.3, exponent=1.0),
        long=Protocol(latency_s=4e-5, bus_efficiency=0.9, exponent=0.8),
        source="",
        date="",
        fitted_to="",
    )

    made = dataclasses.replace(cluster, kernels=Kernels(collective=(truth,)))
    sizes = [2**i for i in range(10, 30)]
    rows = [
        CollectiveRow("all_reduce", 8, size, collective_s(made, "all_reduce", size, Group(8, 8)))
        for size in sizes
    ]
    (found,) = fit_collectives(cluster.intra_node, rows)
    assert found.long.bus_efficiency == pytest.approx(0.9, rel=0.03)
    assert found.long.latency_s == pytest.approx(4e-5, rel=0.1)
    assert 2**21 < found.switch_bytes < 2**22
    assert found.short is not None
    assert found.short.latency_s == pytest.approx(1.5e-5, rel=0.05)


def test_where_a_curve_is_silent_the_switch_follows_the_other_group_sizes() -> None:
    """NCCL takes Simple from (1.8 us + 2.8 us · steps) / wire factor on, times a device's rate.

    Rows of 4 MB and 8 MB among eight are missing, where its switch lies; two and four tell the rate.
    """
    cluster = load_cluster("h100-sxm-80gb")
    modelled = {2: (1.8 + 2.8 * 1) / (1 / 2), 4: (1.8 + 2.8 * 3) / (3 / 4), 8: (1.8 + 2.8 * 7) / (7 / 8)}
    for rate in (2.4e5, 4.2e5):  # eight ranks switch at 5.9 MB, or at 10.3 MB
        rows = []
        for gpus, size_bytes in modelled.items():
            truth = CollectiveFit(
                kind="all_gather",
                gpus=gpus,
                switch_bytes=rate * size_bytes,
                short=Protocol(latency_s=4e-6 + 1e-6 * gpus, bus_efficiency=0.4, exponent=1.0),
                long=Protocol(latency_s=5e-5, bus_efficiency=0.7, exponent=0.9),
                source="",
                date="",
                fitted_to="",
            )
            made = dataclasses.replace(cluster, kernels=Kernels(collective=(truth,)))
            group = Group(gpus, gpus)
            rows += [
                CollectiveRow("all_gather", gpus, size, collective_s(made, "all_gather", size, group))
                for size in (2**i for i in range(10, 30))
                if gpus < 8 or size not in (2**22, 2**23)
            ]
        found = {fit.gpus: fit for fit in fit_collectives(cluster.intra_node, rows)}
        assert (found[8].switch_bytes < 2**23) == (rate < 3e5)


def test_an_exchange_has_a_protocol_for_tiny_messages() -> None:
    """Eight GPUs exchange 64 KiB in 10 us and 1 MiB in 16 (aiconfigurator, H100): LL, then Simple."""
    cluster = load_cluster("h100-sxm-80gb")
    for num_bytes, measured_s in ((2**16, 10.1e-6), (2**20, 15.9e-6), (2**25, 125.2e-6)):
        seconds = collective_s(cluster, "all_to_all", num_bytes, Group(8, 8))
        assert seconds == pytest.approx(measured_s, rel=0.15)


def test_gemm_constants_predict_what_they_were_not_fitted_to() -> None:
    device = load_cluster("h100-sxm-80gb").device
    truth = GemmFit(
        dtype="bf16", tiles=((256, 128, 0.8), (64, 64, 0.6)), launch_s=3e-6, ramp_k=150, split_k=1500,
        wave_quantisation=0.7, memory_efficiency=0.8, overlap_exponent=4, droop=0.1, droop_s=1e-3,
        source="", date="", fitted_to="",
    )  # fmt: skip
    sizes = (256, 768, 1024, 3072, 4096, 12288)
    rows = [
        GemmRow("bf16", m, n, k, float(fitted_gemm_s(truth, device, m, n, k)))
        for m in sizes
        for n in sizes
        for k in sizes
    ]
    found = fit_gemm(device, rows, dtype="bf16")
    for m, n, k in ((2048, 2048, 2048), (8192, 1536, 640), (512, 10240, 8192)):
        unseen = GemmRow("bf16", m, n, k, float(fitted_gemm_s(truth, device, m, n, k)))
        assert predict_gemm_s(found, device, unseen) == pytest.approx(unseen.measured_s, rel=0.05)


def test_residuals_of_a_cell_with_few_rows_say_little() -> None:
    rows = np.array([1.0] * 40 + [2.0])
    ratio = np.array([0.2] * 40 + [0.2])
    table = fit_residuals(rows, np.ones(41), np.full(41, 64.0), ratio, np.ones(41), knots=(64, 128))
    assert table.percent[0][0][0] == pytest.approx(22, abs=1)
    assert 5 < table.percent[1][0][0] < 15


def test_layouts_are_compared_with_the_forward() -> None:
    device = load_cluster("h100-sxm-80gb").device
    fit = load_cluster("h100-sxm-80gb").kernels.gemm[0]
    rows = []
    for layout, slower in (("TN", 1.2), ("NN", 1.26), ("NT", 1.5)):
        seconds = slower * fitted_gemm_s(fit, device, 4096, 4096, 4096, layout=layout)
        rows.append(LayoutRow(fit.dtype, layout, 4096, 4096, 4096, 2 * 4096**3 / seconds))
    assert with_layouts(fit, device, rows).layout_slowdown == {"NN": 1.05, "NT": 1.25}
    assert with_layouts(fit, device, rows[1:]) == fit


def test_relatives_keep_shares_of_the_data_sheet() -> None:
    kernels = load_cluster("a100-sxm-80gb").kernels
    volta = derive_kernels(kernels, relative="a100-sxm-80gb", rate=0.5, dtypes={"bf16": "fp16"})
    assert volta.relative == "a100-sxm-80gb"
    (fit,) = volta.gemm
    assert (fit.dtype, fit.residuals) == ("fp16", None)
    assert fit.tiles[0][2] == pytest.approx(kernels.gemm[0].tiles[0][2] / 2, rel=1e-3)
    assert "a100-sxm-80gb" in fit.source
    assert volta.collective[0].long == kernels.collective[0].long


def test_fits_need_rows_and_dtypes_apart() -> None:
    rows = [GemmRow("bf16", 256, 256, 256, 1e-5)] * 5
    assert fit_kernels(load_cluster("h100-sxm-80gb"), rows) == Kernels()


def test_constants_are_written_at_the_end_of_a_profile(tmp_path: Path) -> None:
    source = shipped("hardware_profiles")["a100-sxm-80gb"].read_text()
    path = tmp_path / "a100-sxm-80gb.toml"
    path.write_text(source)
    kernels = load_cluster("h100-sxm-80gb").kernels
    write_kernels(path, kernels)
    once = path.read_text()
    assert load_cluster(str(path)).kernels == kernels
    assert load_cluster(str(path)).device == load_cluster("a100-sxm-80gb").device
    write_kernels(path, kernels)
    assert path.read_text() == once


@pytest.mark.parametrize("name", sorted(shipped("hardware_profiles")))
def test_shipped_profiles_are_small_and_say_where_their_constants_come_from(name: str) -> None:
    path = data_folder("hardware_profiles") / f"{name}.toml"
    assert path.stat().st_size < 60_000
    kernels = load_cluster(name).kernels
    if name == "local-cpu":
        return
    assert kernels.gemm
    assert kernels.attention
    assert kernels.memory_bound
    assert kernels.collective
    for noun in (*kernels.gemm, *kernels.attention, kernels.memory_bound, *kernels.collective):
        assert noun.source
        assert noun.date
        assert noun.fitted_to
    assert path.read_text().endswith(kernels_toml(kernels))
    if kernels.relative:
        assert kernels.relative in shipped("hardware_profiles")


DEVICES = ("a100-sxm-80gb", "h100-sxm-80gb", "h200-sxm-141gb", "b200-sxm-180gb", "gb200-nvl72")
LIMITS = {"gemm": (0.03, 0.08), "attention_forward": (0.04, 0.12), "nccl": (0.03, 0.10)}
"""Median and 90th percentile of the error of long kernels, on the rows that the fits have seen."""


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("table", sorted(LIMITS))
def test_shared_tables_within_limits(table: str, name: str) -> None:
    path = SHARED / f"{table}_{name}.csv.gz"
    if not path.exists():
        pytest.skip("the shared tables of measured kernels are not beside this checkout")
    report = validate_kernels(path, load_cluster(name))
    assert report.summary.ok == report.summary.rows
    median, p90 = LIMITS[table]
    assert report.long_summary.median_ape is not None
    assert report.long_summary.p90_ape is not None
    assert report.long_summary.median_ape < median
    assert report.long_summary.p90_ape < p90
