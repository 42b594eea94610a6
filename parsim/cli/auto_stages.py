"""`stage_split=auto` and `recompute_layers=auto` in a plan's short form: what was chosen, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from parsim.cli.output import Section
from parsim.settings_text import numbers_text

if TYPE_CHECKING:
    from parsim.search.partition.chosen import Loads, Partitioned


def stages_section(chosen: Partitioned | None) -> Section:
    """What was chosen; nothing where nothing was to be."""
    item = {"partition": _to_data(chosen)} if chosen is not None else {}
    return Section(item=item, lines=stage_lines(chosen))


def stage_lines(chosen: Partitioned | None) -> list[str]:
    """What was chosen and why, for reading; nothing where nothing was to be."""
    if chosen is None:
        return []
    lines = []
    if chosen.split:
        lines.append(f"  stage_split   {_layers(chosen)}")
    if chosen.counts:
        lines.append(f"  recomputed    {_recomputed(chosen)}")
    return [*lines, f"                {_why(chosen)}"]


def _layers(chosen: Partitioned) -> str:
    plan, before, after = chosen.plan, chosen.before, chosen.after
    if plan.pp == 1:
        return f"{after.layers[0]}: without a pipeline there is one stage"
    if plan.num_stages > plan.pp:
        return f"{numbers_text(after.layers)}, the usual: a rank's chunks share its memory"
    if before.layers == after.layers:
        return f"{numbers_text(after.layers)}, the usual: none is faster that fits"
    return f"{numbers_text(after.layers)} instead of {numbers_text(before.layers)}"


def _recomputed(chosen: Partitioned) -> str:
    before, after = chosen.before, chosen.after
    if not after.fits:
        return f"{numbers_text(after.recomputed)} by stage"
    if not any(after.recomputed):
        return "no layer: all fit without"
    of = numbers_text(before.layers)
    return f"{numbers_text(after.recomputed)} by stage, the fewest that fit, of {of}"


def _why(chosen: Partitioned) -> str:
    from parsim.units import format_bytes

    before, after = chosen.before, chosen.after
    full = after.ranks[after.fullest]
    room = f"{format_bytes(full.num_bytes)} of {format_bytes(full.limit_bytes)}"
    if not after.fits:
        return f"nothing fits: at the least rank {after.fullest} needs {room}"
    if not before.fits:
        lacking = before.ranks[before.fullest]
        was = (
            f"rank {before.fullest} was too full, {format_bytes(lacking.num_bytes)} of "
            f"{format_bytes(lacking.limit_bytes)}"
        )
    else:
        was = f"rank {before.slowest} was slowest, {_pace(before)}"
    if before.ranks == after.ranks:
        return f"rank {after.slowest} is slowest, {_pace(after)}; rank {after.fullest} fullest, {room}"
    return (
        f"{was}; now rank {after.slowest} is slowest, {_pace(after)}, and rank {after.fullest} fullest, "
        f"{room}"
    )


def _pace(loads: Loads) -> str:
    from parsim.units import format_duration

    return f"{format_duration(loads.ranks[loads.slowest].seconds)} a micro-batch"


def _to_data(chosen: Partitioned) -> dict[str, Any]:
    auto = {"stage_split": chosen.split, "recompute_layers": chosen.counts}
    return {
        "auto": [key for key, asked in auto.items() if asked],
        "before": _loads_data(chosen.before),
        "after": _loads_data(chosen.after),
        "why": _why(chosen),
    }


def _loads_data(loads: Loads) -> dict[str, Any]:
    return {
        "stage_layers": list(loads.layers),
        "recomputed_layers": list(loads.recomputed),
        "slowest_rank": loads.slowest,
        "fullest_rank": loads.fullest,
        "rank_s": [load.seconds for load in loads.ranks],
        "rank_bytes": [load.num_bytes for load in loads.ranks],
        "fits": loads.fits,
    }
