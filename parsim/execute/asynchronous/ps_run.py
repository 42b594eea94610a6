"""A case on workers and parameter servers, as each rank runs it: timed, or held against one process."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from parsim.execute.asynchronous.ps_ledger import PULL, Event
from parsim.execute.asynchronous.ps_ranks import (
    Server,
    Worker,
    absolute_spans,
    shard_bounds,
    whole_model,
)
from parsim.execute.gloo_threads import let_gloo_give_way
from parsim.execute.request import Case
from parsim.execute.training.batches import whole_batch
from parsim.execute.training.parallelize import token_loss
from parsim.execute.training.recorder import Recorder
from parsim.execute.training.timing import about_device, reading
from parsim.execute.training.trainer import make_optimizer

AGAINST_ORDER = "one process with the recorded order of pulls and pushes"
AGAINST_WHOLE = "single-process training"
Losses = list[list[float]]
"""Of each worker's steps."""


def run_served_case(
    case: Case,
    device: torch.device,
    recorder: Recorder,
    control: dist.ProcessGroup,
    folder: Path,
    index: int,
) -> dict[str, Any]:
    """What this rank did and when; with case.verify, how far all were from one process."""
    works = dist.get_rank() < case.plan.dp
    actor = (Worker if works else Server)(case, device, recorder)
    let_gloo_give_way()
    recorder.say("waiting: start of the run")
    dist.barrier(group=control)
    before = reading()
    start_ns = recorder.begin_step(0)
    if isinstance(actor, Worker):
        with (folder / "progress.jsonl").open("a") as progress:
            _work(actor, progress if actor.rank == 0 and not case.verify else None, index)
    else:
        actor.serve()
    end_ns = recorder.end_step()
    since = reading().since(before)
    recorder.say("waiting: end of the run")
    if case.verify:
        return _verified(case, actor, device, control)
    return about_device(device) | {
        "start_ns": start_ns,
        "end_ns": end_ns,
        "cpu_since_s": since,
        "spans": absolute_spans(recorder),
        "losses": actor.losses if isinstance(actor, Worker) else [],
        "times_ns": actor.times if isinstance(actor, Worker) else [],
        "events": actor.ledger.events if isinstance(actor, Server) else [],
        "max_lead": actor.ledger.max_lead if isinstance(actor, Server) else 0,
    }


def _work(worker: Worker, progress: TextIO | None, index: int) -> None:
    """All steps of a worker; one of them tells of its own."""
    for step in range(worker.case.total_steps):
        worker.step(step)
        if progress is not None:
            time_s = (time.perf_counter_ns() - worker.times[-1].ready_ns) * 1e-9
            line = {"case": index, "step": step - worker.case.warmup, "time_s": time_s}
            progress.write(json.dumps(line | {"loss": worker.losses[-1], "slow": {}}) + "\n")
            progress.flush()


def _verified(
    case: Case, actor: Worker | Server, device: torch.device, control: dist.ProcessGroup
) -> dict[str, Any]:
    """Largest errors of losses and of the weights in the end, found on rank 0, alike on all; collective.

    The gradients' error is max |Δw| / max |w − w₀|.
    """
    mine: tuple[Any, ...]
    if isinstance(actor, Server):
        mine = actor.ledger.events, actor.master, actor.initial
    else:
        mine = (actor.losses,)
    everyone: list[Any] = [None] * case.world_size
    dist.all_gather_object(everyone, mine, group=control)
    found = [0.0, 0.0]
    assert case.servers is not None
    if dist.get_rank() == 0:
        workers, servers = everyone[: case.plan.dp], everyone[case.plan.dp :]
        losses: Losses = [own for (own,) in workers]
        events, shards, initial = zip(*servers, strict=True)
        after, before = torch.cat(shards), torch.cat(initial)
        if case.servers.bound == 0:
            expected, weights = _trained_whole(case, device)
            losses = [[sum(step) / len(losses)] for step in zip(*losses, strict=True)]
        else:
            expected, weights = _replayed(case, device, events)
        moved = (weights - before).abs().max()
        found = [
            ((after - weights).abs().max() / moved).item(),
            (_exact(losses) / _exact(expected) - 1).abs().max().item(),
        ]
    dist.broadcast_object_list(found, src=0, group=control)
    return {
        "max_gradient_error": found[0],
        "parameter": "all, at the end",
        "max_loss_error": found[1],
        "steps": case.steps,
        "against": AGAINST_WHOLE if case.servers.bound == 0 else AGAINST_ORDER,
    }


def _trained_whole(case: Case, device: torch.device) -> tuple[Losses, torch.Tensor]:
    """The loss of each step and the last weights of training on whole batches."""
    model, bucket = whole_model(case, device)
    optimizer = make_optimizer(case.job.optimizer, list(model.parameters()))
    losses = []
    for step in range(case.total_steps):
        tokens, targets = whole_batch(case, step)
        loss = token_loss(model(tokens.to(device)), targets.to(device), None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append([loss.item()])
    return losses, bucket.flat


def _replayed(
    case: Case, device: torch.device, events: tuple[list[Event], ...]
) -> tuple[Losses, torch.Tensor]:
    """The same pulls and pushes one after another, server by server as far as each can go.

    A worker's gradient is taken from what its pulls read at every server, and is there once all were.
    """
    model, bucket = whole_model(case, device)
    bounds = shard_bounds(case, bucket.flat.numel())
    shards = [bucket.flat[first:last].clone() for first, last in bounds]
    optimizers = [make_optimizer(case.job.optimizer, [shard]) for shard in shards]
    losses: Losses = [[] for _ in range(case.plan.dp)]
    pulled: dict[tuple[int, int], dict[int, torch.Tensor]] = defaultdict(dict)
    gradients: dict[tuple[int, int], torch.Tensor] = {}
    done = [Counter[tuple[int, int]]() for _ in events]
    """Of each server: how many pulls and pushes of each worker it has seen."""
    at = [0] * len(shards)
    while any(place < len(own) for place, own in zip(at, events, strict=True)):
        before = list(at)
        for server, own in enumerate(events):
            while at[server] < len(own):
                kind, worker, _ = own[at[server]]
                step = worker, done[server][kind, worker]
                if kind == PULL:
                    pulled[step][server] = shards[server].clone()
                    if len(pulled[step]) == len(shards):
                        parts = pulled.pop(step)
                        bucket.flat.copy_(torch.cat([parts[k] for k in range(len(shards))]))
                        losses[worker].append(_gradients_of(case, model, *step, device))
                        gradients[step] = bucket.gather_gradients()
                elif step not in gradients:
                    break  # another server has not answered this worker's pull yet
                else:
                    shards[server].grad = gradients[step][slice(*bounds[server])]
                    optimizers[server].step()
                done[server][kind, worker] += 1
                at[server] += 1
        assert at != before, "the recorded order waits for itself"
    return losses, torch.cat(shards)


def _gradients_of(
    case: Case, model: torch.nn.Module, worker: int, step: int, device: torch.device
) -> float:
    """Leave the gradients of a worker's step on the model's parameters; its loss."""
    size = case.job.global_batch // case.plan.dp
    tokens, targets = (part.to(device)[worker * size :][:size] for part in whole_batch(case, step))
    loss = token_loss(model(tokens), targets, None)
    loss.backward()
    return float(loss.item())


def _exact(losses: Losses) -> torch.Tensor:
    return torch.tensor(losses, dtype=torch.float64)
