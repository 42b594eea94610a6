"""Pipelines without a flush on real ranks: PipeDream and PipeDream-2BW.

torch's pipeline runtime ends every step with a flush, so these run on plain sends and receives: 1F1B
from the first micro-batch to the last of all steps, every backward with the weights of its forward.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from parsim.errors import ParsimError
from parsim.execute.training.batches import Batch
from parsim.execute.training.parallelize import token_loss
from parsim.execute.training.recorder import Label
from parsim.execute.training.replicas import Replicas
from parsim.execute.training.trainer import Trainer
from parsim.schedule.action import FORWARD, Action
from parsim.schedule.pipedream import version_of
from parsim.timeline import HOST

Parameters = list[dict[str, nn.Parameter]]
"""Those of a stage, by bucket."""


@dataclass(slots=True)
class _Flight:
    """A micro-batch between its forward and its backward."""

    version: int
    entered: torch.Tensor
    left: torch.Tensor
    """Activations, or on the last stage the loss."""


class StalePipeline:
    """One stage, its versions of the weights, and what it does with each micro-batch of a run."""

    def __init__(self, trainer: Trainer, on_step: Callable[[int], None] | None = None) -> None:
        """`on_step` is told each step whose last update is over."""
        assert isinstance(trainer.data_parallel, Replicas)
        self.trainer = trainer
        self._on_step = on_step
        self.replicas: Replicas = trainer.data_parallel
        self.updated_ns: list[int] = []
        """When each update was over."""
        self.losses: dict[int, float] = {}
        """By micro-batch, on the last stage."""
        self.staleness: Counter[int] = Counter()
        """Updates between the weights of a gradient and those it was added to: how often each."""
        self.most_versions = 0
        ((self._stage, self._module),) = trainer.stages.items()
        self._ranks = dist.get_process_group_ranks(trainer.mesh["pp"].get_group())
        self._last = self._stage == len(self._ranks) - 1
        self._versions: dict[int, Parameters] = {}
        self._flights: dict[int, _Flight] = {}
        self._sends: dict[Action, tuple[dist.Work, torch.Tensor]] = {}
        self._batch: tuple[int, Batch] | None = None
        self._stash()

    @property
    def updates(self) -> int:
        """Updates of the weights so far."""
        return len(self.updated_ns)

    def run(self) -> None:
        """All steps, from an empty pipeline to an empty pipeline."""
        schedule = self.trainer.case.schedule
        with self.trainer.within_step():
            for action in schedule.ranks[self._stage]:
                if action.kind == FORWARD:
                    self._forward(action)
                else:
                    self._backward(action)
                    if (action.micro_batch + 1) % schedule.update_every == 0:
                        self._update(action)
        for work, _ in self._sends.values():
            work.wait()

    def _forward(self, action: Action) -> None:
        i = action.micro_batch
        tokens, targets = self._micro_batch(i)
        entered = tokens if self._stage == 0 else self._receive(action, self._stage - 1)
        version = version_of(self.trainer.case.plan, self._stage, i, self.trainer.num_micro_batches)
        self._use(version)
        with self.trainer.recorder.act(action):
            left = self._module(entered.requires_grad_(self._stage > 0))
            if self._last:
                left = token_loss(left, targets, self.trainer.tp_mesh)
        if self._last:
            self.losses[i] = left.item()
            self._check_loss(i)
            left = left / self.trainer.case.schedule.update_every
        else:
            self._send(action, left.detach(), self._stage + 1)
        self._flights[i] = _Flight(version, entered, left)

    def _backward(self, action: Action) -> None:
        i = action.micro_batch
        gradient = None if self._last else self._receive(action, self._stage + 1)
        flight = self._flights.pop(i)
        self._use(flight.version)
        with self.trainer.recorder.act(action):
            flight.left.backward(gradient)
        self.staleness[self.updates - flight.version] += 1
        if self._stage > 0:
            assert flight.entered.grad is not None
            self._send(action, flight.entered.grad, self._stage - 1)
        # That this gradient came tells that its activations arrived, and gradients before the last one.
        self._sent(Action(self._stage, FORWARD, i))
        self._sent(action._replace(micro_batch=i - 2))

    def _update(self, action: Action) -> None:
        """Apply the gradients that lie on the version just used to the newest weights."""
        self.trainer.require_gradients()
        self.replicas.reduce()
        self.replicas.update()
        self.updated_ns.append(time.perf_counter_ns())
        self._stash()
        step, place = divmod(action.micro_batch, self.trainer.num_micro_batches)
        if self._on_step is not None and place == self.trainer.num_micro_batches - 1:
            self._on_step(step)
        following = version_of(
            self.trainer.case.plan,
            self._stage,
            max([action.micro_batch, *self._flights]) + 1,
            self.trainer.num_micro_batches,
        )
        needed = min([following, *(flight.version for flight in self._flights.values())])
        self._versions = {v: kept for v, kept in self._versions.items() if v >= needed}
        self.most_versions = max(self.most_versions, len(self._versions))

    def _stash(self) -> None:
        """Keep the newest weights for the forwards to come, apart from those that updates change."""
        with self.trainer.recorder.span(Label(HOST, "keep weights", "host", self._stage)):
            self._versions[self.updates] = [bucket.snapshot() for bucket in self.replicas.buckets]

    def _use(self, version: int) -> None:
        self.replicas.adopt(self._module, self._versions[version])

    def _micro_batch(self, i: int) -> Batch:
        """Tokens and targets of a micro-batch of the run; its step's batch is made once."""
        step, place = divmod(i, self.trainer.num_micro_batches)
        if self._batch is None or self._batch[0] != step:
            self._batch = step, self.trainer.batch(step)
        tokens, targets = self._batch[1]
        count = self.trainer.num_micro_batches
        return tokens.chunk(count)[place], targets.chunk(count)[place]

    def _receive(self, action: Action, source: int) -> torch.Tensor:
        """What an action needs, from the stage before or behind this one."""
        case = self.trainer.case
        cut = case.plan.tp if case.plan.sequence_parallel else 1
        shape = (case.plan.micro_batch, case.job.seq_len // cut, case.job.model.hidden)
        buffer = torch.empty(shape, dtype=self.trainer.dtype, device=self.trainer.device)
        carried = action._replace(stage=source)
        stream = "pp_recv_prev" if source < self._stage else "pp_recv_next"
        label = Label(stream, str(carried), "pp", source, action.micro_batch)
        with self.trainer.recorder.span(label, waits=True):
            dist.recv(buffer, src=self._ranks[source])
        return buffer

    def _send(self, action: Action, tensor: torch.Tensor, target: int) -> None:
        stream = "pp_send_next" if target > self._stage else "pp_send_prev"
        label = Label(stream, str(action), "pp", self._stage, action.micro_batch)
        with self.trainer.recorder.span(label):
            tensor = tensor.contiguous()
            self._sends[action] = dist.isend(tensor, dst=self._ranks[target]), tensor

    def _sent(self, action: Action) -> None:
        """Let go of a message that must have arrived."""
        if action in self._sends:
            self._sends.pop(action)[0].wait()

    def _check_loss(self, micro_batch: int) -> None:
        loss = self.losses[micro_batch]
        if loss - loss != 0:
            step = micro_batch // self.trainer.num_micro_batches
            raise ParsimError("the loss is no longer finite", where=f"step {step}", got=loss)


def mean_losses(pipeline: StalePipeline, control: dist.ProcessGroup) -> torch.Tensor:
    """The loss of every micro-batch, as the mean over the replicas, on every rank; collective."""
    total = torch.zeros(2, pipeline.trainer.case.schedule.num_micro_batches, dtype=torch.float64)
    for micro_batch, loss in pipeline.losses.items():
        total[:, micro_batch] = torch.tensor([loss, 1.0], dtype=total.dtype)
    dist.all_reduce(total, group=control)
    return total[0] / total[1]
