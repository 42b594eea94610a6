"""The collectives that `parsim calibrate` times between real ranks. Torch and standard library.

Sizes follow nccl-tests: the bytes of the full buffer (all_gather: the gathered total; reduce_scatter:
the input total; send_recv: the message).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from parsim.execute.calibrate.points import Point

Call = Callable[[], object]


def subgroup(size: int) -> dist.ProcessGroup:
    """This rank's group of `size` neighbours; all such groups communicate at once, as in training."""
    mine, _ = dist.new_subgroups(group_size=size)
    return mine


def collective_call(point: Point, group: dist.ProcessGroup, device: str) -> Call:
    """The call to time for a collective point, on this rank of the group."""
    num_bytes, _ = point.size
    # torch 2.13 renames the *_tensor collectives; 2.11 knows only the old names.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*is deprecated.*")
    ranks = dist.get_process_group_ranks(group)
    count = num_bytes // 4
    full = torch.zeros(count, device=device)
    shard = torch.zeros(count // len(ranks), device=device)
    calls: dict[str, Callable[[], Call]] = {
        "all_reduce": lambda: lambda: dist.all_reduce(full, group=group),
        "all_gather": lambda: lambda: dist.all_gather_into_tensor(full, shard, group=group),
        "reduce_scatter": lambda: lambda: dist.reduce_scatter_tensor(shard, full, group=group),
        "all_to_all": lambda: _all_to_all(full, group),
        "broadcast": lambda: _broadcast(full, ranks, group),
        "send_recv": lambda: _ping_pong(full, ranks, group),
    }
    return calls[point.variant]()


def calls_in_one(point: Point) -> int:
    """Messages that one call stands for: a ping-pong is two, and every rank broadcasts once."""
    if point.variant == "broadcast":
        return point.size[1]
    return 2 if point.variant == "send_recv" else 1


def _all_to_all(full: Tensor, group: dist.ProcessGroup) -> Call:
    received = torch.empty_like(full)
    return lambda: dist.all_to_all_single(received, full, group=group)


def _broadcast(full: Tensor, ranks: list[int], group: dist.ProcessGroup) -> Call:
    """Each rank is the root in turn: one root alone would run ahead of its receivers."""

    def round_about() -> None:
        for root in ranks:
            dist.broadcast(full, root, group=group)

    return round_about


def _ping_pong(full: Tensor, ranks: list[int], group: dist.ProcessGroup) -> Call:
    """There and back between the two ranks of a group."""
    first, second = ranks
    if dist.get_rank() == first:

        def ping() -> None:
            dist.send(full, second, group=group)
            dist.recv(full, second, group=group)

        return ping

    def pong() -> None:
        dist.recv(full, first, group=group)
        dist.send(full, first, group=group)

    return pong
