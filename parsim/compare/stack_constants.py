"""The constants of a Stack that measured runs may move, and which of them given rows can tell of."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from scipy.linalg import qr

from parsim.compare.measured_steps import MeasuredStep, QuickSteps
from parsim.errors import ParsimError, did_you_mean
from parsim.stack import Stack

Bounds = Mapping[str, tuple[float, float]]
"""Least and greatest plausible value of each constant that is fitted."""

BOUNDS: Bounds = {
    "gemm_slowdown": (0.9, 1.6),
    "attention_slowdown": (0.8, 3.0),
    "attention_max_flops_per_s": (5e13, 1e15),
    "memory_bound_slowdown": (0.8, 3.0),
    "layer_host_s": (0.0, 3e-3),
    "layer_lead_s": (0.0, 1e-3),
    "narrow_host_s": (0.0, 2e-3),
    "ring_host_s": (0.0, 3e-3),
    "action_host_s": (0.0, 2e-3),
    "step_overhead_s": (0.0, 2.0),
    "collective_overhead_s": (0.0, 6e-4),
    "overlap_cost": (0.0, 1.0),
    "dp_slowdown": (0.8, 3.0),
    "zero_broadcast_s": (0.0, 1e-2),
    "dp_overlap_cost": (0.0, 1.0),
    "fp8_row_slowdown": (1.0, 3.0),
    "routed_slowdown": (0.8, 4.0),
    "moe_host_s": (0.0, 1e-2),
    "ep_slowdown": (0.8, 3.0),
}
"""Kernels hardly faster than bare ones, and host times of the frameworks' order. Memory-bound kernels
may be: what profiles know of them is the traffic of GEMMs."""

TYPICAL: Mapping[str, float] = {
    "gemm_slowdown": 1.05,
    "attention_slowdown": 1.1,
    "attention_max_flops_per_s": 4e14,
    "memory_bound_slowdown": 1.1,
    "layer_host_s": 5e-4,
    "layer_lead_s": 1e-4,
    "narrow_host_s": 5e-4,
    "ring_host_s": 1e-3,
    "action_host_s": 2e-4,
    "step_overhead_s": 0.02,
    "collective_overhead_s": 1e-5,
    "overlap_cost": 0.2,
    "dp_slowdown": 1.1,
    "zero_broadcast_s": 3e-3,
    "dp_overlap_cost": 0.2,
    "fp8_row_slowdown": 1.3,
    "routed_slowdown": 1.3,
    "moe_host_s": 5e-4,
    "ep_slowdown": 1.3,
}
"""What is expected of a framework before any of its runs is seen; fits afresh start here."""

OFF_AT_ZERO = ("attention_max_flops_per_s", "layer_lead_s", "zero_broadcast_s")
"""Constants of effects that only some stacks have; 0 says that this one has not."""

MOST_CONSTANTS = 10
ROWS_A_CONSTANT = 3
"""Fewer rows than this for each constant would fit noise."""
LEAST_EFFECT = 0.005
"""A constant is left alone where half of its range moves step times by less than this, beyond what the
constants chosen before it can imitate (root mean square over rows)."""


def afresh(stack: Stack, bounds: Bounds = BOUNDS) -> Stack:
    """The stack with typical values in place of constants that may have been fitted before."""
    changes: dict[str, Any] = {
        name: TYPICAL[name]
        for name in bounds
        if name in TYPICAL and (getattr(stack, name) or name not in OFF_AT_ZERO)
    }
    return replace(stack, **changes)


def named_in(source: str) -> Bounds:
    """Bounds of the constants that a stack's source says were fitted (or chosen) to runs: those named in
    such a clause of it.

    >>> list(named_in("dp_slowdown as in nemo; gemm_slowdown, layer_host_s fitted to 8 runs"))
    ['gemm_slowdown', 'layer_host_s']
    """
    clauses = [text for text in source.split(";") if re.search(r"\b(fitted|chosen)\b", text)]
    return {
        name: bound
        for name, bound in BOUNDS.items()
        if any(re.search(rf"\b{name}\b", clause) for clause in clauses)
    }


def check_bounds(stack: Stack, bounds: Bounds) -> None:
    """Raises ParsimError for a constant that stacks do not have, or bounds that are none."""
    known = [field.name for field in fields(stack)]
    for name, (low, high) in bounds.items():
        if name not in known:
            raise ParsimError("a stack has no such constant", where=name, hint=did_you_mean(name, known))
        if not low < high:
            raise ParsimError("bounds are low and high", where=name, got=(low, high))


def bounds_of(names: Sequence[str]) -> Bounds:
    """The usual bounds of named constants; raises ParsimError for one that is not fitted."""
    for name in names:
        if name not in BOUNDS:
            raise ParsimError(
                f"{name!r} is no constant that runs are fitted with",
                expected=", ".join(BOUNDS),
                hint=did_you_mean(name, BOUNDS),
            )
    return {name: BOUNDS[name] for name in names}


def told_by(steps: Sequence[MeasuredStep], stack: Stack, quick: QuickSteps) -> Bounds:
    """Bounds of the constants that these runs can tell of, the most telling first.

    Each constant's effect is the change of all log step times over half of its range. QR with column
    pivoting takes the largest effect first and then the one that the chosen explain least, so that of
    two constants which move all rows alike only one is fitted.

    Source: Golub and Van Loan, Matrix Computations, 4th ed., section 5.5.6 (subset selection).
    """
    names = [name for name in BOUNDS if getattr(stack, name) or name not in OFF_AT_ZERO]
    paths = quick.paths(steps, stack)
    effects = np.array(
        [
            [math.log(s / path) for s, path in zip(quick.along(steps, paths, moved), paths, strict=True)]
            for moved in (_moved(stack, name) for name in names)
        ]
    ).T
    _, triangle, order = qr(effects, mode="economic", pivoting=True)
    beyond = np.abs(np.diag(triangle)) / math.sqrt(len(steps))
    most = min(MOST_CONSTANTS, max(1, len(steps) // ROWS_A_CONSTANT))
    chosen = [names[i] for i, effect in zip(order, beyond, strict=False) if effect > LEAST_EFFECT]
    return {name: BOUNDS[name] for name in chosen[:most]}


def _moved(stack: Stack, name: str) -> Stack:
    """The stack with one constant moved by half of its range, to where there is room."""
    low, high = BOUNDS[name]
    start = min(max(getattr(stack, name), low), high)
    half = (high - low) / 2
    changes: dict[str, Any] = {name: start + half if start < low + half else start - half}
    return replace(stack, **changes)
