"""Compressed sums against the same arithmetic by hand, on the gradients of all ranks in one process.

Training goes on with the exact mean, so that every step's gradients can be held against single-process
training, while residuals pile up as they would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from parsim.execute.measurement import worst
from parsim.execute.training.compress import (
    INT8_BLOCK,
    POWERSGD_SEED,
    Compressor,
    GradientBucket,
    dequantised,
    largest,
    padded,
    quantised,
)
from parsim.plan import Compression

POWERSGD_LEAST_RATE = 2.0
"""Matrices that PowerSGD would make smaller by less are summed whole (min_compression_rate)."""


class CheckedCompressor(Compressor):
    """A compressor that is compared with ByHand at every sum, and hands out the exact mean."""

    def __init__(self, compression: Compression, group: dist.ProcessGroup) -> None:
        super().__init__(compression, group)
        self.error = 0.0
        """max |Δ| / max |mean| of the worst bucket so far, beyond what 16-bit sums may round."""
        self._by_hand = ByHand(compression)

    def mean(self, bucket: GradientBucket) -> torch.Tensor:
        """The exact mean, after a comparison of the compressed one; collective."""
        flat = bucket.buffer()
        everyone = [torch.empty_like(flat) for _ in range(self.group.size())]
        dist.all_gather(everyone, flat.clone(), group=self.group)
        gradients = torch.stack(everyone)
        found = super().mean(bucket)
        expected, rounding = self._by_hand.mean(gradients, bucket)
        beyond = ((found - expected).abs() - rounding).max().clamp(min=0).item()
        error = beyond / expected.abs().max().item() if beyond else 0.0  # an idle expert's mean is zero
        self.error, _ = worst([(self.error, ""), (error, "")])
        return flat.copy_(gradients.mean(0))


class ByHand:
    """What each compression does, by its formula, on the gradients [ranks, values] of a bucket."""

    def __init__(self, compression: Compression) -> None:
        self._compression = compression
        self._residuals: dict[int, torch.Tensor] = {}
        self._right: dict[int, list[torch.Tensor]] = {}
        self._seeds: Any = None

    def mean(self, gradients: torch.Tensor, bucket: GradientBucket) -> tuple[torch.Tensor, torch.Tensor]:
        """The compressed mean over the ranks, and how far rounding in another order may lead from it."""
        rules: dict[str, Callable[[], torch.Tensor]] = {
            "int8": lambda: _int8(gradients),
            "topk": lambda: self._topk(gradients, bucket.index()),
            "powersgd": lambda: self._powersgd(gradients, bucket),
        }
        kind = self._compression.kind
        if kind in rules:
            return rules[kind](), torch.zeros_like(gradients[0])
        return _narrow(gradients, torch.float16 if kind == "fp16" else torch.bfloat16)

    def _with_residual(self, gradients: torch.Tensor, index: int) -> torch.Tensor:
        return gradients + self._residuals.get(index, 0.0)

    def _topk(self, gradients: torch.Tensor, index: int) -> torch.Tensor:
        whole = self._with_residual(gradients, index)
        sent = torch.zeros_like(whole)
        for own, picked in zip(whole, sent, strict=True):
            places = largest(own, self._compression.amount)
            picked[places] = own[places]
        self._residuals[index] = whole - sent
        return sent.mean(0)

    def _powersgd(self, gradients: torch.Tensor, bucket: GradientBucket) -> torch.Tensor:
        """Vogels et al. 2019, algorithm 1: P = orth(mean M·Q), Q = mean Mᵀ·P, M ≈ P·Qᵀ."""
        whole = self._with_residual(gradients, bucket.index())
        mean = whole.mean(0)
        at, matrices = 0, []
        for gradient in bucket.gradients():
            matrix = mean[at : at + gradient.numel()].view(gradient.shape[0], -1)
            rank = min(*matrix.shape, int(self._compression.amount))
            if sum(matrix.shape) * rank * POWERSGD_LEAST_RATE < matrix.numel():
                matrices.append((matrix, rank))
            at += gradient.numel()
        rights = self._right.get(bucket.index()) or self._first_rights(matrices)
        self._right[bucket.index()] = []
        for (matrix, _), right in zip(matrices, rights, strict=True):
            # All steps are linear in M: the mean over ranks may be taken first.
            left = torch.linalg.qr(matrix @ torch.linalg.qr(right).Q).Q
            new_right = matrix.T @ left
            self._right[bucket.index()].append(new_right)
            matrix.copy_(left @ new_right.T)  # a view of `mean`
        self._residuals[bucket.index()] = whole - mean
        return mean

    def _first_rights(self, matrices: list[tuple[torch.Tensor, int]]) -> list[torch.Tensor]:
        """The Q that torch's hook draws: matrices of one shape after those of another."""
        import numpy as np

        if self._seeds is None:
            self._seeds = np.random.RandomState(POWERSGD_SEED)
        draws = torch.Generator().manual_seed(int(self._seeds.randint(1_000_000_000)))
        shapes = dict.fromkeys(matrix.shape for matrix, _ in matrices)
        found: dict[int, torch.Tensor] = {}
        for shape in shapes:
            for i, (matrix, rank) in enumerate(matrices):
                if matrix.shape == shape:
                    drawn = torch.randn(shape[1], rank, dtype=matrix.dtype, generator=draws)
                    found[i] = drawn.to(matrix.device)
        return [found[i] for i in range(len(matrices))]


def _narrow(gradients: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Each rank's share in 16 bits, summed; every addition of a 16-bit sum may round once more."""
    ranks = len(gradients)
    parts = gradients.to(dtype).div(ranks).to(gradients.dtype)
    rounding = (ranks - 1) * torch.finfo(dtype).eps / 2 * parts.abs().sum(0)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return parts.sum(0), rounding + ranks * smallest


def _int8(gradients: torch.Tensor) -> torch.Tensor:
    ranks, size = gradients.shape
    parts = [dequantised(*quantised(padded(own, ranks * INT8_BLOCK))) for own in gradients]
    mean = torch.stack(parts).sum(0) / ranks
    return dequantised(*quantised(mean))[:size].to(gradients.dtype)
