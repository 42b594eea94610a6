"""`parsim plan --explain`: why a plan is not the best."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from parsim.cli.output import document, print_json, print_lines, print_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from parsim.cli.options import Setup
    from parsim.search.explain import Explanation
    from parsim.simulate.prediction import Prediction


def explain_plan(
    setup: Setup,
    text: str,
    gpus: int,
    best_plan: Callable[[], Prediction],
    inputs: dict[str, Any],
    *,
    as_json: bool,
) -> bool:
    """Print what speaks against a plan; `best_plan` is asked for only where the plan fits. Returns
    whether it does.
    """
    from parsim.search.explain import explain

    plan = _read(text, gpus, setup)
    explanation = explain(setup.job, plan, setup.costs())
    best = best_plan() if explanation.prediction is not None else None
    if as_json:
        print_json(document("plan", inputs, {"explain": to_data(explanation, best)}))
    else:
        _print(explanation, best, setup)
    return explanation.verdict == "fits"


def _read(text: str, gpus: int, setup: Setup) -> Any:
    from dataclasses import replace

    from parsim.errors import ParsimError
    from parsim.plan import parse_plan

    plan = parse_plan(text)
    if plan.gpus != gpus:
        raise ParsimError(
            "the plan to explain is for another number of GPUs",
            where="--explain",
            got=f"dp·tp·pp·cp = {plan.gpus}",
            expected=f"--gpus {gpus}",
        )
    if "tp_overlap" not in text:
        plan = replace(plan, tp_overlap=plan.tp > 1 and setup.stack.default_tp_overlap)
    return plan


def to_data(explanation: Explanation, best: Prediction | None) -> dict[str, Any]:
    """The `explain` table of `plan --json`."""
    prediction = explanation.prediction
    return {
        "plan": asdict(explanation.plan),
        "verdict": explanation.verdict,
        "problems": [str(problem) for problem in explanation.problems],
        "memory_bytes": dict(explanation.memory_items()),
        "over_bytes": explanation.over_bytes,
        "step_time_s": prediction.step_time_s if prediction else None,
        "best": best.to_item() if best else None,
        "slower_by_s": dict(explanation.slower_by_s(best)) if best else {},
    }


def _print(explanation: Explanation, best: Prediction | None, setup: Setup) -> None:
    from parsim.units import format_bytes, format_duration

    name, device = explanation.plan.short(), setup.cluster.device
    if explanation.problems:
        print_lines([f"{name} is illegal:", *(f"  {problem}" for problem in explanation.problems)])
        return
    if best is None or explanation.prediction is None:
        rows = [[key, format_bytes(size)] for key, size in explanation.memory_items()]
        rows.append(["outside the allocator", format_bytes(setup.stack.context_bytes)])
        over, most = format_bytes(explanation.over_bytes), format_bytes(device.memory_bytes)
        print_table(["on the fullest rank", ""], rows)
        largest = explanation.memory_items()[0][0]
        print_lines([
            f"{name} does not fit: it needs {over} more than the {most} of {device.name}; most of all "
            f"for {largest}"
        ])  # fmt: skip
        return
    mine, theirs = explanation.prediction, best
    rows = [
        [
            key,
            format_duration(mine.breakdown_s.get(key, 0.0)),
            format_duration(theirs.breakdown_s.get(key, 0.0)),
            ("+" if more > 0 else "−") + format_duration(abs(more)) if more else "",
        ]
        for key, more in explanation.slower_by_s(best)
    ]
    rows.append(["step", format_duration(mine.step_time_s), format_duration(theirs.step_time_s), ""])
    print_table(["", "this plan", "the best", ""], rows, title=f"{name} against {theirs.plan.short()}")
    more_s = mine.step_time_s - theirs.step_time_s
    key, by_s = explanation.slower_by_s(best)[0]
    print_lines([
        f"slower by {format_duration(more_s)} ({more_s / theirs.step_time_s:.1%}), most of all by "
        f"{key} (+{format_duration(by_s)})"
        if more_s > 0
        else "nothing in the space is faster"
    ])  # fmt: skip
