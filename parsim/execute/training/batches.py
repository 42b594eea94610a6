"""The tokens of a step: the same global batch under every plan, of which a rank reads its part."""

from __future__ import annotations

import functools
import os

import torch

from parsim.errors import ParsimError
from parsim.execute.request import Case
from parsim.execute.token_file import TokenFile
from parsim.execute.training.transformer import synthetic_tokens

Batch = tuple[torch.Tensor, torch.Tensor]
"""Tokens and the tokens that follow them, [sequences, s] each."""

_DTYPES = {"uint16": torch.uint16, "uint32": torch.uint32, "int32": torch.int32}


def whole_batch(case: Case, step: int) -> Batch:
    """The global batch of a step."""
    return _sequences(case, step, range(case.job.global_batch))


def replica_batch(case: Case, step: int, dp_rank: int) -> Batch:
    """The sequences of the global batch that one dp rank trains on; from a file it reads no others."""
    size = case.job.global_batch // case.plan.dp
    return _sequences(case, step, range(dp_rank * size, (dp_rank + 1) * size))


def _sequences(case: Case, step: int, wanted: range) -> Batch:
    job = case.job
    if case.tokens is None:
        drawn = synthetic_tokens(
            job.model.vocab, job.seq_len, job.global_batch, seed=case.seed, step=step
        )
        return drawn[0][wanted.start : wanted.stop], drawn[1][wanted.start : wanted.stop]
    everything = _mapped(case.tokens)
    count = case.tokens.num_sequences(job.seq_len)
    first = step * job.global_batch
    starts = [(first + i) % count * job.seq_len for i in wanted]
    rows = torch.stack([everything[at : at + job.seq_len + 1].to(torch.int64) for at in starts])
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@functools.cache
def _mapped(file: TokenFile) -> torch.Tensor:
    """All tokens, mapped into memory."""
    try:
        size = os.stat(file.path).st_size
        content = torch.from_file(file.path, shared=False, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise ParsimError("cannot read the token file", where=file.path, got=str(error)) from None
    dtype = _DTYPES[file.dtype]
    if size != file.offset_bytes + file.num_tokens * dtype.itemsize:
        raise ParsimError("the token file has changed", where=file.path, got=f"{size} bytes")
    return content[file.offset_bytes :].view(dtype)
