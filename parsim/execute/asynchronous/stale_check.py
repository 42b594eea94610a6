"""A pipeline without a flush against the same versions of the weights in one process.

The reference knows no pipeline: it takes one micro-batch after the other through the whole model, each
stage's parameters as they were after as many updates as the paper's formula says, and adds the gradients
to the newest ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call

from parsim.execute.asynchronous.stale_pipeline import StalePipeline, mean_losses
from parsim.execute.measurement import worst
from parsim.execute.request import Case
from parsim.execute.training.batches import whole_batch
from parsim.execute.training.parallelize import token_loss
from parsim.execute.training.trainer import DTYPES, Trainer, make_optimizer
from parsim.execute.training.transformer import build, whole
from parsim.plan import stage_layers
from parsim.schedule.pipedream import version_of

AGAINST = "one process with the same versions of the weights"
Values = dict[str, torch.Tensor]


def verify_stale_case(case: Case, trainer: Trainer) -> dict[str, Any]:
    """Largest relative errors of all losses, and of all updates together, on this rank.

    The gradients' error is max |Δw| of the worst parameter after the last update, over max |w − w₀| of
    all parameters.
    """
    trainer.recorder.begin_step(0)
    pipeline = StalePipeline(trainer)
    pipeline.run()
    trainer.recorder.say("sequential emulation")
    reference = _Emulation(case, trainer.device) if dist.get_rank() == 0 else None
    losses = torch.zeros(case.schedule.num_micro_batches, dtype=torch.float64)
    if reference is not None:
        losses = torch.tensor(list(reference.run()), dtype=torch.float64)
    moved = torch.tensor(reference.moved() if reference is not None else 0.0, dtype=torch.float64)
    for known in (losses, moved):
        dist.broadcast(known, src=0)
    mine = mean_losses(pipeline, trainer.control)
    errors = [(0.0, "")]
    after = dict(pipeline.replicas.weights())
    for name, shape in _shapes(case):
        expected = torch.empty(shape, dtype=DTYPES[case.dtype], device=trainer.device)
        if reference is not None:
            expected.copy_(reference.newest[name].detach())
        dist.broadcast(expected, src=0)
        if name in after:
            errors.append((((after[name] - expected).abs().max() / moved).item(), name))
    trainer.recorder.end_step()
    error, worst_name = worst(errors)
    return {
        "max_gradient_error": error,
        "parameter": worst_name,
        "max_loss_error": ((mine - losses).abs() / losses).max().item(),
        "steps": case.schedule.steps,
        "against": AGAINST,
    }


def _shapes(case: Case) -> list[tuple[str, torch.Size]]:
    """All parameters of the model in order, on every rank."""
    model = _whole_model(case, torch.device("meta"), None)
    return [(name, parameter.shape) for name, parameter in model.named_parameters()]


def _whole_model(case: Case, device: torch.device, seed: int | None) -> nn.Module:
    return build(
        case.job.model,
        whole(case.job.model),
        seq_len=case.job.seq_len,
        recompute="none",
        dtype=DTYPES[case.dtype],
        device=device,
        seed=seed,
    )


class _Emulation:
    """The whole run in one process."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self._case = case
        self._device = device
        self._model = _whole_model(case, device, case.seed)
        self.newest: dict[str, nn.Parameter] = dict(self._model.named_parameters())
        """Parameters after the last update."""
        self._stages = _names_by_stage(case, list(self.newest))
        self._optimizers = [
            make_optimizer(case.job.optimizer, [self.newest[name] for name in names])
            for names in self._stages
        ]
        self._versions: list[list[Values]] = [[self._copy(names)] for names in self._stages]
        """Of each stage: its parameters after 0, 1, 2 … updates."""

    def run(self) -> Iterator[float]:
        """The loss of each micro-batch over all replicas."""
        case = self._case
        every, count = case.schedule.update_every, case.plan.num_micro_batches(case.job)
        for i in range(case.schedule.num_micro_batches):
            used: Values = {}
            for stage, versions in enumerate(self._versions):
                used |= versions[version_of(case.plan, stage, i, count)]
            loss = self._loss(used, i, count)
            gradients = torch.autograd.grad(loss / every, list(used.values()))
            for name, gradient in zip(used, gradients, strict=True):
                own = self.newest[name]
                own.grad = gradient if own.grad is None else own.grad + gradient
            if (i + 1) % every == 0:
                self._update()
            yield loss.item()

    def moved(self) -> float:
        """How far the parameter that went farthest has gone."""
        changes: list[tuple[float, str]] = [
            ((self.newest[name] - first).abs().max().item(), name)
            for versions in self._versions
            for name, first in versions[0].items()
        ]
        return worst(changes)[0]

    def _loss(self, parameters: Values, i: int, count: int) -> torch.Tensor:
        """Of the sequences that all replicas together take through as micro-batch i of the run."""
        tokens, targets = (
            torch.cat([own.chunk(count)[i % count] for own in batch.chunk(self._case.plan.dp)])
            for batch in whole_batch(self._case, i // count)
        )
        logits = functional_call(self._model, parameters, (tokens.to(self._device),))
        return token_loss(logits, targets.to(self._device), None)

    def _update(self) -> None:
        for stage, optimizer in enumerate(self._optimizers):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self._versions[stage].append(self._copy(self._stages[stage]))

    def _copy(self, names: list[str]) -> Values:
        return {name: self.newest[name].detach().clone().requires_grad_() for name in names}


def _names_by_stage(case: Case, names: list[str]) -> list[list[str]]:
    """Which parameters each stage holds: embedding first, head and last norm at the end."""
    layer_stage = [
        s for s, layers in enumerate(stage_layers(case.job.model, case.plan)) for _ in range(layers)
    ]
    stages: list[list[str]] = [[] for _ in range(case.plan.pp)]
    for name in names:
        part, _, rest = name.partition(".")
        if part == "layers":
            stages[layer_stage[int(rest.partition(".")[0])]].append(name)
        else:
            stages[0 if part == "embedding" else -1].append(name)
    return stages
