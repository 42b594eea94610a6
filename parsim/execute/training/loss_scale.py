"""Loss scaling for fp16, whose gradients would else vanish below 6·10⁻⁸.

The loss is multiplied by a scale, and gradients are divided by it before the update. Where one is not
finite on any rank, all ranks leave the step out and halve the scale; after 2000 steps in a row it
doubles (Micikevicius et al. 2018, Mixed Precision Training, arXiv 1710.03740, section 3.2). torch's own
GradScaler hands the decision to fused optimizers, which torch 2.13 cannot take on a CPU.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch.nn.utils import get_total_norm

from parsim.execute.training.local import local

GROWTH_INTERVAL = 2000
"""Steps in a row after which the scale doubles, as in torch.amp.GradScaler."""
States = dict[str, torch.Tensor]


class LossScale:
    """The scale of one training, alike on all ranks of the world."""

    def __init__(self, initial: float, device: torch.device) -> None:
        self.value = initial
        """The scale of the step that comes next."""
        self.skipped_steps = 0
        self._since_change = 0
        self._device = device

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Unscale the gradients and update, or leave the step out; collective over all ranks."""
        gradients = [local(p.grad) for group in optimizer.param_groups for p in group["params"]]
        for gradient in gradients:
            gradient.div_(self.value)
        largest = get_total_norm(gradients, math.inf)
        overflown = (~torch.isfinite(largest)).to(self._device, torch.float32)
        dist.all_reduce(overflown)
        if overflown.item():
            self.value /= 2
            self.skipped_steps += 1
            self._since_change = 0
            return
        optimizer.step()
        self._since_change += 1
        if self._since_change == GROWTH_INTERVAL:
            self.value *= 2
            self._since_change = 0

    def states(self) -> States:
        """What a checkpoint has to hold, by name; load() takes it."""
        return {
            "loss_scale.value": torch.tensor(self.value, dtype=torch.float64),
            "loss_scale.steps_since_change": torch.tensor(self._since_change),
        }

    def load(self, states: States) -> None:
        """Go on as the run that these are of."""
        self.value = states["loss_scale.value"].item()
        self._since_change = int(states["loss_scale.steps_since_change"].item())


def take_step(optimizer: torch.optim.Optimizer, loss_scale: LossScale | None) -> None:
    """The optimizer's step, with the loss scale's say where there is one."""
    if loss_scale is None:
        optimizer.step()
    else:
        loss_scale.step(optimizer)
