"""Workers and parameter servers as real ranks: ranks 0 … w − 1 work, the others serve.

All speak point to point over gloo. A worker's request names itself, so that a server can take requests
from anybody in the order of their arrival; what follows a request goes under a tag of its own.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from parsim.errors import ParsimError
from parsim.execute.asynchronous.ps_ledger import PULL, PUSH, Ledger
from parsim.execute.request import Case
from parsim.execute.training.batches import Batch, replica_batch
from parsim.execute.training.parallelize import token_loss
from parsim.execute.training.recorder import Label, Recorder
from parsim.execute.training.replicas import Bucket, adopt
from parsim.execute.training.trainer import DTYPES, make_optimizer
from parsim.execute.training.transformer import Transformer, build, whole
from parsim.schedule.action import BACKWARD, FORWARD, Action
from parsim.timeline import COMPUTE, DP

_REQUEST, _GRADIENT, _ALLOWED, _PARAMETERS, _APPLIED = range(1, 6)
"""Tags."""


class StepTimes(NamedTuple):
    """One step of a worker on the host's clock; each time is when the part before it was over."""

    ready_ns: int
    allowed_ns: int
    pulled_ns: int
    computed_ns: int
    applied_ns: int


def whole_model(case: Case, device: torch.device) -> tuple[Transformer, Bucket]:
    """The model, its parameters one after another in one bucket."""
    model = build(
        case.job.model,
        whole(case.job.model),
        seq_len=case.job.seq_len,
        recompute=case.plan.recompute,
        dtype=DTYPES[case.dtype],
        device=device,
        seed=case.seed,
    )
    bucket = Bucket(0, dict(model.named_parameters()))
    adopt(model, bucket.parameters)
    return model, bucket


def shard_bounds(case: Case, parameters: int) -> list[tuple[int, int]]:
    """Where each server's part of the flat parameters begins and ends."""
    assert case.servers is not None
    shares = case.servers.shares
    cuts = [round(parameters * sum(shares[:k]) / sum(shares)) for k in range(len(shares) + 1)]
    return list(pairwise(cuts))


class Worker:
    """A replica that pulls parameters, computes, and pushes gradients."""

    def __init__(self, case: Case, device: torch.device, recorder: Recorder) -> None:
        assert case.servers is not None
        self.case = case
        self.rank = dist.get_rank()
        self.recorder = recorder
        self.losses: list[float] = []
        self.times: list[StepTimes] = []
        self._requests = {kind: torch.tensor([self.rank, kind]) for kind in (PULL, PUSH)}
        self._device = device
        self._count = case.plan.num_micro_batches(case.job)
        self._model, self._bucket = whole_model(case, device)
        bounds = shard_bounds(case, self._bucket.flat.numel())
        self._shards = [self._bucket.flat[first:last] for first, last in bounds]
        self._bounds = bounds
        self._servers = range(case.plan.dp, case.world_size)

    def step(self, step: int) -> None:
        """One step: as soon as the clocks of the others allow it."""
        batch = replica_batch(self.case, step, self.rank)
        ready_ns = time.perf_counter_ns()
        allowed_ns = self._pull()
        pulled_ns = time.perf_counter_ns()
        self.losses.append(self._compute(batch, step))
        computed_ns = time.perf_counter_ns()
        self._push()
        self.times.append(
            StepTimes(ready_ns, allowed_ns, pulled_ns, computed_ns, time.perf_counter_ns())
        )

    def _pull(self) -> int:
        """Take all shards; when the last server had allowed it."""
        # All receives stand before anything is waited for: no server may wait for this worker while
        # another one keeps it waiting.
        allowed = [torch.zeros(1, dtype=torch.int64) for _ in self._servers]
        permits = [dist.irecv(p, s, tag=_ALLOWED) for p, s in zip(allowed, self._servers, strict=True)]
        shards = [
            dist.irecv(shard, server, tag=_PARAMETERS)
            for shard, server in zip(self._shards, self._servers, strict=True)
        ]
        with self.recorder.span(Label(DP, "wait", DP), waits=True):
            for work in (*self._request(PULL), *permits):
                work.wait()
        allowed_ns = time.perf_counter_ns()
        with self.recorder.span(Label(DP, "pull", DP), waits=True):
            for shard in shards:
                shard.wait()
        return allowed_ns

    def _compute(self, batch: Batch, step: int) -> float:
        """Gradients of the mean over this worker's sequences; that loss."""
        tokens, targets = (part.to(self._device) for part in batch)
        total = 0.0
        for i, (inputs, wanted) in enumerate(
            zip(tokens.chunk(self._count), targets.chunk(self._count), strict=True)
        ):
            with self.recorder.act(Action(0, FORWARD, i)):
                loss = token_loss(self._model(inputs), wanted, None) / self._count
            with self.recorder.act(Action(0, BACKWARD, i)):
                loss.backward()
            total += loss.item()
        missing = [name for name, p in self._model.named_parameters() if p.grad is None]
        if missing or total - total != 0:
            raise ParsimError(
                "this step has no gradient for some parameters" if missing else "the loss is not finite",
                where=f"worker {self.rank}, step {step}",
                got=", ".join(missing[:4]) or total,
            )
        return total

    def _push(self) -> None:
        """Hand every server its part of the gradients, and wait until all have applied them."""
        applied = [torch.zeros(1, dtype=torch.int64) for _ in self._servers]
        answers = [dist.irecv(p, s, tag=_APPLIED) for p, s in zip(applied, self._servers, strict=True)]
        with self.recorder.span(Label(DP, "push", DP), waits=True):
            flat = self._bucket.gather_gradients()
            # Nothing is waited for before all is under way: a server takes a whole push at a time.
            requests = self._request(PUSH)
            sends = [
                dist.isend(flat[first:last], server, tag=_GRADIENT)
                for (first, last), server in zip(self._bounds, self._servers, strict=True)
            ]
            for work in (*requests, *sends, *answers):
                work.wait()

    def _request(self, kind: int) -> list[dist.Work]:
        """Ask every server; a request stays as it is until its work is over."""
        return [dist.isend(self._requests[kind], server, tag=_REQUEST) for server in self._servers]


