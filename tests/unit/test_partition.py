"""The dynamic program over stages, beside every split and beside integer programming."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from parsim.search.partition.split import EVENNESS, Floats, Split, best_split, least_slowest, split_of

TIMES = st.sampled_from([0.25, 0.5, 1.0, 1.0, 1.0, 1.25, 3.0])


def splits(layers: int, stages: int, least: int = 0) -> list[tuple[int, ...]]:
    """Every split."""
    free = layers - least * stages
    places = combinations(range(free + stages - 1), stages - 1)
    ends = [(-1, *place, free + stages - 1) for place in places]
    return [tuple(b - a - 1 + least for a, b in pairwise(end)) for end in ends]


@st.composite
def tables(draw: st.DrawFn) -> tuple[Floats, Floats]:
    """Any figures, some of them infinite."""
    stages, layers = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    longest = draw(st.integers(1, layers))
    shape = stages, layers + 1, longest + 1
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    slowest = rng.integers(0, 8, shape) * draw(st.sampled_from([1.0, 0.0, 1e-3]))
    added = rng.integers(0, 8, shape) * draw(st.sampled_from([1.0, 0.0]))
    first, count = np.indices(shape[1:])
    nowhere = (rng.random(shape) < 0.2) | (first + count > layers)
    return np.where(nowhere, np.inf, slowest), np.where(nowhere, np.inf, added)


@given(tables())
@settings(max_examples=200)
def test_no_split_is_better(drawn: tuple[Floats, Floats]) -> None:
    slowest, added = drawn
    stages, sizes, counts = slowest.shape
    known = [layers for layers in splits(sizes - 1, stages) if max(layers) < counts]
    every = [split_of(slowest, added, layers) for layers in known]
    values = [split.value for split in every if np.isfinite(split.value)]
    found, fastest = best_split(slowest, added), least_slowest(slowest)
    if not values:
        assert found is None
        assert fastest is None
        return
    assert found is not None
    assert fastest is not None
    assert found.value <= min(values) * (1 + 3 * EVENNESS)
    assert found == split_of(slowest, added, found.layers)
    assert sum(found.layers) == sizes - 1
    assert fastest.slowest == min(split.slowest for split in every)


def by_program(
    forward: list[float], again: list[float], kept: list[float], speed: list[float], limit: float, m: int
) -> float:
    """(m − 1)·max + Σ by integer programming: x says which stage a layer is on, z that it is recomputed
    there; infinite where nothing fits. Stage s keeps S − s micro-batches of what is not recomputed.
    """
    layers, stages = len(forward), len(speed)
    size = layers * stages
    rows: list[tuple[Floats, float, float]] = []

    def row(low: float, high: float, **parts: dict[tuple[int, int], float]) -> None:
        found = np.zeros(2 * size + 1)
        for name, terms in parts.items():
            for (layer, stage), factor in terms.items():
                found[(name == "z") * size + layer * stages + stage] += factor
        rows.append((found, low, high))

    for i in range(layers):
        row(1, 1, x={(i, s): 1.0 for s in range(stages)})
        for s in range(stages):
            row(-np.inf, 0, z={(i, s): 1.0}, x={(i, s): -1.0})
        if i + 1 < layers:
            order = {(i + 1, s): float(s) for s in range(stages)} | {
                (i, s): -float(s) for s in range(stages)
            }
            row(0, np.inf, x=order)
            for s in range(stages):  # the first ones of a stage
                row(-np.inf, 1, z={(i + 1, s): 1.0, (i, s): -1.0}, x={(i, s): 1.0})
    for s in range(stages):
        row(1, np.inf, x={(i, s): 1.0 for i in range(layers)})
        saved = {(i, s): (stages - s) * kept[i] for i in range(layers)}
        row(-np.inf, limit, x=saved, z={key: -value for key, value in saved.items()})
        takes = {(i, s): speed[s] * forward[i] for i in range(layers)}
        more = {(i, s): speed[s] * again[i] for i in range(layers)}
        row(-np.inf, 0, x=takes, z=more)
        rows[-1][0][-1] = -1.0  # no more than the slowest
    cost = np.zeros(2 * size + 1)
    for i in range(layers):
        for s in range(stages):
            cost[i * stages + s] = speed[s] * forward[i]
            cost[size + i * stages + s] = speed[s] * again[i]
    cost[-1] = m - 1
    matrix, low, high = (np.array(part) for part in zip(*rows, strict=True))
    found = milp(
        cost,
        integrality=np.append(np.ones(2 * size), 0),
        bounds=Bounds(0, np.append(np.ones(2 * size), np.inf)),
        constraints=LinearConstraint(matrix, low, high),
    )
    return np.inf if found.x is None else float(found.fun)


@st.composite
def pipelines(draw: st.DrawFn) -> dict[str, object]:
    layers = draw(st.integers(3, 7))
    each = st.lists(TIMES, min_size=layers, max_size=layers)
    stages = draw(st.integers(1, min(3, layers)))
    return {
        "forward": draw(each),
        "again": draw(each),
        "kept": draw(each),
        "speed": draw(st.lists(st.sampled_from([1.0, 1.0, 2.0]), min_size=stages, max_size=stages)),
        "limit": draw(st.sampled_from([1.1, 3.1, 6.1, 100.0])),
        "m": draw(st.sampled_from([1, 2, 4, 64])),
    }


@given(pipelines())
@settings(max_examples=60, deadline=None)
def test_as_integer_programming_has_it(drawn: dict) -> None:  # type: ignore[type-arg]
    forward, again, kept, speed = (np.array(drawn[k]) for k in ("forward", "again", "kept", "speed"))
    stages, layers = len(speed), len(forward)
    seconds = np.full((stages, layers + 1, layers + 1), np.inf)
    for s in range(stages):
        for first in range(layers):
            for count in range(1, layers - first + 1):
                mine = slice(first, first + count)
                for r in range(count + 1):  # the fewest that fit
                    if (stages - s) * kept[first + r : first + count].sum() <= drawn["limit"]:
                        more = again[first : first + r].sum()
                        seconds[s, first, count] = speed[s] * (forward[mine].sum() + more)
                        break
    found = best_split(others(seconds, drawn["m"]), seconds)
    value = np.inf if found is None else found.value
    assert value == pytest.approx(by_program(**drawn), rel=1e-5)


def others(seconds: Floats, m: int) -> Floats:
    """What m − 1 micro-batches take."""
    fits = np.isfinite(seconds)
    return np.where(fits, (m - 1) * np.where(fits, seconds, 0.0), np.inf)


def uniform(layers: int, stages: int, head_s: float = 0.0) -> Floats:
    """Equal layers, and a head on the last stage."""
    first, count = np.indices((layers + 1, layers + 1))
    one = np.where((first + count <= layers) & (count > 0), count.astype(float), np.inf)
    seconds = np.repeat(one[None], stages, axis=0)
    seconds[-1] += head_s
    return seconds


def layers_of(seconds: Floats, m: int) -> tuple[int, ...]:
    found = best_split(others(seconds, m), seconds)
    assert found is not None
    return found.layers


def test_a_split_is_even_and_the_longer_stages_come_first() -> None:
    assert layers_of(uniform(12, 4), 8) == (3, 3, 3, 3)
    assert layers_of(uniform(14, 4), 8) == (4, 4, 3, 3)
    assert layers_of(uniform(14, 4, head_s=1.5), 8) == (4, 4, 4, 2)


def test_the_sum_decides_for_one_micro_batch_and_the_slowest_stage_for_many() -> None:
    seconds = uniform(9, 2)
    seconds[1] /= 2
    assert layers_of(seconds, 1) == (1, 8)
    assert layers_of(seconds, 100) == (3, 6)


def test_neither_the_slowest_stage_nor_the_sum_decides_alone() -> None:
    # Of two layers on two stages 0-2 has the fastest slowest stage, 2-0 the least sum.
    slowest, added = np.zeros((2, 3, 3)), np.zeros((2, 3, 3))
    for layers, largest, total in ((0, 1.0, 10.0), (1, 3.0, 5.0), (2, 9.0, 1.0)):
        slowest[0, 0, layers], added[0, 0, layers] = largest, total
    assert best_split(slowest, added) == Split((1, 1), 3.0, 5.0)


def test_large_pipelines_are_split_as_counting_says() -> None:
    # 126 layers and 2 for the ends on 16 stages, as Llama 3 405B has them (arXiv 2407.21783, 3.3.2).
    seconds = uniform(126, 16)
    seconds[0] += 1.0
    seconds[-1] += 1.0
    assert layers_of(seconds, 16) == (7, *[8] * 14, 7)
    assert layers_of(uniform(128, 64), 32) == (2,) * 64
