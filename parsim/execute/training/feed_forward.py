"""The feed-forward of a layer: dense, or a mixture of experts that may lie on several ranks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from parsim.execute.training.layer_collectives import LayerGroup
from parsim.model import ModelSpec


class FeedForward(nn.Module):  # type: ignore[misc]
    """Two matrices with GELU, or three with SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, spec: ModelSpec, width: int, *, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(spec.hidden, width, bias=bias) if spec.gated_mlp else None
        self.up = nn.Linear(spec.hidden, width, bias=bias)
        self.down = nn.Linear(width, spec.hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            return self.down(functional.gelu(self.up(x)))
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Experts(nn.ModuleDict):  # type: ignore[misc]
    """The routed experts of one layer that lie on this rank, by their numbers in the whole model."""

    def __init__(self, spec: ModelSpec, ranks: LayerGroup | None) -> None:
        """`ranks` share the experts, in order; None: all are here."""
        moe = spec.moe
        assert moe is not None
        count, index = (1, 0) if ranks is None else (ranks.size, ranks.index)
        each = moe.experts // count
        super().__init__(
            {
                str(i): FeedForward(spec, moe.ffn_hidden, bias=moe.expert_bias)
                for i in range(index * each, (index + 1) * each)
            }
        )
        self.ranks = ranks

    def forward(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Rows [n, h] in order of their expert, `counts` [experts] for each: what the experts make of
        them, in the same order.
        """
        if self.ranks is None:
            return self._compute(rows, counts.tolist())
        ones = [1] * self.ranks.size
        here = self.ranks.all_to_all(counts.view(self.ranks.size, -1), ones, ones)  # [ranks, local]
        sent = counts.view(self.ranks.size, -1).sum(dim=1).tolist()
        received = here.sum(dim=1).tolist()
        arrived = self.ranks.exchange(rows, sent, received)
        # They come in the order of their senders; the experts take theirs together.
        numbers = torch.arange(here.shape[1], device=here.device).repeat(self.ranks.size)
        order = numbers.repeat_interleave(here.flatten()).argsort(stable=True)
        made = self._compute(arrived[order], here.sum(dim=0).tolist())
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return self.ranks.exchange(made[back], received, sent)

    def _compute(self, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Each expert's rows through it; one without rows still gets a gradient, of zeros."""
        parts = zip(self.values(), rows.split(counts), strict=True)
        return torch.cat([expert(part) for expert, part in parts])


class MixtureOfExperts(nn.Module):  # type: ignore[misc]
    """Every token goes to its top-k experts, whose results are weighted and summed; none is dropped.

    The weights are the softmax over the scores of the chosen experts (Jiang et al. 2024, Mixtral, arXiv
    2401.04088, section 2.1). No loss balances the load.
    """

    def __init__(self, spec: ModelSpec, ranks: LayerGroup | None) -> None:
        super().__init__()
        moe = spec.moe
        assert moe is not None
        self.top_k = moe.top_k
        self.num_experts = moe.experts
        self.router = nn.Linear(spec.hidden, moe.experts, bias=moe.expert_bias)
        self.experts = Experts(spec, ranks)
        self.shared = self.shared_gate = None
        if moe.shared_ffn_hidden:
            self.shared = FeedForward(spec, moe.shared_ffn_hidden, bias=moe.expert_bias)
            self.shared_gate = nn.Linear(spec.hidden, 1, bias=False) if moe.shared_gate else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores, chosen = self.router(x).flatten(0, 1).topk(self.top_k)
        wide = scores.float() if scores.dtype.itemsize < 4 else scores
        weights = wide.softmax(dim=-1).to(x.dtype).flatten()
        order = chosen.flatten().argsort(stable=True)  # copies of tokens, by expert
        source = order // self.top_k
        tokens = x.flatten(0, 1)
        made = self.experts(tokens[source], chosen.flatten().bincount(minlength=self.num_experts))
        weighted = made * weights[order, None]
        out = torch.zeros_like(tokens).index_add(0, source, weighted).view_as(x)
        if self.shared is None:
            return out
        shared = self.shared(x)
        return out + (shared if self.shared_gate is None else shared * self.shared_gate(x).sigmoid())
