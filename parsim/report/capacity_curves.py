"""Plots of `parsim capacity`: time against cost, scaling, sensitivity."""

from __future__ import annotations

import math

from parsim.report.document import Node
from parsim.report.item import plan_text
from parsim.report.page import Bar, Cell, Column, Picture, Row, Section, Table, Waterfall
from parsim.report.plot import Line, Plot, Point, Rule, linear_axis, log_axis
from parsim.search.pareto import pareto_front
from parsim.search.sensitivity import RESOURCES
from parsim.units import format_count, format_usd, parse_duration, parse_usd


def pareto_sections(rows: list[Node], chosen: dict[str, Node], document: Node) -> list[Section]:
    """Days against dollars (GPU-hours where a price is unknown) of each model's clusters."""
    pictures = []
    for model in dict.fromkeys(row.table("model").text("name") for row in rows):
        own = [row for row in rows if row.table("model").text("name") == model and "days" in row]
        if own:
            pictures.append(_pareto(model, own, chosen.get(model), document))
    return [Section(title="Time against cost", parts=tuple(pictures))] if pictures else []


def _pareto(model: str, rows: list[Node], chosen: Node | None, document: Node) -> Picture:
    by_dollars = all("usd" in row for row in rows)
    key, text = ("usd", format_usd) if by_dollars else ("gpu_hours", format_count)
    places = [(row.number("days"), row.number(key)) for row in rows]
    hardware = list(dict.fromkeys(row.text("hardware") for row in rows))
    spreads = [row.numbers("days_interval")[1] / row.number("days") for row in rows]
    points = [
        Point(
            x=days,
            y=cost,
            text=f"{row.number('gpus'):,.0f} × {row.text('hardware')}, {plan_text(row)}: "
            f"{days:.3g} days, {text(cost)}",
            series=hardware.index(row.text("hardware")) % 8,
            hollow=not row.truth("pareto"),
            ringed=row is chosen,
            label=f"{row.number('gpus'):,.0f}",
        )
        for row, (days, cost) in zip(rows, places, strict=True)
    ]
    lines = [
        Line(
            points=((d / spread, c / spread), (d * spread, c * spread)), color=f"s{p.series}", faint=True
        )
        for (d, c), spread, p in zip(places, spreads, points, strict=True)
    ]
    front = sorted(places[i] for i in pareto_front(places))
    rules = _limits(document, by_dollars)
    ends = [end for line in lines for end in line.points]
    lines.append(Line(points=tuple(front), color="muted", steps=True))
    plot = Plot(
        alt=f"Days to train {model} against {'cost' if by_dollars else 'GPU-hours'} on {len(rows)} "
        f"clusters; {len(front)} of them are on the front.",
        x=log_axis(
            "days to train, failures included (log scale)",
            [*(days for days, _ in ends), *(rule.value for rule in rules if rule.vertical)],
            lambda days: f"{days:g}",
        ),
        y=log_axis(
            "cost, USD (log scale)" if by_dollars else "GPU-hours (log scale)",
            [*(cost for _, cost in ends), *(rule.value for rule in rules if not rule.vertical)],
            text,
        ),
        lines=tuple(lines),
        points=tuple(points),
        rules=tuple(rules),
        legend=tuple((f"s{i % 8}", name) for i, name in enumerate(hardware)),
    )
    return Picture(
        caption=f"{model}: numbers are GPUs; filled: none other is better in time, cost, GPUs and free "
        "memory; ring: the one to take; slanted lines: 90% intervals",
        plot=plot,
    )


def _limits(document: Node, by_dollars: bool) -> list[Rule]:
    inputs = document.table("inputs")
    rules = []
    if "deadline" in inputs:
        days = parse_duration(inputs.text("deadline")) / 86400
        rules.append(Rule(value=days, text="deadline", vertical=True))
    if "budget" in inputs and by_dollars:
        rules.append(Rule(value=parse_usd(inputs.text("budget")), text="budget"))
    return rules


def scaling_section(document: Node) -> list[Section]:
    """Efficiency against GPUs, strong and weak."""
    pictures = []
    for kind, words in (("strong", "the same batch"), ("weak", "the batch grows with the GPUs")):
        curves = {
            name: Node(data={"points": points}, where=f"{document.where}: scaling.{kind}").tables(
                "points"
            )
            for name, points in document.table("scaling").table(kind).data.items()
        }
        if curves:
            pictures.append(_curves(kind, words, curves))
    return [Section(title="Scaling", parts=tuple(pictures))] if pictures else []


