"""Data parallelism with whole parameters on every rank: ZeRO stages 0 and 1, and no dp at all.

The parameters of a rank are cut into buckets. A bucket's parameters lie one after another in one flat
tensor, so gradients are summed, optimizer states sharded and parameters gathered a bucket at a time
(Rajbhandari et al. 2020, arXiv 1910.02054, section 5.1; the flat buffers are those of Megatron-Core's
distributed optimizer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from parsim.execute.training.compress import Compressor, GradientBucket
from parsim.execute.training.local import local
from parsim.execute.training.loss_scale import LossScale, take_step
from parsim.execute.training.parallelize import master_dtype
from parsim.execute.training.recorder import Label, Recorder
from parsim.timeline import COMPUTE, DP, EXPERTS, HOST, TIED_EMBEDDING, TP

BUCKET_PARAMETERS = 40_000_000
"""Size at which a bucket is closed, as in Megatron-Core."""

TIED = "embedding.token.weight"
"""The matrix that a head uses too where embeddings are tied."""

# The first names are those since torch 2.13, which warns of the second ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

MakeOptimizer = Callable[[list[Any]], torch.optim.Optimizer]
"""From tensors, or from groups of them, to torch's optimizer."""


class Holders(NamedTuple):
    """Ranks that hold the same parameters, whose gradients they sum."""

    group: dist.ProcessGroup | None
    """None where there is but one."""
    size: int
    place: int
    """This rank's, from 0."""


ALONE = Holders(None, 1, 0)


def holders(mesh: DeviceMesh) -> Holders:
    """The ranks of a mesh of one dimension."""
    return Holders(mesh.get_group(), mesh.size(), mesh.get_local_rank())


