"""One rank's trace of torch's profiler (Kineto), as spans of streams.

On a GPU every kernel and copy is a span; what it is for comes from the moment the host launched it:
inside autograd's engine it is a backward, inside an optimizer's step it belongs to that, else it is a
forward. NCCL's kernels name their process group, whose ranks say which part of the plan it is. On a CPU
the outermost operators are the compute and gloo's own marks the collectives, without their group.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from parsim.errors import ParsimError
from parsim.plan import ParallelPlan
from parsim.timeline import COMPUTE
from parsim.traces.chrome_file import Event, read_chrome_file
from parsim.traces.groups import stream_of

CATEGORIES = (
    *("cpu_op", "user_annotation", "kernel", "gpu_memcpy", "gpu_memset"),
    *("cuda_runtime", "cuda_driver"),
)
"""Categories of events that are read; calls of Python functions, most of many traces, are not."""
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_STEP = re.compile(r"ProfilerStep#(\d{1,12})$")
_ACTION = re.compile(r"PP:(\d{1,9})([FBIW])(\d{1,9})$")
"""Actions as torch.distributed.pipelining records them."""
_GLOO = re.compile(r"gloo:(\w+)$")
_ENGINE = "autograd::engine::evaluate_function"
_WRAPPER = re.compile(
    r"(autograd::|torch::autograd::|c10d::|_?c10d_functional::|.*Backward\d*$|record_param)"
)
"""Operators that only hold others, or wait."""
_TRANSFERS = ("c10d::send", "c10d::recv")
_KINDS = {"F": "forward", "B": "backward", "I": "input_grad", "W": "weight_grad"}


Thread = tuple[object, object]
"""Process and thread, as a file names them."""
Marked = tuple[int, int, str]
"""Begin and end in nanoseconds, and a name."""


class Work(NamedTuple):
    """A span of a rank's trace, in nanoseconds of its clock."""

    stream: str
    name: str
    kind: str
    start_ns: int
    end_ns: int
    stage: int
    micro_batch: int
    launched_ns: int
    """When the host asked for it."""
    group: tuple[int, ...]
    """Ranks that take part, where the trace names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTrace:
    """What one rank's file says."""

    where: str
    rank: int
    world_size: int
    host: str
    on_gpu: bool
    base_ns: int
    """What the clock's zero is, in nanoseconds since 1970; 0 where the file does not say."""
    steps: Mapping[int, tuple[int, int]]
    """Begin and end of each step that was marked by profiler.step()."""
    work: tuple[Work, ...]
    """In order of start."""
    left_out: int
    """Events that could not be used: they last less than nothing."""


def read_rank_trace(path: Path, plan: ParallelPlan | None, *, place: int) -> RankTrace:
    """One rank's trace; `place` is its rank where the file does not say (a run of one process).

    Raises ParsimError for a file that is no trace, or holds no work.
    """
    file = read_chrome_file(path, CATEGORIES)
    info = file.head.get("distributedInfo")
    info = info if isinstance(info, Mapping) else {}
    rank = _whole(info.get("rank"), place, f"{path}: distributedInfo.rank")
    groups = _groups(info)
    marks = _Marks(file.events)
    on_gpu = any(event.category in _ON_GPU for event in file.events)
    make = _gpu_work if on_gpu else _cpu_work
    work = sorted(make(file.events, marks, rank, groups, plan), key=lambda w: (w.start_ns, w.end_ns))
    if not work:
        raise ParsimError(
            "this trace holds neither kernels nor operators",
            where=str(path),
            hint="profile with activities CPU, and CUDA where there are GPUs",
        )
    return RankTrace(
        where=str(path),
        rank=rank,
        world_size=_whole(info.get("world_size"), 1, f"{path}: distributedInfo.world_size"),
        host=str(file.head.get("host_name", "")),
        on_gpu=on_gpu,
        base_ns=_whole(file.head.get("baseTimeNanoseconds"), 0, f"{path}: baseTimeNanoseconds"),
        steps=_steps(file.events),
        work=tuple(work),
        left_out=file.left_out,
    )


def _whole(value: Any, default: int, where: str) -> int:
    if value is None:
        return default
    if type(value) is not int or not 0 <= value < 2**63:
        raise ParsimError("this must be a whole number", where=where, got=value, expected="0 or more")
    return value


