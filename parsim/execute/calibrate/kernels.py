"""The calls that `parsim calibrate` times on one device: one function a family of kernels.

Operands rotate through a buffer larger than the caches, as the weights and activations of a training
step do; results are allocated anew by every call, as torch does in training. Optimizer and layer are
those of parsim's executor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from parsim.execute.calibrate.points import Point
from parsim.execute.training.trainer import make_optimizer
from parsim.execute.training.transformer import Block, rope_angles
from parsim.model import ModelSpec

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ARENA_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Two to ten times the last-level cache of the devices at hand."""
MOST_SETS = 64
ALIGNMENT = 64
"""Operands start on a cache line."""

Call = Callable[[], object]


class Arena:
    """Random numbers that operands are cut from, one after another and round again."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.size: int = ARENA_BYTES[device] // dtype.itemsize
        generator = torch.Generator(device=device).manual_seed(0)
        values = torch.empty(self.size, device=device, dtype=torch.float32)
        self.values = values.normal_(generator=generator).to(dtype)
        self.at = 0

    def take(self, *shape: int) -> Tensor:
        """The next operand. Operands overlap once the arena is used up: they are only read."""
        count = 1
        for side in shape:
            count *= side
        if count > self.size:
            return torch.empty(shape, device=self.values.device, dtype=self.values.dtype).normal_()
        if self.at + count > self.size:
            self.at = 0
        piece = self.values[self.at : self.at + count].view(shape)
        self.at += -(-count // ALIGNMENT) * ALIGNMENT
        return piece

    def sets(self, values_each: int) -> int:
        """Sets of operands, of so many values each, that fill the arena."""
        return max(1, min(MOST_SETS, self.size // values_each))


def kernel_call(point: Point, arena: Arena) -> Call:
    """The call to time for a point of any family but collectives."""
    families = {
        "gemm": _gemm,
        "attention": _attention,
        "memory_bound": _memory_bound,
        "optimizer": _optimizer,
        "host": _host,
    }
    return families[point.family](point, arena)


def _rotating(calls: list[Call]) -> Call:
    turns: Iterator[Call] = itertools.cycle(calls)
    return lambda: next(turns)()


def _gemm(point: Point, arena: Arena) -> Call:
    """C[m,n] = A[m,k] B[k,n] with operands stored as a linear layer's passes find them."""
    m, n, k = point.size

    def one() -> Call:
        if point.variant == "TN":
            x, weight = arena.take(m, k), arena.take(n, k)
            return lambda: functional.linear(x, weight)
        if point.variant == "NN":
            gradient, weight = arena.take(m, k), arena.take(k, n)
            return lambda: gradient.mm(weight)
        gradient, x = arena.take(k, m), arena.take(k, n)
        return lambda: gradient.t().mm(x)

    return _rotating([one() for _ in range(arena.sets(m * k + k * n))])


def _attention(point: Point, arena: Arena) -> Call:
    """Fused causal attention; the backward goes through autograd as in training."""
    batch, seq_len, heads, kv_heads, head_dim = point.size
    backward = point.variant == "backward"

    def operand(count: int) -> Tensor:
        # Stored as (batch, seq, heads, dim), which is how the projections leave it.
        return arena.take(batch, seq_len, count, head_dim).transpose(1, 2).requires_grad_(backward)

    def one() -> Call:
        q, k, v = operand(heads), operand(kv_heads), operand(kv_heads)
        grouped = kv_heads != heads
        if not backward:
            return lambda: functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=grouped
            )
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        gradient = arena.take(*out.shape)
        return lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)

    values = batch * seq_len * (heads + 2 * kv_heads) * head_dim
    return _rotating([one() for _ in range(min(16, arena.sets(values)))])


def _memory_bound(point: Point, arena: Arena) -> Call:
    """A residual addition c = a + b: two reads and one write."""
    count = point.size[0] // (3 * arena.values.dtype.itemsize)

    def one() -> Call:
        a, b = arena.take(count), arena.take(count)
        return lambda: torch.add(a, b)

    return _rotating([one() for _ in range(arena.sets(2 * count))])


def _optimizer(point: Point, arena: Arena) -> Call:
    """One optimizer step as parsim's executor makes it, over one flat bucket of parameters."""
    (count,) = point.size
    bucket = arena.take(count).clone().requires_grad_()
    bucket.grad = arena.take(count).clone()
    optimizer = make_optimizer(point.variant, [bucket])
    return lambda: optimizer.step()


def _host(point: Point, arena: Arena) -> Call:
    """An operation on one number, or a layer so small that only torch's own work remains."""
    number = arena.take(1)
    if point.variant == "op":
        return lambda: torch.add(number, number)
    spec = ModelSpec(
        name="host", layers=1, hidden=8, heads=2, ffn_hidden=8, gated_mlp=True, vocab=8, max_seq_len=2
    )
    with torch.device(number.device):
        layer = Block(spec, "none")
        angles = rope_angles(torch.arange(2), spec.head_dim).float()
    cos, sin = angles.cos(), angles.sin()
    x = arena.take(1, 2, spec.hidden).float().clone().requires_grad_()
    if point.variant == "forward":
        return lambda: layer(x, cos, sin)
    out = layer(x, cos, sin)
    inputs = [x, *layer.parameters()]
    gradient = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)
