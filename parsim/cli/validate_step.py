"""`parsim validate PREDICTION MEASUREMENT`: one step, itemised, drawn and traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parsim.cli.output import document, print_json, print_lines, say
from parsim.cli.report import write_report
from parsim.cli.run_launch import say_shared
from parsim.cli.tables import print_table
from parsim.cli.trace import read_run, traced_data
from parsim.setup import Flags, load_plan
from parsim.timeline import COMPUTE

if TYPE_CHECKING:
    from parsim.compare.itemised import ItemisedComparison
    from parsim.plan import ParallelPlan
    from parsim.schedule.program import Program
    from parsim.timeline import Timeline

RANKS_SHOWN = 16
ACTIONS_SHOWN = 12
SAME_STEP = 1e-6
"""Relative difference up to which a replayed step is the one that was predicted."""
SHOWN_AS_ONE = 0.002
"""Relative difference of step times that a reader does not notice."""
_REPLAYED = (
    "the predicted step is replayed with what was measured of one part after another; percentages are "
    "of the measured step"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFiles:
    """Pictures and traces of a compared step that are to be written."""

    chart: Path | None = None
    waterfall: Path | None = None
    trace: Path | None = None
    report: Path | None = None
    """A folder."""

    def drawn(self) -> dict[str, Path]:
        """Those that need the spans of both steps, by flag."""
        flags = {"--chart": self.chart, "--waterfall": self.waterfall, "--trace": self.trace}
        return {flag: path for flag, path in flags.items() if path is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Predicted:
    """What a prediction's document says, replayed on the cores of the measurement."""

    plan: ParallelPlan
    step_time_s: float
    """That of the document, unless ranks shared cores, of which it knows nothing."""
    program: Program
    timeline: Timeline


def validate_step(
    prediction: Path, measurement: Sequence[Path], files: StepFiles, *, as_json: bool
) -> float:
    """Compare and answer; returns the relative error of the step time."""
    from parsim.compare.itemised import ItemisedComparison, itemise
    from parsim.compare.steps import compare_documents
    from parsim.config import read_json
    from parsim.report.document import Node

    where = str(prediction), ", ".join(map(str, measurement))
    document_of_prediction = read_json(prediction)
    measured_data, measured = _measured(prediction, measurement)
    whole = compare_documents(document_of_prediction, measured_data, where=where)
    cores = Node(data=measured_data, where=where[1]).optional_count("cores")
    predicted = None if measured is None else _replayed(where[0], whole.predicted_s, cores)
    if measured is None or predicted is None:
        _refuse_files(files)
        if cores is not None:
            say(f"note: the measured ranks shared {cores} cores, which this prediction leaves out")
        found = ItemisedComparison(whole=whole)
    else:
        found = itemise(
            predicted.timeline,
            measured,
            predicted.plan,
            predicted_s=predicted.step_time_s,
            measured_s=whole.measured_s,
            program=predicted.program,
        )
        write_step(files, predicted.timeline, measured, predicted.plan, found)
    inputs = {"prediction": where[0], "measurement": [str(path) for path in measurement]}
    answer = document("validate", inputs, found.to_data())
    compared = () if measured is None or predicted is None else (predicted.timeline, measured)
    if as_json:
        print_json(answer)
    else:
        _show(found)
    write_report(files.report, answer, compared)
    return found.whole.error


def _measured(prediction: Path, paths: Sequence[Path]) -> tuple[Any, Timeline | None]:
    """A measurement's document and its timeline, from what `run` wrote or from torch's traces.

    The timeline is None in a document of earlier versions, which had none.
    """
    from parsim.config import read_json
    from parsim.errors import ParsimError
    from parsim.export.timeline_json import timeline_from_data
    from parsim.plan_file import read_plan
    from parsim.traces.chrome_file import is_chrome_trace

    if all(map(is_chrome_trace, paths)):
        run = read_run(paths, read_plan(str(prediction)).plan)
        return traced_data(run, None), run.timeline
    if len(paths) > 1:
        raise ParsimError(
            "several files of a measurement are traces of torch's profiler, one a rank",
            where=next(str(path) for path in paths if not is_chrome_trace(path)),
            expected="one file of `parsim run -o`, or traces",
        )
    data = read_json(paths[0])
    if not isinstance(data, Mapping) or "timeline" not in data:
        return data, None
    timeline = timeline_from_data(data["timeline"], where=f"{paths[0]}: timeline")
    return data, timeline if timeline.spans else None


