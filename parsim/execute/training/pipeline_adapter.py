"""parsim's Schedules on the pipeline runtime of torch: the one file that touches its private names.

Held against torch 2.11 and 2.13. `_PipelineScheduleRuntime` runs any list of actions a rank; what it
calls around each action (`record_function`) and to wait for a transfer (`_wait_batch_p2p`) is replaced
while a step runs, so that both become spans.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import (
    _Action,
    _ComputationType,
    _PipelineScheduleRuntime,
)

from parsim.execute.training.recorder import Label, Recorder
from parsim.schedule.action import (
    BACKWARD,
    FORWARD,
    INPUT_GRAD,
    KINDS,
    Action,
    Schedule,
    computations,
)
from parsim.timeline import HOST

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_RECORDED = re.compile(r"PP:(\d+)(F|B|I|W|SEND_F|SEND_B|RECV_F|RECV_B|UNSHARD|RESHARD|REDUCE_GRAD)(\d*)")
"""The names under which torch records what it does: stage, what, micro-batch."""
_RECEIVES = (_ComputationType.RECV_F, _ComputationType.RECV_B)


class Pipeline:
    """The stages of one rank, ready to run a Schedule."""

    def __init__(
        self,
        modules: dict[int, nn.Module],
        schedule: Schedule,
        *,
        group: dist.ProcessGroup,
        device: torch.device,
        tokens: tuple[int, int],
        hidden: tuple[int, int, int],
        logits: tuple[int, int, int],
        dtype: torch.dtype,
        loss: LossFunction,
        recorder: Recorder,
    ) -> None:
        """`tokens`, `hidden`, `logits`: shapes of a micro-batch before, between and after the stages."""
        self._recorder = recorder
        self._transfers = _Transfers(schedule, dist.get_rank(group))
        last = schedule.num_stages - 1
        stages = [
            _Stage(
                module,
                index,
                schedule.num_stages,
                device,
                # Shapes are known, so no trial run is needed to find them.
                input_args=_example(tokens, torch.int64) if index == 0 else _example(hidden, dtype),
                output_args=_example(logits if index == last else hidden, dtype),
                group=group,
            )
            for index, module in sorted(modules.items())
        ]
        self._first = 0 in modules
        self._last = last in modules
        self._runtime = _Runtime(
            stages, n_microbatches=schedule.num_micro_batches, loss_fn=loss, scale_grads=False
        )
        # torch runs the parts of an overlapped pair one after the other; apart, each is a span.
        self._runtime._prepare_schedule_with_comms(
            {
                rank: [_Action.from_str(str(action)) for action in computations(row)]
                for rank, row in enumerate(schedule.ranks)
            }
        )
        if device.type == "cpu":
            orders = self._runtime.pipeline_order_with_comms
            orders.update({rank: receives_first(order) for rank, order in orders.items()})

    def run(self, tokens: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
        """Forward and backward of all micro-batches; their losses on the last stage, else nothing."""
        with _recorded(self._transfers, self._recorder):
            self._runtime.step(
                *((tokens,) if self._first else ()),
                target=targets if self._last else None,
                return_outputs=False,
            )
        losses = self._runtime.losses
        self._runtime.losses = {}
        return [losses[i].detach() for i in sorted(losses)]


class _Stage(PipelineStage):  # type: ignore[misc]
    """A stage that does not greet itself: in V-shaped schedules neighbours may live on one rank.

    Torch 2.11 lets all neighbours exchange a message before the first step; gloo has no connection from
    a rank to itself.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._alone = runs_alone(self.group)
        self._filled: set[int] = set()

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        ops = super()._get_init_p2p_neighbors_ops()
        return [op for op in ops if op.group_peer != self.group_rank]

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._with_content(super().get_fwd_recv_ops(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._with_content(super().get_bwd_recv_ops(bwd_chunk_id))

    def _with_content(self, ops: list[dist.P2POp]) -> list[dist.P2POp]:
        """Noise in what is received, once, where a rank runs alone: kernels may care for values."""
        for op in ops if self._alone else ():
            if op.tensor.data_ptr() not in self._filled:
                self._filled.add(op.tensor.data_ptr())
                with torch.no_grad():
                    op.tensor.normal_()
        return ops


class _Runtime(_PipelineScheduleRuntime):  # type: ignore[misc]
    """The runtime with losses kept by micro-batch.

    Torch's own finds them by order of computation, which is wrong where a schedule does not take
    micro-batches in order.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: dict[int, torch.Tensor] = {}

    def _warmup_p2p(self, stages: list[Any], *rest: Any) -> None:
        """From torch 2.13 all stages vote on whether shapes are known; with nobody there, they are."""
        if not runs_alone(stages[0].group):
            super()._warmup_p2p(stages, *rest)
            return
        for stage in stages:
            stage._inference_mode = schedules.InferenceMode.STATIC

    def _maybe_compute_loss(
        self, stage: Any, output: Any, target_mbs: Any, mb_index: int, *_: Any
    ) -> None:
        if stage.is_last:
            self.losses[mb_index] = self._loss_fn(output, target_mbs[mb_index])

    def _maybe_get_loss(self, stage: Any, mb_index: int) -> torch.Tensor | None:
        return self.losses[mb_index] if stage.is_last else None


def receives_first(order: list[_Action]) -> list[_Action]:
    """A rank's actions with all its receives at the beginning, in the order in which they were.

    gloo sends a message once it has heard that the other rank asks for it. It hears that in a thread of
    its own, which waits for its turn on a core that computes: asked for in the course of the step, as
    torch does it, messages left up to a time slice of 4 ms late. Every micro-batch has a buffer of its
    own from the start, so asking early takes no memory. NCCL wants the order of both sides to agree.
    """
    first = [action for action in order if action.computation_type in _RECEIVES]
    return first + [action for action in order if action.computation_type not in _RECEIVES]


def runs_alone(group: dist.ProcessGroup) -> bool:
    """Whether the other ranks of a group are not there."""
    return bool(dist.get_backend(group) == "fake")


def _example(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor without content; activations carry gradients."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


class _Transfers:
    """Names and streams of the transfers of one pipeline rank.

    As in parsim.schedule.lower: a transfer is named after the action whose result it carries, and the
    stream tells whether the peer stands before or after this rank on the ring of ranks.
    """

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self._rank = rank
        self._pp = schedule.pp
        self._ranks = schedule.stage_ranks()
        self._input_grads = {a for a in schedule.actions() if a.kind == INPUT_GRAD}
        self.sent: list[Label] = []
        """Transfers on their way from this rank, in order."""

    def receive(self, action: Action) -> Label:
        """The transfer that brings what `action` needs."""
        source = self._carried(action.stage + (-1 if action.kind == FORWARD else 1), action)
        onward = (self._rank - self._ranks[source.stage]) % self._pp == 1
        return _transfer("pp_recv_prev" if onward else "pp_recv_next", source)

    def send(self, stage: int, direction: str, micro_batch: int) -> Label:
        """The transfer that carries a result of `stage` away: "F" to the next stage, "B" back."""
        source = self._carried(stage, Action(stage, direction, micro_batch))
        target = self._ranks[stage + (1 if direction == FORWARD else -1)]
        onward = (target - self._rank) % self._pp == 1
        return _transfer("pp_send_next" if onward else "pp_send_prev", source)

    def _carried(self, stage: int, like: Action) -> Action:
        """The action of `stage` whose result goes the way that `like` goes."""
        if like.kind == FORWARD:
            return Action(stage, FORWARD, like.micro_batch)
        split = Action(stage, INPUT_GRAD, like.micro_batch)
        return split if split in self._input_grads else split._replace(kind=BACKWARD)


def _transfer(stream: str, source: Action) -> Label:
    return Label(stream, str(source), "pp", source.stage, source.micro_batch)


@contextlib.contextmanager
def _recorded(transfers: _Transfers, recorder: Recorder) -> Iterator[None]:
    """Turn the runtime's actions and waits into spans."""
    original_record, original_wait = schedules.record_function, schedules._wait_batch_p2p
    transfers.sent.clear()

    def record(name: str) -> contextlib.AbstractContextManager[object]:
        match = _RECORDED.fullmatch(name)
        assert match is not None, f"torch records {name!r}, which this adapter does not know"
        stage, what, micro_batch = int(match[1]), match[2], match[3]
        if what in KINDS:
            return recorder.act(Action(stage, what, int(micro_batch)))
        if what.startswith("SEND"):
            label = transfers.send(stage, what[-1], int(micro_batch))
            transfers.sent.append(label)
            return recorder.span(label)
        return recorder.span(Label(HOST, what.lower(), "host", stage))

    def wait(work: list[dist.Work]) -> None:
        action = recorder.action
        if not work or (action is None and not transfers.sent):
            original_wait(work)  # torch 2.11 opens its connections this way before the first action
            return
        label = transfers.sent.pop() if action is None else transfers.receive(action)
        with recorder.span(label, waits=True):
            original_wait(work)
        recorder.begin_again()  # an action first waits for its input

    schedules.record_function, schedules._wait_batch_p2p = record, wait
    try:
        yield
    finally:
        schedules.record_function, schedules._wait_batch_p2p = original_record, original_wait
