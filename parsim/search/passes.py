"""Passes: how long what P plans do takes, as arrays: rows are kinds of stages, columns plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from parsim.plan import ParallelPlan
from parsim.schedule import OVERLAPPED_SCHEDULES, SPLIT_SCHEDULES
from parsim.search.cells import PartFigures
from parsim.search.layout import Floats, Ints, Layout
from parsim.search.replicas import ReplicaTime
from parsim.stack import Stack


class Passes(NamedTuple):
    """(D, P) each unless it says otherwise: D kinds of stages, n stages, P plans of one layout."""

    num_micro_batches: Ints
    """(P,)"""
    forward_s: Floats
    input_grad_s: Floats
    """With the recomputation before it."""
    weight_grad_s: Floats
    backward_s: Floats
    paired_forward_s: Floats
    """In an overlapped pair whose other pass has compute enough."""
    paired_input_grad_s: Floats
    paired_backward_s: Floats
    send_s: Floats
    """(n − 1, P): between stages."""
    replicas: ReplicaTime[Floats]

    def columns(self, which: Ints) -> Passes:
        """Some of the plans, by number."""
        replicas = ReplicaTime(*(figures[:, which] for figures in self.replicas))
        rest = {key: getattr(self, key)[:, which] for key in _FIGURES}
        return Passes(num_micro_batches=self.num_micro_batches[which], replicas=replicas, **rest)

    def least_s(self, plan: ParallelPlan) -> tuple[Floats, Floats, Floats]:
        """The least that passes take under the schedule of a plan: a forward, a backward until the
        gradient of its input is there, and a whole backward.
        """
        split = plan.schedule in SPLIT_SCHEDULES
        if plan.schedule in OVERLAPPED_SCHEDULES:
            return self.paired_forward_s, self.paired_input_grad_s, self.paired_backward_s
        return self.forward_s, self.input_grad_s if split else self.backward_s, self.backward_s


_FIGURES = Passes._fields[1:-1]


def of_ranks(layout: Layout, figures: Floats) -> Floats:
    """(pp, P): sums over the stages of each rank, of figures (D, P)."""
    sums: Floats = figures[layout.kind[layout.own]].sum(axis=1)
    return sums


def passes_of(
    plan: ParallelPlan,
    num_micro_batches: Ints,
    stages: PartFigures,
    send_s: Floats,
    replicas: ReplicaTime[Floats],
    stack: Stack,
) -> Passes:
    """The passes of P plans that differ from `plan` in ZeRO stage and cell; `stages` are (D, P)."""
    host_s = stack.action_host_s if plan.pp > 1 else 0.0
    hidden = 1 - stack.overlap_cost if stack.pair_overlap else 0.0
    forward = stages.forward_s + (host_s + replicas.gather_each_s)
    input_grad = stages.hand_back_s + (host_s + replicas.gather_each_s)
    backward = input_grad + stages.weight_grad_s + replicas.reduce_each_s
    both_exchange_s = stages.hand_back_exchange_s + stages.weight_grad_exchange_s
    return Passes(
        num_micro_batches=num_micro_batches,
        forward_s=forward,
        input_grad_s=input_grad,
        weight_grad_s=stages.weight_grad_s + (host_s + replicas.reduce_each_s),
        backward_s=backward,
        paired_forward_s=forward - hidden * stages.forward_exchange_s,
        paired_input_grad_s=input_grad - hidden * stages.hand_back_exchange_s,
        paired_backward_s=backward - hidden * both_exchange_s,
        send_s=send_s,
        replicas=replicas,
    )


def joined(groups: Sequence[Passes]) -> Passes:
    """The plans of several groups of one layout."""
    replicas = zip(*(group.replicas for group in groups), strict=True)
    figures = {
        key: np.concatenate([getattr(group, key) for group in groups], axis=1) for key in _FIGURES
    }
    return Passes(
        num_micro_batches=np.concatenate([group.num_micro_batches for group in groups]),
        replicas=ReplicaTime(*(np.concatenate(parts, axis=1) for parts in replicas)),
        **figures,
    )
