"""What a report says of one predicted step: an ITEM of a document, with its cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from parsim.config import validate
from parsim.cost.stage import CostModel
from parsim.plan import ParallelPlan
from parsim.report.document import Node
from parsim.report.page import Answer, Bar, Cell, Column, Fact, Row, Section, Share, Table, Waterfall
from parsim.search.scaling import TERMS
from parsim.units import format_bytes, format_count, format_duration, format_usd

KEYS = {
    "compute": "forward",
    "tp_exposed": "tp",
    "cp_exposed": "cp",
    "ep_exposed": "ep",
    "pp_exposed": "pp_send",
    "dp_exposed": "dp",
    "optimizer": "optimizer",
    "overhead": "host",
    "bubble": "idle",
}
"""The colour of each term of a breakdown."""
MEMORY_KEYS = {
    "weights": "s0",
    "gradients": "s5",
    "optimizer": "s4",
    "activations": "s2",
    "working": "s6",
    "buffers": "s3",
    "residuals": "s1",
    "slack": "idle",
    "context": "s7",
}
MEMORY_WORDS = {
    "optimizer": "optimizer states",
    "working": "working space of a layer",
    "buffers": "communication buffers",
    "residuals": "residuals of compression",
    "slack": "slack of the allocator",
    "context": "context and libraries",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a step costs to rent."""

    usd_per_hour: float
    usd_per_billion_tokens: float
    source: str


def cost_of(item: Node, costs: CostModel) -> Cost | None:
    """The rent of a step's GPUs; None where the profile has no price."""
    price = costs.cluster.price
    if price is None:
        return None
    per_hour = price.usd_per_gpu_hour * item.number("gpus")
    tokens_per_s = item.positive("tokens_per_s_per_gpu") * item.positive("gpus")
    return Cost(
        usd_per_hour=per_hour,
        usd_per_billion_tokens=per_hour / 3600 / tokens_per_s * 1e9,
        source=f"{price.usd_per_gpu_hour:.2f} USD a GPU-hour, {price.source} {price.date}".strip(),
    )


def plan_text(item: Node) -> str:
    """A plan as users type it."""
    plan = validate(ParallelPlan, dict(item.table("plan").data), where=f"{item.where}: plan")
    return plan.short()


def title_of(item: Node) -> str:
    """What is trained on what."""
    model, job = item.table("model"), item.table("job")
    return (
        f"{model.text('name')} on {item.number('gpus'):,.0f} × {item.text('hardware')}, "
        f"batch {job.number('global_batch'):,.0f} × {job.number('seq_len'):,.0f} tokens"
    )


def answer_of(item: Node, costs: CostModel | None, *, binds: str, verdict: str) -> Answer:
    """The first screen of a predicted step; without costs neither price nor capacity are known."""
    step_s = item.positive("step_time_s")
    low, high = item.pair("interval_s")
    tokens_per_s = item.number("tokens_per_s_per_gpu") * item.number("gpus")
    facts = [
        Fact(
            label="Step time",
            value=format_duration(step_s),
            note=f"90% interval {format_duration(low)} to {format_duration(high)}",
        ),
        Fact(
            label="MFU",
            value=f"{item.number('mfu'):.1%}",
            note=f"{item.number('model_tflops_per_gpu'):,.0f} model TFLOP/s a GPU; "
            f"{item.number('mfu_causal'):.1%} with attention counted as causal",
            meter=item.number("mfu"),
            meter_text="share of the dense peak",
        ),
        Fact(
            label="Throughput",
            value=f"{format_count(tokens_per_s)} tokens/s",
            note=f"{item.number('tokens_per_s_per_gpu'):,.0f} a GPU",
        ),
        _memory_fact(item, costs),
    ]
    cost = cost_of(item, costs) if costs else None
    if cost is not None:
        facts.append(
            Fact(
                label="Cost",
                value=f"{format_usd(cost.usd_per_billion_tokens)} a billion tokens",
                note=f"{format_usd(cost.usd_per_hour)} an hour; {cost.source}",
            )
        )
    else:
        facts.append(Fact(label="Cost", value="unknown", note="the hardware profile has no price"))
    if binds:
        facts.append(Fact(label="What binds", value=binds, sentence=True))
    headline = f"{format_duration(step_s)} a step: {title_of(item)}"
    return Answer(headline=headline, plan=plan_text(item), facts=tuple(facts), verdict=verdict)


def _memory_fact(item: Node, costs: CostModel | None) -> Fact:
    memory = item.seconds("memory_bytes")
    needed = memory.get("peak", 0.0) + memory.get("context", 0.0)
    fits = item.truth("fits")
    if costs is None:
        return Fact(
            label="Memory", value=format_bytes(needed), note="of the fullest rank", warns=not fits
        )
    there = costs.cluster.device.memory_bytes
    share = needed / there
    note = f"of {format_bytes(there)} on the fullest rank, {share:.0%}"
    return Fact(
        label="Memory" if fits else "Memory: DOES NOT FIT",
        value=format_bytes(needed),
        note=note if fits else f"{note}: {format_bytes(needed - there)} too much",
        meter=min(share, 1.0),
        meter_text="share of device memory",
        warns=not fits,
    )


