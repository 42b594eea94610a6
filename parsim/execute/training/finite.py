"""Where a loss that is no longer finite comes from."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from parsim.execute.training.local import local
from parsim.execute.training.transformer import Transformer


class Origin(NamedTuple):
    """A part of the model, in the order in which data goes through it."""

    stage: int
    layer: int
    """-1: the embedding."""

    def __str__(self) -> str:
        return f"stage {self.stage}, " + ("embedding" if self.layer < 0 else f"layer {self.layer}")


class FiniteWatch:
    """Remembers a sum over the output of every layer of this rank, until the step is over.

    A sum is finite only if all values are. It is one pass over b·s·h values beside the layer's 24·b·s·h²
    floating-point operations, and nothing waits for it unless the loss is not finite.
    """

    def __init__(self, stages: dict[int, nn.Module]) -> None:
        self._sums: list[tuple[Origin, torch.Tensor]] = []
        for stage, module in stages.items():
            assert isinstance(module, Transformer)
            if module.embedding is not None:
                module.embedding.register_forward_hook(partial(self._note, Origin(stage, -1)))
            for name, layer in module.layers.items():
                layer.register_forward_hook(partial(self._note, Origin(stage, int(name))))

    def _note(self, origin: Origin, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        values = local(output)
        wide = torch.float64 if values.dtype == torch.float64 else torch.float32
        self._sums.append((origin, values.sum(dtype=wide)))

    def clear(self) -> None:
        """Begin a step."""
        self._sums.clear()

    def first(self) -> Origin | None:
        """The first part of this rank whose output was not finite in this step."""
        return min((o for o, total in self._sums if not torch.isfinite(total)), default=None)
