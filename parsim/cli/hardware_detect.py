"""`parsim hardware detect`: the shipped profile of this node, with what this node has instead."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parsim.cli.output import document, print_json, print_lines, say

if TYPE_CHECKING:
    from parsim.importers.nvidia_smi import Detected, Gpu, Topology

ADAPTERS = Path("/sys/class/infiniband")


def hardware_detect(
    gpus: Path | None, topology: Path | None, output: Path | None, *, as_json: bool
) -> None:
    """Detect from nvidia-smi on this node, or from its answers in files."""
    from dataclasses import replace

    from parsim.config import load_cluster, to_data, to_toml, write_file
    from parsim.importers.nvidia_smi import detect
    from parsim.shipped import shipped

    clusters = {name: load_cluster(name) for name in shipped("hardware_profiles")}
    here = gpus is None and topology is None
    devices, matrix = _asked(gpus, topology)
    found = detect(devices, matrix, _nic_rates(ADAPTERS) if here else {}, clusters)
    if output is not None:
        cluster = replace(found.cluster, name=output.stem, description=f"as detected: {found.profile}")
        write_file(output, to_toml(to_data(cluster)))
        say(f"wrote {output}")
    if as_json:
        answer: dict[str, Any] = {
            "profile": found.profile,
            "gpus": len(devices),
            "device": devices[0].name,
            "differs": list(found.differs),
            "unknown": list(found.unknown),
            "output": str(output) if output else None,
        }
        inputs = {"gpus": gpus and str(gpus), "topology": topology and str(topology)}
        print_json(document("hardware detect", inputs, answer))
    else:
        print_lines(_lines(found, devices, output))


def _lines(found: Detected, gpus: Sequence[Gpu], output: Path | None) -> list[str]:
    lines = [f"{len(gpus)} × {gpus[0].name}: profile {found.profile}"]
    lines += [f"  differs    {text}" for text in found.differs]
    lines += [f"  not known  {text}" for text in found.unknown]
    if output is not None:
        lines.append(f"  use        --hardware {output}")
    elif found.differs:
        lines.append("  use        -o PROFILE.toml writes a profile with these figures")
    else:
        lines.append(f"  use        --hardware {found.profile}")
    return lines


def _asked(gpus: Path | None, topology: Path | None) -> tuple[Sequence[Gpu], Topology | None]:
    """The GPUs and the topology, from files where either is given."""
    from parsim.config import read_text
    from parsim.errors import ParsimError
    from parsim.importers.nvidia_smi import QUERY, TOPOLOGY, parse_gpus, parse_topology

    if gpus is None and topology is not None:
        raise ParsimError("a topology names no GPUs", where="--smi-topology",
                          hint=f"--smi-gpus FILE with the answer of {' '.join(QUERY)}")  # fmt: skip
    texts = (
        [_run(QUERY), _run(TOPOLOGY)]
        if gpus is None
        else [read_text(gpus), None if topology is None else read_text(topology)]
    )
    places = [str(gpus or "nvidia-smi"), str(topology or "nvidia-smi topo -m")]
    try:
        devices = parse_gpus(texts[0] or "")
    except ParsimError as error:
        raise error.at(places[0]) from None
    try:
        return devices, parse_topology(texts[1]) if texts[1] else None
    except ParsimError as error:
        raise error.at(places[1]) from None


def _run(command: Sequence[str]) -> str:
    from parsim.errors import NothingFits

    try:
        done = subprocess.run(  # noqa: S603 - a constant of ours
            list(command), capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NothingFits(
            "nvidia-smi does not run here", got=type(error).__name__,
            hint="--smi-gpus and --smi-topology read its answers from another node",
        ) from None  # fmt: skip
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise NothingFits("nvidia-smi finds no GPU", got=reason[-1])
    return done.stdout


def _nic_rates(folder: Path) -> dict[str, float]:
    """Bytes/s of every adapter's first port, by name."""
    from parsim.errors import ParsimError
    from parsim.importers.nvidia_smi import parse_nic_rate

    rates = {}
    for path in sorted(folder.glob("*/ports/1/rate")):
        try:
            rates[path.parts[-4]] = parse_nic_rate(path.read_text(encoding="utf-8"))
        except (OSError, ParsimError):
            continue  # a port that is down, or says its rate in other words: not known
    return rates
