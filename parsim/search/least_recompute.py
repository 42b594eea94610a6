"""How little a rank must recompute at least, for many plans at once."""

from __future__ import annotations

import numpy as np

from parsim.search.cells import PartFigures
from parsim.search.layout import Floats, FullestMoment, Layout

ROUNDING = 1e-6
"""Of a layer: what sums of floats may be off by."""
NEAR = 1e-9
"""Of a rank's memory: likewise."""


def least_recompute_s(
    layout: Layout, moment: FullestMoment, parts: PartFigures, room_bytes: Floats
) -> Floats:
    """(P,): a rank recomputes no less of a micro-batch, whatever layers it chooses; nothing where it has
    room for all that its passes leave behind.

    `parts` are (K, P), `room_bytes` (P,) is what the rank may keep beside a layer that is
    recomputed. A recomputed layer frees its bytes as often as its chunk has micro-batches in flight:
    chunks with most come first.
    """
    missing = moment.kept @ (parts.saved_bytes + parts.kept_bytes) - room_bytes
    # Without any such layer there is more room.
    again = parts.recomputed_bytes[moment.kept > 0].max(axis=0)
    lacks = missing - again > NEAR * np.abs(room_bytes)
    if not moment.freed[-1]:  # no layer, none in flight
        return np.zeros(missing.shape)
    kinds = list(layout.layer_parts)
    # The layer that is recomputed may be of the kind that needs least meanwhile.
    missing = np.where(lacks, missing - again + parts.recomputed_bytes[kinds].min(axis=0), 0.0)
    kept, again_s = np.maximum(parts.kept_bytes[kinds], 1.0), parts.recompute_s[kinds]
    if len(kinds) == 1:
        count = np.interp(missing / kept[0], moment.freed, moment.layers)
        return np.asarray(np.ceil(count - ROUNDING) * again_s[0])
    most = (np.diff(moment.freed) / np.maximum(np.diff(moment.layers), 1.0)).max()
    return np.asarray(missing / most * (again_s / kept).min(axis=0))
