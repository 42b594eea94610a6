"""Hardware: every shipped number has a source, agrees with physics, and is looked up with care."""

import csv
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from parsim.config import load_cluster
from parsim.errors import ParsimError
from parsim.hardware import (
    Cluster,
    Device,
    Link,
    default_precision,
    describe,
    machine_balance,
    peak_flops_per_s,
    with_overrides,
)
from parsim.shipped import shipped
from parsim.units import parse_field
from tests.builders import round_cluster

SHARED = Path(__file__).parents[2] / "../shared"
NAMES = sorted(shipped("hardware_profiles"))
GPUS = [name for name in NAMES if name != "local-cpu"]
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="measurements beside the checkout are absent"
)


# Shipped profiles


def test_the_profiles_that_published_runs_name_are_shipped() -> None:
    sxm = ["a100-sxm-40gb", "a100-sxm-80gb", "h100-sxm-80gb", "h100-sxm-96gb-500w", "h200-sxm-141gb"]
    blackwell = ["b200-sxm-180gb", "b300-sxm-288gb", "gb200-nvl72", "gb300-nvl72"]
    others = ["v100-sxm-32gb", "mi300x", "a100-pcie-80gb", "local-cpu"]
    assert {*sxm, *blackwell, *others} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_loads_under_its_own_name(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    assert cluster.description


def holds_a_number(table: dict[str, Any]) -> bool:
    def is_number(key: str, value: object) -> bool:
        if isinstance(value, str):
            return parse_field(key, value) is not None
        return isinstance(value, int | float) and not isinstance(value, bool)

    return any(is_number(key, value) for key, value in table.items())


def is_cited(table: dict[str, Any]) -> bool:
    dated = re.fullmatch(r"20\d\d(-(0[1-9]|1[0-2])(-[0-3]\d)?)?", table.get("date", ""))
    return dated is not None and len(table.get("source", "")) > 10


def uncited(table: dict[str, Any], path: str, cited: bool) -> Iterator[str]:
    """Paths of tables that hold a number but neither cite a source nor lie inside one that does."""
    if holds_a_number(table) and not (cited or is_cited(table)):
        yield path or "top level"
    for key, value in table.items():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                # The top level cites the shape of a node, nothing more.
                yield from uncited(inner, f"{path}.{key}", path != "" and (cited or is_cited(table)))


@pytest.mark.parametrize("name", NAMES)
def test_every_table_with_a_number_cites_its_source_and_date(name: str) -> None:
    tables = tomllib.loads(shipped("hardware_profiles")[name].read_text(encoding="utf-8"))
    assert list(uncited(tables, "", cited=False)) == []


@pytest.mark.parametrize("name", NAMES)
def test_percentages_stand_as_everywhere_else(name: str) -> None:
    text = shipped("hardware_profiles")[name].read_text(encoding="utf-8")
    assert not re.search(r"\d %", text)


def test_the_walk_finds_a_table_that_cites_nothing() -> None:
    cited = {"source": "a data sheet", "date": "2024-05"}
    assert list(uncited({"link": {"latency_s": "1 us"}, **cited}, "", cited=False)) == [".link"]
    assert list(uncited({"kernels": {"fit": [{"k": 1.5}]}}, "", cited=False)) == [".kernels.fit"]
    assert list(uncited({"device": {**cited, "peak": {"bf16": 1.0}}}, "", cited=False)) == []
    assert list(uncited({"link": {"n": 1, "source": "a data sheet"}}, "", cited=False)) == [".link"]


def test_the_example_in_the_documentation_is_a_profile(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/hardware.md").read_text(encoding="utf-8")
    example = text.split("```toml\n")[1].split("```")[0]
    assert list(uncited(tomllib.loads(example), "", cited=False)) == []
    (tmp_path / "mine.toml").write_text(example, encoding="utf-8")
    assert load_cluster(str(tmp_path / "mine.toml")).device.peak_flops_per_s["bf16"] == 312e12


# Physics


def peak(name: str, dtype: str) -> float:
    return load_cluster(name).device.peak_flops_per_s[dtype]


def test_each_generation_is_faster() -> None:
    parts = ["v100-sxm-32gb", "a100-sxm-80gb", "h100-sxm-80gb", "b200-sxm-180gb", "gb200-nvl72"]
    rates = [peak(part, "fp16") for part in parts]
    assert rates == sorted(set(rates))
    per_watt = [peak(part, "fp16") / load_cluster(part).device.power_w for part in parts[:4]]
    assert per_watt == sorted(per_watt)


@pytest.mark.parametrize(
    ("name", "units", "flops_per_clock", "clock_hz"),
    [
        # 8 tensor cores of 64 FMAs an SM; 4 of 256; 4 of 512; 2048 FLOPs a CU (the makers' whitepapers)
        ("v100-sxm-32gb", 80, 8 * 64 * 2, 1.53e9),
        ("a100-sxm-80gb", 108, 4 * 256 * 2, 1.41e9),
        ("h100-sxm-80gb", 132, 4 * 512 * 2, 1.83e9),
        ("h200-sxm-141gb", 132, 4 * 512 * 2, 1.83e9),
        ("mi300x", 304, 2048, 2.1e9),
    ],
)
def test_peak_is_units_times_width_times_clock(
    name: str, units: int, flops_per_clock: int, clock_hz: float
) -> None:
    assert load_cluster(name).device.num_sms == units
    assert peak(name, "fp16") == pytest.approx(units * flops_per_clock * clock_hz, rel=0.005)


@pytest.mark.parametrize("name", GPUS)
def test_halving_the_width_doubles_the_rate(name: str) -> None:
    rates = load_cluster(name).device.peak_flops_per_s
    if "bf16" in rates:
        assert rates["bf16"] == rates["fp16"]
        assert rates["tf32"] == pytest.approx(rates["bf16"] / 2, rel=0.001)
    if "fp8" in rates:
        assert rates["fp8"] == pytest.approx(2 * rates["bf16"], rel=0.001)
    assert rates.get("mxfp8", rates.get("fp8")) == rates.get("fp8")
    assert rates.get("nvfp4", 1e99) >= 2 * rates.get("fp8", 0)


def test_only_parts_with_the_units_list_a_dtype() -> None:
    assert "bf16" not in load_cluster("v100-sxm-32gb").device.peak_flops_per_s
    assert "fp8" not in load_cluster("a100-sxm-80gb").device.peak_flops_per_s
    assert "mxfp8" not in load_cluster("h200-sxm-141gb").device.peak_flops_per_s
    assert {"mxfp8", "nvfp4"} <= load_cluster("b200-sxm-180gb").device.peak_flops_per_s.keys()


@pytest.mark.parametrize("name", GPUS)
def test_the_machine_balance_is_that_of_a_training_accelerator(name: str) -> None:
    assert 100 < machine_balance(load_cluster(name).device, "fp16") < 450


@pytest.mark.parametrize("name", GPUS)
def test_memory_is_what_the_name_says(name: str) -> None:
    memory = load_cluster(name).device.memory_bytes
    sold = re.search(r"-(\d+)gb", name)
    if sold:
        assert 0.99 * int(sold[1]) * 1e9 <= memory <= int(sold[1]) * 2**30
    # Nothing holds more than the stacks it is built from: 192 GiB and 288 GiB are the largest so far.
    assert memory < (288 if "300" in name and name != "mi300x" else 192) * 2**30


def test_a_plan_for_an_h100_stays_below_its_nominal_80_gb() -> None:
    assert load_cluster("h100-sxm-80gb").device.memory_bytes <= 80e9


@pytest.mark.parametrize("name", GPUS)
def test_scale_up_is_faster_and_nearer_than_scale_out(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.inter_node.bandwidth_bytes_per_s < cluster.intra_node.bandwidth_bytes_per_s
    assert cluster.intra_node.latency_s < cluster.inter_node.latency_s
    assert cluster.intra_node.bandwidth_bytes_per_s < cluster.device.memory_bandwidth_bytes_per_s


def test_ranks_of_the_local_host_reach_each_other_the_same_way_beyond_its_cores() -> None:
    cluster = load_cluster("local-cpu")
    assert cluster.default_stack == "parsim-executor"
    assert cluster.inter_node.bandwidth_bytes_per_s == cluster.intra_node.bandwidth_bytes_per_s
    assert cluster.inter_node.latency_s == cluster.intra_node.latency_s
    assert peak("local-cpu", "fp32") == pytest.approx(2 * peak("local-cpu", "fp64"), rel=0.2)


@needs_shared
def test_nobody_has_measured_a_gemm_faster_than_the_peak() -> None:
    of_gpu = {
        "A100-80GB-SXM": "a100-sxm-80gb",
        "A100-80GB-PCIe": "a100-pcie-80gb",
        "H100-80GB-SXM": "h100-sxm-80gb",
        "H200": "h200-sxm-141gb",
        "B200-SXM": "b200-sxm-180gb",
        "B300-SXM": "b300-sxm-288gb",
        "GB200": "gb200-nvl72",
        "MI300X": "mi300x",
    }
    with (SHARED / "measured/gemm_best_seen.csv").open(newline="") as file:
        seen = [row for row in csv.DictReader(file) if row["gpu"] in of_gpu]
    assert len(seen) >= 12
    for row in seen:
        share = float(row["tflops"]) * 1e12 / peak(of_gpu[row["gpu"]], row["dtype"])
        assert 0.5 < share < 0.95, row


@needs_shared
def test_every_published_run_has_its_profile_with_the_same_nodes() -> None:
    for table in ("public_runs", "vtrain_multi", "vtrain_single"):
        with (SHARED / f"published/{table}.csv").open(newline="") as file:
            shapes = {
                (row["hardware"], int(float(row["gpus_per_node"]))) for row in csv.DictReader(file)
            }
        for name, gpus_per_node in shapes:
            assert load_cluster(name).gpus_per_node == gpus_per_node


# Look-ups


def test_a_peak_that_is_not_there_says_what_is() -> None:
    a100 = load_cluster("a100-sxm-80gb").device
    assert peak_flops_per_s(a100, "bf16") == 312e12
    with pytest.raises(ParsimError) as error:
        peak_flops_per_s(a100, "nvfp4")
    assert error.value.got == "nvfp4"
    assert error.value.expected == "fp64, fp32, tf32, bf16, fp16"
    assert error.value.hint == "train in bf16 instead"
    with pytest.raises(ParsimError) as error:
        peak_flops_per_s(a100, "bfloat16")
    assert error.value.hint == "did you mean 'bf16'?"
    with pytest.raises(ParsimError, match="V100"):
        peak_flops_per_s(load_cluster("v100-sxm-32gb").device, "bf16")


def test_the_precision_where_nobody_says_is_one_the_device_has() -> None:
    assert default_precision(load_cluster("h100-sxm-80gb").device) == "bf16"
    assert default_precision(load_cluster("v100-sxm-32gb").device) == "fp16"
    assert default_precision(load_cluster("local-cpu").device) == "fp32"


def test_domains() -> None:
    hgx, nvl72 = load_cluster("h100-sxm-80gb"), load_cluster("gb200-nvl72")
    assert [hgx.same_domain(7, other) for other in (0, 7, 8)] == [True, True, False]
    assert [nvl72.same_domain(71, other) for other in (0, 71, 72)] == [True, True, False]


@pytest.mark.parametrize("name", ["h100-sxm-80gb", "gb200-nvl72"])
@pytest.mark.parametrize("stride", [1, 2, 4, 8, 72, 144])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_domain_ranks_counts_the_ranks_that_share_a_domain(name: str, size: int, stride: int) -> None:
    cluster = load_cluster(name)
    together = sum(cluster.same_domain(i * stride, 0) for i in range(size))
    assert cluster.domain_ranks(size=size, stride=stride) == together


def worst_group(cluster: Cluster, size: int, stride: int, gpus: int) -> int:
    """The least that a domain holds of any of the groups that `gpus` ranks are cut into, by counting."""
    block = size * stride
    groups = [
        [first + offset + i * stride for i in range(size)]
        for first in range(0, gpus - block + 1, block)
        for offset in range(stride)
    ]
    return min(
        min(Counter(rank // cluster.scale_up_domain for rank in group).values()) for group in groups
    )


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 6, 7, 8, 12])
@pytest.mark.parametrize("size", [2, 3, 5, 6, 8, 10, 12, 16, 24, 40])
def test_domain_ranks_is_that_of_the_worst_group(size: int, stride: int) -> None:
    hgx, block = round_cluster(), size * stride
    assert hgx.domain_ranks(size=size, stride=stride) == worst_group(hgx, size, stride, 8 * block)
    for gpus in (block, 3 * block):
        fewest = worst_group(hgx, size, stride, gpus)
        assert hgx.domain_ranks(size=size, stride=stride, gpus=gpus) == fewest


def test_six_ranks_of_a_job_are_torn_between_nodes_of_eight_unless_there_are_no_more() -> None:
    hgx = round_cluster()
    assert hgx.domain_ranks(size=6, stride=1) == 2
    assert hgx.domain_ranks(size=6, stride=1, gpus=24) == 2
    assert hgx.domain_ranks(size=6, stride=1, gpus=6) == 6
    # 64 of an NVL72's 72 hold two groups of 32; nobody would leave half of a node of eight empty.
    assert load_cluster("gb200-nvl72").domain_ranks(size=32, stride=1) == 32


def test_overrides_replace_numbers_and_say_so() -> None:
    hgx = load_cluster("h100-sxm-80gb")
    assert with_overrides(hgx) == hgx
    changed = with_overrides(
        hgx, inter_node="100Gb/s", inter_node_latency="20 us", memory="64 GiB", usd_per_gpu_hour=2.0
    )
    assert changed.inter_node.bandwidth_bytes_per_s == 12.5e9
    assert changed.inter_node.latency_s == 20e-6
    assert changed.device.memory_bytes == 64 * 2**30
    assert changed.price is not None
    assert changed.price.usd_per_gpu_hour == 2.0
    assert changed.intra_node == hgx.intra_node
    for noun in (changed.inter_node, changed.device, changed.price):
        assert "given by the user" in noun.source
    assert with_overrides(hgx, intra_node=300e9).intra_node.bandwidth_bytes_per_s == 300e9


def test_a_domain_of_one_node_follows_the_node() -> None:
    hgx, nvl72 = load_cluster("h100-sxm-80gb"), load_cluster("gb200-nvl72")
    assert with_overrides(hgx, gpus_per_node=4).scale_up_domain == 4
    assert with_overrides(nvl72, gpus_per_node=8).scale_up_domain == 72
    assert with_overrides(nvl72, scale_up_domain=36).scale_up_domain == 36
    with pytest.raises(ParsimError, match="whole nodes"):
        with_overrides(nvl72, gpus_per_node=16)


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ({"inter_node": "400 GHz"}, "inter_node"),
        ({"inter_node": -1.0}, "inter_node: bandwidth_bytes_per_s"),
        ({"intra_node_latency": "-5 us"}, "intra_node_latency: latency_s"),
        ({"memory": "80 Gb"}, "memory"),
        ({"memory": "0 GB"}, "memory: memory_bytes"),
        ({"gpus_per_node": 0}, "gpus_per_node"),
        ({"usd_per_gpu_hour": 0.0}, "usd_per_gpu_hour"),
    ],
)
def test_an_override_that_makes_no_sense_is_named(override: dict[str, Any], where: str) -> None:
    with pytest.raises(ParsimError) as error:
        with_overrides(load_cluster("h100-sxm-80gb"), **override)
    assert error.value.where == where


def test_a_description_shows_every_number_with_its_source() -> None:
    facts = {fact.what: fact for fact in describe(load_cluster("b200-sxm-180gb"))}
    assert facts["peak bf16"].value == "2.25 PFLOP/s (292 FLOPs a byte)"
    assert facts["memory"].value == "178.4 GiB (191.5 GB) at 7.70 TB/s"
    assert facts["between"].value == "50.0 GB/s, 5.00 µs"
    assert facts["devices"].value == "8 a node, 8 a scale-up domain"
    assert facts["price"].value == "6.69 USD a GPU-hour"
    assert all(fact.source for fact in facts.values())
    assert facts["price"].source.endswith("(2026-09-20)")
    assert "price" not in {fact.what for fact in describe(load_cluster("local-cpu"))}


# The nouns themselves

CITED: dict[str, Any] = {"source": "a test", "date": "2026"}
CORE: dict[str, Any] = {
    "name": "core",
    "peak_flops_per_s": {"fp32": 1e11},
    "memory_bytes": 1e9,
    "memory_bandwidth_bytes_per_s": 1e10,
    "num_sms": 1,
    "l2_bytes": 1e6,
    "power_w": 10.0,
    **CITED,
}


def test_a_device_refuses_impossible_numbers_all_at_once() -> None:
    with pytest.raises(ParsimError) as error:
        Device(**CORE | {"memory_bytes": 0.0, "power_w": -1.0})
    assert error.value.where == "memory_bytes, power_w"
    assert error.value.got == {"memory_bytes": 0.0, "power_w": -1.0}


@pytest.mark.parametrize(
    ("rates", "what"),
    [
        ({}, "needs a peak"),
        ({"bfloat16": 1e12}, "unknown dtype"),
        ({"bf16": -1e12}, "greater than zero"),
    ],
)
def test_a_device_refuses_wrong_rates(rates: dict[str, float], what: str) -> None:
    with pytest.raises(ParsimError, match=what):
        Device(**CORE | {"peak_flops_per_s": rates})


def test_a_domain_holds_whole_nodes() -> None:
    link = Link(latency_s=0.0, bandwidth_bytes_per_s=1e9, **CITED)
    shape: dict[str, Any] = {
        "name": "odd",
        "device": Device(**CORE),
        "intra_node": link,
        "inter_node": link,
    }
    assert Cluster(gpus_per_node=4, scale_up_domain=8, **shape).same_domain(0, 7)
    with pytest.raises(ParsimError, match="whole nodes") as error:
        Cluster(gpus_per_node=4, scale_up_domain=6, **shape)
    assert error.value.expected == "a multiple of gpus_per_node = 4"