def _replayed(prediction: str, step_time_s: float, cores: int | None) -> _Predicted | None:
    """The prediction of a document once more, for its spans; None where that gives another step time.

    `cores`: those that the measured ranks shared, None where each had its own. Another step time comes
    where the prediction came about with more than the document holds (a fabric, stragglers), or
    where a profile has changed since.
    """
    from parsim.errors import ParsimError
    from parsim.plan import ASYNCHRONOUS_SCHEDULES
    from parsim.schedule.program import task_times, timeline_of
    from parsim.simulate.fold import unfolded
    from parsim.simulate.prediction import program_of
    from parsim.simulate.shared_cores import on_cores

    try:
        setup, plan = load_plan(prediction, Flags())
    except ParsimError as error:
        say(f"no spans of the prediction: {error.what} ({error.where})")
        return None
    if plan.schedule in ASYNCHRONOUS_SCHEDULES:
        say(f"no spans are compared: schedule={plan.schedule} has no step that begins and ends")
        return None
    program, _ = program_of(setup.job, plan, setup.costs())
    timeline = unfolded(timeline_of(program, task_times(program)), plan)
    if abs(timeline.end_s / step_time_s - 1) > SAME_STEP:
        say(
            f"no spans are compared: {prediction} was made with more than it says (--fabric, "
            "--straggler, --schedule-csv), or its hardware profile has changed since"
        )
        return None
    if cores is not None and cores < plan.gpus:
        say_shared(plan.gpus, cores)
        program = on_cores(program, plan, cores)
        timeline = unfolded(timeline_of(program, task_times(program)), plan)
        step_time_s = timeline.end_s
    return _Predicted(plan=plan, step_time_s=step_time_s, program=program, timeline=timeline)


def _refuse_files(files: StepFiles) -> None:
    """Raise ParsimError where something is to be drawn of steps without spans."""
    from parsim.errors import ParsimError

    for flag, path in files.drawn().items():
        raise ParsimError(
            f"{flag} needs the spans of both steps",
            where=str(path),
            hint="`parsim run -o` writes those of the measurement; those of the prediction are "
            "replayed from what `parsim simulate --json` wrote",
        )


def write_step(
    files: StepFiles,
    predicted: Timeline,
    measured: Timeline,
    plan: ParallelPlan,
    found: ItemisedComparison,
) -> None:
    """The pictures and the trace that were asked for."""
    if files.chart is not None:
        draw_overlay(files.chart, predicted, measured, plan, found)
    if files.waterfall is not None:
        from parsim.charts.waterfall import Waterfall, draw_waterfall
        from parsim.compare.itemised import WORDS

        waterfall = Waterfall(
            name=measured.title or predicted.title,
            finding=found.verdict,
            note="; ".join(filter(None, (found.because, _REPLAYED))),
            parts=tuple((WORDS[cause.what], -cause.difference_s) for cause in found.causes),
            begin="predicted",
            begin_s=found.whole.predicted_s,
            end="measured",
        )
        draw_waterfall(waterfall, files.waterfall)
    if files.trace is not None:
        from parsim.export.chrome_trace import write_chrome_trace

        write_chrome_trace(files.trace, [predicted, measured])
    for path in files.drawn().values():
        say(f"wrote {path}")


def draw_overlay(
    path: Path,
    predicted: Timeline,
    measured: Timeline,
    plan: ParallelPlan,
    found: ItemisedComparison,
) -> None:
    """Predicted above measured; waiting for another stage's result is idle time in both."""
    from parsim.charts.comparison import draw_comparison
    from parsim.compare.waiting import without_waiting
    from parsim.units import format_duration

    notes = [found.because] if found.because else []
    if abs(measured.end_s / found.whole.measured_s - 1) > SHOWN_AS_ONE:
        median = format_duration(found.whole.measured_s)
        notes.append(f"measured is the step nearest to the median of {median}")
    ranks = slowest_replicas(measured, plan)
    if len(ranks) < len(measured.ranks):
        notes.append("of each pipeline rank the replica that computes longest")
    shown = without_waiting(measured, plan, collectives=False)
    draw_comparison(predicted.only(ranks), shown.only(ranks), path, because="; ".join(notes))


