"""Traffic: a transfer as far as a step depends on it."""

from __future__ import annotations

from typing import NamedTuple

from parsim.cost.collective import Group, collective_s, wire_factor
from parsim.hardware import Cluster


class Traffic(NamedTuple):
    """A transfer: how long it takes, and what each device sends."""

    seconds: float = 0.0
    num_bytes: float = 0.0

    def plus(self, other: Traffic) -> Traffic:
        """Both, one after the other."""
        return Traffic(self.seconds + other.seconds, self.num_bytes + other.num_bytes)

    def times(self, count: float) -> Traffic:
        """The same, `count` times over."""
        return Traffic(count * self.seconds, count * self.num_bytes)


NO_TRAFFIC = Traffic()


def collective(cluster: Cluster, kind: str, num_bytes: float, group: Group) -> Traffic:
    """One collective of `num_bytes` (nccl-tests convention: the full buffer)."""
    sent = wire_factor(kind, group.size) * num_bytes
    return Traffic(collective_s(cluster, kind, num_bytes, group), sent)
