"""gloo's receiving threads, and no others, give way to those that compute."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from parsim.execute.gloo_threads import LOOP, LOWEST_WEIGHT, let_gloo_give_way

torch = pytest.importorskip("torch", reason="the executor needs torch")
dist = torch.distributed


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def niceness() -> dict[bool, set[int]]:
    """Of this process's threads, by whether they are gloo's."""
    found: dict[bool, set[int]] = {True: set(), False: set()}
    for task in Path("/proc/self/task").glob("*"):
        is_loop = (task / "comm").read_text().strip() == LOOP
        found[is_loop].add(os.getpriority(os.PRIO_PROCESS, int(task.name)))
    return found


@pytest.mark.usefixtures("group")
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are found through /proc")
def test_gloo_gives_way() -> None:
    before = niceness()
    assert let_gloo_give_way() >= 1
    after = niceness()
    assert after[True] == {LOWEST_WEIGHT}
    assert after[False] == before[False]
