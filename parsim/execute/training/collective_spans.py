"""Spans of collectives that libraries issue: DTensor's (tensor parallel) and FSDP's (data parallel).

Both look their functions up by name when they call them, so a wrapper under the same name sees every
call, in every version of torch that parsim runs on, at the cost of two readings of the clock.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

from parsim.execute.training.recorder import Label, Recorder
from parsim.timeline import DP, EXPERTS, TP

_FUNCTIONAL = (
    "all_reduce",
    "all_gather_tensor",
    "all_gather_single",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
)
"""What DTensor calls, with the names of torch 2.11 and of 2.13."""
_GATHERS = ("all_gather_into_tensor", "all_gather_single")
_REDUCTIONS = ("reduce_scatter_tensor", "reduce_scatter_single")
"""What FSDP calls, likewise."""


@contextlib.contextmanager
def recorded_collectives(recorder: Recorder, experts: Sequence[int] = ()) -> Iterator[None]:
    """Turn the collectives of DTensor and FSDP into spans as long as this lasts.

    `experts`: the ranks that shard the same routed experts, where those are not all replicas.
    """
    issued: list[Any] = []

    def issue(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not issued:
                issued.append(recorder.mark())
            return original(*args, **kwargs)

        return call

    def wait(original: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(tensor: torch.Tensor) -> torch.Tensor:
            # DTensor uses a result as soon as it asks for it, so the call to the wait is one span.
            with recorder.span(_tp_label(recorder), waits=True) as span:
                if issued:
                    span.begin = issued.pop()
                return original(tensor)

        return call

    def data_parallel(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return functools.partial(_timed, recorder, name, experts)

    with contextlib.ExitStack() as undo:
        for name in _FUNCTIONAL:
            _wrap(functional, name, issue, undo)
        _wrap(functional, "wait_tensor", wait, undo)
        for name in _GATHERS:
            _wrap(dist, name, data_parallel("parameters"), undo)
        for name in _REDUCTIONS:
            _wrap(dist, name, data_parallel("gradients"), undo)
        yield


def _wrap(module: Any, name: str, wrapper: Callable[[Any], Any], undo: contextlib.ExitStack) -> None:
    """Put a wrapper in place of a function, where this torch has it."""
    original = getattr(module, name, None)
    if original is not None:
        setattr(module, name, wrapper(original))
        undo.callback(setattr, module, name, original)


def _tp_label(recorder: Recorder) -> Label:
    """As in parsim.schedule.lower: named after the action it belongs to."""
    action = recorder.action
    if action is None:
        return Label(TP, "gradients of norms", TP, recorder.stage)
    return Label(TP, str(action), TP, action.stage, action.micro_batch)


def _timed(
    recorder: Recorder,
    name: str,
    experts: Sequence[int],
    original: Callable[..., Any],
) -> Callable[..., Any]:
    """A collective whose call, or whose wait where it is asynchronous, becomes a span."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        ranks = dist.get_process_group_ranks(kwargs.get("group"))
        kind = EXPERTS if ranks == experts else ""
        label = Label(DP, f"{kind}{name} {recorder.stage}", DP, recorder.stage)
        if kwargs.get("async_op"):
            return _TimedWork(original(*args, **kwargs), recorder, label)
        with recorder.span(label, waits=True):
            return original(*args, **kwargs)

    return call


class _TimedWork(dist.Work):  # type: ignore[misc]
    """A collective under way; waiting for it is a span."""

    def __init__(self, work: dist.Work, recorder: Recorder, label: Label) -> None:
        super().__init__()
        self._work = work
        self._recorder = recorder
        self._label = label

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        with self._recorder.span(self._label, waits=True):
            return bool(self._work.wait())
