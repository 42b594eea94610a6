"""What training changes, by the names parameters have in the whole model.

"model.layers.3.attention.out.weight" is a parameter's value in the precision that the optimizer sees,
"optimizer.layers.3.attention.out.weight.exp_avg" what AdamW remembers of it. Under every plan the same
names stand for the same tensors, split or whole, so torch.distributed.checkpoint cuts them anew where a
checkpoint of one plan is loaded under another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from parsim.execute.training.local import local
from parsim.execute.training.replicas import Bucket, Replicas, like
from parsim.execute.training.shards import Shards

States = dict[str, torch.Tensor]


def saved_states(data_parallel: Replicas | Shards) -> States:
    """Every tensor that this rank has to save; collective over the dp ranks."""
    if not data_parallel.optimizer.state:  # fp16 may have left out every step so far
        _create_states(data_parallel.optimizer)
        for state in data_parallel.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
    if isinstance(data_parallel, Shards):
        return _of_shards(data_parallel)
    states: States = {}
    for bucket in data_parallel.buckets:
        for key, tensor in _bucket_states(data_parallel, bucket):
            states |= _pieces_to_save(bucket, key, tensor)
    return states


def load_states(data_parallel: Replicas | Shards, read: Callable[[States], None]) -> None:
    """Let `read` fill every tensor of this rank in place, by its name; collective over the dp ranks."""
    _create_states(data_parallel.optimizer)
    if isinstance(data_parallel, Shards):
        read(_of_shards(data_parallel))
        return
    wanted = [
        (bucket, tensor, _pieces_to_load(bucket, key, tensor))
        for bucket in data_parallel.buckets
        for key, tensor in _bucket_states(data_parallel, bucket)
    ]
    read({name: piece for _, _, pieces in wanted for name, piece in pieces.items()})
    for bucket, tensor, pieces in wanted:
        _take(bucket, tensor, list(pieces.values()))
    data_parallel.spread()


def _create_states(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer that has not stepped yet make its states, without a change of any parameter."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _of_shards(shards: Shards) -> States:
    """FSDP's tensors know by themselves which part of the whole they are."""
    states: States = {}
    for name, parameter in shards.parameters().items():
        states[f"model.{name}"] = parameter.detach()
        for key, tensor in shards.optimizer.state[parameter].items():
            states[_optimizer_name(name, key)] = tensor
    return states


def _optimizer_name(parameter: str, key: str) -> str:
    return f"optimizer.{parameter}.{key}"


def _name(parameter: str, key: str) -> str:
    """`key` is "" for the value itself."""
    return _optimizer_name(parameter, key) if key else f"model.{parameter}"


def _bucket_states(replicas: Replicas, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
    """(key, tensor) of a bucket: this rank's share of the values, "", and of the optimizer's states."""
    yield "", bucket.master
    yield from replicas.optimizer.state[bucket.master].items()


def _pieces_to_save(bucket: Bucket, key: str, tensor: torch.Tensor) -> States:
    """Of a bucket's tensor, the parameters that begin in this rank's shard: each has one rank."""
    mine = [name for name, (start, _) in bucket.extents().items() if start in bucket.owned]
    if tensor.dim() == 0:  # a number for all, such as AdamW's count of steps
        return {_name(name, key): tensor for name in mine}
    pieces = dict(zip(bucket.parameters, bucket.pieces(bucket.gathered(tensor)), strict=True))
    return {
        # A copy of a gathered piece lets the rest of the whole go.
        _name(name, key): _shaped(bucket, name, pieces[name].clone() if bucket.sharded else pieces[name])
        for name in mine
    }


def _shaped(bucket: Bucket, name: str, piece: torch.Tensor) -> torch.Tensor:
    """A flat piece as the parameter is: its shape, and its split over tp."""
    parameter = bucket.parameters[name]
    return like(parameter, piece.view(local(parameter).shape)).detach()


def _pieces_to_load(bucket: Bucket, key: str, tensor: torch.Tensor) -> States:
    """Room for every parameter of which this rank's shard holds something."""
    return {
        _name(name, key): torch.zeros_like(tensor)
        if tensor.dim() == 0
        else _shaped(bucket, name, tensor.new_zeros(stop - start))
        for name, (start, stop) in bucket.extents().items()
        if _overlaps((start, stop), bucket.owned)
    }


def _take(bucket: Bucket, tensor: torch.Tensor, pieces: list[torch.Tensor]) -> None:
    """Put this rank's share of the pieces that were read into a bucket's tensor."""
    if tensor.dim() == 0:
        tensor.copy_(pieces[0])
        return
    extents = [e for e in bucket.extents().values() if _overlaps(e, bucket.owned)]
    for (start, stop), piece in zip(extents, pieces, strict=True):
        first, last = max(start, bucket.owned.start), min(stop, bucket.owned.stop)
        flat = local(piece).reshape(-1)
        tensor[first - bucket.owned.start : last - bucket.owned.start] = flat[
            first - start : last - start
        ]


def _overlaps(extent: tuple[int, int], owned: range) -> bool:
    return extent[0] < owned.stop and extent[1] > owned.start
