"""What one rank does with its cases: join the others, build its share, run the steps."""

from __future__ import annotations

import gc
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parsim.execute.checking import verify_case
from parsim.execute.heartbeat import Heartbeats
from parsim.execute.recorder import Recorder
from parsim.execute.request import decode_case
from parsim.execute.timing import time_case
from parsim.execute.trainer import Trainer


def run_rank(request: dict[str, Any], folder: Path, heartbeats: Heartbeats) -> list[dict[str, Any]]:
    """The results of all cases on this rank, as plain data."""
    rank = int(os.environ["RANK"])
    device = _own_device(request["device"], rank)
    recorder = Recorder(rank, heartbeats, device)
    recorder.say("joining the other ranks")
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        timeout=timedelta(seconds=request["library_timeout_s"]),
    )
    control = dist.new_group(backend="gloo")
    results = []
    for index, data in enumerate(request["cases"]):
        case = decode_case(data)
        recorder.say("building the model")
        trainer = Trainer(case, device, recorder, control)
        if case.verify:
            results.append(verify_case(case, trainer))
        else:
            with (folder / "progress.jsonl").open("a") as progress:
                results.append(time_case(case, trainer, progress, index))
        del trainer  # before the next one takes its memory
        gc.collect()
    recorder.say("leaving")
    dist.barrier(group=control)
    dist.destroy_process_group()
    return results


def _own_device(kind: str, rank: int) -> torch.device:
    """The GPU of a rank, or the one CPU core that it is bound to."""
    if kind == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        return device
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})  # before the libraries start their threads
    torch.set_num_threads(1)
    return torch.device("cpu")
