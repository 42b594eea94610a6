"""Context parallelism: ranks that share every sequence, and attention over all of it.

A sequence is cut into 2·cp chunks, and rank i has chunks i and 2·cp − 1 − i, so that under the causal
mask all ranks have the same work. Keys and values are gathered, queries stay (Llama Team 2024, arXiv
2407.21783, section 3.3.2). torch's own context_parallel has no attention kernel for CPUs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.nn.attention.bias import CausalBias, causal_lower_right

from parsim.execute.training.layer_collectives import LayerGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """This rank's part of every sequence."""

    ranks: LayerGroup | None = None
    """Those that share a sequence; None: this rank has all of it."""

    @property
    def size(self) -> int:
        return 1 if self.ranks is None else self.ranks.size

    def positions(self, seq_len: int) -> torch.Tensor:
        """Where this rank's tokens stand in the sequence, [s/cp]."""
        everything = torch.arange(seq_len)
        if self.ranks is None:
            return everything
        chunks = everything.chunk(2 * self.size)
        return torch.cat([chunks[chunk] for chunk in chunks_of(self.ranks.index, self.size)])

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, grouped: bool
    ) -> torch.Tensor:
        """softmax(q·kᵀ / √d) · v with the causal mask, of this rank's queries; [b, heads, s/cp, d]."""
        if self.ranks is None:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        k, v = self._whole(torch.stack((k, v)))
        length = q.shape[2] // 2
        parts = []
        for chunk, queries in zip(
            chunks_of(self.ranks.index, self.size), q.split(length, dim=2), strict=True
        ):
            seen = (chunk + 1) * length  # keys up to the end of the chunk itself
            parts.append(
                functional.scaled_dot_product_attention(
                    queries,
                    k[:, :, :seen],
                    v[:, :, :seen],
                    attn_mask=_mask(length, seen),
                    enable_gqa=grouped,
                )
            )
        return torch.cat(parts, dim=2)

    def _whole(self, part: torch.Tensor) -> torch.Tensor:
        """Keys and values [2, b, heads, s/cp, d] of this rank as those of the whole sequence."""
        assert self.ranks is not None
        chunks: dict[int, torch.Tensor] = {}
        for index, theirs in enumerate(self.ranks.gather(part).unbind()):
            halves = theirs.chunk(2, dim=3)
            chunks |= zip(chunks_of(index, self.size), halves, strict=True)
        return torch.cat([chunks[i] for i in range(2 * self.size)], dim=3)


@functools.cache
def _mask(queries: int, keys: int) -> CausalBias:
    """That the last query sees every key, and each before it one less.

    Kept, since torch cannot make one while a dispatch mode counts operations.
    """
    return causal_lower_right(queries, keys)


def chunks_of(index: int, ranks: int) -> tuple[int, int]:
    """The chunks of a sequence that one of `ranks` has: one from each end.

    >>> [chunks_of(i, 2) for i in range(2)]
    [(0, 3), (1, 2)]
    """
    return index, 2 * ranks - 1 - index


WHOLE_SEQUENCES = Context()
