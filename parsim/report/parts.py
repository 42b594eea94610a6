"""Parts of a page that several commands' reports have."""

from __future__ import annotations

from collections.abc import Mapping

from parsim.report.item import KEYS
from parsim.report.page import Cell, Column, Row, Share, Table
from parsim.search.scaling import TERMS
from parsim.units import format_duration


def comparison_table(
    predicted: Mapping[str, float], measured: Mapping[str, float], *, step_s: float
) -> Table:
    """Predicted and measured parts of a step, and the difference as a share of the measured step."""
    rows = []
    widest = max([*predicted.values(), *measured.values(), 1e-12])
    keys = [key for key in {**TERMS, **measured, **predicted} if predicted.get(key) or measured.get(key)]
    for key in keys:
        theirs, mine = predicted.get(key), measured.get(key, 0.0)
        bars = tuple(
            Share(key=KEYS.get(key, "other"), label=word, share=value / widest)
            for word, value in (("predicted", theirs or 0.0), ("measured", mine))
        )
        difference = None if theirs is None else theirs - mine
        rows.append(
            Row(
                cells=(
                    Cell(text=TERMS.get(key, key), value=key),
                    _seconds(theirs, bars[:1]),
                    _seconds(theirs),
                    _seconds(mine, bars[1:]),
                    _seconds(mine),
                    Cell(
                        text="" if difference is None else f"{difference / step_s:+.1%}",
                        value=difference,
                    ),
                )
            )
        )
    return Table(
        caption="Parts of the step, mean over ranks; the last column is what each adds to the error",
        columns=(
            Column(key="part", title="part"),
            Column(key="p", title="predicted"),
            Column(key="predicted", title="", numeric=True),
            Column(key="m", title="measured"),
            Column(key="measured", title="", numeric=True),
            Column(key="difference", title="of the step", numeric=True),
        ),
        rows=tuple(rows),
        plain=True,
    )


def _seconds(value: float | None, shares: tuple[Share, ...] = ()) -> Cell:
    text = "" if value is None else format_duration(value)
    return Cell(text=text, value=value, shares=shares)


def off_by(error: float) -> str:
    """How far a predicted time is off, in words.

    >>> off_by(0.1), off_by(-0.02), off_by(0.0001)
    ('10.0% too long', '2.0% too short', 'the same')
    """
    if abs(error) < 5e-4:
        return "the same"
    return f"{abs(error):.1%} too {'long' if error > 0 else 'short'}"
