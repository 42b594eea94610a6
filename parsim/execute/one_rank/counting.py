"""FLOPs and collectives of one rank's step, counted below DTensor as they are dispatched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from parsim.timeline import CP

_KINDS = {
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "allreduce_": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "all_gather_single": "all_gather",
    "_allgather_base_": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "send": "send",
    "recv_": "recv",
}
"""Kinds of collectives by the names of torch's operations; others are counted under their own names."""
_NO_TRANSFERS = ("wait_tensor", "_wrap_tensor_autograd", "barrier")


class Counted(NamedTuple):
    """Collectives of one kind in the groups of one mesh dimension."""

    dimension: str
    """tp, dp, cp, pp, or tied: between both copies of an embedding."""
    kind: str


class StepCounter(TorchDispatchMode):  # type: ignore[misc]
    """Counts what one rank computes and communicates as long as it lasts.

    Torch's FlopCounterMode sees a DTensor as the whole tensor; here DTensor comes first, so that every
    operation is seen with the rank's own shapes. What sharding propagation tries out on fake tensors
    would be counted too: run a step before, after which it is remembered.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        context: dist.ProcessGroup | None,
        tied: dist.ProcessGroup | None,
    ) -> None:
        """`context`: the ranks that share a sequence; where those are all replicas, they count as dp.

        `tied`: the two that have a copy of a tied embedding; in short pipelines all of its ranks.
        """
        super().__init__()
        self.flops = 0
        self.count: Counter[Counted] = Counter()
        self.num_bytes: Counter[Counted] = Counter()
        """Of the full buffers, as nccl-tests counts."""
        names = mesh.mesh_dim_names or ()
        # By members: DTensor may hold on to a group of the same ranks from before.
        self._dimensions: dict[tuple[int, ...], str] = {
            _members(mesh.get_group(name)): name for name in names
        }
        if context is not None:
            self._dimensions.setdefault(_members(context), CP)
        self._tied = None if tied is None else _members(tied)

    def __torch_dispatch__(
        self,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        given = kwargs or {}
        result = func(*args, **given)
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count_collective(func._opname, args, result)
        else:
            formula = _formula(func._overloadpacket)
            if formula is not None:
                self.flops += int(formula(*args, **given, out_val=result))
        return result

    def _count_collective(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if name in _NO_TRANSFERS:
            return
        kind = _KINDS.get(name, name)
        sizes = [t.nbytes for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
        at = Counted(self._dimension(args, kind), kind)
        self.count[at] += 1
        self.num_bytes[at] += max(sizes)  # a gather's result, a reduce-scatter's input

    def _dimension(self, args: tuple[Any, ...], kind: str) -> str:
        members = next(
            (
                _members(dist.ProcessGroup.unbox(arg))
                for arg in args
                if isinstance(arg, torch.ScriptObject)
            ),
            None,
        )
        if members is None:  # functional collectives end with the group's name
            members = _members(_resolve_process_group(args[-1]))
        if members == self._tied and kind == "all_reduce":
            return "tied"
        return self._dimensions.get(members, "other")

    def to_data(self) -> dict[str, Any]:
        """Everything counted, as plain data."""
        return {
            "flops": self.flops,
            "collectives": [
                {"dimension": at.dimension, "kind": at.kind, "count": n, "bytes": self.num_bytes[at]}
                for at, n in sorted(self.count.items())
            ],
        }


def _members(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _formula(operation: Any) -> Callable[..., Any] | None:
    """Torch's own formula for the FLOPs of an operation; None where it has no matrix product."""
    found: Callable[..., Any] | None = flop_registry.get(operation)
    aten = torch.ops.aten
    if operation is getattr(aten, "_scaled_dot_product_flash_attention_for_cpu", None):
        return _attention_flops
    if operation is getattr(aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None):
        return _attention_backward_flops
    return found


def _attention_flops(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> int:
    """As torch counts the same kernel on a GPU: nothing is left out under the causal mask."""
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward_flops(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
    **__: Any,
) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))
