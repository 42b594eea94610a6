"""A folder of checkpoints: which are complete, which is newest, and whether one fits what is run.

DIR/step-00000020/           a checkpoint after 20 steps: files of torch.distributed.checkpoint, and
DIR/step-00000020/parsim.json   what was trained, how far, and how long each file is
DIR/step-00000030.part/      one that is being written, or never was finished
DIR/launch.txt               the launch of torchrun's that began or resumed here last, if it was torchrun

A checkpoint gets its name in the moment it is complete. Standard library only.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from parsim.errors import ParsimError
from parsim.execute.request import Case
from parsim.execute.steps import StepRecord
from parsim.units import format_bytes

KEPT = 2
"""Complete checkpoints that stay: should the newest be damaged, there is one before it."""
_MANIFEST = "parsim.json"
_CLAIM = "launch.txt"
_SCHEMA_VERSION = 1
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NEARLY_FULL_BYTES = 2**20
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A complete checkpoint."""

    path: Path
    step: int
    """Optimizer steps that it has behind it, warm-up counted; the next one to run has this number."""
    plan: str
    """The short form of the plan it was written under."""
    plan_since: int
    """The first step that ran under this plan."""
    identity: dict[str, Any]
    """What must be equal where it is loaded."""
    steps: tuple[StepRecord, ...]
    """What was measured of every step so far."""


def identity(case: Case) -> dict[str, Any]:
    """What decides how training goes on, by a name for each part: all but the plan."""
    model = {
        f"model.{key}": value
        for key, value in dataclasses.asdict(case.job.model).items()
        if key not in ("name", "source")
    }
    return model | {
        "seq_len": case.job.seq_len,
        "global_batch": case.job.global_batch,
        "optimizer": case.job.optimizer,
        "dtype": case.dtype,
        "seed": case.seed,
        "tokens": "synthetic" if case.tokens is None else case.tokens.digest,
    }


def unfinished(folder: Path, step: int) -> Path:
    """Where the ranks write the checkpoint after `step` steps, until it is complete."""
    return folder / f"{_name(step)}.part"


def complete(folder: Path, case: Case, steps: list[StepRecord], plan_since: int) -> None:
    """Turn what the ranks wrote after `steps` into a checkpoint, and remove the oldest beyond KEPT."""
    step = len(steps)
    part = unfinished(folder, step)
    manifest = {
        "schema_version": _SCHEMA_VERSION,
        "step": step,
        "plan": case.plan.short(),
        "plan_since": plan_since,
        "identity": identity(case),
        "steps": [record._asdict() for record in steps],
        "files": {path.name: path.stat().st_size for path in sorted(part.iterdir())},
    }
    with (part / _MANIFEST).open("w") as file:
        json.dump(manifest, file)
        file.flush()
        os.fsync(file.fileno())
    target = folder / _name(step)
    if target.exists():  # damaged, or of a run that was begun again before it
        _remove(target)
    part.replace(target)
    _sync(folder)
    for old in _named(folder)[:-KEPT]:
        _remove(old)


def unwritten(folder: Path, step: int, error: Exception) -> NoReturn:
    """Say why a checkpoint could not be written; what there is of it goes when all ranks have ended.

    Raises ParsimError where the disk is full, which another start would meet again, else the error.
    """
    free_bytes = shutil.disk_usage(folder).free
    # torch's writer does not say it where a write was cut short; a quota leaves space free.
    if free_bytes >= _NEARLY_FULL_BYTES and getattr(error, "errno", None) not in _FULL:
        raise error
    kept = [path.name for path in _named(folder)]
    raise ParsimError(
        "the disk is full: this checkpoint could not be written",
        where=str(folder),
        got=f"{format_bytes(free_bytes)} free after step {step}",
        hint=f"free some space, then --resume goes on from {kept[-1]}"
        if kept
        else "free some space and begin again: there is no earlier checkpoint",
    ) from error


def remove_unfinished(folder: Path) -> None:
    """Remove what killed ranks left behind; nobody may be writing."""
    for path in folder.glob("step-*.part"):
        if _NAME.fullmatch(path.name.partition(".")[0]):
            shutil.rmtree(path, ignore_errors=True)


def newest(folder: Path, *, before: int | None = None) -> Saved | None:
    """The newest complete checkpoint, of fewer than `before` steps; None where there is none.

    One with a missing or shortened file does not count.
    """
    for path in reversed(_named(folder)):
        saved = read_checkpoint(path)
        if saved is not None and (before is None or saved.step < before):
            return saved
    return None


