"""Collectives inside layers whose gradients come back the other way, each a span.

An all-gather's gradient is a reduce-scatter, an all-to-all's the all-to-all that returns every part. The
functional collectives of torch do the same, but run their backward out of the recorder's sight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from parsim.execute.training.recorder import Label, Recorder

# Taken before anything is put in their place. The first names are those since torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_to_all = dist.all_to_all_single


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Ranks that communicate inside layers."""

    group: dist.ProcessGroup
    stream: str
    """The timeline's stream of these collectives: cp or ep."""
    recorder: Recorder

    @property
    def size(self) -> int:
        return int(self.group.size())

    @property
    def index(self) -> int:
        """This rank's place among them."""
        return int(self.group.rank())

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """[ranks, …]: the parts of all ranks, of equal shapes, in order."""
        found: torch.Tensor = _Gather.apply(self, part)
        return found

    def exchange(self, rows: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Rows from every rank in order; `sent` and `received`: how many go to and come from each."""
        found: torch.Tensor = _Exchange.apply(self, rows, tuple(sent), tuple(received))
        return found

    def span(self) -> Any:
        """The context of one collective, named after the action it belongs to."""
        action = self.recorder.action
        if action is None:
            label = Label(self.stream, self.stream, self.stream, self.recorder.stage)
        else:
            label = Label(self.stream, str(action), self.stream, action.stage, action.micro_batch)
        return self.recorder.span(label, waits=True)

    def all_to_all(
        self, rows: torch.Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> torch.Tensor:
        """As `exchange`, outside autograd."""
        found = rows.new_empty(sum(received), *rows.shape[1:])
        with self.span():
            _all_to_all(found, rows.contiguous(), list(received), list(sent), group=self.group)
        return found


class _Gather(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, ranks: LayerGroup, part: torch.Tensor) -> torch.Tensor:
        ctx.ranks = ranks
        whole = part.new_empty(ranks.size * part.shape[0], *part.shape[1:])
        with ranks.span():
            _all_gather(whole, part.contiguous(), group=ranks.group)
        return whole.unflatten(0, (ranks.size, -1))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        part = gradient.new_empty(gradient.shape[1:])
        with ctx.ranks.span():
            _reduce_scatter(part, gradient.contiguous().flatten(0, 1), group=ctx.ranks.group)
        return None, part


class _Exchange(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        ranks: LayerGroup,
        rows: torch.Tensor,
        sent: tuple[int, ...],
        received: tuple[int, ...],
    ) -> torch.Tensor:
        ctx.ranks, ctx.sent, ctx.received = ranks, sent, received
        return ranks.all_to_all(rows, sent, received)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None, None]:
        return None, ctx.ranks.all_to_all(gradient, ctx.received, ctx.sent), None, None