def slowest_replicas(measured: Timeline, plan: ParallelPlan) -> tuple[int, ...]:
    """All ranks, or where they are too many to be drawn, of each pipeline rank the one that sets its
    pace: the one that computes longest.
    """
    if len(measured.ranks) <= RANKS_SHOWN:
        return measured.ranks
    busy_s = dict.fromkeys(measured.ranks, 0.0)
    for span in measured.spans:
        if span.stream == COMPUTE:
            busy_s[span.rank] += span.duration_s
    slowest: dict[int, int] = {}
    for rank in measured.ranks:
        stage = plan.coordinate(rank).pp
        if busy_s[rank] > busy_s[slowest.setdefault(stage, rank)]:
            slowest[stage] = rank
    return tuple(sorted(slowest.values()))


def _show(found: ItemisedComparison) -> None:
    """Tables, from the whole to single actions, and the sentence that sums them up."""
    from parsim.units import format_duration

    whole = found.whole

    def row(what: str, predicted_s: float, measured_s: float, *, of: float) -> list[str]:
        shown = [format_duration(predicted_s), format_duration(measured_s)]
        return [what, *shown, f"{(predicted_s - measured_s) / of:+.1%}"]

    heads = ["predicted", "measured", "of the step"]
    rows = [row(p.what, p.predicted_s, p.measured_s, of=whole.measured_s) for p in whole.parts]
    total = row("step", whole.predicted_s, whole.measured_s, of=whole.measured_s)
    print_table(["where the time goes", *heads], [*rows, total])
    if found.causes:
        rows = [
            [
                cause.what,
                format_duration(cause.predicted_work_s),
                format_duration(cause.measured_work_s),
                format_duration(cause.step_time_s),
                f"{cause.difference_s / whole.measured_s:+.1%}",
            ]
            for cause in found.causes
        ]
        heads = ["predicted", "measured", "step becomes", "of the step"]
        total = ["step", *total[1:3], "", total[3]]
        print_table(["replayed with what was measured of", *heads], [*rows, total])
    if found.ranks:
        _show_ranks(found)
    if found.actions:
        _show_actions(found)
    print_lines([found.finding])


def _show_ranks(found: ItemisedComparison) -> None:
    """What each rank spends its step on, predicted → measured."""
    from parsim.units import format_duration

    keys = [
        part.what
        for part in found.whole.parts
        if any(p.what == part.what for row in found.ranks for p in row.parts)
    ]
    rows = []
    for rank in found.ranks[:RANKS_SHOWN]:
        parts = {part.what: part for part in rank.parts}
        rows.append(
            [
                str(rank.rank),
                *(
                    f"{format_duration(parts[key].predicted_s)} → "
                    f"{format_duration(parts[key].measured_s)}"
                    for key in keys
                ),
            ]
        )
    print_table(["rank", *keys], rows)
    if len(found.ranks) > RANKS_SHOWN:
        say(f"{len(found.ranks) - RANKS_SHOWN} more ranks are in --json")


def _show_actions(found: ItemisedComparison) -> None:
    """Actions by stage and kind, those first that cost or save most in all."""
    from parsim.units import format_duration

    rows = [
        [
            action.name,
            str(action.number),
            format_duration(action.predicted_s),
            format_duration(action.measured_s),
            f"{action.predicted_s / action.measured_s - 1:+.1%}",
            f"{format_duration(action.fastest_s)} to {format_duration(action.slowest_s)}",
            action.slowest,
        ]
        for action in found.actions[:ACTIONS_SHOWN]
    ]
    heads = ["number", "predicted", "measured", "error", "measured range", "slowest"]
    print_table(["actions", *heads], rows)
    if len(found.actions) > ACTIONS_SHOWN:
        say(f"{len(found.actions) - ACTIONS_SHOWN} more kinds of action are in --json")
