"""Tensor parallelism and FSDP on a stage, with DTensor and fully_shard.

What `zero` means here, exactly:

0  replicas: parameters, gradients and optimizer states whole on every dp rank; one all-reduce of the
   gradients a step (parsim.execute.training.replicas).
1  the same, but each dp rank keeps the optimizer states of its share: reduce-scatter of the
   gradients, update of the share, all-gather of the parameters (parsim.execute.training.replicas).
2  fully_shard(reshard_after_forward=False): parameters are gathered once a step and stay whole until the
   last backward; gradients are reduce-scattered after every backward. Between steps parameters are
   sharded too.
3  fully_shard(reshard_after_forward=True): each layer is gathered for its forward and again for its
   backward, and reduce-scattered after every backward.

In a pipeline, torch's runtime keeps the gradients of stages under 2 and 3 whole until their last
backward, and reduce-scatters them once a step.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional

from parsim.execute.training.feed_forward import MixtureOfExperts
from parsim.execute.training.transformer import Transformer

HEADS = 2
"""Dimension of the heads in [b, s, heads, d]."""


def apply_tensor_parallel(model: Transformer, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    """Split every layer, the embedding and the head over the ranks of `mesh`.

    As in Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3): a layer costs two all-reduces
    forward and two backward; with sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198,
    section 4.2.2) each is an all-gather and a reduce-scatter, and norms work on 1/tp of the sequence.
    """
    outside = Shard(1) if sequence_parallel else Replicate()
    parallelize_module(model, mesh, _ends_plan(model, outside), src_data_rank=None)
    for block in model.layers.values():
        styles = _block_plan(outside)
        if isinstance(block.feed_forward, MixtureOfExperts):
            del styles["feed_forward"]
            styles |= _moe_plan(outside)
        parallelize_module(block, mesh, _present(block, styles), src_data_rank=None)
    model.tie()  # again: both matrices were split, by rows of the vocabulary, each on its own


def _present(module: nn.Module, plan: dict[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    """The entries of a plan whose submodules the module has."""
    names = {name for name, _ in module.named_modules()}
    return {name: style for name, style in plan.items() if name in names}


def _ends_plan(model: Transformer, outside: Shard | Replicate) -> dict[str, ParallelStyle]:
    """What to do with embedding, final norm and head."""
    plan: dict[str, ParallelStyle] = {
        # Rows of the tables are split: a rank looks up what it has, the sum over ranks is the vector.
        "embedding.token": RowwiseParallel(input_layouts=Replicate(), output_layouts=outside),
        "embedding.position": RowwiseParallel(input_layouts=Replicate(), output_layouts=outside),
        # Logits stay split by vocabulary; the loss is computed on the parts.
        "head": ColwiseParallel(input_layouts=outside, output_layouts=Shard(-1)),
    }
    if isinstance(outside, Shard):
        plan["embedding.norm"] = SequenceParallel(use_local_output=True)
        plan["norm"] = SequenceParallel()
    return _present(model, plan)


def _block_plan(outside: Shard | Replicate) -> dict[str, ParallelStyle]:
    """What to do with the parts of one layer."""
    plan: dict[str, ParallelStyle] = {
        # One conversion for query, key and value together, so that backward communicates once.
        "attention": PrepareModuleInput(
            input_layouts=(outside, None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        "attention.query": ColwiseParallel(),
        "attention.key": ColwiseParallel(),
        "attention.value": ColwiseParallel(),
        # Heads are split, so each rank's gradient of these weights is a part of the sum.
        "attention.query_norm": SequenceParallel(sequence_dim=HEADS, use_local_output=True),
        "attention.key_norm": SequenceParallel(sequence_dim=HEADS, use_local_output=True),
        "attention.out": RowwiseParallel(output_layouts=outside),
        "feed_forward": PrepareModuleInput(
            input_layouts=(outside,), desired_input_layouts=(Replicate(),)
        ),
        "feed_forward.gate": ColwiseParallel(),
        "feed_forward.up": ColwiseParallel(),
        "feed_forward.down": RowwiseParallel(output_layouts=outside),
    }
    if isinstance(outside, Shard):
        plan["attention_norm"] = SequenceParallel()
        plan["feed_forward_norm"] = SequenceParallel()
    return plan


def _moe_plan(outside: Shard | Replicate) -> dict[str, ParallelStyle]:
    """What takes the place of the feed-forward's entries in a layer with experts.

    Each rank routes its own part of the sequence; experts are whole, so only the shared one is split.
    """
    return {
        "feed_forward_norm": SequenceParallel(use_local_output=True),
        "feed_forward.router": SequenceParallel(use_local_output=True),
        "feed_forward.shared_gate": SequenceParallel(use_local_output=True),
        "feed_forward.shared": PrepareModuleInput(
            input_layouts=(outside,), desired_input_layouts=(Replicate(),)
        ),
        "feed_forward.shared.gate": ColwiseParallel(),
        "feed_forward.shared.up": ColwiseParallel(),
        "feed_forward.shared.down": RowwiseParallel(output_layouts=outside),
    }


def apply_fsdp(
    model: Transformer,
    mesh: DeviceMesh,
    expert_mesh: DeviceMesh,
    *,
    zero: int,
    compute_dtype: torch.dtype,
) -> None:
    """Shard a stage over the ranks of `mesh`, and routed experts over those that hold the same ones.

    Each layer is a unit, its experts are another; embedding, final norm and head are one.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=master_dtype(compute_dtype))
    reshard = zero == 3
    for block in model.layers.values():
        if isinstance(block.feed_forward, MixtureOfExperts):
            experts = block.feed_forward.experts
            fully_shard(experts, mesh=expert_mesh, mp_policy=policy, reshard_after_forward=reshard)
            # Sums, which Shards divides: tokens of all replicas come to an expert, however few ranks
            # hold it, and on one rank alone torch 2.13 divides twice by a factor that it is given.
            experts.set_gradient_divide_factor(1.0)
            experts.set_force_sum_reduction_for_comms(True)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)


def master_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """What optimizer states and gradient sums are kept in."""
    return torch.float32 if compute_dtype.itemsize < 4 else compute_dtype


def token_loss(logits: torch.Tensor, targets: torch.Tensor, tp_mesh: DeviceMesh | None) -> torch.Tensor:
    """Mean cross-entropy over the tokens of a micro-batch, from logits split over `tp_mesh`.

    Under tensor parallelism it must run, with its backward, within torch's loss_parallel().
    """
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    if tp_mesh is None:
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    split = DTensor.from_local(logits, tp_mesh, [Shard(2)], run_check=False)
    loss = functional.cross_entropy(split.flatten(0, 1), targets.flatten())
    assert isinstance(loss, DTensor)
    return loss.to_local()
