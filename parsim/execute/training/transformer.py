"""A decoder-only transformer in torch, from a ModelSpec: whole, or one pipeline stage of it.

Parts that a stage does not hold are None, and parameters keep the names they have in the whole model, so
a stage is a slice of it. Every parameter is initialised from its name and a seed alone.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from parsim.execute.training.context import WHOLE_SEQUENCES, Context
from parsim.execute.training.feed_forward import FeedForward, MixtureOfExperts
from parsim.execute.training.layer_collectives import LayerGroup
from parsim.model import ModelSpec
from parsim.plan import Recompute

ROPE_BASE = 10_000.0
"""Su et al. 2021 (RoFormer), arXiv 2104.09864, section 3.3."""
INIT_STD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which part of the model a stage holds."""

    layers: range
    first: bool
    """With the embedding."""
    last: bool
    """With the final norm and the head."""
    recomputed: int
    """How many of its layers, the first ones, the backward runs again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What of each layer this rank has, beside its share under tensor parallelism."""

    context: Context = WHOLE_SEQUENCES
    experts: LayerGroup | None = None
    """The ranks that share the experts; None: this one has them all."""


WHOLE_LAYERS = Share()


def whole(spec: ModelSpec) -> Part:
    """All of a model, every layer recomputed if any is."""
    return Part(layers=range(spec.layers), first=True, last=True, recomputed=spec.layers)


def make_norm(spec: ModelSpec, width: int) -> nn.Module:
    """The model's kind of norm."""
    if spec.norm == "rmsnorm":
        return nn.RMSNorm(width, eps=1e-5)
    return nn.LayerNorm(width, eps=1e-5, bias=spec.norm_bias)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions on x [b, s, heads, d]; cos and sin are [s, 1, d/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):  # type: ignore[misc]
    """Causal self-attention with grouped key and value heads (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, spec: ModelSpec, share: Share, recompute_core: bool) -> None:
        super().__init__()
        width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        bias = spec.linear_bias or spec.qkv_bias
        self.head_dim = spec.head_dim
        self.grouped = spec.kv_heads != spec.heads
        self.context = share.context
        self.recompute_core = recompute_core
        self.query = nn.Linear(spec.hidden, width, bias=bias)
        self.key = nn.Linear(spec.hidden, kv_width, bias=bias)
        self.value = nn.Linear(spec.hidden, kv_width, bias=bias)
        self.query_norm = nn.RMSNorm(spec.head_dim, eps=1e-5) if spec.qk_norm else None
        self.key_norm = nn.RMSNorm(spec.head_dim, eps=1e-5) if spec.qk_norm else None
        self.out = nn.Linear(width, spec.hidden, bias=spec.linear_bias)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None
    ) -> torch.Tensor:
        # Heads are counted from the tensor: under tensor parallelism a rank has its share of them.
        q = self.query(x).unflatten(-1, (-1, self.head_dim))
        k = self.key(x).unflatten(-1, (-1, self.head_dim))
        v = self.value(x).unflatten(-1, (-1, self.head_dim))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.recompute_core:
            core = checkpoint(self.core, q, k, v, use_reentrant=False, preserve_rng_state=False)
        else:
            core = self.core(q, k, v)
        return self.out(core.transpose(1, 2).flatten(2))

    def core(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """What selective recomputation runs again; [b, heads, s/cp, d]."""
        return self.context.attention(q, k, v, grouped=self.grouped)


class Block(nn.Module):  # type: ignore[misc]
    """One layer: attention and feed-forward, each behind a norm and added to its input."""

    def __init__(
        self,
        spec: ModelSpec,
        recompute: Recompute,
        *,
        layer: int = 0,
        share: Share = WHOLE_LAYERS,
    ) -> None:
        """`layer` is its number in the model, which tells whether it has experts."""
        super().__init__()
        self.recompute = recompute == "full"
        self.attention_norm = make_norm(spec, spec.hidden)
        self.attention = Attention(spec, share, recompute_core=recompute == "selective")
        self.feed_forward_norm = make_norm(spec, spec.hidden)
        self.feed_forward = (
            MixtureOfExperts(spec, share.experts)
            if spec.is_moe_layer(layer)
            else FeedForward(spec, spec.ffn_hidden, bias=spec.linear_bias)
        )

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None
    ) -> torch.Tensor:
        if self.recompute:
            return checkpoint(self.layer, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
        return self.layer(x, cos, sin)

    def layer(self, x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Table(nn.Module):  # type: ignore[misc]
    """The token embedding's matrix alone: a last stage's copy, which its head uses."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.token = nn.Embedding(spec.vocab, spec.hidden)


