"""`parsim simulate --fabric`: the step with its transfers on the links of a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parsim.cli.output import Section
from parsim.cli.output_paths import to_picture

if TYPE_CHECKING:
    from parsim.cli.simulated_step import SimulatedStep, StepRequest
    from parsim.simulate.contention import Contention
    from parsim.simulate.prediction import Prediction
    from parsim.timeline import Timeline

FabricOption = Annotated[
    str | None,
    typer.Option(
        "--fabric",
        help="Share a network's links: rail, fat-tree, torus or switch, with settings such as "
        "fat-tree,oversubscription=4,leaf=32,routing=hash,algorithm=in-switch or torus,dims=4x8.",
    ),
]
FabricChartOption = Annotated[
    Path | None,
    typer.Option(
        "--fabric-chart",
        help="Draw how full the busiest links are: .png, .svg or .pdf.",
        callback=to_picture,
    ),
]


def simulate_over(text: str, request: StepRequest) -> tuple[Prediction, Timeline, Contention]:
    """The step over the fabric that `text` describes.

    Raises ParsimError where ranks are not alike, which this does not model.
    """
    from parsim.errors import ParsimError
    from parsim.simulate.contention import predict_over
    from parsim.simulate.fabric import fabric_of

    if request.costs_by_rank:
        raise ParsimError(
            "a fabric has devices of one kind",
            where="--fabric",
            got="--rank-hardware",
            hint="leave one of the two out",
        )
    fabric = fabric_of(text, request.setup.cluster, request.plan.gpus)
    job, plan, uneven = request.setup.job, request.plan, request.uneven
    return predict_over(fabric, job, plan, request.costs, request.schedule, uneven=uneven)


def network_section(chart: Path | None, step: SimulatedStep) -> Section:
    """What sharing the network adds to the answer."""
    from parsim.errors import ParsimError
    from parsim.units import format_duration

    section, contention = Section(), step.contention
    if contention is None:
        if chart is not None:
            raise ParsimError("there are no links to draw", where="--fabric-chart", hint="add --fabric")
        return section
    section.item["fabric"] = contention.to_data()
    more_s = contention.step_s - contention.alone_s
    fabric = contention.fabric
    settings = ",".join(f"{key}={value}" for key, value in fabric.settings.items())
    section.lines.append(
        f"  network       {fabric.name},{settings}: {format_duration(more_s)} more than with every "
        f"link alone ({more_s / contention.alone_s:+.1%})"
    )
    for kind, seconds in contention.contended_s.items():
        section.lines.append(f"    {kind} waits   {format_duration(seconds):>10}  a rank, for its links")
    for use in contention.links[:3]:
        peak = max(load for _, load in use.points)
        section.lines.append(f"    {use.name}: {use.mean:.1%} busy, at most {peak:.0%}")
    if chart is not None:
        from parsim.charts.links import draw_links

        draw_links(contention, chart, title=step.timeline.title)
        section.written.append(chart)
    return section
