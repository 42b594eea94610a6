"""Machines whose clocks differ are put on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

AHEAD_NS = 5_000_000_000

PROGRAM = f"""
import os, sys, time
rank = int(os.environ["RANK"])
true_clock = time.perf_counter_ns
time.perf_counter_ns = lambda: true_clock() + (rank // 2) * {AHEAD_NS}
import torch.distributed as dist
from parsim.execute.launch.clocks import clock_offset_ns
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=4)
print(clock_offset_ns(dist.group.WORLD))
"""


def test_a_machine_that_is_ahead_is_put_back(tmp_path: Path) -> None:
    """Four ranks on two machines, the second of which is five seconds ahead."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "meet")],
            env={**os.environ, "RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo",
                 "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in started]
    offsets = [int(text.split()[-1]) for text in said]
    assert offsets[:2] == [0, 0]
    assert offsets[2] == offsets[3]
    assert offsets[2] == pytest.approx(-AHEAD_NS, rel=0.2)