def read_checkpoint(path: Path) -> Saved | None:
    """What a checkpoint says of itself, or None where it is not whole."""
    try:
        data = json.loads((path / _MANIFEST).read_text())
        if data["schema_version"] != _SCHEMA_VERSION:
            return None
        saved = Saved(
            path=path,
            step=data["step"],
            plan=data["plan"],
            plan_since=data["plan_since"],
            identity=data["identity"],
            steps=tuple(StepRecord(**record) for record in data["steps"]),
        )
        sizes = dict(data["files"])
        there = all((path / Path(name).name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return saved if there and _is_sound(saved) else None


def _is_sound(saved: Saved) -> bool:
    """Whether what was read has the types and sizes of what `complete` writes."""
    return (
        all(type(number) is int for number in (saved.step, saved.plan_since))
        and 0 <= saved.plan_since <= saved.step == len(saved.steps)
        and isinstance(saved.plan, str)
        and isinstance(saved.identity, dict)
        and all(type(value) in (int, float, bool) for record in saved.steps for value in record)
    )


def saved_at(folder: Path, step: int) -> Saved:
    """The complete checkpoint after `step` steps, which is known to exist."""
    saved = read_checkpoint(folder / _name(step))
    if saved is None:
        raise ParsimError("this checkpoint is gone or damaged", where=str(folder / _name(step)))
    return saved


def check_fits(saved: Saved, case: Case) -> None:
    """Raises ParsimError, naming every difference, where a checkpoint is of another training."""
    # Through JSON, as what was read: a tuple is a list there.
    mine = json.loads(json.dumps(identity(case)))
    keys = [k for k in {**saved.identity, **mine} if saved.identity.get(k) != mine.get(k)]
    if keys:
        raise ParsimError(
            "this checkpoint is of another training",
            where=str(saved.path),
            got=", ".join(f"{key} {saved.identity.get(key)}" for key in keys),
            expected=", ".join(f"{key} {mine.get(key)}" for key in keys),
            hint="only the plan may differ; another --checkpoint folder starts afresh",
        )


def starting_point(case: Case, *, resume: bool) -> Saved | None:
    """Where a run begins: at a checkpoint if it resumes, else at the start in an empty folder.

    Raises ParsimError where there is nothing to resume, where it does not fit or is already at the
    end, and where a run that does not resume would mix with an earlier one.
    """
    assert case.checkpoint is not None
    folder = Path(case.checkpoint.folder)
    saved = newest(folder) if folder.is_dir() else None
    if not resume:
        if saved is not None:
            raise ParsimError(
                "this folder holds checkpoints of an earlier run",
                where=str(folder),
                got=f"the newest after {saved.step} steps, {saved.plan}",
                hint="--resume goes on from it; another folder starts afresh",
            )
        return None
    if saved is None:
        raise ParsimError(
            "there is no complete checkpoint to resume from",
            where=str(folder),
            hint="the first start goes without --resume",
        )
    check_fits(saved, case)
    if saved.step >= case.total_steps:
        raise ParsimError(
            "the newest checkpoint is already at the end of this run",
            where=str(saved.path),
            got=f"{saved.step} steps done, {case.total_steps} wanted with the warm-up",
            hint="give a larger --steps to train on",
        )
    return saved


def starting_again(case: Case) -> Saved | None:
    """Where a run goes on whose ranks were lost: at the newest checkpoint that leaves a step to run."""
    assert case.checkpoint is not None
    return newest(Path(case.checkpoint.folder), before=case.total_steps)


def is_claimed(folder: Path, launch: str) -> bool:
    """Whether the checkpoints in a folder are those of this launch of torchrun's.

    Only then may it go on from them unasked: torchrun starts ranks again that refused, too.
    """
    try:
        return launch != "" and (folder / _CLAIM).read_text() == launch
    except FileNotFoundError:
        return False


def prepare(folder: Path, launch: str = "") -> None:
    """Make a folder for checkpoints of `launch`, and clear it of unfinished ones."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        (folder / _CLAIM).unlink(missing_ok=True)
        if launch:
            part = folder / f"{_CLAIM}.part"
            part.write_text(launch)
            part.replace(folder / _CLAIM)
    except OSError as error:
        raise ParsimError(
            "cannot write checkpoints here", where=str(folder), got=error.strerror
        ) from None


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint; half of it must not pass for a whole one, so it loses its name first."""
    gone = checkpoint.with_name(f"{checkpoint.name}.old.part")
    checkpoint.replace(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _name(step: int) -> str:
    return f"step-{step:08}"


def _named(folder: Path) -> list[Path]:
    """Folders that have a checkpoint's name, in order of steps."""
    found = [(int(match[1]), p) for p in folder.iterdir() if (match := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk before anything is removed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
