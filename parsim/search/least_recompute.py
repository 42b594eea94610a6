"""How little a rank must recompute at least, for many plans at once."""

from __future__ import annotations

import numpy as np

from parsim.search.cells import PartFigures
from parsim.search.layout import Floats, FullestMoment, Holding, Layout

ROUNDING = 1e-6
"""Of a layer: what sums of floats may be off by."""
NEAR = 1e-9
"""Of a rank's memory: likewise."""


def least_recompute_s(
    layout: Layout, holding: Holding, moment: FullestMoment, parts: PartFigures, room_bytes: Floats
) -> Floats:
    """(P,): a rank recomputes no less of a micro-batch, whatever layers it chooses; nothing where it has
    room for all that its passes leave behind.

    `parts` are (K, P), `room_bytes` (P,) is what the rank may keep while the largest of its layers is
    recomputed. A recomputed layer frees its bytes as often as its chunk has micro-batches in flight:
    chunks with most come first.
    """
    if not moment.freed[-1]:  # no layer, none in flight
        return np.zeros(room_bytes.shape)
    held = layout.has[list(holding.stages)].any(axis=0)
    kinds = [kind for kind in layout.layer_parts if moment.kept[kind]]
    missing = moment.kept @ (parts.saved_bytes + parts.kept_bytes) - room_bytes
    # There is more room where no layer is recomputed, or small ones alone.
    alone = missing - parts.recomputed_bytes[held].max(axis=0)
    smallest = parts.recomputed_bytes[kinds].min(axis=0)
    missing = np.where(alone > NEAR * np.abs(room_bytes), alone + smallest, 0.0)
    kept, again_s = np.maximum(parts.kept_bytes[kinds], 1.0), parts.recompute_s[kinds]
    if len(kinds) == 1:
        count = np.interp(missing / kept[0], moment.freed, moment.layers)
        return np.asarray(np.ceil(count - ROUNDING) * again_s[0])
    most = (np.diff(moment.freed) / np.maximum(np.diff(moment.layers), 1.0)).max()
    return np.asarray(missing / most * (again_s / kept).min(axis=0))
