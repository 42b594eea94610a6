"""A file of tokens to train on: one flat array of whole numbers, mapped into memory and never loaded.

`.npy` says its own dtype; `.bin` is bare numbers, as nanoGPT writes them. Ranks see a TokenFile, which
needs the standard library alone; opening and checking one needs numpy.

Sequence i is tokens i·s to (i+1)·s, and its targets are one further, so neighbours share one token.
Step k takes the `global_batch` sequences after those of step k − 1, and behind the last sequence comes
the first: a step's number says where in the file it reads, under every plan.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parsim.errors import ParsimError

if TYPE_CHECKING:
    import numpy as np

    from parsim.plan import Job

DTYPES = ("uint16", "uint32", "int32")
_CHECKED_AT_ONCE = 1 << 24
"""Tokens whose range is looked at in one go: 64 MiB."""
_DIGESTED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFile:
    """Where the tokens lie, and in which form."""

    path: str
    """Absolute."""
    dtype: str
    """uint16, uint32 or int32, in the machine's byte order."""
    offset_bytes: int
    """Where the first token begins."""
    num_tokens: int
    digest: str
    """Of length, dtype and the first and last mebibyte: tells one file from another."""

    def num_sequences(self, seq_len: int) -> int:
        """Sequences with all their targets."""
        return (self.num_tokens - 1) // seq_len


def open_tokens(path: Path, dtype: str | None, job: Job, steps: int) -> TokenFile:
    """A token file that is fit for `steps` steps of a job.

    `dtype` is that of a .bin file. Raises ParsimError for a file that is missing, of another form or
    too short for one sequence, and for a token outside the model's vocabulary among those to be read.
    """
    tokens, name = _mapped(path, dtype)
    if len(tokens) < job.seq_len + 1:
        raise ParsimError(
            "this token file is too short for one sequence and its targets",
            where=str(path),
            got=f"{len(tokens)} tokens",
            expected=f"at least {job.seq_len + 1}",
        )
    used = min(len(tokens), steps * job.tokens + 1)
    for first in range(0, used, _CHECKED_AT_ONCE):
        _check_range(tokens[first : min(used, first + _CHECKED_AT_ONCE)], first, path, job)
    offset = int(getattr(tokens, "offset", 0))
    return TokenFile(
        path=str(path.resolve()),
        dtype=name,
        offset_bytes=offset,
        num_tokens=len(tokens),
        digest=_digest(path, len(tokens), name),
    )


def _mapped(path: Path, dtype: str | None) -> tuple[np.ndarray[Any, Any], str]:
    """The file as an array, and its dtype's name."""
    import numpy as np

    if path.suffix not in (".npy", ".bin"):
        raise ParsimError("unknown kind of token file", where=str(path), expected=".npy or .bin")
    try:
        with warnings.catch_warnings(action="ignore"):  # of headers that Python 2 wrote
            tokens = _bare(path, dtype) if path.suffix == ".bin" else np.load(path, mmap_mode="r")
    except ParsimError:
        raise
    except (OSError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ParsimError("cannot read this file", where=str(path), got=reason) from None
    except Exception as error:  # numpy parses the header as Python, and lets out whatever that raises
        raise ParsimError("this is no array of numpy", where=str(path), got=str(error)) from None
    if not isinstance(tokens, np.memmap) or tokens.ndim != 1 or tokens.dtype.name not in DTYPES:
        raise ParsimError(
            "a token file holds one row of whole numbers",
            where=str(path),
            got=f"{getattr(tokens, 'dtype', type(tokens).__name__)} {getattr(tokens, 'shape', '')}",
            expected=", ".join(DTYPES),
        )
    if not tokens.dtype.isnative:
        raise ParsimError(
            "these numbers have another byte order than this machine",
            where=str(path),
            got=tokens.dtype.str,
            expected=f"{sys.byteorder}-endian",
        )
    return tokens, tokens.dtype.name


def _bare(path: Path, dtype: str | None) -> np.ndarray[Any, Any]:
    """Numbers without a header."""
    import numpy as np

    if dtype is None or dtype not in DTYPES:
        raise ParsimError(
            "a .bin file does not say what its numbers are",
            where="--tokens-dtype",
            got=dtype,
            expected=", ".join(DTYPES),
            hint="nanoGPT's files are uint16",
        )
    size = path.stat().st_size
    if not size or size % np.dtype(dtype).itemsize:
        raise ParsimError(
            "this file is no whole number of tokens", where=str(path), got=f"{size} bytes of {dtype}"
        )
    return np.memmap(path, dtype=np.dtype(dtype), mode="r")


def _check_range(tokens: np.ndarray[Any, Any], first: int, path: Path, job: Job) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low >= 0 and high < job.model.vocab:
        return
    wrong = low if low < 0 else high
    at = first + int((tokens == wrong).argmax())
    raise ParsimError(
        "a token lies outside the model's vocabulary",
        where=f"{path}: token {at}",
        got=wrong,
        expected=f"0 to {job.model.vocab - 1}",
        hint="another tokenizer's file, or another --tokens-dtype than it was written with?",
    )


def _digest(path: Path, num_tokens: int, dtype: str) -> str:
    found = hashlib.sha256(f"{num_tokens} {dtype} ".encode())
    with path.open("rb") as file:
        found.update(file.read(_DIGESTED_BYTES))
        file.seek(max(0, path.stat().st_size - _DIGESTED_BYTES))
        found.update(file.read(_DIGESTED_BYTES))
    return found.hexdigest()[:16]
