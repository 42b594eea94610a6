"""Gradients made smaller for their sum over replicas, through the communication hooks of torch's DDP.

A hook is a function of its state and a bucket of gradients that gives a future of their mean over all
ranks (torch.distributed.algorithms.ddp_comm_hooks). fp16, bf16 and PowerSGD are torch's own hooks; int8
and top-k are hooks of the same form, after the papers that parsim.cost.compression names. DDP itself is
not used: the buckets are parsim's, so hooks work under tensor parallelism and in pipelines as well, on
the part of each matrix that a rank holds.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.futures import Future

from parsim.plan import Compression

INT8_BLOCK = 256
"""Values that share an fp32 scale, as parsim.cost.compression prices them."""
INT8_MOST = 127
POWERSGD_SEED = 0
"""Of the first Q, which must be alike on all ranks."""

Hook = Callable[["GradientBucket"], Future[torch.Tensor]]

# The first name is that since torch 2.13, which warns of the second one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class GradientBucket:
    """What hooks ask of DDP's own GradBucket, which only DDP can make."""

    def __init__(self, index: int, flat: torch.Tensor, shapes: list[torch.Size], *, last: bool) -> None:
        """`flat` holds gradients of these shapes one after another, and perhaps padding."""
        self._index = index
        self._flat = flat
        self._last = last
        sizes = [shape.numel() for shape in shapes]
        parts = flat[: sum(sizes)].split(sizes)
        self._gradients = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def index(self) -> int:
        """Which bucket this is, from 0."""
        return self._index

    def buffer(self) -> torch.Tensor:
        """All gradients one after another."""
        return self._flat

    def gradients(self) -> list[torch.Tensor]:
        """The gradients as views of the buffer in their own shapes."""
        return self._gradients

    def is_last(self) -> bool:
        """Whether a step ends with this bucket."""
        return self._last


class Compressor:
    """The compressed mean of gradients over the replicas of a rank."""

    def __init__(self, compression: Compression, group: dist.ProcessGroup) -> None:
        self.compression = compression
        self.group = group
        self.payload_bytes: Counter[str] = Counter()
        """Bytes handed to collectives so far by kind (nccl-tests convention: the full buffer)."""
        self._hook = self._make_hook()

    def mean(self, bucket: GradientBucket) -> torch.Tensor:
        """The mean of a bucket over all ranks, in the bucket's own buffer; collective."""
        with self._counted():
            return self._hook(bucket).wait()

    def _make_hook(self) -> Hook:
        # torch's hooks load numpy and much else: only where they are used.
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        kind, group = self.compression.kind, self.group
        if kind == "fp16":
            return lambda bucket: default_hooks.fp16_compress_hook(group, bucket)
        if kind == "bf16":
            return lambda bucket: default_hooks.bf16_compress_hook(group, bucket)
        if kind == "powersgd":
            state = powerSGD_hook.PowerSGDState(
                group,
                matrix_approximation_rank=int(self.compression.amount),
                random_seed=POWERSGD_SEED,
                start_powerSGD_iter=2,
            )
            # The steps before that are for DDP, which cuts its buckets anew after the first one.
            state.iter = state.start_powerSGD_iter
            return lambda bucket: powerSGD_hook.powerSGD_hook(state, bucket)
        return self._int8_hook if kind == "int8" else _TopK(self)

    def _int8_hook(self, bucket: GradientBucket) -> Future[torch.Tensor]:
        """Quantised parts exchanged all-to-all, summed, quantised again and gathered (ZeRO++, 3.3)."""
        flat, ranks = bucket.buffer(), self.group.size()
        values, scales = quantised(padded(flat, ranks * INT8_BLOCK))
        parts = dequantised(self._exchanged(values), self._exchanged(scales)).view(ranks, -1)
        values, scales = quantised(parts.sum(0) / ranks)
        mean = dequantised(self.gathered(values), self.gathered(scales))
        flat.copy_(mean[: flat.numel()])
        return _done(flat)

    def _exchanged(self, tensor: torch.Tensor) -> torch.Tensor:
        self.payload_bytes["all_to_all"] += tensor.nbytes
        received = torch.empty_like(tensor)
        dist.all_to_all_single(received, tensor, group=self.group)
        return received

    def gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks one after another."""
        whole = tensor.new_empty(self.group.size() * tensor.numel())
        self.payload_bytes["all_gather"] += whole.nbytes
        _all_gather(whole, tensor, group=self.group)
        return whole

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the all-reduces that torch's hooks call by name."""
        original = dist.all_reduce

        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.payload_bytes["all_reduce"] += tensor.nbytes
            return original(tensor, *args, **kwargs)

        dist.all_reduce = counted
        try:
            yield
        finally:
            dist.all_reduce = original


class _TopK:
    """Each rank's largest values to all ranks; the rest waits for the next step (Lin et al. 2018)."""

    def __init__(self, compressor: Compressor) -> None:
        self._compressor = compressor
        self._residuals: dict[int, torch.Tensor] = {}

    def __call__(self, bucket: GradientBucket) -> Future[torch.Tensor]:
        flat, compressor = bucket.buffer(), self._compressor
        waiting = self._residuals.setdefault(bucket.index(), torch.zeros_like(flat))
        waiting += flat
        places = largest(waiting, compressor.compression.amount)
        sent = waiting[places]
        waiting[places] = 0
        everywhere = compressor.gathered(places.to(torch.int32)).to(torch.int64)
        flat.zero_().index_add_(0, everywhere, compressor.gathered(sent))
        flat /= compressor.group.size()
        return _done(flat)


def largest(flat: torch.Tensor, percent: float) -> torch.Tensor:
    """Where the largest values are, by size without sign: so many in a hundred, rounded up."""
    return flat.abs().topk(math.ceil(percent / 100 * flat.numel()), sorted=False).indices


def padded(flat: torch.Tensor, multiple: int) -> torch.Tensor:
    """A flat tensor with zeros up to a multiple of so many values, in fp32."""
    missing = -flat.numel() % multiple
    return torch.nn.functional.pad(flat.to(torch.float32), (0, missing))


def quantised(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers from −127 to 127, and a scale for each block of INT8_BLOCK of them.

    >>> values, scales = quantised(torch.linspace(-254.0, 254.0, 256))
    >>> values[0].item(), values[-1].item(), scales.tolist()
    (-127, 127, [2.0])
    """
    blocks = flat.view(-1, INT8_BLOCK)
    scales = blocks.abs().amax(1) / INT8_MOST
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (blocks / safe[:, None]).round().to(torch.int8).view(-1), scales


def dequantised(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What `quantised` made small, as fp32 again."""
    return (values.view(-1, INT8_BLOCK).to(torch.float32) * scales[:, None]).view(-1)


def _done(tensor: torch.Tensor) -> Future[torch.Tensor]:
    future: Future[torch.Tensor] = Future()
    future.set_result(tensor)
    return future
