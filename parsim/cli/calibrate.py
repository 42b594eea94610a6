"""`parsim calibrate`: microbenchmarks of this machine become a hardware profile."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parsim.cli.options import JsonOption
from parsim.cli.output import document, print_json, print_table, progress, say

if TYPE_CHECKING:
    from parsim.execute.calibrate import Calibration


class DeviceKind(StrEnum):
    """What ranks run on."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


DeviceOption = Annotated[
    DeviceKind, typer.Option("--device", help="auto: CUDA where there is a GPU, else the CPU.")
]


def calibrate(
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile to write.")] = Path(
        "profile.toml"
    ),
    device: DeviceOption = DeviceKind.AUTO,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="Devices busy at once [default: all].")
    ] = None,
    budget_s: Annotated[float, typer.Option("--budget-s", min=1, help="Seconds to spend.")] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Time GEMMs, attention, memory-bound kernels and collectives here, and write a profile.

    \b
    Examples:
      parsim calibrate -o here.toml
      parsim plan --model tiny-llama-8l --hardware here.toml --gpus 2 --global-batch 32
    """
    from parsim.execute.calibrate_profile import write_profile

    found = run_calibration(device, ranks, budget_s)
    write_profile(found.cluster, output)
    say(f"wrote {output}" + ("" if found.complete else " (coarse: the time was over before all points)"))
    if as_json:
        answer = {
            "profile": str(output),
            "complete": found.complete,
            "elapsed_s": found.elapsed_s,
            "points": len(found.timed),
        }
        print_json(document("calibrate", {"device": device.value, "budget_s": budget_s}, answer))
    else:
        print_table(["what", "value"], summary(found))


def run_calibration(device: DeviceKind, ranks: int | None, budget_s: float) -> Calibration:
    """Calibrate with progress on stderr."""
    import os

    from parsim.execute.calibrate import calibrate as measure
    from parsim.execute.devices import available_gpus

    gpus = available_gpus() if device is not DeviceKind.CPU else 0
    kind = "cuda" if device is DeviceKind.CUDA or (device is DeviceKind.AUTO and gpus) else "cpu"
    count = ranks or (gpus if kind == "cuda" else len(os.sched_getaffinity(0)))
    with progress() as report:
        return measure(
            device=kind,  # type: ignore[arg-type]
            ranks=count,
            budget_s=budget_s,
            progress=lambda what, share: report(what, round(100 * share), 100),
        )


def summary(found: Calibration) -> list[list[str]]:
    """The figures of a calibration that an expert looks at first."""
    from parsim.units import format_bandwidth, format_bytes, format_rate

    cluster = found.cluster
    rows = [
        [f"best {dtype} GEMM", format_rate(rate)]
        for dtype, rate in cluster.device.peak_flops_per_s.items()
    ]
    return [
        *rows,
        ["memory of a rank", format_bytes(cluster.device.memory_bytes)],
        ["memory bandwidth", format_bandwidth(cluster.device.memory_bandwidth_bytes_per_s)],
        ["link between ranks", format_bandwidth(cluster.intra_node.bandwidth_bytes_per_s)],
        ["points timed", f"{len(found.timed)} in {found.elapsed_s:.0f} s"],
    ]
