"""A Stack as the text of its TOML file."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from parsim.stack import Stack

if TYPE_CHECKING:
    from parsim.compare.stack_fit import StackFit

_FITTED = "; fitted: "
"""What stands before it in a source tells where the settings come from."""


def stack_toml(stack: Stack) -> str:
    """One line a field, those that hold their default left out; the same stack gives the same text.

    >>> print(stack_toml(Stack(name="plain", description="", source="none", gemm_slowdown=1.1)), end="")
    name = "plain"
    description = ""
    source = "none"
    gemm_slowdown = 1.1
    """
    lines = []
    for field in dataclasses.fields(stack):
        value = getattr(stack, field.name)
        if value == field.default:
            continue
        text = json.dumps(value, ensure_ascii=False) if not isinstance(value, float) else repr(value)
        lines.append(f"{field.name} = {text}")
    return "\n".join(lines) + "\n"


def fitted_source(found: StackFit, table: str) -> Stack:
    """The fitted stack with a `source` that says which constants were fitted to which rows of a table,
    and the error on rows left out.
    """
    settings = found.stack.source.split(_FITTED)[0]
    names = ", ".join(constant.name for constant in found.constants) or "nothing"
    rows = [row.id for row in found.rows]
    text = f"{names} to {len(rows)} runs of {table} ({rows[0]} to {rows[-1]})"
    if found.fitted.mape is not None:
        text += f", mean error {found.fitted.mape:.1%}"
    held_out = found.held_out
    if found.tested is not None and held_out is not None and held_out.mape is not None:
        text += (
            f"; left out {held_out.mape:.1%} mean, {held_out.p90_ape:.1%} p90 "
            f"({found.tested.groups} groups: {found.tested.by})"
        )
    else:
        text += "; not tested on other rows"
    return dataclasses.replace(found.stack, source=settings + _FITTED + text)
