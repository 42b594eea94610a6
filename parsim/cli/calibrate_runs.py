"""`parsim calibrate --runs`: measured runs become the constants of a software stack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from parsim.cli.output import document, print_json, print_lines, progress, say
from parsim.cli.tables import print_table

if TYPE_CHECKING:
    from parsim.compare.stack_fit import StackFit


def calibrate_runs(
    runs: Path,
    stack: str,
    *,
    output: Path | None,
    constants: Sequence[str],
    is_afresh: bool,
    as_json: bool,
) -> None:
    """Fit a stack's constants to a table of runs, report them, and write the stack where asked."""
    from parsim.compare.runs import read_runs
    from parsim.compare.stack_constants import afresh, bounds_of
    from parsim.compare.stack_fit import fit_stack
    from parsim.compare.stack_profile import fitted_source, stack_toml
    from parsim.config import load_stack, write_file

    bounds = bounds_of(constants) if constants else None
    start = load_stack(stack)
    if is_afresh:
        start = afresh(start)
    with progress() as report:
        found = fit_stack(read_runs(runs), start, bounds, progress=report)
    if not found.complete:
        say("interrupted: these are the best constants so far, not tested on left-out models")
    if output is not None:
        write_file(output, stack_toml(fitted_source(found, runs.name)))
        say(f"wrote {output}")
    if as_json:
        inputs = {"runs": str(runs), "stack": stack, "output": output and str(output)}
        print_json(document("calibrate", inputs, found.to_data()))
    else:
        _print(found)


def _print(found: StackFit) -> None:
    from parsim.compare.run_report import summary_line

    rows = [
        [c.name, f"{c.before:g}", f"{c.after:g}", f"{c.low:g} to {c.high:g}",
         "sits on its bound" if c.on_bound else ""]
        for c in found.constants
    ]  # fmt: skip
    print_table(["constant", "before", "after", "plausible", ""], rows, title=found.stack.name)
    lines = [summary_line("fitted rows", found.fitted)]
    if found.tested is not None and found.held_out is not None:
        lines.append(summary_line("the same, left out", found.held_out))
    if found.larger is not None:
        lines.append(summary_line("larger from smaller", found.larger))
    lines.extend(_explained(found))
    print_lines(lines)


def _explained(found: StackFit) -> list[str]:
    lines = []
    if found.tested is not None and found.held_out is not None:
        lines.append(
            f"left out: {found.tested.groups} groups ({found.tested.by}), each predicted by a fit "
            f"that had not seen it"
        )
    else:
        lines.append("no row could be left out: the error on a new model is unknown")
    width = found.stack.relative_error
    lines.append(f"90% interval of a prediction: {_factor(-width)} to {_factor(width)} of it")
    reasons: dict[str, int] = {}
    for row in found.left_out:
        text = f"{row.framework or 'no framework'}: {row.reason}"
        reasons[text] = reasons.get(text, 0) + 1
    lines.extend(f"not fitted, {count} rows: {text}" for text, count in sorted(reasons.items()))
    return lines


def _factor(log_width: float) -> str:
    import math

    return f"{math.exp(log_width):.0%}"
