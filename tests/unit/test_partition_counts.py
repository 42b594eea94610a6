"""The least recomputation for chunks that share a memory, beside every choice."""

from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from parsim.search.partition.counts import Chunk, Moments, least_recomputed


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Chunk], Moments]:
    """Chunks of a few layers, that are alike or not, and ranks with some room."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    alike, chunks = draw(st.booleans()), []
    for _ in range(draw(st.integers(1, 3))):
        layers = draw(st.integers(0, 4))
        seconds = np.full(layers, 3) if alike else rng.integers(1, 5, layers)
        freed = np.full(layers, 7) if alike else rng.integers(1, 9, layers)
        at_once = np.full(layers, 5) if alike else rng.integers(0, 6, layers)
        chunks.append(
            Chunk(
                seconds=1.0 + np.cumsum([0, *seconds]),
                saved_bytes=freed.sum() - np.cumsum([0.0, *freed]) + rng.integers(0, 4),
                again_bytes=np.maximum.accumulate([0.0, *at_once]),
            )
        )
    kept = rng.integers(0, 6, (draw(st.integers(1, 3)), len(chunks))).astype(float)
    whole = kept @ [chunk.saved_bytes[0] for chunk in chunks]
    return chunks, Moments(kept, whole * rng.uniform(0.1, 1.05) + rng.uniform(0, 6))


def fits(chunks: list[Chunk], moments: Moments, counts: tuple[int, ...]) -> bool:
    pairs = list(zip(chunks, counts, strict=True))
    at_once = max(chunk.again_bytes[r] for chunk, r in pairs)
    needed = moments.kept @ [chunk.saved_bytes[r] for chunk, r in pairs] + at_once
    return bool((needed <= moments.room_bytes).all())


def seconds(chunks: list[Chunk], counts: tuple[int, ...]) -> float:
    return float(sum(chunk.seconds[r] for chunk, r in zip(chunks, counts, strict=True)))


@given(problems())
@settings(max_examples=250, deadline=None)
def test_no_counts_that_fit_take_less(problem: tuple[list[Chunk], Moments]) -> None:
    chunks, moments = problem
    every = product(*(range(len(chunk.seconds)) for chunk in chunks))
    best = min((seconds(chunks, r) for r in every if fits(chunks, moments, r)), default=None)
    found = least_recomputed(chunks, moments)
    if best is None:
        assert found is None
    else:
        assert found is not None
        assert fits(chunks, moments, found)
        assert seconds(chunks, found) == best


def test_the_chunk_that_keeps_more_is_recomputed_first() -> None:
    # Three micro-batches of the first chunk and one of the second: 32 bytes, 20 of room.
    chunk = Chunk(np.arange(5.0), 8.0 - 2.0 * np.arange(5), np.zeros(5))
    moments = Moments(np.array([[3.0, 1.0]]), np.array([20.0]))
    assert least_recomputed([chunk, chunk], moments) == (2, 0)
    assert least_recomputed([chunk, chunk], moments._replace(room_bytes=np.array([32.0]))) == (0, 0)
    assert least_recomputed([chunk, chunk], moments._replace(room_bytes=np.array([-1.0]))) is None


def test_a_layer_that_needs_room_of_its_own_may_not_be_worth_it() -> None:
    # Either chunk's layer frees the 7 bytes that are missing, but the first one's needs 10 meanwhile.
    large, small = (
        Chunk(np.arange(3.0), 14.0 - 7.0 * np.arange(3), np.array([0.0, again, again]))
        for again in (10.0, 0.0)
    )
    moments = Moments(np.array([[1.0, 1.0]]), np.array([21.0]))
    assert least_recomputed([large, small], moments) == (0, 1)
