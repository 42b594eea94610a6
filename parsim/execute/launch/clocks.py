"""One clock for the ranks of several machines."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

ROUND_TRIPS = 4


def ranks_per_node() -> int:
    """Ranks on each machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"])


def clock_offset_ns(control: dist.ProcessGroup) -> int:
    """What to add to this machine's clock to have that of rank 0's machine; collective.

    The middle of the quickest of some round trips (Cristian 1989, "Probabilistic clock synchronization",
    section 2): off by less than half of it. Ranks of one machine share a clock.
    """
    size, per_node = dist.get_world_size(control), ranks_per_node()
    rank = dist.get_rank()
    offset = torch.zeros(1, dtype=torch.int64)
    for other in range(per_node, size, per_node):
        if rank == 0:
            for _ in range(ROUND_TRIPS):
                _answer(other, control)
        elif rank == other:
            offset.fill_(min(_ask(control) for _ in range(ROUND_TRIPS))[1])
    if size == per_node:
        return 0
    everyone = [torch.empty_like(offset) for _ in range(size)]
    dist.all_gather(everyone, offset, group=control)
    return int(everyone[rank // per_node * per_node].item())


def _answer(other: int, control: dist.ProcessGroup) -> None:
    message = torch.zeros(1, dtype=torch.int64)
    dist.recv(message, src=other, group=control)
    dist.send(message.fill_(time.perf_counter_ns()), dst=other, group=control)


def _ask(control: dist.ProcessGroup) -> tuple[int, int]:
    """(duration of a round trip, offset that it gives), in ns."""
    message = torch.zeros(1, dtype=torch.int64)
    begin = time.perf_counter_ns()
    dist.send(message, dst=0, group=control)
    dist.recv(message, src=0, group=control)
    end = time.perf_counter_ns()
    return end - begin, int(message.item()) - (begin + end) // 2
