"""Updates of a pipeline without a flush, as tasks of a Program (PipeDream, PipeDream-2BW).

A stage reduces and applies its gradients by itself, right behind the backward that completes them; no
rank waits for another's norm. What follows on that rank waits for the update.
"""

from __future__ import annotations

from dataclasses import dataclass

from parsim.schedule.action import BACKWARD, Action
from parsim.schedule.program import Task
from parsim.schedule.sync import ReplicaSync
from parsim.timeline import COMPUTE, HOST


@dataclass(slots=True)
class StaleSync(ReplicaSync):
    """Adds reductions and updates to `work`, every `schedule.update_every` micro-batches of a stage."""

    def begin(self) -> None:
        """Nothing comes before the first action: there are no shards to gather."""

    def done(self, rank: int, action: Action) -> None:
        """Update a stage's weights where the action completes their gradients."""
        if not self._completes(action):
            return
        chain, stage, sync = self.work.chain[rank], action.stage, self.cost.syncs[action.stage]
        if sync.reduce_s > 0 and not self.stack.dp_overlap:
            if sync.reduce_kernels_s > 0:
                self._prepare(rank, stage, sync.reduce_kernels_s)
            self._reduce(rank, stage, 1, (chain[-1],))
        ready = (chain[-1], *(() if sync.reduce_s <= 0 else (self.reduced[rank],)))
        seconds, i = sync.optimizer_s, action.micro_batch
        update = Task(rank, COMPUTE, f"update {stage}", "optimizer", seconds, ready, stage, i)
        chain.append(self.work.add(update))
        in_step = self.schedule.num_micro_batches // self.schedule.steps
        if self.stack.step_overhead_s > 0 and (i + 1) % in_step == 0:
            host_s, after = self.stack.step_overhead_s, (chain[-1],)
            chain.append(self.work.add(Task(rank, HOST, "host", "host", host_s, after, stage, i)))

    def finish(self) -> None:
        """Nothing follows the last backward but its own update."""

    def _completes(self, action: Action) -> bool:
        return action.kind == BACKWARD and (action.micro_batch + 1) % self.schedule.update_every == 0

    def _reduces(self, action: Action) -> bool:
        """Whether gradients are reduced piece by piece behind this action."""
        reduce_s = self.cost.syncs[action.stage].reduce_s
        return self.stack.dp_overlap and reduce_s > 0 and self._completes(action)
