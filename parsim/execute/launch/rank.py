"""What one rank does with its cases: join the others, build its share, run the steps."""

from __future__ import annotations

import gc
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parsim.execute.asynchronous.ps_run import run_served_case
from parsim.execute.asynchronous.stale_check import verify_stale_case
from parsim.execute.asynchronous.stale_run import time_stale_case
from parsim.execute.gloo_threads import let_gloo_give_way
from parsim.execute.launch.clocks import ranks_per_node
from parsim.execute.launch.heartbeat import Heartbeats
from parsim.execute.one_rank.emulation import emulate_case, join_alone
from parsim.execute.request import RESTARTS_FILE, Case, decode_case
from parsim.execute.training.checking import verify_case
from parsim.execute.training.recorder import Recorder
from parsim.execute.training.timing import time_case
from parsim.execute.training.trainer import Trainer
from parsim.plan import ASYNCHRONOUS_SCHEDULES

Results = list[dict[str, Any]]
"""What a rank found for each case, as plain data."""


def run_rank(
    request: dict[str, Any],
    folder: Path,
    heartbeats: Heartbeats,
    progress: Any,
    *,
    all_to_first: bool = False,
) -> dict[int, Results]:
    """The results of all cases on this rank, by rank; rank 0 writes of its steps to `progress`.

    On rank 0 also those from other machines, or of all ranks.
    """
    rank = int(os.environ["RANK"])
    device = _own_device(request["device"], int(os.environ["LOCAL_RANK"]))
    recorder = Recorder(rank, heartbeats, device)
    recorder.say("joining the other ranks")
    cases = [decode_case(data) for data in request["cases"]]
    alone: int | None = request["one_rank"]
    if alone is None:
        control = _join(device, request["library_timeout_s"])
        _agree_on_restarts(request["restarts"], folder, control)
        cases = _agreed(cases, control)
    else:
        control = join_alone(alone, cases[0].plan.gpus)
    results: Results = []
    for index, case in enumerate(cases):
        recorder.say("building the model")
        if case.servers is not None:
            results.append(run_served_case(case, device, recorder, control, folder, index))
            continue
        trainer = Trainer(case, device, recorder, control)
        # What is there now stays: the collector need not look through all of torch within a step again
        # (0.17 s on one core, on one rank while the others wait).
        gc.collect()
        gc.freeze()
        if device.type == "cpu":
            let_gloo_give_way()
        stale = case.plan.schedule in ASYNCHRONOUS_SCHEDULES
        if case.verify:
            results.append((verify_stale_case if stale else verify_case)(case, trainer))
        else:
            run = time_stale_case if stale else time_case if alone is None else emulate_case
            results.append(run(case, trainer, progress, index))
        del trainer  # before the next one takes its memory
        gc.unfreeze()
        gc.collect()
    recorder.say("waiting: end")
    dist.barrier(group=control)
    found = {rank: results} | _from_others(results, control, 1 if all_to_first else ranks_per_node())
    dist.destroy_process_group()
    return found


def _join(device: torch.device, timeout_s: float) -> dist.ProcessGroup:
    """Meet the other ranks; the group for what is no part of training."""
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    # torchrun keeps its store when it starts ranks again: the addresses of those before are in it.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        store=dist.PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )
    return dist.new_group(backend="gloo")


def _agree_on_restarts(counted: int, folder: Path, control: dist.ProcessGroup) -> None:
    """Let every machine know how many restarts there have been: one may have counted fewer."""
    most = torch.tensor(counted)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=control)
    if os.environ["LOCAL_RANK"] == "0":
        unfinished = folder / f"{RESTARTS_FILE}.part"
        unfinished.write_text(str(int(most.item())))
        unfinished.replace(folder / RESTARTS_FILE)


def _agreed(mine: list[Case], control: dist.ProcessGroup) -> list[Case]:
    """The cases that rank 0 has too: it left the timed one out if it saw no memory for it."""
    kinds = [{case.verify for case in mine}]
    dist.broadcast_object_list(kinds, src=0, group=control)
    return [case for case in mine if case.verify in kinds[0]]


def _from_others(mine: Results, control: dist.ProcessGroup, here: int) -> dict[int, Results]:
    """On rank 0 what ranks from `here` on found, of whom it sees no files; collective."""
    size = dist.get_world_size(control)
    if size == here:
        return {}
    everyone: list[Any] | None = [None] * size if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone, dst=0, group=control)
    return {} if everyone is None else dict(enumerate(everyone[here:], start=here))


def _own_device(kind: str, rank: int) -> torch.device:
    """The GPU of the machine's rank of this number, or the one CPU core that it is bound to."""
    if kind == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        return device
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})  # before the libraries start their threads
    torch.set_num_threads(1)
    return torch.device("cpu")
