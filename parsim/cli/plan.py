"""`parsim plan`: which split is best, and how long a step takes."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parsim.cli.constraints import Allowed, with_constraints
from parsim.cli.options import (
    GlobalBatchOption,
    HardwareOption,
    InterNodeOption,
    IntraNodeOption,
    JsonOption,
    MemoryOption,
    ModelOption,
    SeqLenOption,
    StackOption,
)
from parsim.cli.output import document, print_json, print_lines, progress, say
from parsim.cli.report import ReportOption, write_report
from parsim.cli.tables import print_table
from parsim.setup import Flags, load_setup

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from parsim.search.robust import Recommendation
    from parsim.search.search import SearchResult
    from parsim.setup import Setup
    from parsim.simulate.prediction import Prediction


SIZES = range(1, 12)
"""Columns of the table that describe a plan: where all are alike they are said once, above it."""


@with_constraints
def plan(
    gpus: Annotated[int, typer.Option("--gpus", help="GPUs to use, all of them.")],
    model: ModelOption = None,
    hardware: HardwareOption = None,
    global_batch: GlobalBatchOption = None,
    seq_len: SeqLenOption = None,
    stack: StackOption = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision", help="dtypes of the GEMMs, such as bf16,fp8 [default: bf16 where there is]."
        ),
    ] = None,
    inter_node: InterNodeOption = None,
    intra_node: IntraNodeOption = None,
    memory: MemoryOption = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Plans to print.")] = 10,
    *,
    allowed: Allowed,
    explain: Annotated[
        str, typer.Option("--explain", help="Why is this plan not the best? dp=8,tp=4,… or a file.")
    ] = "",
    budget_s: Annotated[
        float, typer.Option("--budget-s", min=0, help="Stop proving after so many seconds.")
    ] = 60.0,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="Of a large search [default: one a core].")
    ] = None,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rank all splits of N GPUs over dp, tp, pp and cp for a model.

    \b
    Examples:
      parsim plan --model llama-3.1-405b --hardware h100-sxm-80gb --gpus 16384 --global-batch 2048
      parsim plan --model gpt3-175b --hardware a100-sxm-80gb --gpus 512 --global-batch 1536 --tp 4,8
      parsim plan --model gpt3-175b --hardware a100-sxm-80gb --gpus 512 --global-batch 1536 \\
          --explain dp=8,tp=8,pp=8
    """
    from parsim.search.relax import Question, explained
    from parsim.search.robust import LEAST_LOOKED_AT
    from parsim.search.search import NoPlan, SearchResult, search, together

    flags = Flags(
        model=model,
        hardware=hardware,
        global_batch=global_batch,
        seq_len=seq_len,
        stack=stack,
        precision=precision,
        inter_node=inter_node,
        intra_node=intra_node,
        memory=memory,
    )
    setups = _setups(flags)
    setup = setups[0]
    constraints = allowed.constraints()
    node = setup.cluster.gpus_per_node
    if gpus > node and gpus % node:
        nodes, others = divmod(gpus, node)
        full = f"{nodes} node{'s'[: nodes > 1]} of {node}"
        say(f"note: {gpus} GPUs are {full} and {others} GPU{'s'[: others > 1]} of another")
    chosen = {"gpus": gpus, "top": top, "stack": setup.stack.name, "seq_len": setup.job.seq_len}
    inputs = flags.given() | chosen | {"constraints": allowed.given()}

    def found(count: int) -> SearchResult:
        """Of all precisions together: those that nothing fits in give none of the plans."""
        results, none = [], []
        with progress() as show:
            for of in setups:
                try:
                    result = search(
                        of.job,
                        gpus,
                        of.costs(),
                        constraints=constraints,
                        top=count,
                        budget_s=budget_s,
                        progress=show,
                        processes=processes,
                    )
                except NoPlan as no:
                    none.append(no)
                    result = SearchResult(
                        space=no.space, plans=(), optimal=True, replayed=0, search_s=0.0
                    )
                results.append(result)
        if len(none) == len(setups):
            raise none[0]
        return together(results, count)

    if explain:
        from parsim.cli.plan_explain import explain_plan

        if not explain_plan(setup, explain, gpus, lambda: found(1).plans[0], inputs, as_json=as_json):
            raise typer.Exit(1)
        return
    try:
        result = found(max(top, LEAST_LOOKED_AT))
    except NoPlan as no:
        asked = Question(job=setup.job, gpus=gpus, costs=setup.costs(), constraints=constraints)
        with progress() as show:
            error = explained(asked, no, show)
        if as_json and isinstance(error, NoPlan):
            answer = {"space": asdict(no.space), "optimal": True, "plans": [], "why": str(error)}
            print_json(document("plan", inputs, answer))
        raise error from no
    advice = _advice(result, setup)
    whole = document("plan", inputs, to_data(result, setup.origin, advice, show=top))
    if as_json:
        print_json(whole)
    else:
        name, where = setup.job.model.name, setup.origin["hardware"]
        several = len(setups) > 1
        print_result(result, name, where, gpus, advice, show=top, several_precisions=several)
    write_report(report, whole)


def _setups(flags: Flags) -> list[Setup]:
    """What to work on, in each of the precisions."""
    from parsim.errors import ParsimError

    if flags.precision is None:
        return [load_setup(flags)]
    parts = dict.fromkeys(part.strip().lower() for part in flags.precision.split(","))
    if "" in parts:
        raise ParsimError(
            "a dtype is missing", where="--precision", got=flags.precision, expected="bf16,fp8"
        )
    return [load_setup(replace(flags, precision=part)) for part in parts]