def _groups(info: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Ranks and description of the process groups that the file lists, by name."""
    found = {}
    listed = info.get("pg_config")
    for group in listed if isinstance(listed, list) else ():
        if isinstance(group, Mapping) and isinstance(group.get("ranks"), list):
            ranks = tuple(rank for rank in group["ranks"] if type(rank) is int)
            found[str(group.get("pg_name"))] = ranks, str(group.get("pg_desc", ""))
    return found


def _steps(events: Iterable[Event]) -> dict[int, tuple[int, int]]:
    """What profiler.step() marked."""
    found = {}
    for event in events:
        if event.category == "user_annotation" and (match := _STEP.match(event.name)):
            found[int(match[1])] = event.start_ns, event.end_ns
    return found


class _Marks:
    """What each thread of the host was about, at any time."""

    def __init__(self, events: Iterable[Event]) -> None:
        marked: dict[Thread, list[Marked]] = defaultdict(list)
        actions: dict[Thread, list[Marked]] = defaultdict(list)
        calls: dict[Thread, list[Marked]] = defaultdict(list)
        for event in events:
            span = event.start_ns, event.end_ns, event.name
            if event.name.startswith((_ENGINE, "Optimizer.")):
                marked[event.thread].append(span)
            elif event.name.startswith(_TRANSFERS):
                calls[event.thread].append(span)
            elif _ACTION.match(event.name):
                actions[event.thread].append(span)
        self._kinds = {thread: _outermost(spans) for thread, spans in marked.items()}
        self._actions = {thread: _outermost(spans) for thread, spans in actions.items()}
        self._all_actions = _outermost([span for own in actions.values() for span in own])
        self._calls = {thread: _outermost(spans) for thread, spans in calls.items()}

    def asked_ns(self, event: Event) -> int:
        """When a transfer was asked for: gloo's own mark is set only after the data was handed on."""
        call = _around(self._calls.get(event.thread, ()), event.start_ns)
        return event.start_ns if call is None else call[0]

    def at(self, thread: Thread, time_ns: int) -> tuple[str, str, int, int]:
        """(kind, name, stage, micro-batch) of what is launched by a thread at a time.

        Autograd's own threads know nothing of the action for which they work: only one runs at a time.
        """
        name = _name_around(self._kinds.get(thread, ()), time_ns)
        kind = "forward"
        if name.startswith("Optimizer."):
            return "optimizer", "optimizer", -1, -1
        if name:
            kind = "backward"
        action = _name_around(self._actions.get(thread, self._all_actions), time_ns)
        match = _ACTION.match(action)
        if match is None:
            return kind, kind, -1, -1
        return _KINDS[match[2]], action.removeprefix("PP:"), int(match[1]), int(match[3])


def _outermost(spans: list[Marked]) -> list[Marked]:
    """Spans that lie in no other, in order."""
    found: list[Marked] = []
    for span in sorted(spans, key=lambda s: (s[0], -s[1])):
        if not found or span[0] >= found[-1][1]:
            found.append(span)
    return found


def _around(spans: Sequence[Marked], time_ns: int) -> Marked | None:
    """The one of disjoint spans that a time lies in."""
    place = bisect_right(spans, time_ns, key=lambda span: span[0]) - 1
    return spans[place] if place >= 0 and time_ns < spans[place][1] else None


def _name_around(spans: Sequence[Marked], time_ns: int) -> str:
    """The name of the one of disjoint spans that a time lies in, or nothing."""
    span = _around(spans, time_ns)
    return "" if span is None else span[2]


def _gpu_work(
    events: Sequence[Event],
    marks: _Marks,
    rank: int,
    groups: Mapping[str, tuple[tuple[int, ...], str]],
    plan: ParallelPlan | None,
) -> Iterable[Work]:
    """Kernels and copies; a copy between host and device is compute of the stream's rank."""
    launches = {
        event.args.get("correlation"): event
        for event in events
        if event.category in ("cuda_runtime", "cuda_driver")
    }
    for event in events:
        if event.category not in _ON_GPU:
            continue
        launch = launches.get(event.args.get("correlation"), event)
        kind, name, stage, micro_batch = marks.at(launch.thread, launch.start_ns)
        times = event.start_ns, event.end_ns
        if "Collective name" in event.args or event.name.startswith(("ncclDevKernel", "ncclKernel")):
            ranks, description = _group_of(event.args, groups)
            what = str(event.args.get("Collective name", event.name.split("(")[0]))
            stream = stream_of(what, ranks, description, plan, rank, kind, event.args)
            kind = "pp" if stream.startswith("pp_") else stream
            yield Work(stream, what, kind, *times, stage, micro_batch, launch.start_ns, ranks)
        else:
            yield Work(COMPUTE, name, kind, *times, stage, micro_batch, launch.start_ns, ())


def _group_of(
    args: Mapping[str, Any], groups: Mapping[str, tuple[tuple[int, ...], str]]
) -> tuple[tuple[int, ...], str]:
    """Ranks and description of the process group of a collective.

    A kernel lists its ranks shortened where they are many; the file's list of groups is complete.
    """
    ranks, description = groups.get(str(args.get("Process Group Name")), ((), ""))
    if not ranks and "..." not in (text := str(args.get("Process Group Ranks", ""))):
        ranks = tuple(int(number) for number in re.findall(r"\d{1,9}", text))
    return ranks, str(args.get("Process Group Description", description))


def _cpu_work(
    events: Sequence[Event],
    marks: _Marks,
    rank: int,
    groups: Mapping[str, tuple[tuple[int, ...], str]],
    plan: ParallelPlan | None,
) -> Iterable[Work]:
    """The outermost operators of each thread, and what gloo carried."""
    ends: dict[Thread, int] = {}
    operators = (e for e in events if e.category == "cpu_op" and not _WRAPPER.match(e.name))
    for event in sorted(operators, key=lambda e: (e.start_ns, -e.end_ns)):
        if event.start_ns < ends.get(event.thread, -1):
            continue
        ends[event.thread] = event.end_ns
        kind, name, stage, micro_batch = marks.at(event.thread, event.start_ns)
        times = event.start_ns, event.end_ns
        yield Work(COMPUTE, name, kind, *times, stage, micro_batch, event.start_ns, ())
    engine = Counter(event.thread for event in events if event.name.startswith(_ENGINE))
    most = engine.most_common(1)  # of as many the one that comes first in the file
    for event in events:
        if not (match := _GLOO.match(event.name)):
            continue
        # Gloo's own threads do not know what for they work; those of autograd do.
        asking = most[0][0] if most and event.thread not in engine else event.thread
        begin_ns = marks.asked_ns(event)
        kind = marks.at(asking, begin_ns)[0]
        stream = stream_of(match[1], (), "", plan, rank, kind, event.args)
        shown = "pp" if stream.startswith("pp_") else stream
        yield Work(stream, match[1], shown, begin_ns, event.end_ns, -1, -1, begin_ns, ())
