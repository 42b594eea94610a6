"""`parsim validate`: predictions against measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parsim.cli.options import Flags, HardwareOption, JsonOption, load_machine
from parsim.cli.output import document, print_json, print_lines, print_table, progress


def validate(
    prediction: Annotated[
        Path | None, typer.Argument(metavar="[PREDICTION.json]", help="What simulate --json wrote.")
    ] = None,
    measurement: Annotated[
        Path | None, typer.Argument(metavar="[MEASUREMENT.json]", help="What run --json wrote.")
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
    as_json: JsonOption = False,
) -> None:
    """Compare predictions with what was measured: one step, a table of runs, or a table of kernels.

    \b
    Examples:
      parsim validate prediction.json measurement.json
      parsim validate --runs runs.csv --tolerance 0.1
      parsim validate --published
      parsim validate --kernels gemm.csv.gz --hardware h100-sxm-80gb
    """
    from parsim.errors import ParsimError

    chosen = sum(given is not None for given in (prediction, runs, kernels)) + published
    if chosen != 1 or (prediction is None) != (measurement is None):
        raise ParsimError(
            "validate compares one thing",
            expected="PREDICTION.json MEASUREMENT.json, --runs F, --published, or --kernels F",
        )
    error: float | None
    if published or runs is not None:
        error = _runs(runs, as_json)
    elif kernels is not None:
        error = _kernels(kernels, hardware, as_json)
    else:
        assert prediction is not None
        assert measurement is not None
        error = _step(prediction, measurement, as_json)
    if tolerance is not None and (error is None or abs(error) > tolerance):
        raise typer.Exit(1)


def _step(prediction: Path, measurement: Path, as_json: bool) -> float:
    """One step; returns its relative error."""
    from parsim.compare.steps import compare_documents
    from parsim.config import read_json
    from parsim.units import format_duration

    where = (str(prediction), str(measurement))
    found = compare_documents(read_json(prediction), read_json(measurement), where=where)
    if as_json:
        inputs = {"prediction": where[0], "measurement": where[1]}
        print_json(document("validate", inputs, found.to_data()))
        return found.error
    rows = [
        [part.what, format_duration(part.predicted_s), format_duration(part.measured_s),
         f"{part.difference_s / found.measured_s:+.1%}"]
        for part in found.parts
    ]  # fmt: skip
    whole = [
        format_duration(found.predicted_s),
        format_duration(found.measured_s),
        f"{found.error:+.1%}",
    ]
    print_table(["", "predicted", "measured", "of the step"], [*rows, ["step", *whole]])
    return found.error


def _runs(path: Path | None, as_json: bool) -> float | None:
    """A table of runs, or the shipped one; returns the mean absolute error, None where no row could be
    predicted.
    """
    from parsim.compare.runs import PUBLISHED, validate_runs

    with progress() as report:
        found = validate_runs(path or PUBLISHED, progress=report)
    if as_json:
        inputs = {"runs": str(path)} if path else {"published": True}
        print_json(document("validate", inputs, found.to_data()))
    else:
        print_lines(found.to_lines())
    return found.summary.mape


def _kernels(path: Path, hardware: str | None, as_json: bool) -> float | None:
    """A table of kernels; returns the mean absolute error, None where no row could be predicted."""
    from parsim.compare.kernels import validate_kernels

    cluster, _ = load_machine(Flags(hardware=hardware))
    found = validate_kernels(path, cluster)
    if as_json:
        inputs = {"kernels": str(path), "hardware": hardware}
        print_json(document("validate", inputs, found.to_data()))
    else:
        print_lines(found.to_lines())
    return found.summary.mape
