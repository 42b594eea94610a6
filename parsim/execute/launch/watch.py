"""The ranks of one launch: watched while they run, and gone when it is over.

A rank that fails leaves a file that says why. One that is killed leaves nothing: it is the first whose
process ends without a file. One that hangs is the one that does not wait for others. Standard library
only.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from parsim.errors import ParsimError
from parsim.execute.launch.heartbeat import WAITING, Beat, Heartbeats, die_with_parent
from parsim.execute.steps import NotFinite

POLL_S = 0.05
START_S = 120.0
"""Silence that is granted before the first step: a busy machine takes long to import torch."""
LAST_WORDS_S = 1.0
"""How long after the first death files of other ranks are waited for."""
END_S = 10.0
"""How long killed processes may take to vanish."""

OnLine = Callable[[dict[str, Any]], None]


class RankLost(ParsimError):  # noqa: N818 - as in "a rank was lost"
    """A rank raised, died or hangs: it may go well when all are started again."""


class Ranks:
    """torchrun and this machine's ranks, as a context: however it is left, none of them stays behind."""

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        folder: Path,
        world_size: int,
        ranks: range,
    ) -> None:
        """`ranks` are those on this machine, of `world_size` on all."""
        self._folder = folder
        self._ranks = ranks
        self._elsewhere = world_size > len(ranks)
        self._heartbeats = Heartbeats(folder / "heartbeats", world_size)
        self._handles: dict[int, int] = {}
        """rank -> file descriptor of its process, readable once it has ended."""
        self._ended: list[int] = []
        """Ranks whose processes have ended, in order."""
        self._log = folder / "log.txt"
        self._progress_read = 0
        with self._log.open("wb") as log:
            self._torchrun = subprocess.Popen(  # noqa: S603
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes to the parent alone, which then ends all
                preexec_fn=die_with_parent,
            )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_all()
        for handle in self._handles.values():
            os.close(handle)
        self._heartbeats.close()

    def watch(self, *, timeout_s: float, on_line: OnLine) -> None:
        """Return when all ranks have left results; raise ParsimError with the rank that did not."""
        last_change, seen = time.monotonic(), self._beats()
        while self._torchrun.poll() is None:
            self._wait_a_moment()
            self._read_progress(on_line)
            if self._failed() is not None:
                break
            beats = self._beats()
            if beats != seen:
                last_change, seen = time.monotonic(), beats
            elif time.monotonic() - last_change > (limit_s := _limit_s(beats, timeout_s)):
                self._blame_hang(beats, limit_s)
        self._read_progress(on_line)
        if not all(self._result(rank).exists() for rank in self._ranks):
            self._blame_failure()

    def _beats(self) -> dict[int, Beat]:
        return {rank: self._heartbeats.read(rank) for rank in self._ranks}

    def _result(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"

    def _error(self, rank: int) -> Path:
        return self._folder / f"error-{rank}.json"

    def _wait_a_moment(self) -> None:
        """Wait until a rank's process ends, or a little while; note which ended first."""
        for rank, beat in self._beats().items():
            if beat.pid and rank not in self._handles:
                try:
                    self._handles[rank] = os.pidfd_open(beat.pid)
                except ProcessLookupError:
                    self._handles[rank] = os.open(os.devnull, os.O_RDONLY)
                    self._ended.append(rank)
        running = {h: rank for rank, h in self._handles.items() if rank not in self._ended}
        poll = select.poll()
        for handle in running:
            poll.register(handle, select.POLLIN)
        ended = poll.poll(POLL_S * 1000)
        self._ended += sorted(running[handle] for handle, _ in ended)

    def _failed(self) -> int | None:
        """The first rank that has ended without leaving its results."""
        return next((rank for rank in self._ended if not self._result(rank).exists()), None)

    def _read_progress(self, on_line: OnLine) -> None:
        path = self._folder / "progress.jsonl"
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._progress_read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._progress_read += len(line)
                on_line(json.loads(line))

    def _blame_failure(self) -> NoReturn:
        """Raise for the rank that failed first."""
        died = self._failed()
        if died is not None and self._error(died).exists():
            message = str(json.loads(self._error(died).read_text())["message"])
            if self._heartbeats.read(died).waits or "by peer" in message:
                # On a busy machine its end is seen together with that of the rank that it lost.
                silent = (rank for rank in self._ended if not self._error(rank).exists())
                died = next((rank for rank in silent if not self._result(rank).exists()), died)
        if died is not None and not self._error(died).exists():
            beat = self._heartbeats.read(died)
            raise self._with_log(
                RankLost(
                    f"rank {died} died without a word",
                    where=_place(beat),
                    got="its process was killed from outside, or crashed",
                    hint="out of memory? the kernel kills the process that needs most",
                )
            )
        deadline = time.monotonic() + LAST_WORDS_S
        errors: dict[int, dict[str, Any]] = {}
        while not errors and time.monotonic() < deadline:
            for rank in self._ranks:
                if self._error(rank).exists():
                    errors[rank] = json.loads(self._error(rank).read_text())
            time.sleep(0.01)
        if not errors:
            raise self._with_log(RankLost("torchrun could not start the ranks", got=self._last_line()))
        rank = min(errors, key=lambda r: errors[r]["time_ns"])
        beat = self._heartbeats.read(rank)
        if self._elsewhere and beat.waits and "parsim" not in errors[rank]:
            raise self._with_log(
                RankLost(
                    f"rank {rank} lost the rank that it waited for",
                    where=_place(beat),
                    got=errors[rank]["message"].strip().split("\n")[0],
                    hint="if it ran on another machine, parsim says there what happened to it",
                )
            )
        raise self._with_log(_as_error(rank, errors[rank], beat))

    def _blame_hang(self, beats: dict[int, Beat], timeout_s: float) -> NoReturn:
        """Raise for the ranks that are stopped, else those that do not wait for others, else all."""
        unborn = [r for r, beat in beats.items() if not beat.pid]
        stopped = [r for r, beat in beats.items() if beat.pid and _is_stopped(beat.pid)]
        active = [r for r, b in beats.items() if b.pid and not b.waits and b.doing != "done"]
        blamed = stopped or unborn or active or list(self._ranks)
        names = ", ".join(map(str, blamed[:8]))
        doing = "; ".join(
            f"rank {r}: {_place(beat)}{' (stopped)' if r in stopped else ''}"
            for r, beat in islice(beats.items(), 16)
        )
        if blamed != list(self._ranks):
            what = f"rank {names} hangs"
        elif self._elsewhere and not (stopped or unborn or active):
            what = "all ranks of this machine wait for another one"
        else:
            what = "all ranks hang"
        raise RankLost(
            what,
            where=doing,
            got=f"no sign of life for {timeout_s:g} s",
            hint="ranks that wait are victims; give a larger timeout if a single action takes that long",
        )

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no output")

    def _with_log(self, error: ParsimError) -> ParsimError:
        """The error with the ranks' output as a note, which --debug shows."""
        error.add_note(self._log.read_text(errors="replace")[-8000:])
        return error

    def _end_all(self) -> None:
        """Kill torchrun and every rank, and wait until they are gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._torchrun.pid, signal.SIGKILL)
        self._torchrun.wait()
        # torchrun's end kills its ranks (die_with_parent); the rest is for ranks that came up just now.
        deadline = time.monotonic() + END_S
        pids = [beat.pid for beat in self._beats().values() if beat.pid]
        while pids and time.monotonic() < deadline:
            pids = [pid for pid in pids if _is_our_rank(pid)]
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


def _limit_s(beats: dict[int, Beat], timeout_s: float) -> float:
    """How long silence is no hang; before the first step, ranks import torch and join."""
    begun = all(beat.step >= 0 for beat in beats.values())
    return timeout_s if begun else max(timeout_s, START_S)


def _as_error(rank: int, found: dict[str, Any], beat: Beat) -> ParsimError:
    """What a rank left, as one error."""
    if "parsim" in found:
        error = ParsimError(**found["parsim"])
        if found["type"] != NotFinite.__name__:  # which all ranks say, with the rank where it came up
            error = error.at(f"rank {rank}")
    else:
        message = found["message"].strip().split("\n")
        error = RankLost(
            f"rank {rank} failed: {found['type']}: {message[0]}",
            where=f"{_place(beat)}",
            got=None if len(message) == 1 else message[-1].strip(),
            hint="--debug shows the rank's traceback",
        )
    error.add_note(found["traceback"])
    return error


def _place(beat: Beat) -> str:
    """Where a rank is, for reading."""
    if not beat.pid:
        return "not started"
    doing = beat.doing.replace(WAITING, "waiting for ") if beat.waits else beat.doing
    return doing if beat.step < 0 else f"step {beat.step}, {doing}"


def _is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger holds a process."""
    return _state(pid) in ("T", "t")


def _is_our_rank(pid: int) -> bool:
    """Whether a process still runs and is a rank, not another that has its number by now."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"parsim.execute.launch.worker" in command


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
