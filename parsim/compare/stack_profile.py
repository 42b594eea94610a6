"""A Stack as the text of its TOML file."""

from __future__ import annotations

import dataclasses
import json

from parsim.stack import Stack


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
