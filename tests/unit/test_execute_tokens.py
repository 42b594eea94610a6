"""Token files: what is refused, and which tokens a rank reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from parsim.errors import ParsimError
from parsim.execute.request import Case
from parsim.execute.token_file import open_tokens
from parsim.model import ModelSpec
from parsim.plan import Job, parse_plan
from parsim.schedule import make_schedule

MODEL = ModelSpec(
    name="m", layers=2, hidden=8, heads=2, kv_heads=2, ffn_hidden=8, gated_mlp=True, vocab=5000,
    max_seq_len=8,
)  # fmt: skip
JOB = Job(model=MODEL, seq_len=8, global_batch=4)


def write(path: Path, tokens: np.ndarray) -> Path:
    if path.suffix == ".npy":
        np.save(path, tokens)
    else:
        tokens.tofile(path)
    return path


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_every_rank_reads_its_own_part_of_one_global_batch(
    tmp_path: Path, dtype: str, suffix: str
) -> None:
    pytest.importorskip("torch")
    from parsim.execute.training.batches import replica_batch, whole_batch

    row = np.random.default_rng(1).integers(0, 5000, 8 * 10 + 5).astype(dtype)
    path = write(tmp_path / f"t{suffix}", row)
    file = open_tokens(path, dtype if suffix == ".bin" else None, JOB, steps=3)
    assert file.num_tokens == 85
    plan = parse_plan("dp=2")
    case = Case(job=JOB, plan=plan, schedule=make_schedule(plan, 2), steps=3, tokens=file)
    for step in range(4):
        tokens, targets = whole_batch(case, step)
        # Ten sequences of eight tokens: the eleventh lacks targets, so the first comes again.
        wanted = [(4 * step + i) % 10 * 8 for i in range(4)]
        assert tokens.tolist() == [row[at : at + 8].tolist() for at in wanted]
        assert targets.tolist() == [row[at + 1 : at + 9].tolist() for at in wanted]
        parts = [replica_batch(case, step, rank) for rank in (0, 1)]
        assert [t for part in parts for t in part[0].tolist()] == tokens.tolist()
        assert [t for part in parts for t in part[1].tolist()] == targets.tolist()


def test_a_file_that_shrank_after_it_was_checked_is_noticed(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from parsim.execute.training.batches import whole_batch

    path = write(tmp_path / "t.npy", np.zeros(100, np.uint16))
    file = open_tokens(path, None, JOB, steps=1)
    write(path, np.zeros(99, np.uint16))
    plan = parse_plan("dp=2")
    case = Case(job=JOB, plan=plan, schedule=make_schedule(plan, 2), steps=3, tokens=file)
    with pytest.raises(ParsimError, match="has changed"):
        whole_batch(case, 0)


REFUSED = {
    "too short": np.zeros(8, np.uint16),
    "outside the model's vocabulary": np.array([1] * 30 + [5000] + [2] * 9, np.uint16),
    "outside the model's  vocabulary": np.array([1] * 30 + [-1] + [2] * 9, np.int32),
    "one row": np.zeros((4, 20), np.uint16),
    "one row of": np.zeros(40, np.float32),
    "one row of whole": np.zeros(40, np.int64),
    "byte order": np.zeros(40, np.dtype(np.uint16).newbyteorder()),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, message: str) -> None:
    path = write(tmp_path / "t.npy", REFUSED[message])
    with pytest.raises(ParsimError, match=" ".join(message.split())) as caught:
        open_tokens(path, None, JOB, steps=1)
    if "vocabulary" in message:
        assert caught.value.where is not None
        assert caught.value.where.endswith("token 30")


def test_only_what_is_read_must_fit(tmp_path: Path) -> None:
    path = write(tmp_path / "t.npy", np.array([1] * 70 + [6000], np.uint16))
    open_tokens(path, None, JOB, steps=2)
    with pytest.raises(ParsimError, match="vocabulary"):
        open_tokens(path, None, JOB, steps=3)


@pytest.mark.parametrize(
    ("name", "content", "dtype", "message"),
    [
        ("t.bin", b"\0" * 80, None, "does not say"),
        ("t.bin", b"\0" * 80, "float32", "does not say"),
        ("t.bin", b"\0" * 81, "uint16", "no whole number of tokens"),
        ("t.bin", b"", "uint16", "no whole number of tokens"),
        ("t.txt", b"words", None, "unknown kind"),
        ("t.npy", b"no numpy at all", None, "no array of numpy"),
        ("t.npy", b"", None, "cannot read"),
    ],
)
def test_a_file_of_another_form_is_refused(
    tmp_path: Path, name: str, content: bytes, dtype: str | None, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ParsimError, match=message):
        open_tokens(tmp_path / name, dtype, JOB, steps=1)


def test_a_missing_file_and_one_that_would_run_code_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ParsimError, match="cannot read"):
        open_tokens(tmp_path / "absent.npy", None, JOB, steps=1)
    np.save(tmp_path / "objects.npy", np.array([{}] * 40, dtype=object), allow_pickle=True)
    with pytest.raises(ParsimError, match="no array of numpy"):
        open_tokens(tmp_path / "objects.npy", None, JOB, steps=1)


def test_the_digest_tells_files_apart(tmp_path: Path) -> None:
    row = np.arange(100, dtype=np.uint16)
    digests = [
        open_tokens(write(tmp_path / f"{i}.npy", tokens), None, JOB, steps=1).digest
        for i, tokens in enumerate((row, row, row[::-1].copy(), row[:-1], row.astype(np.int32)))
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_the_job_says_how_long_a_sequence_is(tmp_path: Path) -> None:
    path = write(tmp_path / "t.npy", np.zeros(100, np.uint16))
    file = open_tokens(path, None, JOB, steps=1)
    assert file.num_sequences(8) == 12
    assert file.num_sequences(99) == 1
    longer = dataclasses.replace(JOB, seq_len=100)
    with pytest.raises(ParsimError, match="too short"):
        open_tokens(path, None, longer, steps=1)
