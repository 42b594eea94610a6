"""`parsim validate`: predictions against measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parsim.cli.options import HardwareOption, JsonOption
from parsim.cli.output import document, print_json, print_lines, progress
from parsim.cli.output_paths import to_file, to_picture
from parsim.cli.report import ReportOption, write_report
from parsim.cli.validate_step import StepFiles, validate_step
from parsim.setup import Flags, load_machine


def validate(
    prediction: Annotated[
        Path | None, typer.Argument(metavar="[PREDICTION.json]", help="What simulate --json wrote.")
    ] = None,
    measurement: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[MEASUREMENT.json...]", help="What run -o wrote, or torch.profiler's traces."
        ),
    ] = None,
    runs: Annotated[
        Path | None, typer.Option("--runs", help="A CSV of measured training runs, one a row.")
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="The published runs that parsim ships, with sources.")
    ] = False,
    kernels: Annotated[
        Path | None, typer.Option("--kernels", help="A CSV (or .csv.gz) of measured kernels.")
    ] = None,
    hardware: HardwareOption = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0, help="Exit 1 where the (mean) error is larger, e.g. 0.1."),
    ] = None,
    chart: Annotated[
        Path | None,
        typer.Option(
            "--chart", help="Predicted above measured: .png, .svg or .pdf.", callback=to_picture
        ),
    ] = None,
    waterfall: Annotated[
        Path | None,
        typer.Option(
            "--waterfall", help="From predicted to measured, cause by cause.", callback=to_picture
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", help="Both timelines as one Chrome trace.", callback=to_file),
    ] = None,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare predictions with what was measured: one step, a table of runs, or a table of kernels.

    \b
    Examples:
      parsim validate prediction.json measurement.json --chart step.png --waterfall error.png
      parsim validate prediction.json rank0.json rank1.json
      parsim validate --runs runs.csv --tolerance 0.1
      parsim validate --published
      parsim validate --kernels gemm.csv.gz --hardware h100-sxm-80gb
    """
    from parsim.errors import ParsimError

    chosen = sum(given is not None for given in (prediction, runs, kernels)) + published
    if chosen != 1 or (prediction is None) == bool(measurement):
        raise ParsimError(
            "validate compares one thing",
            expected="PREDICTION.json MEASUREMENT.json, --runs F, --published, or --kernels F",
        )
    files = StepFiles(chart=chart, waterfall=waterfall, trace=trace, report=report)
    drawn = files.drawn()
    if prediction is None and drawn:
        flag, path = next(iter(drawn.items()))
        raise ParsimError(
            f"{flag} is about one step", where=str(path), expected="PREDICTION MEASUREMENT"
        )
    error: float | None
    if published or runs is not None:
        error = _runs(runs, report, as_json)
    elif kernels is not None:
        error = _kernels(kernels, hardware, report, as_json)
    else:
        assert prediction is not None
        assert measurement
        error = validate_step(prediction, measurement, files, as_json=as_json)
    if tolerance is not None and (error is None or abs(error) > tolerance):
        raise typer.Exit(1)


def _runs(path: Path | None, report: Path | None, as_json: bool) -> float | None:
    """A table of runs, or the shipped one; returns the mean absolute error, None where no row could be
    predicted.
    """
    from parsim.compare.runs import PUBLISHED, validate_runs

    with progress() as show:
        found = validate_runs(path or PUBLISHED, progress=show)
    inputs = {"runs": str(path)} if path else {"published": True}
    whole = document("validate", inputs, found.to_data())
    if as_json:
        print_json(whole)
    else:
        print_lines(found.to_lines())
    write_report(report, whole)
    return found.summary.mape


def _kernels(path: Path, hardware: str | None, report: Path | None, as_json: bool) -> float | None:
    """A table of kernels; returns the mean absolute error, None where no row could be predicted."""
    from parsim.compare.kernels import validate_kernels

    cluster, _ = load_machine(Flags(hardware=hardware))
    found = validate_kernels(path, cluster)
    inputs = {"kernels": str(path), "hardware": hardware}
    whole = document("validate", inputs, found.to_data())
    if as_json:
        print_json(whole)
    else:
        print_lines(found.to_lines())
    write_report(report, whole)
    return found.summary.mape