def _curves(kind: str, words: str, curves: dict[str, list[Node]]) -> Picture:
    gpus = sorted({point.number("gpus") for points in curves.values() for point in points})
    efficiencies = [point.number("efficiency") for points in curves.values() for point in points]
    lines, dots, rows = [], [], []
    for number, (name, points) in enumerate(curves.items()):
        color = f"s{number % 8}"
        places = [(point.number("gpus"), point.number("efficiency")) for point in points]
        lines.append(Line(points=tuple(places), color=color, text=name))
        for point, (x, y) in zip(points, places, strict=True):
            reason = f"; {point.text('reason')}" if point.text("reason", "") else ""
            text = f"{name}, {x:,.0f} GPUs: {y:.1%}, {point.text('plan')}{reason}"
            dots.append(Point(x=x, y=y, text=text, series=number % 8))
            rows.append(_scaling_row(name, point))
    plot = Plot(
        alt=f"Efficiency in {kind} scaling of {len(curves)} curves from {gpus[0]:,.0f} to "
        f"{gpus[-1]:,.0f} GPUs; the lowest is {min(efficiencies):.1%}.",
        x=log_axis("GPUs (log scale)", gpus, lambda value: f"{value:,.0f}", at=gpus),
        y=linear_axis("efficiency", [1.0, *efficiencies], lambda value: f"{value:.0%}"),
        lines=tuple(lines),
        points=tuple(dots),
        legend=tuple((f"s{i % 8}", name) for i, name in enumerate(curves)),
    )
    table = Table(
        caption=f"{kind.capitalize()} scaling",
        columns=(
            Column(key="curve", title="curve"),
            Column(key="gpus", title="GPUs", numeric=True),
            Column(key="batch", title="batch", numeric=True),
            Column(key="efficiency", title="efficiency", numeric=True),
            Column(key="tokens", title="tokens/s", numeric=True),
            Column(key="plan", title="plan", wide=True),
            Column(key="reason", title="why it fell", wide=True),
        ),
        rows=tuple(rows),
        folded=True,
    )
    caption = (
        f"{kind.capitalize()} scaling, {words}: tokens a second and GPU over those of the first point"
    )
    return Picture(caption=caption, plot=plot, table=table)


def _scaling_row(name: str, point: Node) -> Row:
    plan, reason = point.text("plan"), point.text("reason", "")
    numbers = (
        (f"{point.number('gpus'):,.0f}", point.number("gpus")),
        (f"{point.number('global_batch'):,.0f}", point.number("global_batch")),
        (f"{point.number('efficiency'):.1%}", point.number("efficiency")),
        (format_count(point.number("tokens_per_s")), point.number("tokens_per_s")),
    )
    return Row(
        cells=(
            Cell(text=name, value=name),
            *(Cell(text=text, value=value) for text, value in numbers),
            Cell(text=plan, value=plan),
            Cell(text=reason, value=reason),
        )
    )


def sensitivity_section(document: Node) -> list[Section]:
    """What more or less of each resource would do, as bars to both sides of no change."""
    parts = []
    for name in document.table("sensitivity").data:
        effects = document.table("sensitivity").tables(name)
        gains = [abs(effect.number("gain")) for effect in effects if "gain" in effect]
        widest = max([*gains, 1e-3])
        bars = tuple(_effect_bar(effect, widest) for effect in _largest_first(effects))
        parts.append(
            Waterfall(
                caption=f"Speed of {name}, the best plan searched for anew; middle: as it is", bars=bars
            )
        )
    return [Section(title="Sensitivity", parts=tuple(parts))] if parts else []


def _largest_first(effects: list[Node]) -> list[Node]:
    """Effects resource by resource, the resource with the largest first."""
    size: dict[str, float] = {}
    for effect in effects:
        gain = abs(effect.number("gain")) if "gain" in effect else math.inf
        size[effect.text("resource")] = max(size.get(effect.text("resource"), 0.0), gain)
    return sorted(effects, key=lambda e: (-size[e.text("resource")], -e.number("change")))


def _effect_bar(effect: Node, widest: float) -> Bar:
    resource, change = effect.text("resource"), effect.number("change")
    gain = effect.optional("gain")
    label = f"{change:+.0%} {RESOURCES.get(resource, resource)}"
    replanned = ", another plan" if effect.truth("replanned") else ""
    if gain is None:
        return Bar(label=label, value="nothing fits", share="", start=0.0, end=0.5, key="s1")
    middle, other = 0.5, round(0.5 + gain / widest / 2, 5)
    return Bar(
        label=label,
        value=f"{gain:+.1%}{replanned}",
        share="",
        start=min(middle, other),
        end=max(middle, other),
        key="s0" if gain >= 0 else "s1",
    )
