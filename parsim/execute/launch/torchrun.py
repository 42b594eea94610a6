"""What is started for a plan: torchrun on every machine, one worker a rank. Standard library only."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import parsim
from parsim.errors import ParsimError

LOOPBACK = "127.0.0.1"
_ENDPOINT = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+):(\d{1,5})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The machines of a run, and which of them this is."""

    count: int = 1
    index: int = 0
    endpoint: str = ""
    """host:port of machine 0, under which all meet; with one machine torchrun finds a port itself."""

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ParsimError(
                "machines are numbered from 0",
                where="--node-rank",
                got=self.index,
                expected=f"0 to {self.count - 1}, as --nnodes is {self.count}",
            )
        match = _ENDPOINT.fullmatch(self.endpoint)
        if self.count > 1 and (match is None or not 0 < int(match[2]) < 65536):
            raise ParsimError(
                "several machines need a place to meet",
                where="--rdzv-endpoint",
                got=self.endpoint or None,
                expected="host:port of machine 0, the same on every machine",
            )

    @property
    def host(self) -> str:
        return self.endpoint.rpartition(":")[0].strip("[]") or LOOPBACK

    @property
    def port(self) -> str:
        return self.endpoint.rpartition(":")[2]

    @property
    def on_loopback(self) -> bool:
        return self.count == 1 or self.host in (LOOPBACK, "localhost", "::1")

    def ranks_per_node(self, world_size: int) -> int:
        """Ranks on each machine; raises ParsimError where they cannot be shared out evenly."""
        if world_size % self.count:
            raise ParsimError(
                "every machine has the same number of ranks",
                where="--nnodes",
                got=f"{world_size} ranks on {self.count} machines",
            )
        return world_size // self.count

    def ranks(self, world_size: int) -> range:
        """The ranks on this machine: ranks are dealt out machine by machine."""
        size = self.ranks_per_node(world_size)
        return range(self.index * size, (self.index + 1) * size)


def command(nodes: Nodes, world_size: int, folder: Path | str) -> list[str]:
    """The arguments that start this machine's ranks; `folder` holds their request.

    Torchrun starts them once: whether they are started again, and from which checkpoint, is decided
    by whoever watches them.
    """
    meet = (
        [
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={LOOPBACK}:0",  # torchrun finds a free port
            f"--local-addr={LOOPBACK}",
        ]
        if nodes.count == 1
        # Ranks keep to the numbers of their machines, so that neighbours on the mesh share one.
        else [
            "--rdzv-backend=static",
            f"--node-rank={nodes.index}",
            f"--master-addr={nodes.host}",
            f"--master-port={nodes.port}",
        ]
    )
    return [
        sys.executable, "-m", "torch.distributed.run",
        f"--nnodes={nodes.count}",
        f"--nproc-per-node={nodes.ranks_per_node(world_size)}",
        *meet,
        "--max-restarts=0",
        f"--log-dir={folder}/torchrun",  # else it leaves an empty folder beside
        "-m", "parsim.execute.launch.worker", str(folder),
    ]  # fmt: skip


def variables(nodes: Nodes, device: str) -> dict[str, str]:
    """What the ranks' environment has beyond this process's own."""
    package = str(Path(parsim.__file__).parents[1])
    before = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    found = {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([package, *before])),
        "OMP_NUM_THREADS": "1",
    }
    if nodes.on_loopback and "GLOO_SOCKET_IFNAME" not in os.environ:
        found["GLOO_SOCKET_IFNAME"] = "lo"
    if device == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found


def device_of(rank: int, nodes: Nodes, world_size: int, device: str) -> str:
    """What a rank runs on, on its machine: a GPU of its own, or one core that it is bound to."""
    local = rank % nodes.ranks_per_node(world_size)
    if device == "cuda":
        return f"cuda:{local}"
    cores = sorted(os.sched_getaffinity(0))
    return f"core {cores[local % len(cores)]}"
