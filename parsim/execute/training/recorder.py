"""Spans of one rank: what ran when, with hardly any cost to what runs.

On a CPU a mark is one reading of CLOCK_MONOTONIC, which all processes of a host share, so the ranks'
times align as they are. On a GPU a mark is a CUDA event on the stream that computes: its time is when
the device came to it, and a rank's zero is the host's clock right after a device synchronisation.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, NamedTuple

import torch

from parsim.execute.launch.heartbeat import WAITING, Heartbeats
from parsim.schedule.action import BACKWARD, FORWARD, INPUT_GRAD, WEIGHT_GRAD, Action
from parsim.timeline import COMPUTE, HOST, merged

KIND_NAMES = {
    FORWARD: "forward",
    BACKWARD: "backward",
    INPUT_GRAD: "input_grad",
    WEIGHT_GRAD: "weight_grad",
}


class Label(NamedTuple):
    """What a span is, without its times: the fields of timeline.Span."""

    stream: str
    name: str
    kind: str
    stage: int = -1
    micro_batch: int = -1


class Row(NamedTuple):
    """A span of this rank, in nanoseconds of the host's monotonic clock."""

    label: Label
    begin_ns: int
    end_ns: int


class Recorder:
    """Collects the spans of a step, and tells the watcher what the rank does.

    Spans nest: communication that happens within an action is taken out of the action's own span.
    """

    def __init__(self, rank: int, heartbeats: Heartbeats, device: torch.device) -> None:
        self.rank = rank
        self.on_gpu = device.type == "cuda"
        self.active = False
        """Spans are kept only within a step."""
        self._heartbeats = heartbeats
        self._step = -1
        self._events: list[tuple[Label, Any, Any, bool]] = []
        self._open: list[_Open] = []
        self._stream = torch.cuda.current_stream() if self.on_gpu else None
        self._zero: Any = None
        self._zero_ns = 0

    def say(self, doing: str) -> None:
        """Tell the watcher what this rank does, outside any span."""
        self._heartbeats.write(self.rank, self._step, doing)

    def begin_step(self, step: int) -> int:
        """Start a step now; its start on the host's clock, in ns."""
        self._step = step
        self._events = []
        self.active = True
        if self.on_gpu:
            torch.cuda.synchronize()
            self._zero = self.mark()
        self._zero_ns = time.perf_counter_ns()
        return self._zero_ns

    def end_step(self) -> int:
        """End the step when the device has; its end on the host's clock, in ns."""
        if self.on_gpu:
            torch.cuda.synchronize()
        self.active = False
        return time.perf_counter_ns()

    def mark(self) -> Any:
        """A point in time, to be resolved after the step."""
        if not self.on_gpu:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def keep(self, label: Label, begin: Any, end: Any) -> None:
        """Keep a span between two marks."""
        if self.active:
            beside = self.on_gpu and torch.cuda.current_stream() != self._stream
            self._events.append((label, begin, end, beside))

    def begin_again(self) -> None:
        """Let the running span begin now: what came before was waiting."""
        if self._open:
            self._open[-1].begin = self.mark()

    def span(self, label: Label, *, waits: bool = False) -> _Open:
        """A context whose duration becomes a span; `waits`: it depends on other ranks."""
        return _Open(self, label, WAITING + label.name if waits else label.name, None)

    def act(self, action: Action) -> _Open:
        """The context of one pipeline action on the compute stream."""
        label = Label(COMPUTE, str(action), KIND_NAMES[action.kind], action.stage, action.micro_batch)
        return _Open(self, label, label.name, action)

    @property
    def action(self) -> Action | None:
        """The pipeline action that runs now."""
        return next((o.action for o in reversed(self._open) if o.action is not None), None)

    @property
    def stage(self) -> int:
        """The stage that something is done for now, or -1."""
        return self._open[-1].label.stage if self._open else -1

    def push(self, span: _Open) -> None:
        """Note what begins."""
        self._open.append(span)
        self.say(span.doing)

    def pop(self) -> None:
        """Note that it has ended, and what goes on."""
        self._open.pop()
        self.say(self._open[-1].doing if self._open else "between actions")

    def rows(self) -> list[Row]:
        """The last step's spans in order of start.

        Communication that the compute stream went through is taken out of compute and host; what a GPU
        did on another stream ran beside them.
        """
        working, communicating, away = [], [], []
        for label, begin, end, beside in self._events:
            row = Row(label, self._resolve(begin), self._resolve(end))
            if label.stream in (COMPUTE, HOST):
                working.append(row)
                continue
            communicating.append(row)
            if not beside:
                away.append((row.begin_ns, row.end_ns))
        gaps = merged(away)
        rows = communicating + [part for row in working for part in _without(row, gaps)]
        return sorted(rows, key=lambda row: (row.begin_ns, row.end_ns))

    def _resolve(self, mark: Any) -> int:
        if not self.on_gpu:
            return int(mark)
        return self._zero_ns + int(self._zero.elapsed_time(mark) * 1e6)


def _without(row: Row, away: list[tuple[float, float]]) -> list[Row]:
    """The parts of a span outside the intervals `away`, which are in order and disjoint."""
    parts = []
    at = row.begin_ns
    for begin, end in away:
        if end <= at:
            continue
        if begin >= row.end_ns:
            break
        if begin > at:
            parts.append(Row(row.label, at, int(begin)))
        at = max(at, int(end))
    if at < row.end_ns:
        parts.append(Row(row.label, at, row.end_ns))
    return parts


class _Open:
    """A span that has begun; entering and leaving it costs a few microseconds at most on a CPU."""

    __slots__ = ("_recorder", "action", "begin", "doing", "label")

    def __init__(self, recorder: Recorder, label: Label, doing: str, action: Action | None) -> None:
        self.label = label
        self.doing = doing
        self.action = action
        self._recorder = recorder
        self.begin: Any = None

    def __enter__(self) -> _Open:
        self._recorder.push(self)
        self.begin = self._recorder.mark()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            return  # the heartbeat keeps saying what failed
        self._recorder.keep(self.label, self.begin, self._recorder.mark())
        self._recorder.pop()
