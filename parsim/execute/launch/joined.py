"""Being one rank of a launch that somebody else started: torchrun, or srun with one task a rank.

Every process runs the same command. The first one speaks, writes the files and has the exit status of
the answer; torchrun, or Slurm, watches the ranks and starts them again.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parsim.errors import ParsimError
from parsim.execute.launch.heartbeat import Heartbeats
from parsim.execute.launch.watch import RankLost
from parsim.execute.request import Case, encode_case

_TORCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """Which rank this process is."""

    rank: int
    world_size: int
    local_rank: int
    """Among the ranks on this machine."""
    local_world_size: int
    restarts: int = 0
    """How often the ranks have been started again."""
    launch: str = ""
    """What tells this launch of torchrun's from others, the same after a restart; empty for srun."""

    def variables(self) -> dict[str, str]:
        """The environment as torchrun would have set it."""
        found = {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
        }
        alone = self.local_world_size == self.world_size
        return found | ({"GLOO_SOCKET_IFNAME": "lo"} if alone else {})


def joined_rank(environment: Mapping[str, str]) -> Joined | None:
    """The rank that torchrun or srun made this process; None where it is on its own.

    Raises ParsimError for tasks of srun that do not know where to meet, and for values that are no
    numbers.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if all(key in environment for key in _TORCH):
        rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        local, here = "LOCAL_RANK", "LOCAL_WORLD_SIZE"
        if local not in environment and "SLURM_LOCALID" in environment:
            return _task_of_slurm(environment, rank, size)
        if size > 1 and (local not in environment or here not in environment):
            raise ParsimError(
                "a rank has to know its place on its machine",
                where=f"{local}, {here}",
                hint="torchrun sets both",
            )
        return Joined(
            rank=rank,
            world_size=size,
            local_rank=_number(environment, local) if local in environment else 0,
            local_world_size=_number(environment, here) if here in environment else 1,
            restarts=int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
            launch=_launch(environment),
        )
    if tasks == "1" or "SLURM_PROCID" not in environment:
        return None
    if not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise ParsimError(
            "srun's tasks do not know where to meet",
            where="MASTER_ADDR, MASTER_PORT",
            got=f"{tasks} tasks, each of which would run the whole plan",
            hint="export MASTER_ADDR=$(scontrol show hostnames | head -n 1) MASTER_PORT=29500, or let "
            "`parsim export --to slurm` write the script",
        )
    return _task_of_slurm(
        environment, _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS")
    )


def _launch(environment: Mapping[str, str]) -> str:
    """A name of this launch of torchrun's: its id, which may be "none", and its folder of logs.

    That folder (.../ID_RANDOM/attempt_0/0/error.json) has a random name, made once a launch.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return ""
    logs = Path(environment.get("TORCHELASTIC_ERROR_FILE", "")).parents
    return f"{environment['TORCHELASTIC_RUN_ID']} {logs[2] if len(logs) > 2 else ''}"


def _task_of_slurm(environment: Mapping[str, str], rank: int, size: int) -> Joined:
    each = environment.get("SLURM_STEP_TASKS_PER_NODE", str(size))
    match = re.fullmatch(r"(\d+)(\(x\d+\))?", each)
    if match is None:
        raise ParsimError(
            "every machine has the same number of ranks", where="SLURM_STEP_TASKS_PER_NODE", got=each
        )
    return Joined(
        rank=rank,
        world_size=size,
        local_rank=_number(environment, "SLURM_LOCALID"),
        local_world_size=int(match[1]),
    )


def _number(environment: Mapping[str, str], key: str) -> int:
    try:
        return int(environment[key])
    except (KeyError, ValueError):
        raise ParsimError(
            "this variable is a whole number", where=key, got=environment.get(key)
        ) from None


def first_line(error: Exception) -> str:
    """An exception's type, and the first line of its message where it has one.

    >>> first_line(KeyError("a")), first_line(AssertionError())
    ("KeyError: 'a'", 'AssertionError')
    """
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


class _Progress:
    """Takes the lines that rank 0 writes of each step."""

    def __init__(self, on_line: Callable[[dict[str, Any]], None]) -> None:
        self._on_line = on_line

    def write(self, text: str) -> int:
        for line in text.splitlines():
            self._on_line(json.loads(line))
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back."""


def join(
    cases: Sequence[Case],
    joined: Joined,
    *,
    device: str,
    timeout_s: float,
    on_line: Callable[[dict[str, Any]], None],
) -> list[list[dict[str, Any]]]:
    """Run the cases as this rank: on rank 0 what every rank found, on others nothing.

    Raises RankLost for what fails here.
    """
    os.environ.update({k: v for k, v in joined.variables().items() if k not in os.environ})
    from parsim.execute.launch.rank import run_rank

    request = {
        "device": device,
        "one_rank": None,
        "restarts": joined.restarts,
        "cases": [encode_case(case) for case in cases],
        "library_timeout_s": timeout_s,
    }
    with tempfile.TemporaryDirectory(prefix="parsim-rank-") as name:
        heartbeats = Heartbeats(Path(name) / "heartbeats", joined.world_size)
        try:
            found = run_rank(request, Path(name), heartbeats, _Progress(on_line), all_to_first=True)
        except ParsimError:
            raise
        except Exception as error:
            doing = heartbeats.read(joined.rank).doing
            lost = RankLost(
                f"rank {joined.rank} failed: {first_line(error)}",
                where=doing,
                hint="the rank whose message is not about a connection failed first",
            )
            raise lost from error
        finally:
            heartbeats.close()
    return [found[rank] for rank in sorted(found)] if joined.rank == 0 else []
