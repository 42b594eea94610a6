"""`parsim calibrate`: microbenchmarks of this machine become a hardware profile, or runs a stack."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parsim.cli.calibrate_runs import calibrate_runs
from parsim.cli.options import JsonOption
from parsim.cli.output import document, print_json, progress, say
from parsim.cli.output_paths import to_file
from parsim.cli.tables import print_table

if TYPE_CHECKING:
    from parsim.execute.calibrate.calibration import Calibration


class DeviceKind(StrEnum):
    """What ranks run on."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


DeviceOption = Annotated[
    DeviceKind, typer.Option("--device", help="auto: CUDA where there is a GPU, else the CPU.")
]


def calibrate(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The profile to write [default: profile.toml; with --runs: none].",
            callback=to_file,
        ),
    ] = None,
    device: DeviceOption = DeviceKind.AUTO,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="Devices busy at once [default: all].")
    ] = None,
    budget_s: Annotated[float, typer.Option("--budget-s", min=1, help="Seconds to spend.")] = 90.0,
    runs: Annotated[
        Path | None, typer.Option("--runs", help="A CSV of measured training runs, one a row.")
    ] = None,
    stack: Annotated[
        str | None, typer.Option("--stack", help="With --runs: the stack to fit, a name or a file.")
    ] = None,
    constant: Annotated[
        list[str] | None,
        typer.Option(
            "--constant", help="With --runs: fit this one (repeatable) [default: what the rows tell]."
        ),
    ] = None,
    afresh: Annotated[
        bool,
        typer.Option("--afresh", help="With --runs: start from typical values, not the stack's own."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Time GEMMs, attention, memory-bound kernels and collectives here, and write a hardware profile.

    With --runs: fit the few constants of a training stack to measured runs, of your own cluster or of
    others, and say how far off it is on runs left out.

    \b
    Examples:
      parsim calibrate -o here.toml
      parsim plan --model tiny-llama-8l --hardware here.toml --gpus 2 --global-batch 32
      parsim calibrate --runs my_runs.csv --stack torchtitan -o mine.toml
    """
    from parsim.config import require_writable
    from parsim.errors import ParsimError

    if runs is not None:
        if stack is None:
            raise ParsimError(
                "--stack is missing", where="--stack", hint="a name as in `parsim validate`, or a file"
            )
        calibrate_runs(
            runs,
            stack,
            output=output,
            constants=constant or (),
            is_afresh=afresh,
            as_json=as_json,
        )
        return
    if stack is not None or constant or afresh:
        raise ParsimError("--stack, --constant and --afresh go with --runs", where="--runs")
    if output is None:
        require_writable(output := Path("profile.toml"))
    _calibrate_hardware(output, device, ranks, budget_s, as_json)


def _calibrate_hardware(
    output: Path, device: DeviceKind, ranks: int | None, budget_s: float, as_json: bool
) -> None:
    from parsim.execute.calibrate.profile import write_profile

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

    from parsim.execute.calibrate.calibration import calibrate as measure
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
