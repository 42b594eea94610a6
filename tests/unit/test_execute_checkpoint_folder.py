"""Which checkpoints of a folder count, and what they may be used for."""

from __future__ import annotations

import dataclasses
import io
import pickle
from enum import Enum
from pathlib import Path

import pytest

from parsim.errors import ParsimError
from parsim.execute.launch.checkpoint_folder import (
    check_fits,
    complete,
    newest,
    prepare,
    starting_point,
    unfinished,
)
from parsim.execute.request import Case, Checkpoints
from parsim.execute.steps import StepRecord
from parsim.execute.token_file import TokenFile
from parsim.model import ModelSpec
from parsim.plan import Job, parse_plan
from parsim.schedule import make_schedule

MODEL = ModelSpec(
    name="m", layers=2, hidden=8, heads=2, kv_heads=2, ffn_hidden=8, gated_mlp=True, vocab=16,
    max_seq_len=8,
)  # fmt: skip
TOKENS = TokenFile(path="/t.npy", dtype="uint16", offset_bytes=128, num_tokens=99, digest="abc")


def case(folder: Path, **changes: object) -> Case:
    plan = parse_plan("dp=2")
    job = Job(model=MODEL, seq_len=8, global_batch=4)
    base = Case(
        job=job, plan=plan, schedule=make_schedule(plan, 2), steps=40, warmup=2,
        checkpoint=Checkpoints(folder=str(folder), every=5),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def write(folder: Path, step: int) -> None:
    """What the ranks write, and its completion."""
    part = unfinished(folder, step)
    part.mkdir()
    for rank in (0, 1):
        (part / f"__{rank}_0.distcp").write_bytes(bytes(100 + step))
    complete(folder, case(folder), [StepRecord(1.0, 2.5, 0.0)] * step, plan_since=1)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_two_stay(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100_000_000):
        write(tmp_path, step % 1_000_000 or 20)
    assert steps(tmp_path) == ["step-00000015", "step-00000020"]
    found = newest(tmp_path)
    assert found is not None
    assert (found.step, len(found.steps), found.steps[0].loss) == (20, 20, 2.5)


def test_what_is_being_written_is_no_checkpoint_and_goes_when_nobody_writes(tmp_path: Path) -> None:
    write(tmp_path, 5)
    part = unfinished(tmp_path, 10)
    part.mkdir()
    (part / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "notes.part").mkdir()
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 5
    prepare(tmp_path)
    assert steps(tmp_path) == ["notes.part", "step-00000005"]


@pytest.mark.parametrize("damage", ["shorter", "missing", "no manifest", "half a manifest"])
def test_a_damaged_newest_is_passed_over(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 5)
    write(tmp_path, 10)
    last = tmp_path / "step-00000010"
    if damage == "shorter":
        (last / "__1_0.distcp").write_bytes(b"")
    elif damage == "missing":
        (last / "__1_0.distcp").unlink()
    elif damage == "no manifest":
        (last / "parsim.json").unlink()
    else:
        text = (last / "parsim.json").read_text()
        (last / "parsim.json").write_text(text[: len(text) // 2])
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 5
    write(tmp_path, 10)  # the run comes by again
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 10
    assert steps(tmp_path) == ["step-00000005", "step-00000010"]


def test_a_restart_leaves_itself_a_step_to_run(tmp_path: Path) -> None:
    write(tmp_path, 40)
    write(tmp_path, 42)
    found = newest(tmp_path, before=42)
    assert found is not None
    assert found.step == 40


CHANGES: dict[str, dict[str, object]] = {
    "model.hidden": {"job": Job(model=dataclasses.replace(MODEL, hidden=16, head_dim=8), seq_len=8,
                                global_batch=4)},
    "model.head_dim": {"job": Job(model=dataclasses.replace(MODEL, head_dim=8), seq_len=8,
                                  global_batch=4)},
    "global_batch": {"job": Job(model=MODEL, seq_len=8, global_batch=8)},
    "seq_len": {"job": Job(model=MODEL, seq_len=4, global_batch=4)},
    "optimizer": {"job": Job(model=MODEL, seq_len=8, global_batch=4, optimizer="sgd")},
    "dtype": {"dtype": "fp64"},
    "seed": {"seed": 7},
    "tokens": {"tokens": TOKENS},
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGES)
def test_another_training_is_refused_by_the_name_of_the_difference(tmp_path: Path, key: str) -> None:
    write(tmp_path, 5)
    saved = newest(tmp_path)
    assert saved is not None
    check_fits(saved, case(tmp_path))
    with pytest.raises(ParsimError, match="another training") as caught:
        check_fits(saved, case(tmp_path, **CHANGES[key]))
    assert key in str(caught.value)
    assert "vocab" not in str(caught.value)


def test_another_plan_or_another_name_of_the_model_is_no_difference(tmp_path: Path) -> None:
    write(tmp_path, 5)
    saved = newest(tmp_path)
    assert saved is not None
    job = Job(model=dataclasses.replace(MODEL, name="other"), seq_len=8, global_batch=4)
    check_fits(saved, case(tmp_path, plan=parse_plan("tp=2"), job=job))


def test_a_run_neither_mixes_with_an_earlier_one_nor_resumes_what_is_not_there(tmp_path: Path) -> None:
    assert starting_point(case(tmp_path / "new"), resume=False) is None
    for absent in (tmp_path, tmp_path / "new"):
        with pytest.raises(ParsimError, match="no complete checkpoint"):
            starting_point(case(absent), resume=True)
    write(tmp_path, 5)
    with pytest.raises(ParsimError, match="checkpoints of an earlier run"):
        starting_point(case(tmp_path), resume=False)
    found = starting_point(case(tmp_path), resume=True)
    assert found is not None
    assert found.step == 5
    with pytest.raises(ParsimError, match="already at the end"):
        starting_point(case(tmp_path, steps=3), resume=True)
    assert starting_point(case(tmp_path, steps=4), resume=True) is not None


def test_a_folder_that_cannot_be_made_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ParsimError, match="cannot write checkpoints here"):
        prepare(tmp_path / "file")


class ByAttribute(pickle.Pickler):
    """Pickles members of enumerations as Python 3.11.0 to 3.11.4 did."""

    def reducer_override(self, found: object) -> object:
        return (getattr, (type(found), found.name)) if isinstance(found, Enum) else NotImplemented


def index_with(enumeration: object) -> bytes:
    """Bytes of an index that says how a tensor lies in memory by such an attribute."""
    file = io.BytesIO()
    ByAttribute(file).dump(enumeration)
    return file.getvalue()


def test_an_index_written_by_an_older_python_is_read(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from torch.distributed.checkpoint import metadata

    from parsim.execute.training.checkpoint import IndexReader

    written = metadata.Metadata(
        {"weight": metadata.TensorStorageMetadata(metadata.TensorProperties(), (2,), [])}
    )
    (tmp_path / ".metadata").write_bytes(index_with(written))
    assert b"getattr" in (tmp_path / ".metadata").read_bytes()
    read = IndexReader(tmp_path).read_metadata()
    assert read.state_dict_metadata == written.state_dict_metadata


class Attribute:
    """Takes an attribute that is no member when it is unpickled."""

    def __init__(self, owner: object, name: str) -> None:
        self.taken = (owner, name)

    def __reduce__(self) -> tuple[object, tuple[object, str]]:
        return getattr, self.taken


def test_an_index_takes_no_other_attribute(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from torch.distributed.checkpoint import metadata

    from parsim.execute.training.checkpoint import IndexReader

    for owner, name in ((metadata._MEM_FORMAT_ENCODING, "__class__"), (metadata.Metadata, "__init__")):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(Attribute(owner, name)))
        with pytest.raises(ParsimError, match="something other than an index") as caught:
            IndexReader(tmp_path).read_metadata()
        assert "getattr" in str(caught.value)


class Harmful:
    """Calls a function when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("harm",)


def test_an_index_from_elsewhere_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    from parsim.execute.training.checkpoint import IndexReader

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ParsimError, match="something other than an index") as caught:
        IndexReader(tmp_path).read_metadata()
    assert "builtins.print" in str(caught.value)
    assert "harm" not in capsys.readouterr().out
