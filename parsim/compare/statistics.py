"""Statistics of prediction errors: error = predicted / measured - 1, as a fraction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How far off the predictions of some rows are; the figures are None where no row has an error."""

    rows: int
    ok: int
    """Rows that were predicted."""
    mape: float | None = None
    """Mean of |error|."""
    median_ape: float | None = None
    p90_ape: float | None = None
    """90th percentile of |error|, between the two nearest rows."""
    bias: float | None = None
    """Mean of the signed error: above 0 where parsim predicts too long a time."""

    def to_data(self) -> dict[str, Any]:
        return asdict(self)


def summarize(errors: Sequence[float | None]) -> Summary:
    """The summary of rows, of which those that were not predicted have no error.

    >>> summary = summarize([0.1, -0.3, None])
    >>> summary.rows, summary.ok, round(summary.mape, 12), round(summary.bias, 12)
    (3, 2, 0.2, -0.1)
    """
    known = np.array([error for error in errors if error is not None])
    if known.size == 0:
        return Summary(rows=len(errors), ok=0)
    sizes = np.abs(known)
    return Summary(
        rows=len(errors),
        ok=int(known.size),
        mape=float(sizes.mean()),
        median_ape=float(np.median(sizes)),
        p90_ape=float(np.percentile(sizes, 90)),
        bias=float(known.mean()),
    )
