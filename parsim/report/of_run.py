"""The report of `parsim run`: a plan on real ranks, beside its prediction."""

from __future__ import annotations

from dataclasses import replace

from parsim.errors import ParsimError
from parsim.export.timeline_json import timeline_from_data
from parsim.plan_file import plan_from_data
from parsim.report.document import Node
from parsim.report.of_simulate import simulate_chapter
from parsim.report.page import Answer, Chapter, Fact, Lines, Picture, Section
from parsim.report.parts import comparison_table, off_by
from parsim.report.plot import Line, Plot, Point, Rule, linear_axis
from parsim.report.sources import inputs_section, reproduce_section
from parsim.report.step import SAME, Step, costs_of, timeline_sections
from parsim.simulate.fold import unfolded
from parsim.simulate.prediction import predict
from parsim.timeline import Timeline, breakdown_s
from parsim.units import format_count, format_duration


def run_chapter(document: Node, timelines: tuple[Timeline, ...] = ()) -> Chapter:
    """The chapter of a `run --json` document; timelines: predicted, then measured."""
    if "one_rank" in document:
        chapter = simulate_chapter(document, timelines)
        return Chapter(
            command="run", title=chapter.title, answers=chapter.answers, sections=chapter.sections
        )
    if document.data.get("steps_s") == [] and "verify" in document:
        return _verified_only(document)
    if "steps_s" not in document:
        raise ParsimError(
            "this document holds no measured steps, so there is nothing to report",
            where=document.where,
            hint="a dry run, or a machine other than the first, has none",
        )
    step = _step(document, timelines)
    sections = [_comparison(document, step.timelines), *timeline_sections(step), _steps(document)]
    if "loss" in document:
        sections.append(_loss(document))
    restarts = document.texts("restarts")
    if restarts:
        sections.append(Section(title="Restarts", parts=(Lines(lines=tuple(restarts)),)))
    sections += [inputs_section({"the plan": step}, document), reproduce_section(document)]
    title = f"{document.table('model').text('name')} on {document.number('world_size'):,.0f} ranks"
    return Chapter(
        command="run",
        title=title,
        answers=(_answer(document, step.file.plan.short()),),
        sections=tuple(sections),
    )


def _verified_only(document: Node) -> Chapter:
    """The chapter of a plan that was compared with single-process training, and not timed."""
    file = plan_from_data(dict(document.data), where=document.where)
    fact, name = _verify_fact(document), document.table("model").text("name")
    answer = Answer(
        headline=f"{name} verified, not timed: {fact.value}",
        plan=file.plan.short(),
        facts=(fact,),
        verdict="",
    )
    return Chapter(
        command="run",
        title=f"{name}, verified",
        answers=(answer,),
        sections=(reproduce_section(document),),
    )


def _step(document: Node, timelines: tuple[Timeline, ...]) -> Step:
    """The run's plan and costs; its timelines are the given ones, or that of the document and, where it
    can be had again, the predicted one before it.
    """
    file = plan_from_data(dict(document.data), where=document.where)
    inputs = document.table("inputs")
    named = {key: inputs.text(key) for key in ("hardware", "stack") if key in inputs}
    file = replace(file, **named)  # type: ignore[arg-type]
    costs, why_not = costs_of(file)
    if timelines or "timeline" not in document:
        missing = "" if timelines else "this document holds no timeline"
        return Step(file=file, costs=costs, timelines=timelines, why_not=missing)
    measured = timeline_from_data(document.data["timeline"], where=f"{document.where}: timeline")
    if costs is not None and file.job is not None and "predicted_s" in document:
        cores = document.optional_count("cores")
        prediction, predicted = predict(file.job, file.plan, costs, cores=cores)
        if abs(prediction.step_time_s / document.positive("predicted_s") - 1) <= SAME:
            timelines = (unfolded(predicted, file.plan),)
    return Step(file=file, costs=costs, timelines=(*timelines, measured), why_not=why_not)


