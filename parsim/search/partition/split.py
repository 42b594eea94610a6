"""The fastest split of layers into the stages of a pipeline: exact dynamic programming.

A pipeline takes max P + Σ T: T is the forward and backward of one micro-batch on a stage, and P what the
other micro-batches add at the slowest stage. With P = (m − 1)·T that is the makespan of a permutation
flow shop, as GPipe is one, and of 1F1B on equal stages (Narayanan et al. 2021, arXiv 2104.04473, section
2.2.1; DAPPLE, Fan et al. 2021, arXiv 2007.01045, section 4, adds up the same phases). Without a flush
max T alone counts (PipeDream, Narayanan et al. 2019, section 3.1).

max P alone splits into subproblems, and so does Σ T; their sum does not. But of all splits whose largest
P is under a cap, one has the least Σ T. So caps are searched, down from where no Σ T could make up for
them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SAME = 1e-12
"""Relative difference below which two times are the same one, added up in another order."""
EVENNESS = 1e-7
"""What unevenness weighs beside time: it decides between splits that take equally long, no others."""


class Split(NamedTuple):
    """Layers in stages."""

    layers: tuple[int, ...]
    """Of every stage in order."""
    slowest: float
    """The largest of the stages' first figures."""
    total: float
    """The sum of their second ones."""

    @property
    def value(self) -> float:
        """What is to be small."""
        return self.slowest + self.total


def best_split(slowest: Floats, added: Floats) -> Split | None:
    """The split of L layers into S stages with the least max(slowest) + Σ added; None where none is
    finite.

    Both are (S, L + 1, C + 1), and none negative: the figures of stage s with `count` layers from
    `first` on are at [s, first, count], infinite where it cannot hold them. No stage gets more than C
    layers.

    Exact to EVENNESS. Of splits that are as good it is the most even one, of these one with more layers
    on earlier stages: gradients come back through them last.

    >>> layers, seconds = np.array([3.0, 1.0, 1.0, 1.0, 1.0]), np.full((2, 6, 6), np.inf)
    >>> for first in range(6):
    ...     for count in range(1, 6 - first):
    ...         seconds[:, first, count] = layers[first : first + count].sum()
    >>> best_split(7 * seconds, seconds)
    Split(layers=(2, 3), slowest=28.0, total=7.0)
    """
    fastest = least_slowest(slowest)
    if fastest is None:
        return None
    finite = slowest < np.inf
    scale = fastest.slowest + float(_along(added, fastest.layers).sum())
    weighed = np.where(finite, added, 0.0) + EVENNESS * scale * _unevenness(added.shape)

    def under(cap: float) -> tuple[Split, float]:
        """The split with the least sum under a cap, and that sum with its unevenness."""
        layers = _path(np.where(finite & (slowest <= cap * (1 + SAME)), weighed, np.inf), np.add)
        assert layers is not None
        return split_of(slowest, added, layers), float(_along(weighed, layers).sum())

    best, weighed_sum = under(fastest.slowest)
    best_value, cap = best.slowest + weighed_sum, np.inf
    while cap > fastest.slowest + EVENNESS * scale:
        found, weighed_sum = under(cap)
        if found.slowest + weighed_sum < best_value:
            best, best_value = found, found.slowest + weighed_sum
        # What is better still is under this one's largest figure, with a sum that is no less.
        cap = min(found.slowest - EVENNESS * scale, best_value - weighed_sum)
    return best


def _unevenness(shape: tuple[int, ...]) -> Floats:
    """(S, 1, C + 1): squares of the shares of all layers, and a little for those on later stages."""
    stages, sizes, counts = shape
    part = np.arange(counts) / max(1, sizes - 1)
    late = np.arange(stages)[:, None, None] / stages
    uneven: Floats = part * (part + 0.01 * late)
    return uneven


def least_slowest(figures: Floats) -> Split | None:
    """The split whose largest stage is smallest, of figures as in `best_split`; None where none is
    finite.

    Linear partition by dynamic programming: PipeDream, Narayanan et al. 2019, section 3.1.
    """
    layers = _path(figures, np.maximum)
    return None if layers is None else split_of(figures, figures, layers)


def split_of(slowest: Floats, added: Floats, layers: tuple[int, ...]) -> Split:
    """A split with its figures, of tables as in `best_split`."""
    return Split(layers, float(_along(slowest, layers).max()), float(_along(added, layers).sum()))


def _along(figures: Floats, layers: tuple[int, ...]) -> Floats:
    """(S,): the figures of the stages of a split."""
    first = np.cumsum([0, *layers[:-1]])
    along: Floats = figures[np.arange(len(layers)), first, layers]
    return along


def _path(figures: Floats, together: np.ufunc) -> tuple[int, ...] | None:
    """The split with the least figures, sums of stages or their maximum; None where none is finite.

    From the last stage to the first: the least of the stages from s on, by the layer they begin with.
    """
    stages, sizes, counts = figures.shape
    rest = np.full(sizes - 1 + counts, np.inf)
    rest[sizes - 1] = 0.0
    after = sliding_window_view(rest, counts)  # [first, count] is the rest behind those layers
    choices = np.empty((stages, sizes), int)
    rows = np.arange(sizes)
    for s in range(stages - 1, -1, -1):
        candidates = together(figures[s], after)
        choices[s] = candidates.argmin(axis=1)
        rest[:sizes] = candidates[rows, choices[s]]
    if not np.isfinite(rest[0]):
        return None
    layers, first = [], 0
    for chosen in choices:
        layers.append(int(chosen[first]))
        first += layers[-1]
    return tuple(layers)
