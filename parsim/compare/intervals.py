"""How wide a 90% interval must be, from errors on rows that a fit had not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

COVERAGE = 0.9
"""Share of measured times that lie in the interval of their prediction."""
REPEATS = 0.05
"""No interval is narrower: repeats of one run differ by as much (4.6% in BLOOM's trials, 5% between
releases in Megatron-Bridge's tables)."""
FEWEST = 9
"""Of fewer errors not even the largest bounds nine in ten of the next ones."""
FEW_ROWS = 0.10
"""The least half width from so few."""
FEWEST_PLAIN = 4


def half_width(errors: Sequence[float]) -> float:
    """Half width of the interval of log(measured / predicted), two digits, from errors on unseen rows.

    The ceil((n + 1) · 0.9)-th smallest of n sizes holds the next row, drawn like these, with a
    probability of at least 0.9; a table too short for that gives its largest, and FEW_ROWS at least.

    Source: Lei et al. 2018, "Distribution-free predictive inference for regression", section 2.2
    (split conformal prediction), arXiv 1604.04173.

    >>> half_width([0.2, -0.05, 0.02]), half_width([0.01] * 20)
    (0.18, 0.05)
    """
    sizes = sorted(abs(math.log1p(error)) for error in errors)
    place = min(len(sizes), math.ceil((len(sizes) + 1) * COVERAGE))
    least = REPEATS if len(sizes) >= FEWEST else FEW_ROWS
    return max(least, float(f"{sizes[place - 1]:.2g}"))


def base_half_width(errors: Sequence[float], leans: Sequence[bool]) -> float:
    """The half width from rows that lean on nothing that widens their interval of itself; from all rows
    where fewer than FEWEST_PLAIN do not.
    """
    plain = [error for error, lean in zip(errors, leans, strict=True) if not lean]
    return half_width(plain if len(plain) >= FEWEST_PLAIN else errors)
