"""What `parsim run` says of its own prediction: which part of the step was mispredicted."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parsim.compare.itemised import ItemisedComparison
    from parsim.execute.measurement import Measurement
    from parsim.execute.request import Case
    from parsim.setup import Setup
    from parsim.timeline import Timeline


def compared(
    setup: Setup, case: Case, predicted: Timeline, measurement: Measurement, cores: int | None
) -> ItemisedComparison | None:
    """The measured step against the predicted one, itemised; both have global ranks.

    `cores`: those that the ranks shared, None where each had its own.
    None where steps have no common beginning and end: on parameter servers and without a flush.
    """
    from parsim.compare.itemised import itemise
    from parsim.plan import ASYNCHRONOUS_SCHEDULES
    from parsim.simulate.prediction import program_of
    from parsim.simulate.shared_cores import on_cores

    if case.servers is not None or case.plan.schedule in ASYNCHRONOUS_SCHEDULES:
        return None
    program, _ = program_of(setup.job, case.plan, setup.costs())
    return itemise(
        predicted,
        measurement.timeline,
        case.plan,
        predicted_s=predicted.end_s,
        measured_s=measurement.step_time_s,
        program=on_cores(program, case.plan, cores),
    )
