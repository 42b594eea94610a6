"""The threads that gloo receives with, kept from taking the core that computes. Standard library only.

gloo's loop polls its sockets level-triggered: while a message lies there that this rank has not asked
for yet, the loop spins. Where a rank has one core, that is the core which would ask for the message,
and the kernel gives it back no sooner than at the end of a time slice: of all-reduces of 4 KB between
two pinned ranks a quarter took 3 to 4 ms instead of 0.2. With the lowest weight the loop gives way at
once.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

LOOP = "gloo_tcp_loop"
"""Name of the thread, as gloo's tcp transport gives it."""
LOWEST_WEIGHT = 19
"""Niceness. SCHED_IDLE gives way as fast, but then a long message that is sent beside compute waits."""


def let_gloo_give_way() -> int:
    """Give this process's gloo loops the least weight; how many there are.

    To be called when the process groups are there. Without /proc nothing is found.
    """
    found = 0
    for task in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # a thread may end meanwhile
            if (task / "comm").read_text(encoding="ascii").strip() == LOOP:
                os.setpriority(os.PRIO_PROCESS, int(task.name), LOWEST_WEIGHT)
                found += 1
    return found
