"""What a run would start, without starting it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from parsim.execute.launch.attempts import Launch
from parsim.execute.launch.torchrun import command, device_of, variables
from parsim.execute.request import Case
from parsim.execute.support import check_executable


def dry_run(case: Case, how: Launch) -> dict[str, Any]:
    """Commands, environment, ranks and files of a run on this machine, as plain data.

    Needs neither torch nor the devices. Raises ParsimError for a plan that the executor refuses.
    """
    check_executable(case.job, case.plan, case.schedule, case.dtype)
    size = case.world_size
    owners = case.schedule.stage_ranks()
    stages = {pp: [s for s, owner in owners.items() if owner == pp] for pp in range(case.plan.pp)}
    folder = Path(tempfile.gettempdir()) / "parsim-run-XXXXXXXX" / "start-0"
    files = {
        "request": str(folder / "request.json"),
        "heartbeats": str(folder / "heartbeats"),
        "progress": str(folder / "progress.jsonl"),
        "log": str(folder / "log.txt"),
        "results": str(folder / "rank-N.json"),
    }
    if case.checkpoint is not None:
        files["checkpoints"] = str(Path(case.checkpoint.folder) / "step-NNNNNNNN")
    if case.tokens is not None:
        files["tokens"] = case.tokens.path
    return {
        "world_size": size,
        "nnodes": how.nodes.count,
        "node_rank": how.nodes.index,
        "command": command(how.nodes, size, folder),
        "environment": variables(how.nodes, how.device),
        "backend": "gloo" if how.device == "cpu" else "nccl",
        "ranks": [_rank(case, how, rank, stages) for rank in range(size)],
        "files": files,
        "first_step": case.checkpoint.start if case.checkpoint is not None else 0,
        "total_steps": case.total_steps,
    }


def _rank(case: Case, how: Launch, rank: int, stages: dict[int, list[int]]) -> dict[str, Any]:
    """Where a rank runs and what part of the mesh it is."""
    device = device_of(rank, how.nodes, case.world_size, how.device)
    if rank >= case.plan.gpus:
        node = rank // how.nodes.ranks_per_node(case.world_size)
        return {"rank": rank, "node": node, "device": device, "server": rank - case.plan.gpus}
    at = case.plan.coordinate(rank)
    return {
        "rank": rank,
        "node": rank // how.nodes.ranks_per_node(case.world_size),
        "device": device,
        "pp": at.pp,
        "dp": at.dp,
        "cp": at.cp,
        "tp": at.tp,
        "stages": stages[at.pp],
    }