class Bucket:
    """Some parameters of one stage, as one flat tensor cut into one shard for each that holds them."""

    def __init__(
        self,
        stage: int,
        parameters: dict[str, nn.Parameter],
        among: Holders = ALONE,
        *,
        kind: str = "",
        sharded: bool = False,
    ) -> None:
        """`among`: the ranks that sum its gradients, and with `sharded` share its optimizer states.

        `kind`: what the names of its collectives begin with, where those are not of all replicas.
        """
        self.kind = kind
        self.stage = stage
        self.among = among
        self.sharded = sharded and among.size > 1
        ranks, index = (among.size, among.place) if self.sharded else (1, 0)
        mine = {name: local(parameter) for name, parameter in parameters.items()}
        self.shapes = [tensor.shape for tensor in mine.values()]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.shard_size = -(-sum(self.sizes) // ranks)
        self.flat = next(iter(mine.values())).new_zeros(self.shard_size * ranks)
        self.parameters: dict[str, nn.Parameter] = {}
        """Parameters to be used in place of those given: their values lie in `flat`."""
        for (name, tensor), part in zip(mine.items(), self.pieces(self.flat), strict=True):
            part.copy_(tensor.reshape(-1))
            self.parameters[name] = like(parameters[name], part.view(tensor.shape))
        self.shard = self.flat if ranks == 1 else self.flat.chunk(ranks)[index]
        self.owned = range(index * self.shard_size, (index + 1) * self.shard_size)
        """Where the shard lies in `flat`."""
        # 16-bit weights are rounded copies of fp32 ones that only the optimizer sees.
        master = master_dtype(self.flat.dtype)
        self.master = self.shard if master == self.flat.dtype else self.shard.to(master)

    def pieces(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A flat tensor cut by parameters."""
        return tuple(flat.split([*self.sizes, self._padding])[:-1])

    def extents(self) -> dict[str, tuple[int, int]]:
        """Where each parameter begins and ends in `flat`."""
        stops = list(accumulate(self.sizes))
        return dict(zip(self.parameters, zip([0, *stops], stops, strict=False), strict=True))

    @property
    def _padding(self) -> int:
        return int(self.flat.numel() - sum(self.sizes))

    def snapshot(self) -> dict[str, nn.Parameter]:
        """The parameters as they are now, on a copy that updates leave alone."""
        parts = zip(self.parameters.items(), self.pieces(self.flat.clone()), self.shapes, strict=True)
        return {name: like(parameter, part.view(shape)) for (name, parameter), part, shape in parts}

    def gathered(self, mine: torch.Tensor) -> torch.Tensor:
        """What all ranks that share the bucket's shards have, one after another; collective."""
        if not self.sharded:
            return mine
        whole = mine.new_empty(mine.numel() * self.among.size)
        _all_gather(whole, mine, group=self.among.group)
        return whole

    def gather_gradients(self) -> torch.Tensor:
        """All gradients one after another, taken from the parameters."""
        dtype = self.master.dtype
        pieces = [
            local(p.grad).reshape(-1).to(dtype) for p in self.parameters.values() if p.grad is not None
        ]
        for parameter in self.parameters.values():
            parameter.grad = None
        return torch.cat([*pieces, self.flat.new_zeros(self._padding, dtype=dtype)])

    def rounded(self) -> None:
        """Take over what the optimizer made of the master weights."""
        if self.master is not self.shard:
            self.shard.copy_(self.master)


class Replicas:
    """Gradient sums and parameter updates of the stages of one rank."""

    def __init__(
        self,
        stages: dict[int, nn.Module],
        *,
        dp_mesh: DeviceMesh,
        tp_mesh: DeviceMesh,
        tied: dist.ProcessGroup | None,
        expert_mesh: DeviceMesh | None,
        sharded_optimizer: bool,
        make_optimizer: MakeOptimizer,
        recorder: Recorder,
        compressor: Compressor | None = None,
        loss_scale: LossScale | None = None,
    ) -> None:
        """`tied`: this rank and the one that has the other copy of a tied embedding, if it has one.

        `expert_mesh`: the ranks that hold the same routed experts as this one, where there are any.

        `compressor` takes the place of the all-reduce of whole gradients.
        """
        self.replicas = dp_mesh.size()
        self.tp_group = tp_mesh.get_group()
        self.tied = tied
        self.recorder = recorder
        self.compressor = compressor
        self.loss_scale = loss_scale
        dense = holders(dp_mesh)
        routed = dense if expert_mesh is None else holders(expert_mesh)
        self.buckets: list[Bucket] = []
        for stage, module in stages.items():
            named = dict(module.named_parameters())
            # Both copies of a tied matrix have a bucket alone, so that their shards are the same values.
            copied = {TIED} & named.keys() if tied is not None else set()
            for among, mine in (
                (dense, {n: p for n, p in named.items() if not is_routed(n) and n not in copied}),
                (routed, {n: p for n, p in named.items() if is_routed(n)}),
                (dense, {n: named[n] for n in copied}),
            ):
                for parameters in list(_in_buckets(mine)):
                    kind = EXPERTS if among is not dense else ""
                    bucket = Bucket(stage, parameters, among, kind=kind, sharded=sharded_optimizer)
                    adopt(module, bucket.parameters)
                    self.buckets.append(bucket)
        self.optimizer = make_optimizer([bucket.master for bucket in self.buckets])

    def adopt(self, module: nn.Module, parameters: list[dict[str, nn.Parameter]]) -> None:
        """Let the one stage compute with these, by bucket, and leave its gradients on them."""
        for bucket, own in zip(self.buckets, parameters, strict=True):
            bucket.parameters = own
            adopt(module, own)

    def before_backward(self, *, last: bool) -> None:
        """Nothing: gradients are summed over micro-batches where they arise."""

    def reduce(self) -> None:
        """Sum gradients over the replicas, once all micro-batches have been backward."""
        self._settle_over_tp()
        for index, bucket in enumerate(self.buckets):
            with self.recorder.span(Label(HOST, "flatten gradients", "host", bucket.stage)):
                flat = bucket.gather_gradients()
            if bucket.among.size > 1:
                name = f"{bucket.kind}gradients {bucket.stage}"
                with self.recorder.span(Label(DP, name, DP, bucket.stage), waits=True):
                    flat = self._mean(flat, index)
            elif self.replicas > 1:
                flat.div_(self.replicas)  # an expert that no other rank has was sent all its tokens
            if self.tied is not None and TIED in bucket.parameters:
                # Last: the sum of two is the same on both ends whatever the library's order, while sums
                # over more ranks are rounded as they come.
                sum_tied(flat, self.tied, bucket.stage, self.recorder)
            bucket.master.grad = flat

    def _mean(self, flat: torch.Tensor, index: int) -> torch.Tensor:
        """The mean of a bucket's gradients over the replicas: all of it, or this rank's shard."""
        bucket = self.buckets[index]
        if self.compressor is not None:
            last = index == len(self.buckets) - 1
            return self.compressor.mean(GradientBucket(index, flat, bucket.shapes, last=last))
        if bucket.sharded:
            shard = flat.new_empty(flat.numel() // bucket.among.size)
            _reduce_scatter(shard, flat, group=bucket.among.group)
            return shard.div_(self.replicas)
        dist.all_reduce(flat, group=bucket.among.group)
        return flat.div_(self.replicas)

    def _settle_over_tp(self) -> None:
        """Give every gradient the split of its parameter.

        Gradients of which each tp rank has a part (norms and biases) are completed in one all-reduce;
        whole gradients of split parameters (DTensor's embedding) are cut.
        """
        parts: list[nn.Parameter] = []
        for bucket in self.buckets:
            for parameter in bucket.parameters.values():
                grad = parameter.grad
                if not isinstance(grad, DTensor) or grad.placements == parameter.placements:
                    continue
                if grad.placements[0].is_partial() and parameter.placements[0].is_replicate():
                    parts.append(parameter)
                else:
                    parameter.grad = grad.redistribute(placements=parameter.placements)
        if not parts:
            return
        with self.recorder.span(Label(TP, "gradients of norms", TP), waits=True):
            pieces = [local(p.grad) for p in parts if p.grad is not None]
            flat = torch.cat([piece.reshape(-1) for piece in pieces])
            dist.all_reduce(flat, group=self.tp_group)
            for piece, total in zip(pieces, flat.split([p.numel() for p in pieces]), strict=True):
                piece.copy_(total.view(piece.shape))

    def update(self) -> None:
        """The optimizer step, and with sharded states the all-gather of the parameters."""
        with self.recorder.span(Label(COMPUTE, "optimizer", "optimizer")):
            take_step(self.optimizer, self.loss_scale)
            for bucket in self.buckets:
                bucket.rounded()
                bucket.master.grad = None
        self._gather_parameters()

    def spread(self) -> None:
        """Let all parameters follow the masters, after these were given other values."""
        for bucket in self.buckets:
            bucket.rounded()
        self._gather_parameters()

    def _gather_parameters(self) -> None:
        """With sharded states, what every rank made of its share."""
        for bucket in self.buckets:
            if not bucket.sharded:
                continue
            name = f"{bucket.kind}parameters {bucket.stage}"
            with self.recorder.span(Label(DP, name, DP, bucket.stage), waits=True):
                # The input is a copy: not every backend takes a part of the output as input.
                _all_gather(bucket.flat, bucket.shard.clone(), group=bucket.among.group)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole values) of every parameter, of replicas with whole optimizers; collective."""
        for bucket in self.buckets:
            for name, parameter in bucket.snapshot().items():
                whole = parameter.detach()
                yield name, whole.full_tensor() if isinstance(whole, DTensor) else whole

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole gradient) of every parameter, between reduce() and update(); collective."""
        for bucket in self.buckets:
            flat = bucket.master.grad
            assert flat is not None
            flat = bucket.gathered(flat)
            for (name, parameter), piece in zip(
                bucket.parameters.items(), bucket.pieces(flat), strict=True
            ):
                whole = like(parameter, piece.view(local(parameter).shape)).detach()
                yield name, whole.full_tensor() if isinstance(whole, DTensor) else whole


def sum_tied(gradient: torch.Tensor, group: dist.ProcessGroup, stage: int, recorder: Recorder) -> None:
    """Let both copies of a tied embedding have the sum of their gradients."""
    with recorder.span(Label(DP, TIED_EMBEDDING, DP, stage), waits=True):
        dist.all_reduce(gradient, group=group)


def is_routed(name: str) -> bool:
    """Whether a parameter belongs to a routed expert."""
    return ".experts." in name


def like(parameter: nn.Parameter, mine: torch.Tensor) -> nn.Parameter:
    """A parameter split like another, of which this rank has `mine`."""
    if isinstance(parameter, DTensor):
        mine = DTensor.from_local(
            mine, parameter.device_mesh, parameter.placements, run_check=False,
            shape=parameter.shape, stride=parameter.stride(),
        )  # fmt: skip
    return nn.Parameter(mine)


def adopt(module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Put parameters in place of those of the same names, wherever the module uses them."""
    current = dict(module.named_parameters())
    replaced = {id(current[name]): parameter for name, parameter in parameters.items()}
    for owner in module.modules():
        for key, old in list(owner.named_parameters(recurse=False)):
            if id(old) in replaced:
                setattr(owner, key, replaced[id(old)])


def _in_buckets(parameters: dict[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """Parameters in order, cut where a bucket is full."""
    bucket: dict[str, nn.Parameter] = {}
    size = 0
    for name, parameter in parameters.items():
        bucket[name] = parameter
        size += local(parameter).numel()
        if size >= BUCKET_PARAMETERS:
            yield bucket
            bucket, size = {}, 0
    if bucket:
        yield bucket
