"""One rank of a plan: its stages, built and split, and what it does in a step."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel

from parsim.errors import ParsimError
from parsim.execute.request import Case
from parsim.execute.training.batches import Batch, replica_batch
from parsim.execute.training.collective_spans import recorded_collectives
from parsim.execute.training.compress import Compressor
from parsim.execute.training.compress_check import CheckedCompressor
from parsim.execute.training.context import Context
from parsim.execute.training.layer_collectives import LayerGroup
from parsim.execute.training.loss_scale import LossScale
from parsim.execute.training.parallelize import (
    apply_fsdp,
    apply_tensor_parallel,
    master_dtype,
    token_loss,
)
from parsim.execute.training.pipeline_adapter import Pipeline
from parsim.execute.training.recorder import Recorder
from parsim.execute.training.replicas import Replicas
from parsim.execute.training.shards import Shards
from parsim.execute.training.transformer import Part, Share, Transformer, build
from parsim.plan import ASYNCHRONOUS_SCHEDULES, parse_compression, recomputed_layers, stage_layers
from parsim.schedule.action import FORWARD
from parsim.timeline import CP, EP

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
LEARNING_RATE = 1e-3


class Trainer:
    """A rank's share of the model under a plan."""

    def __init__(
        self, case: Case, device: torch.device, recorder: Recorder, control: dist.ProcessGroup
    ) -> None:
        """`control` carries what is no part of training, over the CPU."""
        plan = case.plan
        self.control = control
        self.case = case
        self.device = device
        self.recorder = recorder
        # Gradients are summed over all that see other tokens: the dp·cp ranks are one dimension.
        self.mesh = init_device_mesh(
            device.type, (plan.pp, plan.dp * plan.cp, plan.tp), mesh_dim_names=("pp", "dp", "tp")
        )
        self.expert_mesh = self._expert_mesh()
        self.share = self._share()
        self.tied_group = self._tied_group()
        self.tp_mesh: DeviceMesh | None = self.mesh["tp"] if plan.tp > 1 else None
        self.dtype = DTYPES[case.dtype]
        self.loss_scale = LossScale(case.loss_scale, device) if self.dtype == torch.float16 else None
        self.stages = self._stages()
        self.compressor = self._compressor()
        self.data_parallel = self._data_parallel()
        self.num_micro_batches = plan.num_micro_batches(case.job)
        stale = plan.schedule in ASYNCHRONOUS_SCHEDULES  # those run on stale_pipeline
        self._pipeline = self._make_pipeline() if plan.pp > 1 and not stale else None

    @property
    def sharded(self) -> bool:
        """Whether FSDP holds the parameters; with one replica there is nothing to shard."""
        return self.case.plan.zero >= 2 and self.case.plan.dp * self.case.plan.cp > 1

    def _expert_mesh(self) -> DeviceMesh | None:
        """The ranks of a stage that hold the same experts, and those that share them, if there are."""
        plan = self.case.plan
        if self.case.job.model.moe is None:
            return None
        return init_device_mesh(
            self.device.type,
            (plan.pp, plan.dp * plan.cp * plan.tp // plan.ep, plan.ep),
            mesh_dim_names=("pp", "holders", "ep"),
        )

    def _expert_holders(self) -> list[int]:
        """The ranks with the same experts as this one, where those are others than its replicas."""
        if self.expert_mesh is None:
            return []
        replicas, holders = (
            dist.get_process_group_ranks(mesh.get_group())
            for mesh in (self.mesh["dp"], self.expert_mesh["holders"])
        )
        return [] if holders == replicas else holders

    def _share(self) -> Share:
        """What of each layer this rank has."""
        plan = self.case.plan
        context, experts = Context(), None
        if plan.cp > 1:
            sizes = (plan.pp * plan.dp, plan.cp, plan.tp)
            mesh = init_device_mesh(self.device.type, sizes, mesh_dim_names=("replica", "cp", "tp"))
            context = Context(ranks=self._layer_group(mesh["cp"], CP))
        if self.expert_mesh is not None and plan.ep > 1:
            experts = self._layer_group(self.expert_mesh["ep"], EP)
        return Share(context=context, experts=experts)

    def _tied_group(self) -> dist.ProcessGroup | None:
        """This rank and the one with the other copy of a tied embedding: the ends of a pipeline."""
        plan = self.case.plan
        if not self.case.job.model.tied_embeddings or plan.pp == 1:
            return None
        ranks = self.mesh.mesh
        pairs = torch.stack((ranks[0].flatten(), ranks[-1].flatten()), dim=1).tolist()
        mine, _ = dist.new_subgroups_by_enumeration(pairs)
        return mine

    def _layer_group(self, mesh: DeviceMesh, stream: str) -> LayerGroup:
        return LayerGroup(group=mesh.get_group(), stream=stream, recorder=self.recorder)

    def _stages(self) -> dict[int, nn.Module]:
        """This rank's stages by index, split over tp and dp."""
        case, plan = self.case, self.case.plan
        mine = self.mesh["pp"].get_local_rank()
        ranks = case.schedule.stage_ranks()
        split = stage_layers(case.job.model, plan)
        again = recomputed_layers(case.job.model, plan)
        stages: dict[int, nn.Module] = {}
        for stage in range(plan.num_stages):
            if ranks[stage] != mine:
                continue
            start = sum(split[:stage])
            part = Part(
                layers=range(start, start + split[stage]),
                first=stage == 0,
                last=stage == plan.num_stages - 1,
                recomputed=again[stage],
            )
            stages[stage] = self._split(part)
        return stages

    def _split(self, part: Part) -> Transformer:
        case, plan = self.case, self.case.plan
        model = build(
            case.job.model,
            part,
            seq_len=case.job.seq_len,
            recompute=plan.recompute,
            # FSDP keeps the optimizer's precision in its shards and computes in copies of it.
            dtype=master_dtype(self.dtype) if self.sharded else self.dtype,
            device=self.device,
            seed=case.seed,
            share=self.share,
        )
        if self.tp_mesh is not None:
            apply_tensor_parallel(model, self.tp_mesh, sequence_parallel=plan.sequence_parallel)
        if self.sharded:
            dense = self.mesh["dp"]
            routed = dense if self.expert_mesh is None else self.expert_mesh["holders"]
            apply_fsdp(model, dense, routed, zero=plan.zero, compute_dtype=self.dtype)
        return model

    def _data_parallel(self) -> Replicas | Shards:
        make = partial(make_optimizer, self.case.job.optimizer)
        if self.sharded:
            return Shards(
                self.stages,
                replicas=self.mesh["dp"].size(),
                tied=self.tied_group,
                zero=self.case.plan.zero,
                make_optimizer=make,
                recorder=self.recorder,
                loss_scale=self.loss_scale,
            )
        return Replicas(
            self.stages,
            dp_mesh=self.mesh["dp"],
            tp_mesh=self.mesh["tp"],
            tied=self.tied_group,
            expert_mesh=None if self.expert_mesh is None else self.expert_mesh["holders"],
            sharded_optimizer=self.case.plan.zero >= 1,
            make_optimizer=make,
            recorder=self.recorder,
            compressor=self.compressor,
            loss_scale=self.loss_scale,
        )

    def _compressor(self) -> Compressor | None:
        """What sums gradients in a compressed form, where the plan has it and there are replicas."""
        compression = parse_compression(self.case.plan.compression)
        if compression.kind == "none" or self.mesh["dp"].size() == 1:
            return None
        make = CheckedCompressor if self.case.verify else Compressor
        return make(compression, self.mesh["dp"].get_group())

    def _make_pipeline(self) -> Pipeline:
        job, plan = self.case.job, self.case.plan
        length = job.seq_len // plan.cp
        cut = plan.tp if self.tp_mesh is not None and plan.sequence_parallel else 1
        return Pipeline(
            self.stages,
            self.case.schedule,
            group=self.mesh["pp"].get_group(),
            device=self.device,
            tokens=(plan.micro_batch, length),
            hidden=(plan.micro_batch, length // cut, job.model.hidden),
            logits=(plan.micro_batch, length, job.model.vocab // plan.tp),
            dtype=self.dtype,
            loss=self._loss,
            recorder=self.recorder,
        )

    def _loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """A micro-batch's share of the mean over this replica's tokens, times the loss scale."""
        share = self._scale / self.num_micro_batches
        return token_loss(logits, targets, self.tp_mesh) * share

    @property
    def _scale(self) -> float:
        return 1.0 if self.loss_scale is None else self.loss_scale.value

    def batch(self, step: int) -> Batch:
        """This rank's tokens of the global batch of a step, on its device."""
        replica = self.mesh["dp"].get_local_rank() // self.case.plan.cp
        positions = self.share.context.positions(self.case.job.seq_len)
        tokens, targets = (each[:, positions] for each in replica_batch(self.case, step, replica))
        return tokens.to(self.device), targets.to(self.device)

    def forward_backward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor | None:
        """Gradients of the mean loss over the global batch; the replica's loss on the last stage."""
        scale = self._scale
        with self.within_step():
            if self._pipeline is not None:
                losses = self._pipeline.run(tokens, targets)
            else:
                losses = self._accumulate(tokens, targets)
            self.require_gradients()
            self.data_parallel.reduce()
        return torch.stack(losses).sum() / scale if losses else None

    def update(self) -> None:
        """The optimizer step; gradients are gone afterwards."""
        with self.within_step():
            self.data_parallel.update()

    def require_gradients(self) -> None:
        """Refuse to go on where torch left a parameter out, as it does under some combinations."""
        for stage, module in self.stages.items():
            missing = [name for name, p in module.named_parameters() if p.grad is None]
            if missing:
                raise ParsimError(
                    "torch computed no gradient for some parameters under this plan",
                    where=f"stage {stage}: {', '.join(missing[:4])}",
                    got=f"{len(missing)} parameters without a gradient",
                    hint="this combination must not be run; please report the plan",
                )

    def within_step(self) -> contextlib.ExitStack:
        """The context of everything that computes or communicates for training."""
        stack = contextlib.ExitStack()
        stack.enter_context(recorded_collectives(self.recorder, self._expert_holders()))
        if self.tp_mesh is not None:
            stack.enter_context(loss_parallel())
        return stack

    def _accumulate(self, tokens: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
        """Without a pipeline: the schedule's forwards and backwards of the one stage, in its order."""
        (module,) = self.stages.values()
        batches = list(zip(tokens.chunk(self.num_micro_batches),
                           targets.chunk(self.num_micro_batches), strict=True))  # fmt: skip
        losses: dict[int, torch.Tensor] = {}
        backwards = 0
        for action in self.case.schedule.ranks[0]:
            with self.recorder.act(action):
                if action.kind == FORWARD:
                    inputs, wanted = batches[action.micro_batch]
                    losses[action.micro_batch] = self._loss(module(inputs), wanted)
                else:
                    backwards += 1
                    self.data_parallel.before_backward(last=backwards == self.num_micro_batches)
                    losses[action.micro_batch].backward()
                    losses[action.micro_batch] = losses[action.micro_batch].detach()
        return [losses[i] for i in sorted(losses)]


def make_optimizer(name: str, parameters: list[Any]) -> torch.optim.Optimizer:
    """torch's own optimizer of a Job's name, in its fused form: ten times faster on a core.

    `parameters` are tensors or, where FSDP holds them, groups of DTensors, for which torch 2.13 has no
    fused form of SGD.
    """
    if name == "sgd":
        whole = not parameters or isinstance(parameters[0], torch.Tensor)
        return torch.optim.SGD(parameters, lr=LEARNING_RATE, fused=whole)
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