def _answer(document: Node, plan: str) -> Answer:
    measured_s, ranks = document.positive("step_time_s"), document.number("world_size")
    job = document.table("job")
    tokens_per_s = job.number("global_batch") * job.number("seq_len") / measured_s
    disturbed, timed = sum(document.truths("disturbed")), len(document.series("steps_s"))
    facts = [
        Fact(
            label="Measured",
            value=format_duration(measured_s),
            note=f"median of {timed - disturbed} undisturbed steps of {timed}, "
            f"spread {document.number('spread'):.1%}"
            if disturbed < timed
            else f"median of {timed} steps, every one of them disturbed by other processes, "
            f"spread {document.number('spread'):.1%}",
        )
    ]
    error = document.optional("error")
    if error is not None:
        facts.append(
            Fact(
                label="Predicted",
                value=format_duration(document.number("predicted_s")),
                note=f"error {error:+.1%}",
            )
        )
    losses = document.series("loss")
    facts += [
        Fact(
            label="Throughput", value=f"{format_count(tokens_per_s)} tokens/s", note=f"{ranks:.0f} ranks"
        ),
        Fact(
            label="Loss", value=f"{losses[0]:.4f} to {losses[-1]:.4f}", note=f"over {len(losses)} steps"
        ),
        Fact(
            label="Machine",
            value=document.text("device"),
            note=f"{document.text('machine')}; torch {document.text('torch')}, {document.text('dtype')}",
        ),
        _verify_fact(document),
    ]
    verdict = f"{disturbed} of {timed} steps were disturbed by other processes." if disturbed else ""
    name = document.table("model").text("name")
    said = "" if error is None else f", predicted {off_by(error)}"
    return Answer(
        headline=f"{format_duration(measured_s)} a step measured{said}: {name} on {ranks:.0f} ranks",
        plan=plan,
        facts=tuple(facts),
        verdict=verdict,
    )


def _verify_fact(document: Node) -> Fact:
    if "verify" not in document:
        return Fact(label="Verified", value="no", note="--verify compares with single-process training")
    found = document.table("verify")
    equal = found.truth("equal")
    return Fact(
        label="Verified",
        value="equal" if equal else "DIFFERENT",
        note=f"to {found.text('against')} in float64: gradients within "
        f"{found.number('max_gradient_error'):.1e}, loss within {found.number('max_loss_error'):.1e}",
        warns=not equal,
    )


def _comparison(document: Node, timelines: tuple[Timeline, ...]) -> Section:
    """Where the error is: the measured breakdown, beside the predicted one where that is known."""
    measured = document.seconds("breakdown_s")
    predicted = breakdown_s(timelines[0]) if len(timelines) > 1 else {}
    table = comparison_table(predicted, measured, step_s=document.positive("step_time_s"))
    return Section(title="Predicted against measured", parts=(table,))


def _steps(document: Node) -> Section:
    """Every step's time."""
    steps_s, disturbed = document.series("steps_s"), document.truths("disturbed")
    points = [
        Point(
            x=i,
            y=seconds,
            text=f"step {i}: {format_duration(seconds)}" + (", disturbed" if late else ""),
            hollow=late,
        )
        for i, (seconds, late) in enumerate(
            zip(steps_s, [*disturbed, *[False] * len(steps_s)], strict=False)
        )
    ]
    median_s = document.positive("step_time_s")
    rules = [Rule(value=median_s, text=f"median {format_duration(median_s)}")]
    predicted_s = document.optional("predicted_s")
    if predicted_s is not None:
        rules.append(Rule(value=predicted_s, text=f"predicted {format_duration(predicted_s)}"))
    plot = Plot(
        alt=f"Times of {len(steps_s)} steps, from {format_duration(min(steps_s))} to "
        f"{format_duration(max(steps_s))}.",
        x=linear_axis("step", (len(steps_s) - 1,), lambda step: f"{step:g}", exact=True),
        y=linear_axis("step time", [*steps_s, *(rule.value for rule in rules)], format_duration),
        lines=(Line(points=tuple(enumerate(steps_s)), color="s0"),),
        points=tuple(points),
        rules=tuple(rules),
    )
    caption = "Every timed step; hollow: other processes used this machine meanwhile"
    return Section(title="Steps", parts=(Picture(caption=caption, plot=plot),))


def _loss(document: Node) -> Section:
    losses = document.series("loss")
    plot = Plot(
        alt=f"Loss from {losses[0]:.4f} to {losses[-1]:.4f} over {len(losses)} steps.",
        x=linear_axis("step", (len(losses) - 1,), lambda step: f"{step:g}", exact=True),
        y=linear_axis("loss", losses, lambda value: f"{value:.4g}", zero=False),
        lines=(Line(points=tuple(enumerate(losses)), color="s0"),),
        points=tuple(Point(x=i, y=loss, text=f"step {i}: {loss:.6f}") for i, loss in enumerate(losses)),
    )
    return Section(title="Loss", parts=(Picture(caption="Mean over the global batch", plot=plot),))
