"""What a part of the model does on one rank, as kernels and transfers without times.

One list of operations is the single source for FLOPs, bytes moved, bytes communicated and activations
kept; parsim.cost.price turns it into seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Pass = Literal["forward", "backward"]
PASSES: tuple[Pass, ...] = ("forward", "backward")
Stream = Literal["tp", "cp", "ep"]


Beside = Literal[
    "attention",  # a ring of transfers, by construction (context parallelism)
    "next forward",  # one product of the next Gemm in the list, or of the previous one
    "next input_grad",
    "next weight_grad",
    "previous forward",
    "previous input_grad",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm:
    """Y[m, n] = X[m, k] W[k, n], `batch` times; its backward is dX = dY Wᵀ and dW = dYᵀ X."""

    name: str
    m: int
    n: int
    k: int
    batch: int = 1
    columns: tuple[int, ...] = ()
    """Widths of the matrices that are multiplied as one (they add up to n); empty: one."""
    low_precision: bool = False
    """Runs in the job's narrow dtype (fp8 …) where it has one; else in that of the activations."""
    expert: bool = False
    """W belongs to routed experts, one to each of the batch."""
    saved_bytes: float = 0.0
    """Bytes of X kept for the backward."""

    @property
    def flops(self) -> float:
        """FLOPs of the forward; each of the two backward GEMMs has as many."""
        return 2.0 * self.m * self.n * self.k * self.batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """softmax(Q Kᵀ) V over `batch` sequences, causal, on `heads` heads of this rank."""

    name: str = "attention"
    batch: int
    seq_len: int
    context_ranks: int
    """cp: ranks that share the sequence; each has an equal share of the pairs under the causal mask."""
    fused: bool
    """One flash kernel; else two batched GEMMs, and the softmax is an Elementwise beside them."""
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int = 0
    saved_bytes: float = 0.0
    """Kept for the backward beside Q, K and V: scores and masks where they leave the chip."""
    qkv_bytes: float = 0.0
    """Q, K and V, kept for the backward even where the scores are recomputed."""

    @property
    def flops(self) -> float:
        """FLOPs of the forward with nothing left out under the causal mask (or outside the window)."""
        seen = min(self.seq_len, self.window or self.seq_len)
        pairs = float(self.batch) * self.heads * self.seq_len * seen / self.context_ranks
        return 2.0 * pairs * (self.head_dim + self.v_head_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Elementwise:
    """Kernels bound by memory traffic: norms, activations, residuals, casts, lookups."""

    name: str
    forward_bytes: float
    """Bytes read and written by the forward."""
    backward_bytes: float
    saved_bytes: float = 0.0
    routed: bool = False
    """Works on tokens in the order of their experts, or brings them into it and back."""
    attention_core: bool = False
    """Belongs to the part of attention that selective recomputation runs again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A collective among the ranks that share this part of the model."""

    name: str
    stream: Stream
    kind: str
    num_bytes: float
    """Of the full buffer, as nccl-tests counts."""
    when: Pass
    top_k: int = 0
    """Of a dispatch to experts: ranks that each token goes to, drawn among the group's; the buffer holds
    a copy for each."""
    beside: Beside | None = None
    """Compute that this runs beside; None: in the way."""


Operation: TypeAlias = Gemm | Attention | Elementwise | Transfer
