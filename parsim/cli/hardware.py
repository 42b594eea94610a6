"""`parsim hardware`: the hardware profiles that parsim ships, and the one that fits this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parsim.cli.completion import complete_hardware
from parsim.cli.options import JsonOption
from parsim.cli.output import document, print_json, print_lines
from parsim.cli.output_paths import to_file
from parsim.cli.tables import print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parsim.hardware import Cluster


def hardware(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Show one: a name or a file. `detect`: the one of this machine's GPUs.",
            autocompletion=complete_hardware,
        ),
    ] = None,
    smi_gpus: Annotated[
        Path | None,
        typer.Option(
            "--smi-gpus",
            help="detect: another node's answer to nvidia-smi "
            "--query-gpu=name,memory.total --format=csv,noheader.",
        ),
    ] = None,
    smi_topology: Annotated[
        Path | None, typer.Option("--smi-topology", help="detect: its `nvidia-smi topo -m`.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="detect: write a profile of this machine.", callback=to_file
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the shipped hardware profiles, or show one with the sources of its numbers.

    \b
    Examples:
      parsim hardware
      parsim hardware h100-sxm-80gb
      parsim hardware detect -o my-node.toml
    """
    from parsim.config import load_cluster, to_data
    from parsim.errors import ParsimError
    from parsim.shipped import shipped

    if name == "detect":
        from parsim.cli.hardware_detect import hardware_detect

        hardware_detect(smi_gpus, smi_topology, output, as_json=as_json)
        return
    for flag, value in (("--smi-gpus", smi_gpus), ("--smi-topology", smi_topology), ("-o", output)):
        if value is not None:
            raise ParsimError("only `parsim hardware detect` takes this", where=flag)

    def data(cluster: Cluster) -> dict[str, Any]:
        facts = to_data(cluster)
        facts.pop("kernels", None)  # hundreds of fitted constants
        return facts

    names = [name] if name else list(shipped("hardware_profiles"))
    clusters = [load_cluster(each) for each in names]
    if as_json:
        found = [data(cluster) for cluster in clusters]
        print_json(document("hardware", {"name": name}, {"hardware": found}))
        return
    if name:
        _print_facts(clusters[0])
        return
    _print_list(clusters)


def _print_facts(cluster: Cluster) -> None:
    """One profile, and where each of its numbers is from: sources are told once, by number."""
    from parsim.hardware import describe

    facts = describe(cluster)
    sources = list(dict.fromkeys(fact.source for fact in facts))
    rows = [[fact.what, fact.value, str(1 + sources.index(fact.source))] for fact in facts]
    print_table(["what", "value", "source"], rows, title=cluster.description)
    print_lines([f"{number}  {source}" for number, source in enumerate(sources, 1)])


def _print_list(clusters: Sequence[Cluster]) -> None:
    from parsim.hardware import default_precision
    from parsim.units import format_bandwidth, format_bytes, format_rate

    rows = []
    for cluster in clusters:
        device = cluster.device
        dtype = default_precision(device)
        rows.append([
            cluster.name,
            f"{format_rate(device.peak_flops_per_s[dtype]).removesuffix('FLOP/s')} {dtype}",
            format_bytes(device.memory_bytes),
            format_bandwidth(device.memory_bandwidth_bytes_per_s),
            f"{cluster.gpus_per_node} ({cluster.scale_up_domain})",
            format_bandwidth(cluster.intra_node.bandwidth_bytes_per_s),
            format_bandwidth(cluster.inter_node.bandwidth_bytes_per_s),
            f"${cluster.price.usd_per_gpu_hour:.2f}" if cluster.price else "–",
        ])  # fmt: skip
    headers = ["\nhardware", "peak\nFLOP/s", "\nmemory", "memory\nbandwidth", "a node\n(domain)",
               "\nin node", "between\nnodes", "GPU-\nhour"]  # fmt: skip
    print_table(headers, rows)
