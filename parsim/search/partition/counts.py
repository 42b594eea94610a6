"""The least recomputation with which pipeline ranks of several chunks fit.

A rank's chunks share its memory, so how many layers of each are recomputed is decided together: a
covering problem, the least seconds that free enough bytes at each of the rank's fullest moments. The
layers that free most for their time are taken first. A bound says whether that is already the least:
each moment for itself, layers in any order and in parts. Where it does not, an integer program decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SAME = 1e-9
"""Relative difference below which two sums are the same."""


class Chunk(NamedTuple):
    """(R + 1,) each: a stage whose first r layers are recomputed."""

    seconds: Floats
    """Of a micro-batch, forward and backward."""
    saved_bytes: Floats
    """Kept of a micro-batch from the forward to the backward."""
    again_bytes: Floats
    """Activations that live only while a layer is recomputed."""


class Moments(NamedTuple):
    """T fullest moments of ranks that hold the same n chunks."""

    kept: Floats
    """(T, n): micro-batches that are kept of each chunk."""
    room_bytes: Floats
    """(T,): for all that they keep, and the layer that is recomputed."""


def least_recomputed(chunks: Sequence[Chunk], moments: Moments) -> tuple[int, ...] | None:
    """Layers of each chunk that are recomputed with the least seconds; None where no counts fit.

    Exact to the tolerance of the integer program (2e-6 of the room).
    """
    none = (0,) * len(chunks)
    if _lacking(chunks, moments, none).max() <= 0:
        return none
    bound_s = _bound_s(chunks, moments)
    if bound_s == np.inf:
        return None
    greedy = _greedy(chunks, moments)
    if greedy is not None and _seconds(chunks, greedy) <= bound_s * (1 + SAME):
        return greedy
    # An integer program keeps to its limits within a tolerance.
    for share in (1.0, 1 - 2e-6, 1 - 2e-5):
        exact = _programmed(chunks, moments._replace(room_bytes=moments.room_bytes * share))
        if exact is None or _lacking(chunks, moments, exact).max() <= 0:
            return exact or greedy
    return greedy


def _lacking(chunks: Sequence[Chunk], moments: Moments, counts: Sequence[int]) -> Floats:
    """(T,): bytes that are missing at each moment."""
    saved = np.array([chunk.saved_bytes[r] for chunk, r in zip(chunks, counts, strict=True)])
    again = max(chunk.again_bytes[r] for chunk, r in zip(chunks, counts, strict=True))
    lacking: Floats = moments.kept @ saved + again - moments.room_bytes
    return lacking


def _seconds(chunks: Sequence[Chunk], counts: Sequence[int]) -> float:
    """What recomputation adds to a micro-batch on all chunks."""
    return sum(
        float(chunk.seconds[r] - chunk.seconds[0]) for chunk, r in zip(chunks, counts, strict=True)
    )


def _greedy(chunks: Sequence[Chunk], moments: Moments) -> tuple[int, ...] | None:
    """Layer by layer, the one that frees most in its time at the moment that lacks most."""
    counts = [0] * len(chunks)
    while (lacking := _lacking(chunks, moments, counts)).max() > 0:
        kept = moments.kept[lacking.argmax()]
        worth = [
            kept[c] * _freed(chunk, r) / max(chunk.seconds[r + 1] - chunk.seconds[r], 1e-30)
            if r + 1 < len(chunk.seconds)
            else -np.inf
            for c, (chunk, r) in enumerate(zip(chunks, counts, strict=True))
        ]
        best = int(np.argmax(worth))
        if worth[best] == -np.inf:
            return None
        counts[best] += 1
    return tuple(counts)


def _freed(chunk: Chunk, r: int) -> float:
    """Bytes of a micro-batch that layer r does not keep where it is recomputed."""
    return float(chunk.saved_bytes[r] - chunk.saved_bytes[r + 1])


def _bound_s(chunks: Sequence[Chunk], moments: Moments) -> float:
    """No counts that fit add less: each moment for itself, the layers that free most in their time
    first. Infinite where none fit, even so.

    Layers are whole, so where all take equally long their number is rounded up.
    """
    if all(len(chunk.seconds) == 1 for chunk in chunks):
        return np.inf  # nothing is left to recompute
    again = min(float(chunk.again_bytes[1]) for chunk in chunks if len(chunk.again_bytes) > 1)
    added = np.concatenate([np.diff(chunk.seconds) for chunk in chunks])
    freed = np.concatenate([-np.diff(chunk.saved_bytes) for chunk in chunks])
    owner = np.repeat(range(len(chunks)), [len(chunk.seconds) - 1 for chunk in chunks])
    saved = np.array([chunk.saved_bytes[0] for chunk in chunks])
    alike = np.ptp(added) <= SAME * added.max()
    most_s = 0.0
    for kept, room in zip(moments.kept, moments.room_bytes, strict=True):
        need = float(kept @ saved + again - room)
        gains = kept[owner] * freed
        order = np.argsort(-gains / np.maximum(added, 1e-30), kind="stable")
        so_far = np.concatenate([[0.0], gains[order].cumsum()])
        seconds = np.concatenate([[0.0], added[order].cumsum()])
        if need > so_far[-1]:
            return np.inf
        if alike:
            most_s = max(most_s, float(seconds[np.searchsorted(so_far, need * (1 - SAME))]))
        else:
            most_s = max(most_s, float(np.interp(need, so_far, seconds)))
    return most_s


def _programmed(chunks: Sequence[Chunk], moments: Moments) -> tuple[int, ...] | None:
    """By integer programming: x = 1 for the count that each chunk has, and w ≥ what is recomputed at
    once.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    sizes = [len(chunk.seconds) for chunk in chunks]
    owner = np.repeat(range(len(chunks)), sizes)
    seconds = np.concatenate([chunk.seconds - chunk.seconds[0] for chunk in chunks])
    saved = np.concatenate([chunk.saved_bytes for chunk in chunks])
    again = np.concatenate([chunk.again_bytes for chunk in chunks])
    whole, most = max(seconds.max(), 1e-30), max(float(moments.room_bytes.max()), 1.0)
    one_each = (owner == np.arange(len(chunks))[:, None]).astype(float)
    fits = np.column_stack([moments.kept[:, owner] * saved / most, np.ones(len(moments.kept))])
    at_once = np.column_stack([one_each * again / most, -np.ones(len(chunks))])
    found = milp(
        np.append(seconds / whole, 0.0),
        integrality=np.append(np.ones(len(owner)), 0.0),
        bounds=Bounds(0.0, np.append(np.ones(len(owner)), np.inf)),
        constraints=[
            LinearConstraint(np.column_stack([one_each, np.zeros(len(chunks))]), 1.0, 1.0),
            LinearConstraint(fits, -np.inf, moments.room_bytes / most),
            LinearConstraint(at_once, -np.inf, 0.0),
        ],
    )
    if found.x is None:
        return None
    starts = np.cumsum([0, *sizes[:-1]])
    return tuple(
        int(found.x[start : start + size].argmax()) for start, size in zip(starts, sizes, strict=True)
    )
