"""Data parallelism with sharded gradients and parameters: ZeRO stages 2 and 3, by FSDP2."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from parsim.execute.training.local import local
from parsim.execute.training.loss_scale import LossScale, take_step
from parsim.execute.training.recorder import Label, Recorder
from parsim.execute.training.replicas import TIED, MakeOptimizer, is_routed, sum_tied
from parsim.timeline import COMPUTE


class Shards:
    """Gradient sums and parameter updates of stages under fully_shard, which reduces by itself."""

    def __init__(
        self,
        stages: dict[int, nn.Module],
        *,
        replicas: int,
        tied: dist.ProcessGroup | None,
        zero: int,
        make_optimizer: MakeOptimizer,
        recorder: Recorder,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.stages = stages
        self.replicas = replicas
        self.tied = tied
        self.keep_whole = zero == 2
        self.recorder = recorder
        self.loss_scale = loss_scale
        # The fused loops of an optimizer take one device mesh at a time: norms may have no tp dimension.
        groups: dict[object, list[torch.Tensor]] = defaultdict(list)
        for parameter in self.parameters().values():
            assert isinstance(parameter, DTensor)
            groups[parameter.device_mesh].append(parameter)
        self.optimizer = make_optimizer([{"params": group} for group in groups.values()])

    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's shards by the names of the parameters, which are unique over all stages."""
        return {n: p for module in self.stages.values() for n, p in module.named_parameters()}

    def before_backward(self, *, last: bool) -> None:
        """Without a pipeline: keep parameters whole between micro-batches under ZeRO 2."""
        for module in self.stages.values():
            assert isinstance(module, FSDPModule)
            module.set_is_last_backward(last)
            if self.keep_whole:
                module.set_reshard_after_backward(last)

    def reduce(self) -> None:
        """The sum over both copies of a tied embedding, and of experts a mean over the replicas.

        All else has been reduced behind its backward.
        """
        for stage, module in self.stages.items():
            parameter = dict(module.named_parameters()).get(TIED)
            if self.tied is not None and parameter is not None:
                sum_tied(local(parameter.grad), self.tied, stage, self.recorder)
        for name, parameter in self.parameters().items():
            if is_routed(name):
                local(parameter.grad).div_(self.replicas)

    def update(self) -> None:
        """The optimizer step on this rank's shards."""
        with self.recorder.span(Label(COMPUTE, "optimizer", "optimizer")):
            take_step(self.optimizer, self.loss_scale)
            self.optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole gradient) of every parameter, between reduce() and update(); collective."""
        for name, parameter in self.parameters().items():
            assert isinstance(parameter.grad, DTensor)
            yield name, parameter.grad.full_tensor()
