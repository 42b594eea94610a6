"""Whom the watcher blames, from what ranks said last. The ranks are lines in a file here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from parsim.execute.launch.heartbeat import Heartbeats
from parsim.execute.launch.watch import RankLost, Ranks

SAID = {
    "one computes": (["waiting: gradients 0", "1F3"], range(2), "rank 1 hangs"),
    "one waits for another machine": (["waiting: 1B0"], range(1), "all ranks of this machine wait"),
    "one of this machine computes": (["waiting: 1B0", "0F0"], range(2), "rank 1 hangs"),
    "all wait": (["waiting: 1B0", "waiting: 0F0"], range(2), "all ranks hang"),
    "all of this machine compute": (["1B0"], range(1), "all ranks hang"),
}


@pytest.mark.parametrize("story", SAID)
def test_who_waits_is_a_victim(tmp_path: Path, story: str) -> None:
    said, here, blamed = SAID[story]
    world_size = len(said) + ("another" in story or "this machine" in story)
    heartbeats = Heartbeats(tmp_path / "heartbeats", world_size)
    with Ranks(["sleep", "60"], dict(os.environ), tmp_path, world_size, here) as ranks:
        for rank, doing in enumerate(said):
            heartbeats.write(rank, 5, doing)
        with pytest.raises(RankLost, match=blamed) as caught:
            ranks.watch(timeout_s=0.2, on_line=print)
    assert "step 5" in str(caught.value.where)
    heartbeats.close()