def _advice(result: SearchResult, setup: Setup) -> Recommendation | None:
    """Which of the fastest plans to take; nothing where the user interrupts."""
    from parsim.search.robust import MOST_LOOKED_AT, recommend

    try:
        with progress() as report:
            return recommend(result.plans[:MOST_LOOKED_AT], setup.costs(), report)
    except KeyboardInterrupt:
        say("interrupted: whether plans tie is not said")
        return None


def to_data(
    result: SearchResult,
    origin: dict[str, Any],
    advice: Recommendation | None = None,
    *,
    show: int | None = None,
) -> dict[str, Any]:
    """The answer of `plan --json`: the first `show` plans, and the one to take among the fastest."""
    items = [plan.to_item() | origin for plan in result.plans]
    data: dict[str, Any] = {
        "space": asdict(result.space),
        "optimal": result.optimal,
        "replayed": result.replayed,
        "search_s": result.search_s,
    }
    if advice is not None:
        standings = [standing.to_data() for standing in advice.standings]
        items[: len(standings)] = [a | b for a, b in zip(items, standings, strict=False)]
        item = items[advice.index]
        data["recommended"] = {"index": advice.index, "reason": advice.reason, "item": item}
    return data | {"plans": items[:show]}


def print_result(
    result: SearchResult,
    model: str,
    hardware: str,
    gpus: int,
    advice: Recommendation | None = None,
    *,
    show: int | None = None,
    several_precisions: bool = False,
) -> None:
    """The ranking as a table (its first `show` plans), and what became of the other plans."""
    from parsim.plan import recompute_text
    from parsim.units import format_bytes, format_duration

    rows = []
    more = _more_columns(result.plans[:show], several_precisions=several_precisions)
    for rank, p in enumerate(result.plans[:show], start=1):
        plan = p.plan
        share = {key: seconds / p.step_time_s for key, seconds in p.breakdown_s.items()}
        exposed = sum(part for key, part in share.items() if key.endswith("_exposed"))
        sizes = (rank, plan.dp, plan.tp, plan.pp, plan.cp, plan.ep, plan.vpp, plan.micro_batch)
        rows.append([
            *map(str, sizes), plan.schedule, str(plan.zero), "yes" if plan.sequence_parallel else "no",
            recompute_text(p.job.model, plan), *(text(p) for text in more.values()),
            format_duration(p.step_time_s), f"{p.mfu:.1%}", f"{share['bubble']:.1%}", f"{exposed:.1%}",
            format_bytes(p.memory.peak), _at_worst(rank - 1, advice), _why_slower(p, result.plans[0]),
        ])  # fmt: skip
    headers = ["", "dp", "tp", "pp", "cp", "ep", "vpp", "mb", "schedule", "zero", "sp", "recompute",
               *more, "step", "MFU", "bubble", "comm", "memory", "at worst",
               "why not first"]  # fmt: skip
    same = {i: rows[0][i] for i in SIZES if len(rows) > 1 and len({row[i] for row in rows}) == 1}
    title = f"{model} on {gpus} × {hardware}"
    if same:
        title += f"; all plans: {', '.join(f'{headers[i]} {value}' for i, value in same.items())}"
    shown = [i for i in range(len(headers)) if i not in same]
    print_table([headers[i] for i in shown], [[row[i] for i in shown] for row in rows], title=title)
    space = result.space
    lines = [
        f"{space.enumerated:,} plans: {space.fits:,} fit, {space.enumerated - space.fits:,} rejected; "
        f"{result.replayed} replayed in {result.search_s:.1f} s",
        "proven: no other plan of this space is faster under this model"
        if result.optimal
        else "not proven: the search stopped before every plan was ruled out",
    ]
    lines += [f"  {count:>8,}  {reason}" for reason, count in space.rejected.items()]
    lines += [
        f"{plan.plan.short()}: {'; '.join(plan.stale_weights())}"
        for plan in result.plans[:show]
        if plan.stale_weights()
    ]
    low, high = (format_duration(s) for s in result.plans[0].interval_s)
    lines.append(f"step time of the best plan: 90% interval {low} to {high}")
    if advice is not None:
        lines.append(advice.reason)
    if advice is not None and show is not None and advice.index >= show:
        lines.append(f"plan {advice.index + 1}: {result.plans[advice.index].plan.short()}")
    print_lines(lines)


def _at_worst(index: int, advice: Recommendation | None) -> str:
    """Step time of a plan that ties with the fastest in its worst case; an arrow at the one to take."""
    from parsim.units import format_duration

    if advice is None or index >= len(advice.standings) or not advice.standings[index].tied:
        return ""
    arrow = " ←" if index == advice.index else ""
    return format_duration(advice.standings[index].worst[1]) + arrow


def _more_columns(
    plans: Sequence[Prediction], *, several_precisions: bool
) -> dict[str, Callable[[Prediction], str]]:
    """Columns, with their texts, that say something only in some spaces."""
    from parsim.plan import USUAL_PLACEMENT

    more: dict[str, Callable[[Prediction], str]] = {}
    if several_precisions:
        more["precision"] = lambda p: p.job.precision
    if len({p.plan.tp_overlap for p in plans if p.plan.tp > 1}) > 1:
        more["tp overlap"] = lambda p: "yes" if p.plan.tp_overlap else "no"
    if any(p.plan.placement != USUAL_PLACEMENT for p in plans):
        more["placement"] = lambda p: p.plan.placement
    return more


def _why_slower(prediction: Prediction, best: Prediction) -> str:
    """The part of the step that costs a plan most against the best one."""
    from parsim.units import format_duration

    if prediction is best:
        return ""
    more = {key: s - best.breakdown_s.get(key, 0.0) for key, s in prediction.breakdown_s.items()}
    key = max(more, key=lambda k: more[k])
    return f"{key} +{format_duration(more[key])}" if more[key] > 0 else ""
