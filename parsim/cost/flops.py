"""FLOPs of a training step as publications count them."""

from __future__ import annotations

from parsim.model import ModelSpec, num_parameters
from parsim.plan import Job


def model_flops_per_token(model: ModelSpec, seq_len: int, *, causal: bool = False) -> float:
    """Forward and backward FLOPs of a token, without recomputation.

    6N + 12·L·H·Q·T with N parameters that the token meets, L layers, H heads of width Q, T tokens: PaLM
    (Chowdhery et al. 2022), arXiv 2204.02311, appendix B. With `causal` the attention term is halved.
    """
    attention_width = 2 * model.heads * model.head_dim
    if model.mla is not None:
        qk = model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim
        attention_width = model.heads * (qk + model.mla.v_head_dim)
    attention = 6.0 * model.layers * attention_width * seq_len
    return 6.0 * num_parameters(model, active=True) + attention * (0.5 if causal else 1.0)


def model_flops(job: Job, *, causal: bool = False) -> float:
    """Model FLOPs of a whole step."""
    return job.tokens * model_flops_per_token(job.model, job.seq_len, causal=causal)
