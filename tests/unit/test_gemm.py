"""What is true of one GEMM on any device."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from parsim.config import load_cluster
from parsim.cost.gemm import (
    DEFAULT_GEMM_EFFICIENCY,
    DEFAULT_LAUNCH_S,
    DEFAULT_MEMORY_EFFICIENCY,
    UNALIGNED_BATCHED_SLOWDOWN,
    UNALIGNED_SLOWDOWN,
    Arithmetic,
    fitted_gemm_s,
    gemm_s,
)
from parsim.errors import ParsimError
from parsim.hardware import Cluster, Device, Link
from parsim.kernels import GemmFit, Kernels, MeasuredGemm, Residuals

ARRAYS = Arithmetic(np.ceil, np.maximum, np.minimum)
LINK = Link(latency_s=1e-6, bandwidth_bytes_per_s=1e11, source="", date="")
FIT = GemmFit(
    dtype="bf16",
    tiles=((256, 128, 0.8), (128, 128, 0.75), (64, 64, 0.6)),
    launch_s=3e-6,
    ramp_k=150.0,
    split_k=1500.0,
    wave_quantisation=1.0,
    memory_efficiency=0.8,
    overlap_exponent=4.0,
    droop=0.2,
    droop_s=1e-3,
    source="",
    date="",
    fitted_to="",
)


def machine(*, sms: int = 100, fit: GemmFit | None = FIT, kernels: Kernels | None = None) -> Cluster:
    """A device whose every SM does 10 TFLOP/s, so that more SMs make a faster device."""
    device = Device(
        name="made up",
        peak_flops_per_s={"bf16": sms * 10e12, "fp32": sms * 1e12},
        memory_bytes=80e9,
        memory_bandwidth_bytes_per_s=3e12,
        num_sms=sms,
        l2_bytes=50e6,
        power_w=700,
        source="",
        date="",
    )
    if kernels is None:
        kernels = Kernels(gemm=(fit,) if fit else ())
    return Cluster(
        name="made-up",
        device=device,
        gpus_per_node=8,
        scale_up_domain=8,
        intra_node=LINK,
        inter_node=LINK,
        kernels=kernels,
    )


SHAPES = [(256, 512, 256), (1024, 1024, 64), (4096, 4096, 4096), (384, 16384, 1024), (64, 64, 65536)]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_more_sms_are_never_slower(m: int, n: int, k: int) -> None:
    times = [gemm_s(machine(sms=sms), m, n, k, dtype="bf16") for sms in range(20, 200, 7)]
    assert all(more <= fewer * (1 + 1e-12) for fewer, more in itertools.pairwise(times))


@pytest.mark.parametrize("name", ["a100-sxm-80gb", "h100-sxm-80gb", "b200-sxm-180gb", "mi300x"])
def test_no_gemm_beats_the_data_sheet(name: str) -> None:
    cluster = load_cluster(name)
    peak = cluster.device.peak_flops_per_s["bf16"]
    for m in (256, 1024, 4096, 8192):
        for n in (1024, 3072, 10240):
            for k in (64, 4096, 65536):
                assert gemm_s(cluster, m, n, k, dtype="bf16") >= 2 * m * n * k / peak


def test_one_tile_more_than_sms_costs_a_second_wave() -> None:
    fit = replace(FIT, tiles=((128, 128, 0.8),), split_k=1e9, droop=0.0, launch_s=0.0)
    cluster = machine(sms=100, fit=fit)
    # 10 x 10 tiles in one wave, 10 x 10 and one more in two: compute, which hides the traffic, doubles.
    one = gemm_s(cluster, 1280, 1280, 8192, dtype="bf16")
    two = gemm_s(cluster, 1280, 1288, 8192, dtype="bf16")
    assert two / one == pytest.approx(2.0, rel=0.02)
    # A mix of tile shapes, in which the last wave costs its share, shows no such step.
    smooth = machine(sms=100, fit=replace(fit, wave_quantisation=0.0))
    assert gemm_s(smooth, 1280, 1288, 8192, dtype="bf16") / one == pytest.approx(1.1, rel=0.02)


def test_a_tile_costs_its_pipeline_too() -> None:
    fit = replace(FIT, tiles=((128, 128, 1.0),), split_k=1e9, droop=0.0, launch_s=0.0)
    cluster = machine(sms=1, fit=fit)
    tile_flops = 2 * 128 * 128 * (4096 + fit.ramp_k)
    assert gemm_s(cluster, 128, 128, 4096, dtype="bf16") == pytest.approx(tile_flops / 10e12, rel=1e-3)


def test_sms_share_a_long_k_where_tiles_are_few() -> None:
    alone = machine(fit=replace(FIT, split_k=1e9))
    shared = machine(fit=FIT)

    def both(k: int) -> tuple[float, float]:
        return gemm_s(alone, 256, 256, k, dtype="bf16"), gemm_s(shared, 256, 256, k, dtype="bf16")

    assert both(65536)[1] < both(65536)[0] / 2
    assert both(512)[1] == both(512)[0]  # where k is short, the partial sums would cost more


def test_with_little_k_the_result_is_all_there_is_to_move() -> None:
    cluster = machine(fit=replace(FIT, droop=0.0))
    size = 16384 * 16384 * 2
    seconds = gemm_s(cluster, 16384, 16384, 8, dtype="bf16")
    assert seconds == pytest.approx(FIT.launch_s + size / (0.8 * 3e12), rel=0.1)
    # The weight's gradient is read and written in fp32: four times the bytes.
    added = gemm_s(cluster, 16384, 16384, 8, dtype="bf16", layout="NT")
    assert added == pytest.approx(FIT.launch_s + 4 * size / (0.8 * 3e12), rel=0.1)


def test_the_clock_droops_in_long_kernels() -> None:
    cluster = machine(fit=FIT)
    short = gemm_s(cluster, 2560, 2560, 4096, dtype="bf16") - FIT.launch_s
    long = gemm_s(cluster, 2560, 2560, 4096 * 256, dtype="bf16") - FIT.launch_s
    assert long / short > 256
    assert long / short < 256 * (1 + FIT.droop) * 1.01


def test_rows_that_are_not_aligned_are_slow() -> None:
    cluster = machine()

    def padded(n: int, k: int, batch: int = 1) -> float:
        return gemm_s(cluster, 4096, n, k, dtype="bf16", batch=batch)

    assert padded(50257, 768) == pytest.approx(UNALIGNED_SLOWDOWN * padded(50264, 768), rel=0.01)
    assert padded(2048, 150, batch=8) > 0.9 * UNALIGNED_BATCHED_SLOWDOWN * padded(2048, 152, batch=8)
    assert padded(2048, 104) < padded(2048, 112)


def test_the_gradient_of_an_odd_vocabulary_is_slow_too() -> None:
    """dW = dYᵀ X: dY has rows of 50257 values, while k counts tokens."""
    cluster = machine()

    def gradient(vocab: int, tokens: int) -> float:
        return gemm_s(cluster, vocab, 1024, tokens, dtype="bf16", layout="NT")

    assert gradient(50257, 4096) == pytest.approx(UNALIGNED_SLOWDOWN * gradient(50264, 4096), rel=0.01)
    assert gradient(50264, 4095) == pytest.approx(gradient(50264, 4096), rel=0.01)


def test_a_batch_runs_matrix_by_matrix() -> None:
    """Where every matrix fills the device, a batch reads no operand more often than matrices alone."""
    cluster = machine(fit=replace(FIT, launch_s=0.0, droop=0.0, wave_quantisation=0.0))
    one = gemm_s(cluster, 2048, 2048, 128, dtype="bf16")
    assert gemm_s(cluster, 2048, 2048, 128, dtype="bf16", batch=64) == pytest.approx(64 * one, rel=0.05)


def test_a_batch_is_as_many_tiles_as_one_product_of_that_height() -> None:
    cluster = machine(fit=replace(FIT, memory_efficiency=1.0, overlap_exponent=8.0))
    together = gemm_s(cluster, 1024, 2048, 2048, dtype="bf16", batch=8)
    assert together == pytest.approx(gemm_s(cluster, 8192, 2048, 2048, dtype="bf16"), rel=0.05)


def test_layouts_cost_their_factor() -> None:
    slower = machine(fit=replace(FIT, layout_slowdown={"NN": 1.1}))
    base = gemm_s(slower, 4096, 4096, 4096, dtype="bf16")
    assert gemm_s(slower, 4096, 4096, 4096, dtype="bf16", layout="NN") == pytest.approx(1.1 * base)


def test_casting_to_fp8_costs_memory_traffic_of_a() -> None:
    fp8 = replace(FIT, dtype="fp8", quantize_bytes=6.0, quantize_unaligned=0.5)
    cluster = machine(fit=fp8)
    device = replace(cluster.device, peak_flops_per_s={"fp8": 2e15})
    plain = fitted_gemm_s(replace(fp8, quantize_bytes=0.0), device, 8192, 256, 8192)
    cast = fitted_gemm_s(fp8, device, 8192, 256, 8192)
    assert cast - plain == pytest.approx(8192 * 8192 * 6.0 / 3e12)
    odd = fitted_gemm_s(fp8, device, 8193, 256, 8192) - fitted_gemm_s(
        replace(fp8, quantize_bytes=0.0), device, 8193, 256, 8192
    )
    assert odd == pytest.approx(8193 * 8192 * 6.0 * 1.5 / 3e12)


def test_arrays_and_numbers_get_the_same_times() -> None:
    cluster = machine()
    m, n, k = (np.array(sizes, dtype=float) for sizes in zip(*SHAPES, strict=True))
    table = fitted_gemm_s(FIT, cluster.device, m, n, k, of=ARRAYS)
    one_by_one = [fitted_gemm_s(FIT, cluster.device, *shape) for shape in SHAPES]
    assert table == pytest.approx(one_by_one, rel=1e-12)


def test_residuals_hold_where_they_were_measured_and_fade_away_from_it() -> None:
    table = Residuals(rows=(4096,), columns=(4096,), knots=(64, 4096), percent=(((0, 20),),))
    plain, with_table = machine(), machine(fit=replace(FIT, residuals=table))

    def factor(m: int, n: int, k: int) -> float:
        return gemm_s(with_table, m, n, k, dtype="bf16") / gemm_s(plain, m, n, k, dtype="bf16")

    assert factor(4096, 4096, 4096) == pytest.approx(1.2)
    assert factor(4096, 4096, 512) == pytest.approx(1.1)
    assert 1 < factor(4256, 4096, 4096) < 1.2
    assert factor(5120, 4096, 4096) == 1


def test_a_measured_table_gives_its_own_points_back_and_wins() -> None:
    points = tuple((m, n, 128, 1e-4 * (1 + m / n)) for m in (32, 96) for n in (64, 160))
    kernels = Kernels(gemm=(FIT,), measured_gemm=(MeasuredGemm(dtype="fp32", points=points),))
    cluster = machine(kernels=kernels)
    for m, n, k, seconds in points:
        assert gemm_s(cluster, m, n, k, dtype="fp32") == pytest.approx(seconds, rel=1e-12)
        assert gemm_s(cluster, m, n, k, dtype="fp32", layout="NT") == pytest.approx(seconds, rel=1e-12)
    far = gemm_s(cluster, 96 * 64, 160, 128, dtype="fp32")
    assert far == pytest.approx(64 * points[3][3], rel=0.5)


def test_without_measurements_a_roofline() -> None:
    cluster = machine(fit=None)
    compute_s = 2 * 4096**3 / (DEFAULT_GEMM_EFFICIENCY * 1e15)
    assert gemm_s(cluster, 4096, 4096, 4096, dtype="bf16") == pytest.approx(DEFAULT_LAUNCH_S + compute_s)
    moved = 2 * (8192 * 8 + 8 * 8192 + 8192 * 8192)
    memory_s = moved / (DEFAULT_MEMORY_EFFICIENCY * 3e12)
    assert gemm_s(cluster, 8192, 8192, 8, dtype="bf16") == pytest.approx(DEFAULT_LAUNCH_S + memory_s)


def test_what_cannot_be_asked() -> None:
    with pytest.raises(ParsimError, match="layout"):
        gemm_s(machine(), 8, 8, 8, dtype="bf16", layout="TT")
    with pytest.raises(ParsimError, match="fp8"):
        gemm_s(machine(), 8, 8, 8, dtype="fp8")
    assert gemm_s(machine(), 0, 8, 8, dtype="bf16") == 0.0


@pytest.mark.parametrize(
    ("name", "m", "n", "k", "best_tflops"),
    [
        ("a100-sxm-80gb", 1024, 10240, 5120, 271.2),
        ("h100-sxm-80gb", 2048, 2048, 13312, 794.5),
        ("b200-sxm-180gb", 1792, 16128, 3072, 1745.0),
        ("mi300x", 10240, 15360, 8192, 668.4),
    ],
)
def test_best_rates_anyone_saw(name: str, m: int, n: int, k: int, best_tflops: float) -> None:
    """stas00/ml-engineering, MAMF table: the best shape of a sweep, a ceiling for a typical library."""
    rate = 2 * m * n * k / gemm_s(load_cluster(name), m, n, k, dtype="bf16") / 1e12
    assert 0.75 * best_tflops < rate < 1.03 * best_tflops
