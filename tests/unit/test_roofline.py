"""The roofline of a model's kernels: the whole model's FLOPs, a roof that nothing breaks, its chart."""

from __future__ import annotations

from pathlib import Path

import pytest

from parsim.charts.roofline import draw_roofline
from parsim.charts.waterfall import Waterfall, draw_waterfall
from parsim.config import load_cluster, load_model, load_stack
from parsim.cost.flops import model_flops
from parsim.cost.roofline import attainable_flops_per_s, roofline_kernels
from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.plan import Job, ParallelPlan


def kernels_of(model: str, hardware: str, plan: ParallelPlan, *, seq_len: int = 2048):  # type: ignore[no-untyped-def]
    cluster = load_cluster(hardware)
    job = Job(model=load_model(model), seq_len=seq_len, global_batch=1)
    costs = CostModel(job.model, cluster, load_stack(cluster.default_stack))
    return job, costs, roofline_kernels(job, plan, costs)


@pytest.mark.parametrize("tp", [1, 8])
def test_the_products_flops_are_the_models(tp: int) -> None:
    """All ranks together have 6 FLOPs a parameter and token, and attention under its mask."""
    plan = ParallelPlan(tp=tp)
    job, _, kernels = kernels_of("gpt3-175b", "a100-sxm-80gb", plan)
    products = tp * sum(k.layers * k.flops for k in kernels if k.family == "gemm")
    attention = tp * sum(k.layers * k.flops for k in kernels if k.family == "attention")
    layers, hidden = job.model.layers, job.model.hidden
    square = 4 * job.seq_len**2 * hidden * layers
    # PaLM, arXiv 2204.02311, appendix B: 6N + 12·L·h·s a token; the causal mask leaves half.
    assert products == pytest.approx(model_flops(job) - 3 * square, rel=2e-3)
    # Backward: the flash kernel computes the scores again, 5 products for the forward's 2.
    assert attention == pytest.approx(square / 2 * (1 + 2.5), rel=1e-3)


def test_intensity_of_a_square_product_and_the_ridge() -> None:
    """n³ work on n² data: 2n³ FLOPs over 3n² values of 2 bytes is n/3 FLOPs a byte."""
    _, costs, kernels = kernels_of("gpt3-175b", "a100-sxm-80gb", ParallelPlan(), seq_len=12288)
    output = next(k for k in kernels if k.name == "attention output" and not k.backward)
    assert output.intensity == pytest.approx(12288 / 3)
    ridge = 312e12 / costs.cluster.device.memory_bandwidth_bytes_per_s
    assert attainable_flops_per_s(costs, ridge / 2, "bf16") == pytest.approx(156e12)
    assert attainable_flops_per_s(costs, ridge * 2, "bf16") == pytest.approx(312e12)


@pytest.mark.parametrize(
    ("model", "hardware", "plan"),
    [
        ("gpt3-175b", "a100-sxm-80gb", ParallelPlan(tp=8)),
        ("llama-3.1-70b", "h100-sxm-80gb", ParallelPlan(tp=4)),
        ("deepseek-v3", "h100-sxm-80gb", ParallelPlan(dp=32, ep=32)),
        ("tiny-llama-8l", "a100-sxm-80gb", ParallelPlan()),
    ],
)
def test_nothing_breaks_the_roof(model: str, hardware: str, plan: ParallelPlan) -> None:
    _, costs, kernels = kernels_of(model, hardware, plan)
    device = costs.cluster.device
    for kernel in kernels:
        if kernel.flops:
            roof = attainable_flops_per_s(costs, kernel.intensity, kernel.dtype)
            assert kernel.flops_per_s <= roof, kernel
        else:
            # What the second-level cache holds may move faster than memory does.
            assert kernel.num_bytes / kernel.seconds <= 1.05 * device.memory_bandwidth_bytes_per_s, (
                kernel
            )
    times = [kernel.seconds * kernel.layers for kernel in kernels]
    assert times == sorted(times, reverse=True)


def test_charts_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    _, costs, kernels = kernels_of("llama-3.1-8b", "h100-sxm-80gb", ParallelPlan())
    waterfall = Waterfall(
        name="n", finding="f", note="", parts=(("up", 2.0), ("down", -0.5)), begin="a", begin_s=1.0
    )
    for suffix in ("svg", "png", "pdf"):
        for i in range(2):
            draw_roofline(kernels, costs, tmp_path / f"r{i}.{suffix}")
            draw_waterfall(waterfall, tmp_path / f"w{i}.{suffix}")
        for name in "rw":
            files = [(tmp_path / f"{name}{i}.{suffix}").read_bytes() for i in range(2)]
            assert files[0] == files[1]
    text = (tmp_path / "r0.svg").read_text()
    assert "fc1" in text
    assert "bf16 989.4 TFLOP/s" in text
    assert "+2.00 s, 80%" in (tmp_path / "w0.svg").read_text()


def test_a_waterfall_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParsimError, match="no time"):
        draw_waterfall(Waterfall(name="n", finding="f", note="", parts=()), tmp_path / "w.svg")
    assert not (tmp_path / "w.svg").exists()