def shares_of(breakdown_s: dict[str, float]) -> tuple[Share, ...]:
    """A breakdown as the pieces of a stacked bar."""
    whole = sum(breakdown_s.values())
    if not whole > 0:
        return ()
    return tuple(
        Share(key=KEYS.get(key, "other"), label=TERMS.get(key, key), share=seconds / whole)
        for key, seconds in breakdown_s.items()
        if seconds / whole > 5e-4
    )


def breakdown_section(item: Node) -> Section:
    """Where the step goes, from the FLOPs at peak rate to the whole step."""
    step_s, parts = item.positive("step_time_s"), item.seconds("breakdown_s")
    pieces = []
    ideal_s = (item.optional("mfu_causal") or 0.0) * step_s
    compute_s = parts.get("compute", 0.0)
    if 0 < ideal_s < compute_s:
        pieces.append(("the model's FLOPs at the dense peak", ideal_s, "ideal"))
        again = item.table("plan").text("recompute", "none") != "none"
        words = "kernels below the peak" + (", and what is recomputed" if again else "")
        pieces.append((words, compute_s - ideal_s, "forward"))
    elif compute_s:
        pieces.append(("compute", compute_s, "forward"))
    pieces += [
        (TERMS.get(key, key), seconds, KEYS.get(key, "other"))
        for key, seconds in parts.items()
        if key != "compute" and seconds > 5e-5 * step_s
    ]
    bars = waterfall_bars(pieces, total=("the step", step_s), text=format_duration)
    longest = max((p for p in pieces if p[2] != "ideal"), key=lambda piece: piece[1], default=None)
    finding = ""
    if longest is not None:
        words, seconds, _ = longest
        finding = (
            f"The largest part beyond the FLOPs themselves, {seconds / step_s:.1%} of the step: {words}"
        )
    waterfall = Waterfall(
        caption="Wall time of a step, mean over ranks; exposed communication is what no compute hides",
        bars=bars,
    )
    return Section(title="Where the step goes", finding=finding, parts=(waterfall,))


def waterfall_bars(
    pieces: list[tuple[str, float, str]],
    *,
    total: tuple[str, float],
    text: Callable[[float], str],
    scale: float | None = None,
) -> tuple[Bar, ...]:
    """Bars for (label, amount, colour), each from where the one before ended, and one for the total."""
    whole = scale or max(total[1], sum(amount for _, amount, _ in pieces))
    bars, at = [], 0.0
    for label, amount, key in pieces:
        bars.append(
            Bar(
                label=label,
                value=text(amount),
                share=f"{amount / total[1]:.1%}",
                start=round(at / whole, 5),
                end=round((at + amount) / whole, 5),
                key=key,
            )
        )
        at += amount
    name, amount = total
    end = round(amount / whole, 5)
    bars.append(
        Bar(label=name, value=text(amount), share="", start=0.0, end=end, key="total", total=True)
    )
    return tuple(bars)


def memory_section_parts(item: Node, costs: CostModel | None) -> tuple[Waterfall, ...]:
    """What fills the fullest rank, against what its device has."""
    memory = item.seconds("memory_bytes")
    pieces = [
        (MEMORY_WORDS.get(key, key), num_bytes, MEMORY_KEYS.get(key, "other"))
        for key, num_bytes in memory.items()
        if key != "peak" and num_bytes > 0
    ]
    needed = sum(num_bytes for _, num_bytes, _ in pieces)
    if not needed:
        return ()
    there = costs.cluster.device.memory_bytes if costs else None
    scale = max(needed, there or 0.0)
    bars = waterfall_bars(pieces, total=("in all", needed), text=format_bytes, scale=scale)
    waterfall = Waterfall(
        caption="Memory of the fullest rank at its fullest moment",
        bars=bars,
        limit=None if there is None else there / scale,
        limit_text="" if there is None else f"device memory {format_bytes(there)}",
    )
    return (waterfall,)


def robust_section(item: Node) -> Section | None:
    """The step where things are worse than assumed; None where nobody looked."""
    if "robust" not in item:
        return None
    robust = item.table("robust")
    step_s = item.positive("step_time_s")
    rows = [
        Row(
            cells=(
                Cell(text=case, value=case),
                Cell(text=format_duration(seconds), value=seconds),
                Cell(text=f"+{seconds / step_s - 1:.1%}", value=seconds / step_s),
            )
        )
        for case, seconds in sorted(robust.seconds("step_time_s").items(), key=lambda each: -each[1])
    ]
    table = Table(
        caption="One thing at a time is worse than assumed",
        columns=(
            Column(key="case", title="case"),
            Column(key="step", title="step", numeric=True),
            Column(key="more", title="longer by", numeric=True),
        ),
        rows=tuple(rows),
        plain=True,
    )
    worst = f"At worst {format_duration(robust.number('worst_step_time_s'))}: "
    return Section(
        title="If things are worse", finding=worst + robust.text("worst_case"), parts=(table,)
    )
