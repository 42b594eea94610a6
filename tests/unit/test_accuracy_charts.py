"""Charts of errors over size and of ranked plans."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from parsim.charts.accuracy import errors_figure, ranking_figure
from parsim.errors import ParsimError


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def test_errors_over_size_keep_far_points_at_the_edge() -> None:
    rows = [("A100", 10.0**i, ratio) for i, ratio in enumerate((1.0, 0.9, 1.1, 5.0, 1.0))]
    figure = errors_figure(rows, title="t", sizes="bytes", size_text=str)
    assert any("1 beyond the edge" in text for text in texts(figure))
    highest = max(y for c in figure.axes[0].collections for _, y in np.asarray(c.get_offsets()))
    assert highest == 2.0
    assert figure.axes[0].get_ylim()[1] > 2.0


def test_ranking_tells_regret_of_the_plan_predicted_to_be_fastest() -> None:
    """The first group's choice is best; the second's took half as long again."""
    groups = [[(1.0, 1.0), (2.0, 3.0), (4.0, 2.0)], [(1.5, 1.0), (1.0, 1.2), (3.0, 3.0)]]
    figure = ranking_figure(groups, title="t")
    assert any("2 groups" in text and "mean regret 25%, worst 50%" in text for text in texts(figure))
    bars = [patch for patch in figure.axes[1].patches if isinstance(patch, Rectangle)]
    assert sum(bar.get_height() for bar in bars) == 2


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ParsimError):
        errors_figure([], title="t", sizes="bytes", size_text=str)
    with pytest.raises(ParsimError):
        ranking_figure([], title="t")