class Server:
    """Holds a part of the parameters, and applies gradients in the order in which they come."""

    def __init__(self, case: Case, device: torch.device, recorder: Recorder) -> None:
        assert case.servers is not None
        self.case = case
        self.recorder = recorder
        self.ledger = Ledger(case.plan.dp, case.servers.bound)
        bucket = whole_model(case, device)[1]
        first, last = shard_bounds(case, bucket.flat.numel())[dist.get_rank() - case.plan.dp]
        self.initial = bucket.flat[first:last].clone()
        self._bucket_dtype = bucket.flat.dtype
        # As everywhere, optimizers work on fp32 where the model computes in 16 bits.
        self.master = self.initial.to(bucket.master.dtype, copy=True)
        self._sum = torch.zeros_like(self.master)
        self._optimizer = make_optimizer(case.job.optimizer, [self.master])

    def serve(self) -> None:
        """Answer until every worker has done all its steps."""
        request = torch.zeros(2, dtype=torch.int64)
        left = 2 * self.case.plan.dp * self.case.total_steps
        for _ in range(left):
            self.recorder.say("waiting: requests")
            dist.recv(request, None, tag=_REQUEST)  # whoever comes first
            worker, kind = request.tolist()
            if kind == PULL:
                self.ledger.ask(worker)
            else:
                self._take(worker)
            for allowed in self.ledger.allowed():
                self._hand_out(allowed)

    def _hand_out(self, worker: int) -> None:
        with self.recorder.span(Label(DP, f"to {worker}", DP)):
            dist.send(torch.tensor([self.ledger.version]), worker, tag=_ALLOWED)
            dist.send(self.master.to(self._bucket_dtype), worker, tag=_PARAMETERS)

    def _take(self, worker: int) -> None:
        gradient = torch.empty_like(self.master)
        with self.recorder.span(Label(DP, f"from {worker}", DP), waits=True):
            dist.recv(gradient, worker, tag=_GRADIENT)
        updates, staleness = self.ledger.push(worker)
        with self.recorder.span(Label(COMPUTE, f"update from {worker}", "optimizer")):
            if self.ledger.is_synchronous:
                self._sum += gradient
                gradient = self._sum / self.case.plan.dp
            if updates:
                self.master.grad = gradient
                self._optimizer.step()
                self._sum.zero_()
        dist.send(torch.tensor([staleness]), worker, tag=_APPLIED)


def absolute_spans(recorder: Recorder) -> list[list[Any]]:
    """Everything this rank did, on the host's clock in ns."""
    return [[*row.label, row.begin_ns, row.end_ns] for row in recorder.rows()]
