"""Nodes as nvidia-smi describes them, in the formats of its manual page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from parsim.cli.hardware_detect import _nic_rates
from parsim.cli.main import run_command
from parsim.config import load_cluster
from parsim.errors import NothingFits, ParsimError
from parsim.importers.nvidia_smi import Detected, detect, parse_gpus, parse_nic_rate, parse_topology
from parsim.shipped import shipped

CLUSTERS = {name: load_cluster(name) for name in shipped("hardware_profiles")}
H100 = "NVIDIA H100 80GB HBM3, 81559 MiB\n"


def matrix(gpus: int, nv: str, nics: int = 0) -> str:
    """`nvidia-smi topo -m` of GPUs that are all alike, each beside as many adapters of its own."""
    names = [f"GPU{i}" for i in range(gpus)] + [f"NIC{i}" for i in range(nics)]
    header = [*names, "CPU Affinity", "NUMA Affinity", "GPU NUMA ID"]
    lines = ["\t\x1b[4m" + "\t".join(header) + "\x1b[0m"]
    for row, name in enumerate(names):
        cells = []
        for column in range(len(names)):
            gpu, nic = min(row, column), max(row, column) - gpus
            if row == column:
                cells.append(" X ")
            elif nic < 0:
                cells.append(nv)
            elif gpu >= gpus:
                cells.append("SYS")
            else:
                cells.append("PIX" if nic * gpus // nics == gpu else "NODE")
        tail = ["0-51", "0", "N/A"] if row < gpus else []
        lines.append("\t".join([name, *cells, *tail]))
    legend = ["", "Legend:", "", "  X    = Self", "  NV#  = # NVLinks", "", "NIC Legend:", ""]
    return "\n".join([*lines, *legend, *(f"  NIC{i}: mlx5_{i}" for i in range(nics)), ""])


def node(gpus: str, topology: str | None = None, rate: str | None = None, nics: int = 0) -> Detected:
    rates = {} if rate is None else {f"mlx5_{i}": parse_nic_rate(rate) for i in range(nics)}
    return detect(
        parse_gpus(gpus), parse_topology(topology) if topology else None, rates, CLUSTERS
    )  # fmt: skip


def test_a_dgx_h100_is_the_shipped_profile() -> None:
    found = node(H100 * 8, matrix(8, "NV18", 8), "400 Gb/sec (4X NDR)\n", 8)
    assert found.profile == "h100-sxm-80gb"
    assert (found.differs, found.unknown) == ((), ())
    assert found.cluster == CLUSTERS["h100-sxm-80gb"]


def test_fewer_gpus_and_slower_adapters_are_said_and_taken() -> None:
    found = node(H100 * 4, matrix(4, "NV18", 4), "200 Gb/sec (4X HDR)", 4)
    assert found.cluster.gpus_per_node == found.cluster.scale_up_domain == 4
    assert found.cluster.inter_node.bandwidth_bytes_per_s == 25e9
    assert len(found.differs) == 2
    assert "4 adapters" in found.cluster.inter_node.source


def test_gpus_that_share_an_adapter_share_its_rate() -> None:
    # The matrix of a node of 4 with 2 adapters, each on the PCIe switch of two GPUs.
    gpus = ["GPU0", "GPU1", "GPU2", "GPU3"]
    lines = ["\t" + "\t".join([*gpus, "mlx5_0", "mlx5_1", "CPU Affinity"])]
    for i, name in enumerate(gpus):
        cells = ["X" if i == j else "NV18" for j in range(4)]
        lines.append("\t".join([name, *cells, *(["PXB", "SYS"] if i < 2 else ["SYS", "PXB"]), "0-51"]))
    found = node(H100 * 4, "\n".join(lines), "400 Gb/sec (4X NDR)", 2)
    assert found.cluster.inter_node.bandwidth_bytes_per_s == 25e9


def test_two_adapters_a_gpu_add_up() -> None:
    found = node(H100 * 4, matrix(4, "NV18", 8), "400 Gb/sec (4X NDR)", 8)
    assert found.cluster.inter_node.bandwidth_bytes_per_s == 100e9


def test_four_gpus_in_a_mesh_use_all_links_and_a_missing_bridge_is_seen() -> None:
    a100 = "NVIDIA A100-SXM4-80GB, 81920 MiB\n"
    assert node(a100 * 4, matrix(4, "NV4")).cluster.intra_node == CLUSTERS["a100-sxm-80gb"].intra_node
    two = node(a100 * 2, matrix(2, "NV4"))
    assert two.cluster.intra_node.bandwidth_bytes_per_s == 100e9  # 4 links of 25 GB/s
    assert "4 NVLinks a GPU, not 12" in two.differs[1]
    without = node(a100 * 2, matrix(2, "SYS"))
    assert any("without NVLink" in text for text in without.unknown)


def test_less_memory_than_the_profile_is_taken() -> None:
    found = node("NVIDIA H100 80GB HBM3, 40779 MiB\n" * 8, matrix(8, "NV18"))
    assert found.cluster.device.memory_bytes == 40779 * 2**20
    # Drivers show a little more or less than a process gets: that is no difference.
    assert node(H100 * 8, matrix(8, "NV18")).differs == ()


def test_what_was_not_found_out_is_said() -> None:
    assert len(node(H100 * 8).unknown) == 2
    unknown = node(H100 * 8, matrix(8, "NV18", 8)).unknown
    assert "the rate of mlx5_0, mlx5_1" in unknown[0]


def test_every_driver_name_is_of_one_profile() -> None:
    names = [name for c in CLUSTERS.values() for name in c.device.driver_names]
    assert len(names) == len(set(names)) >= 10
    for cluster in CLUSTERS.values():
        if cluster.device.nvlinks:  # 25 GB/s a link until Hopper, 50 from Blackwell
            rate = cluster.intra_node.bandwidth_bytes_per_s / cluster.device.nvlinks
            assert rate in (25e9, 50e9), cluster.name


@pytest.mark.parametrize(
    ("gpus", "error"),
    [
        ("", NothingFits),
        ("NVIDIA GeForce RTX 4090, 24564 MiB\n", NothingFits),
        (H100 + "NVIDIA H200, 143771 MiB\n", ParsimError),
        ("no commas here", ParsimError),
        ("NVIDIA H100 80GB HBM3, lots", ParsimError),
    ],
)
def test_what_is_no_known_node_is_explained(gpus: str, error: type[ParsimError]) -> None:
    with pytest.raises(error) as caught:
        node(gpus)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    "text", ["", "GPU0", matrix(8, "NV18")[:200], matrix(2, "NV18").replace("NV18", "fast")]
)
def test_what_is_no_topology_is_refused(text: str) -> None:
    with pytest.raises(ParsimError):
        parse_topology(text)


def test_a_topology_of_another_node_is_refused() -> None:
    with pytest.raises(ParsimError, match="another node"):
        node(H100 * 8, matrix(4, "NV18"))


def test_rates_of_ports_are_read_and_a_port_without_one_is_not_known(tmp_path: Path) -> None:
    for name, text in (("mlx5_0", "400 Gb/sec (4X NDR)\n"), ("mlx5_1", "unknown\n")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "rate").write_text(text)
    assert _nic_rates(tmp_path) == {"mlx5_0": 50e9}


def test_the_command_writes_a_profile_that_reads_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gpus.csv").write_text(H100 * 4)
    (tmp_path / "topo.txt").write_text(matrix(4, "NV18"))
    profile = tmp_path / "my-node.toml"
    arguments = ["hardware", "detect", "--smi-gpus", str(tmp_path / "gpus.csv"), "--smi-topology",
                 str(tmp_path / "topo.txt"), "-o", str(profile), "--json"]  # fmt: skip
    assert run_command(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["profile"], answer["gpus"]) == ("h100-sxm-80gb", 4)
    read = load_cluster(str(profile))
    assert read.gpus_per_node == 4
    assert dataclasses.replace(read.device) == CLUSTERS["h100-sxm-80gb"].device
    assert read.kernels == CLUSTERS["h100-sxm-80gb"].kernels
    assert run_command(["hardware", "detect", "--smi-topology", str(tmp_path / "topo.txt")]) == 2
    assert run_command(["hardware", "h100-sxm-80gb", "-o", str(profile)]) == 2
