"""A plan against single-process training: the same steps, gradient by gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parsim.execute.measurement import worst
from parsim.execute.request import Case
from parsim.execute.training.batches import whole_batch
from parsim.execute.training.compress_check import CheckedCompressor
from parsim.execute.training.parallelize import token_loss
from parsim.execute.training.trainer import DTYPES, Trainer, make_optimizer
from parsim.execute.training.transformer import build, whole

NEGLIGIBLE = 1e-6
"""Share of a step's largest gradient below which a parameter's gradients count as rounding.

Gradients of key biases, for one, are zero in exact arithmetic where positions are learned: softmax
ignores what all scores share."""

AGAINST = "single-process training"
AGAINST_COMPRESSED = "single-process training before compression, and compression by hand after it"


class Reference:
    """The whole model on one rank; the others only learn its gradients."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.computes = dist.get_rank() == 0
        self.device = device
        model = build(
            case.job.model,
            whole(case.job.model),
            seq_len=case.job.seq_len,
            recompute="none",
            dtype=DTYPES[case.dtype],
            device=device if self.computes else torch.device("meta"),
            seed=case.seed if self.computes else None,
        )
        self.model = model
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.optimizer = make_optimizer(case.job.optimizer, list(self.parameters.values()))

    def forward_backward(self, tokens: torch.Tensor, targets: torch.Tensor) -> float:
        """Gradients and loss over the whole global batch in one go; the loss on every rank."""
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.computes:
            found = token_loss(self.model(tokens.to(self.device)), targets.to(self.device), None)
            found.backward()
            loss += found.detach()
        dist.broadcast(loss, src=0)
        return float(loss.item())

    def gradient(self, name: str) -> torch.Tensor:
        """The gradient of one parameter, on every rank."""
        parameter = self.parameters[name]
        if self.computes:
            assert parameter.grad is not None
            found = parameter.grad.contiguous()
        else:
            found = torch.empty_like(parameter, device=self.device, requires_grad=False)
        dist.broadcast(found, src=0)
        return found

    def update(self) -> None:
        """The optimizer step."""
        if self.computes:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def verify_case(case: Case, trainer: Trainer) -> dict[str, Any]:
    """Largest relative errors of gradients and loss over all steps, on this rank."""
    reference = Reference(case, trainer.device)
    errors: list[tuple[float, str]] = []
    loss_errors: list[tuple[float, str]] = []
    for step in range(case.steps):
        trainer.recorder.begin_step(step)
        trainer.recorder.say("single-process reference")
        expected_loss = reference.forward_backward(*whole_batch(case, step))
        trainer.recorder.say("starting")
        loss = trainer.forward_backward(*trainer.batch(step))
        off = abs(mean_loss(trainer, loss) - expected_loss)
        loss_errors.append((off / expected_loss, f"step {step}"))
        trainer.recorder.say("comparing gradients")
        errors.append(gradient_error(reference, dict(trainer.data_parallel.gradients())))
        trainer.update()
        reference.update()
        trainer.recorder.end_step()
    if isinstance(trainer.compressor, CheckedCompressor):
        errors.append((trainer.compressor.error, f"compression={case.plan.compression}"))
    error, name = worst(errors)
    return {
        "max_gradient_error": error,
        "parameter": name,
        "max_loss_error": worst(loss_errors)[0],
        "steps": case.steps,
        "against": AGAINST if trainer.compressor is None else AGAINST_COMPRESSED,
    }


def gradient_error(reference: Reference, mine: dict[str, torch.Tensor]) -> tuple[float, str]:
    """max |Δg| / max |g| of the worst of this rank's parameters, and which it is."""
    found: list[tuple[float, float, str]] = []
    largest = 0.0
    for name in reference.parameters:
        expected = reference.gradient(name)
        size = expected.abs().max().item()
        largest = max(largest, size)
        if name in mine:
            found.append(((mine[name] - expected).abs().max().item(), size, name))
    return worst((off / max(size, NEGLIGIBLE * largest), name) for off, size, name in found)


def mean_loss(trainer: Trainer, loss: torch.Tensor | None) -> float:
    """The loss over the global batch, on every rank, from the replicas' losses on the last stages."""
    total = torch.zeros(2, dtype=torch.float64)
    if loss is not None:
        total += torch.tensor([loss.item(), 1.0], dtype=torch.float64)
    dist.all_reduce(total, group=trainer.control)
    return float(total[0] / total[1])