class Embedding(nn.Module):  # type: ignore[misc]
    """Tokens [b, s] to hidden states [b, s, h]."""

    positions: torch.Tensor

    def __init__(self, spec: ModelSpec, positions: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("positions", positions[None], persistent=False)
        self.token = nn.Embedding(spec.vocab, spec.hidden)
        learned, rows = spec.position == "learned", spec.position_rows or spec.max_seq_len
        self.position = nn.Embedding(rows, spec.hidden) if learned else None
        self.norm = make_norm(spec, spec.hidden) if spec.embedding_norm else None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens)
        if self.position is not None:
            x = x + self.position(self.positions)
        return x if self.norm is None else self.norm(x)


class Transformer(nn.Module):  # type: ignore[misc]
    """One stage, or all stages, of the model.

    The first stage takes tokens [b, s], others hidden states; the last gives logits, others hidden
    states [b, s, h]. Under tensor parallelism s of hidden states and the vocabulary of logits are the
    rank's share.
    """

    cos: torch.Tensor | None
    sin: torch.Tensor | None

    def __init__(
        self, spec: ModelSpec, part: Part, share: Share, seq_len: int, recompute: Recompute
    ) -> None:
        super().__init__()
        positions = share.context.positions(seq_len)
        self.embedding: Embedding | Table | None = None
        if part.first:
            self.embedding = Embedding(spec, positions)
        elif part.last and spec.tied_embeddings:
            self.embedding = Table(spec)
        again = part.layers[: part.recomputed]
        self.layers = nn.ModuleDict(
            {
                str(i): Block(spec, recompute if i in again else "none", layer=i, share=share)
                for i in part.layers
            }
        )
        self.norm = make_norm(spec, spec.hidden) if part.last and spec.final_norm else None
        self.head = nn.Linear(spec.hidden, spec.vocab, bias=False) if part.last else None
        self.tied = spec.tied_embeddings
        self.tie()
        cos = sin = None
        if spec.position == "rope":
            angles = rope_angles(positions, spec.head_dim)
            dtype = torch.get_default_dtype()
            cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def tie(self) -> None:
        """Let the head use the embedding's matrix, where the model does."""
        if self.tied and self.head is not None:
            assert self.embedding is not None
            self.head.weight = self.embedding.token.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.embedding, Embedding):
            x = self.embedding(x)
        for layer in self.layers.values():
            x = layer(x, self.cos, self.sin)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.head is None else self.head(x)


def rope_angles(positions: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Position times frequency base^(−2i/d), [s, 1, d/2] in float64 (RoFormer, equation 15)."""
    frequency = ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return torch.outer(positions.double(), frequency)[:, None, :]


def build(
    spec: ModelSpec,
    part: Part,
    *,
    seq_len: int,
    recompute: Recompute,
    dtype: torch.dtype,
    device: torch.device,
    seed: int | None,
    share: Share = WHOLE_LAYERS,
) -> Transformer:
    """A part of the model with its parameters' values, which depend on their names and `seed` alone.

    Without a seed it has shapes, but no particular values.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Transformer(spec, part, share, seq_len, recompute)
    finally:
        torch.set_default_dtype(before)
    if seed is not None:
        initialise(model, seed)
    return model


def initialise(model: nn.Module, seed: int) -> None:
    """Values for every parameter: normal ones for matrices, near 1 for norms, near 0 for biases.

    Norms and biases differ from 1 and 0, so that none can be mixed up with another unnoticed.
    """
    for name, parameter in model.named_parameters():
        generator = torch.Generator(device=parameter.device)
        generator.manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        is_norm = parameter.dim() == 1 and name.endswith("weight")
        nn.init.normal_(parameter, 1.0 if is_norm else 0.0, INIT_STD, generator=generator)


def synthetic_tokens(
    vocab: int, seq_len: int, global_batch: int, *, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the tokens that follow them, [global_batch, s] each; alike on every rank."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:tokens:{step}".encode()))
    drawn = torch.randint(0, vocab, (global_batch, seq_len + 1), generator=generator)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
