"""One rank of a calibration: `python -m parsim.execute.calibrate.worker CONFIG`, CONFIG a JSON text.

It reports on standard output, one JSON document a line: first the facts of its device, then a line for
each point it timed. It ends when its time is spent, or when the process that started it is gone.
Torch, the standard library and parsim's stdlib-only modules are all it imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

import torch
import torch.distributed as dist

from parsim.execute.calibrate.clock import Agree, Timing, time_call
from parsim.execute.calibrate.collectives import calls_in_one, collective_call, subgroup
from parsim.execute.calibrate.kernels import DTYPES, Arena, kernel_call
from parsim.execute.calibrate.points import ESSENTIAL, points
from parsim.execute.gloo_threads import let_gloo_give_way

GPU_POWER_W = 700.0
"""Where nvidia-smi does not tell: the limit of an H100 SXM (NVIDIA's data sheet)."""


def main() -> None:
    config = json.loads(sys.argv[1])
    # Libraries that print must not disturb the report: they get standard error instead.
    report = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cuda = config["device"] == "cuda"
    if cuda:
        torch.cuda.set_device(config["rank"])
    elif hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {config["core"]})
    torch.set_num_threads(1)
    agree = _join(config)
    try:
        _say(report, {"facts": _device_facts(cuda), "torch": torch.__version__})
        for at, timing in _timings(config, agree):
            _say(report, {"point": at, **timing._asdict()})
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _say(report: TextIO, document: dict[str, Any]) -> None:
    report.write(json.dumps(document) + "\n")
    report.flush()


def _end_with_parent() -> None:
    """Standard input is a pipe that the parent never writes to: it ends when the parent does."""
    sys.stdin.read()
    os._exit(1)


def _join(config: dict[str, Any]) -> Agree:
    """Meet the other ranks; what comes back takes the largest of the values they give."""
    if config["ranks"] == 1:
        return list
    backend = "cpu:gloo,cuda:nccl" if config["device"] == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{config['port']}",
        rank=config["rank"],
        world_size=config["ranks"],
    )

    def agree(values: list[float]) -> list[float]:
        largest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        found: list[float] = largest.tolist()
        return found

    let_gloo_give_way()
    return agree


def _timings(config: dict[str, Any], agree: Agree) -> Iterator[tuple[int, Timing]]:
    """Each point's place in the list and its timing, until the deadline; essential ones in any case."""
    device, ranks = config["device"], config["ranks"]
    arenas: dict[str, Arena] = {}
    groups: dict[int, dist.ProcessGroup] = {}
    for at, point in enumerate(points(device, ranks, tuple(config["dtypes"]))):
        late = agree([float(time.monotonic() > config["deadline"])])
        if late != [0.0] and point.level > ESSENTIAL:
            return
        if point.family == "collective":
            group_size = point.size[1]
            if group_size not in groups:
                groups[group_size] = subgroup(group_size)
                let_gloo_give_way()  # as in training
            call = collective_call(point, groups[group_size], device)
        else:
            if point.dtype not in arenas:
                arenas[point.dtype] = Arena(device, DTYPES[point.dtype])
            call = kernel_call(point, arenas[point.dtype])
        timing = time_call(call, agree=agree, cuda=device == "cuda", peers=point.family == "collective")
        yield at, timing._replace(seconds=timing.seconds / calls_in_one(point))


def _device_facts(cuda: bool) -> dict[str, Any]:
    """What the driver says about this rank's GPU; a CPU's facts are read by the parent."""
    if not cuda:
        return {}
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": facts.name,
        "memory_bytes": facts.total_memory,
        "num_sms": facts.multi_processor_count,
        "l2_bytes": facts.L2_cache_size,
        "power_w": _power_limit_w(torch.cuda.current_device()),
    }


def _power_limit_w(index: int) -> float:
    """Board power limit that nvidia-smi reports."""
    command = ["nvidia-smi", f"--id={index}", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
        return float(answer.stdout.strip())
    except (OSError, subprocess.SubprocessError, ValueError):
        return GPU_POWER_W


if __name__ == "__main__":
    main()
