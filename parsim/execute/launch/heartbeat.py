"""A line of shared memory for each rank: what it is doing now, for whoever watches.

When a rank hangs, the timeout of the communication library fires on the ranks that wait for it, so the
library blames a victim. These lines tell who waits and who does not. Standard library only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import time
from pathlib import Path
from typing import NamedTuple

_HEADER = struct.Struct("<qqqB")  # pid, step, time in ns, length of the text
_LINE_BYTES = 128
_TEXT_BYTES = _LINE_BYTES - _HEADER.size
_PR_SET_PDEATHSIG = 1

WAITING = "waiting: "
"""Prefix of what a rank does while it depends on another rank."""


class Beat(NamedTuple):
    """The last sign of life of one rank."""

    pid: int
    """0 before the rank's process has started."""
    step: int
    """-1 before the first step."""
    time_ns: int
    """On CLOCK_MONOTONIC, which all processes of a host share."""
    doing: str

    @property
    def waits(self) -> bool:
        return self.doing.startswith(WAITING)


class Heartbeats:
    """The lines of all ranks of one run, in a file that parent and ranks map into memory."""

    def __init__(self, path: Path, world_size: int) -> None:
        size = world_size * _LINE_BYTES
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(handle).st_size < size:
                os.ftruncate(handle, size)
            self._memory = mmap.mmap(handle, size)
        finally:
            os.close(handle)
        self.world_size = world_size
        self._pid = os.getpid()

    def write(self, rank: int, step: int, doing: str) -> None:
        """Say what this process, which is `rank`, does from now on."""
        text = doing.encode()[:_TEXT_BYTES]
        line = _HEADER.pack(self._pid, step, time.perf_counter_ns(), len(text)) + text
        self._memory[rank * _LINE_BYTES : rank * _LINE_BYTES + len(line)] = line

    def read(self, rank: int) -> Beat:
        """What `rank` said last."""
        start = rank * _LINE_BYTES
        pid, step, time_ns, length = _HEADER.unpack_from(self._memory, start)
        text = self._memory[start + _HEADER.size : start + _HEADER.size + length]
        return Beat(pid, step if pid else -1, time_ns, text.decode(errors="replace"))

    def close(self) -> None:
        self._memory.close()


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the one that started it ends, however it ends.

    torchrun starts every rank in a session of its own, so killing torchrun's process group is not
    enough. Linux only; elsewhere nothing happens.
    """
    parent = os.getppid()
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:  # it ended between the two calls
        os.kill(os.getpid(), signal.SIGKILL)
