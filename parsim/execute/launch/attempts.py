"""Starting the ranks of a launch, and starting them again when one is lost.

A rank that raises, dies or hangs ends all of them; where restarts are left, all start again from the
newest checkpoint. What a rank refuses on purpose, or a loss that is not finite, would only come again:
that ends the launch.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from parsim.execute.devices import usable_cores
from parsim.execute.launch.checkpoint_folder import newest, remove_unfinished, starting_again
from parsim.execute.launch.joined import Joined, join
from parsim.execute.launch.torchrun import Nodes, command, variables
from parsim.execute.launch.watch import START_S, RankLost, Ranks
from parsim.execute.request import RESTARTS_FILE, Case, encode_case

TIMEOUT_S = 300.0
"""A rank that gives no sign of life for so long counts as hung."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A step that all ranks have finished."""

    step: int
    """From 0; negative during warm-up."""
    time_s: float
    loss: float


def _unheard(event: object) -> None:
    """For who does not listen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How ranks are started and watched."""

    device: str = "cpu"
    """cpu or cuda."""
    nodes: Nodes = field(default_factory=Nodes)
    max_restarts: int = 0
    """How often all ranks are started again after one was lost."""
    timeout_s: float = TIMEOUT_S
    joined: Joined | None = None
    """The rank that this process is in a launch of somebody else's; None: it starts the ranks."""
    one_rank: int | None = None
    """Run this rank of the plan alone, with nobody to answer it; None: all ranks."""
    on_step: Callable[[Progress], None] = _unheard
    on_note: Callable[[str], None] = _unheard
    """Told what a person should know: a restart, a slow rank."""

    def num_ranks(self, case: Case) -> int:
        """Processes to start, on all machines."""
        return case.world_size if self.one_rank is None else 1

    def ranks_here(self, case: Case) -> int:
        """Those on this machine."""
        if self.joined is not None:
            return self.joined.local_world_size
        return self.nodes.ranks_per_node(self.num_ranks(case))

    def cores_shared(self, case: Case) -> int | None:
        """Cores of this machine, where all ranks run on it and are more than those; else None."""
        if self.device != "cpu" or self.ranks_here(case) < case.world_size:
            return None
        cores = len(usable_cores())
        return cores if cores < case.world_size else None

    @property
    def answers(self) -> bool:
        """Whether this process has the results in the end: that of machine 0, or of rank 0."""
        return self.nodes.index == 0 and (self.joined is None or self.joined.rank == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a launch ended with."""

    results: list[list[dict[str, Any]]]
    """By rank, what it found for each case: of all ranks on machine 0, else of this machine's."""
    failures: tuple[str, ...]
    """Why ranks were started again, in order."""


def launch(cases: Sequence[Case], how: Launch) -> Outcome:
    """What each rank left for each case. No process and no file outlives this."""
    if how.joined is not None:
        results = join(
            cases, how.joined, device=how.device, timeout_s=how.timeout_s, on_line=_reporter(how)
        )
        return Outcome(results=results, failures=())
    failures: list[str] = []
    spent = 0  # restarts of all machines together
    since, starts = time.monotonic(), itertools.count()
    with _complete_checkpoints(cases, how.nodes), _temporary_folder() as folder:
        while True:
            attempt = folder / f"start-{next(starts)}"
            attempt.mkdir()
            try:
                results = _attempt(cases, how, attempt, spent)
            except RankLost as lost:
                agreed = _agreed_restarts(attempt)
                if agreed is None and spent and time.monotonic() - since < START_S:
                    continue  # another machine has not noticed yet, or not come back: no loss of its own
                spent = max(spent, agreed or 0)
                if spent >= how.max_restarts:
                    raise
                spent += 1
                since = time.monotonic()
                failures.append(lost.what)
                cases = [_from_newest(case, how.nodes) for case in cases]
                how.on_note(_restart_note(lost, spent, how.max_restarts, cases[0]))
            except (KeyboardInterrupt, SystemExit):
                _note_stop(how, cases[0])
                raise
            else:
                return Outcome(results=results, failures=tuple(failures))


def _attempt(
    cases: Sequence[Case], how: Launch, folder: Path, restarts: int
) -> list[list[dict[str, Any]]]:
    """Start all ranks once, after so many restarts; raises RankLost where one fails."""
    world_size = how.num_ranks(cases[0])
    mine = how.nodes.ranks(world_size)
    request = {
        "device": how.device,
        "one_rank": how.one_rank,
        "restarts": restarts,
        "cases": [encode_case(case) for case in cases],
        # The watcher knows who hangs, torch only who waits: let the watcher be first.
        "library_timeout_s": 2 * how.timeout_s + 60,
    }
    (folder / "request.json").write_text(json.dumps(request))
    environment = {**os.environ, **variables(how.nodes, how.device)}
    with Ranks(command(how.nodes, world_size, folder), environment, folder, world_size, mine) as ranks:
        ranks.watch(timeout_s=how.timeout_s, on_line=_reporter(how))
    everyone = range(world_size) if how.nodes.index == 0 else mine
    return [json.loads((folder / f"rank-{rank}.json").read_text())["results"] for rank in everyone]


def _agreed_restarts(folder: Path) -> int | None:
    """The most restarts that any machine had counted when the ranks met; None where they did not."""
    path = folder / RESTARTS_FILE
    return int(path.read_text()) if path.exists() else None


def _from_newest(case: Case, nodes: Nodes) -> Case:
    """The same case, beginning at the newest checkpoint that leaves a step to run."""
    if case.checkpoint is None:
        return case
    if nodes.index == 0:
        remove_unfinished(Path(case.checkpoint.folder))
    saved = starting_again(case)
    return replace(case, checkpoint=replace(case.checkpoint, start=saved.step if saved else 0))


def _note_stop(how: Launch, case: Case) -> None:
    """Tell whoever stops a run what is left of it."""
    if case.checkpoint is not None and (saved := newest(Path(case.checkpoint.folder))) is not None:
        how.on_note(f"stopped; --resume goes on from the checkpoint after {saved.step} steps")


def _restart_note(lost: RankLost, number: int, most: int, case: Case) -> str:
    start = case.checkpoint.start if case.checkpoint is not None else 0
    place = f"the checkpoint after {start} steps" if start else "the beginning"
    where = f" ({lost.where})" if lost.where else ""
    return f"{lost.what}{where}; restart {number} of {most} from {place}"


def _reporter(how: Launch) -> Callable[[dict[str, Any]], None]:
    """Passes on what rank 0 says of each step, and which ranks have become slow."""
    slow_before: set[str] = set()

    def report(line: dict[str, Any]) -> None:
        how.on_step(Progress(step=line["step"], time_s=line["time_s"], loss=line["loss"]))
        slow: dict[str, float] = line["slow"]
        for rank in slow.keys() - slow_before:
            how.on_note(
                f"step {line['step']}: rank {rank} is slow: it computed {slow[rank]:.1f} times as long "
                "as usual for its work"
            )
        slow_before.clear()
        slow_before.update(slow)

    return report


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="parsim-run-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextmanager
def _complete_checkpoints(cases: Sequence[Case], nodes: Nodes) -> Iterator[None]:
    """Leave no half of a checkpoint behind, however a run ends."""
    try:
        yield
    except BaseException:
        for case in cases:
            if case.checkpoint is not None and nodes.index == 0:
                remove_unfinished(Path(case.checkpoint.folder))
        raise
