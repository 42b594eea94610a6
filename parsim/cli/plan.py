"""`parsim plan`: which split is best, and how long a step takes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parsim.cli.constraints import Allowed, with_constraints
from parsim.cli.options import (
    Flags,
    GlobalBatchOption,
    HardwareOption,
    InterNodeOption,
    IntraNodeOption,
    JsonOption,
    MemoryOption,
    ModelOption,
    PrecisionOption,
    SeqLenOption,
    StackOption,
    load_setup,
)
from parsim.cli.output import document, print_json, print_lines, print_table, progress

if TYPE_CHECKING:
    from parsim.search.search import SearchResult
    from parsim.simulate.prediction import Prediction


@with_constraints
def plan(
    gpus: Annotated[int, typer.Option("--gpus", help="GPUs to use, all of them.")],
    model: ModelOption = None,
    hardware: HardwareOption = None,
    global_batch: GlobalBatchOption = None,
    seq_len: SeqLenOption = None,
    stack: StackOption = None,
    precision: PrecisionOption = None,
    inter_node: InterNodeOption = None,
    intra_node: IntraNodeOption = None,
    memory: MemoryOption = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Plans to print.")] = 10,
    *,
    allowed: Allowed,
    explain: Annotated[
        str, typer.Option("--explain", help="Why is this plan not the best? In short form: dp=8,tp=4,…")
    ] = "",
    budget_s: Annotated[
        float, typer.Option("--budget-s", min=0, help="Stop proving after so many seconds.")
    ] = 60.0,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="Of a large search [default: one a core].")
    ] = None,
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
    from parsim.search.search import NoPlan, search

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
    setup = load_setup(flags)
    constraints = allowed.constraints()
    chosen = {"gpus": gpus, "top": top, "stack": setup.stack.name, "seq_len": setup.job.seq_len}
    inputs = flags.given() | chosen | {"constraints": allowed.given()}

    def found(count: int) -> SearchResult:
        with progress() as report:
            return search(
                setup.job,
                gpus,
                setup.costs(),
                constraints=constraints,
                top=count,
                budget_s=budget_s,
                progress=report,
                processes=processes,
            )

    if explain:
        from parsim.cli.plan_explain import explain_plan

        if not explain_plan(setup, explain, gpus, lambda: found(1).plans[0], inputs, as_json=as_json):
            raise typer.Exit(1)
        return
    try:
        result = found(top)
    except NoPlan as no:
        asked = Question(job=setup.job, gpus=gpus, costs=setup.costs(), constraints=constraints)
        with progress() as report:
            error = explained(asked, no, report)
        if as_json and isinstance(error, NoPlan):
            answer = {"space": asdict(no.space), "optimal": True, "plans": [], "why": str(error)}
            print_json(document("plan", inputs, answer))
        raise error from no
    if as_json:
        print_json(document("plan", inputs, to_data(result, setup.origin)))
    else:
        print_result(result, setup.job.model.name, setup.origin["hardware"], gpus)


def to_data(result: SearchResult, origin: dict[str, Any]) -> dict[str, Any]:
    """The answer of `plan --json`."""
    return {
        "space": asdict(result.space),
        "optimal": result.optimal,
        "replayed": result.replayed,
        "search_s": result.search_s,
        "plans": [p.to_item() | origin for p in result.plans],
    }


def print_result(
    result: SearchResult, model: str, hardware: str, gpus: int, *, show: int | None = None
) -> None:
    """The ranking as a table (its first `show` plans), and what became of the other plans."""
    from parsim.plan import recompute_text
    from parsim.units import format_bytes, format_duration

    rows = []
    for rank, p in enumerate(result.plans[:show], start=1):
        plan = p.plan
        share = {key: seconds / p.step_time_s for key, seconds in p.breakdown_s.items()}
        exposed = sum(part for key, part in share.items() if key.endswith("_exposed"))
        sizes = (rank, plan.dp, plan.tp, plan.pp, plan.cp, plan.ep, plan.vpp, plan.micro_batch)
        rows.append([
            *map(str, sizes), plan.schedule, str(plan.zero), "yes" if plan.sequence_parallel else "no",
            recompute_text(p.job.model, plan),
            format_duration(p.step_time_s), f"{p.mfu:.1%}", f"{share['bubble']:.1%}", f"{exposed:.1%}",
            format_bytes(p.memory.peak), _why_slower(p, result.plans[0]),
        ])  # fmt: skip
    headers = ["", "dp", "tp", "pp", "cp", "ep", "vpp", "mb", "schedule", "zero", "sp", "recompute",
               "step", "MFU", "bubble", "comm", "memory", "why not first"]  # fmt: skip
    print_table(headers, rows, title=f"{model} on {gpus} × {hardware}")
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
    lines.append(f"step time of the best plan: 90 % interval {low} to {high}")
    print_lines(lines)


def _why_slower(prediction: Prediction, best: Prediction) -> str:
    """The part of the step that costs a plan most against the best one."""
    from parsim.units import format_duration

    if prediction is best:
        return ""
    more = {key: s - best.breakdown_s.get(key, 0.0) for key, s in prediction.breakdown_s.items()}
    key = max(more, key=lambda k: more[k])
    return f"{key} +{format_duration(more[key])}" if more[key] > 0 else ""
