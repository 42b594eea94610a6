"""`parsim simulate --waterfall` and `--roofline`: what a step is made of, what holds kernels back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parsim.cli.output import Section
from parsim.cli.output_paths import to_picture

if TYPE_CHECKING:
    from parsim.cli.simulated_step import SimulatedStep

WaterfallOption = Annotated[
    Path | None,
    typer.Option("--waterfall", help="Draw the step's parts: .png, .svg or .pdf.", callback=to_picture),
]
RooflineOption = Annotated[
    Path | None,
    typer.Option(
        "--roofline", help="Draw the model's kernels under the device's roof.", callback=to_picture
    ),
]
WORDS = {
    "tp_exposed": "exposed tensor parallel",
    "cp_exposed": "exposed context parallel",
    "ep_exposed": "exposed expert parallel",
    "pp_exposed": "exposed pipeline",
    "dp_exposed": "exposed data parallel",
    "overhead": "host overhead",
}
"""The keys of a breakdown in a chart, where they differ."""


def parts_section(step: SimulatedStep, *, waterfall: Path | None, roofline: Path | None) -> Section:
    """The two charts, where they are asked for."""
    section = Section()
    prediction, title = step.prediction, step.timeline.title
    if waterfall is not None:
        from parsim.charts.waterfall import Waterfall, draw_waterfall
        from parsim.units import format_duration, percent

        parts = {key: seconds for key, seconds in prediction.breakdown_s.items() if seconds > 0}
        compute_s, whole_s = parts.get("compute", 0.0), prediction.step_time_s
        lost = {key: seconds for key, seconds in parts.items() if key not in ("compute", "optimizer")}
        finding = f"{percent(compute_s / whole_s)} of {format_duration(whole_s)} is compute"
        if lost:
            worst = max(lost, key=lambda key: lost[key])
            finding += f"; {WORDS.get(worst, worst)} costs most beside it"
        drawn = Waterfall(
            name=title,
            finding=finding,
            note="simulated; wall time, mean over ranks: communication as far as no compute hides it",
            parts=tuple((WORDS.get(key, key), seconds) for key, seconds in parts.items()),
        )
        draw_waterfall(drawn, waterfall)
        section.written.append(waterfall)
    if roofline is not None:
        from parsim.charts.roofline import draw_roofline
        from parsim.cost.roofline import roofline_kernels

        request = step.request
        kernels = roofline_kernels(request.setup.job, request.plan, request.costs)
        draw_roofline(kernels, request.costs, roofline, title=title)
        section.written.append(roofline)
    return section
