"""Which part of a plan a collective belongs to: the stream that it is shown on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

from parsim.plan import Coordinate, ParallelPlan
from parsim.timeline import CP, DP, EP, TP

_WORDS = (
    (DP, ("expert_data",)),
    (TP, ("expert_tensor_parallel",)),
    (EP, ("expert", "_ep", "ep_")),
    (TP, ("tensor", "_tp", "tp_")),
    (CP, ("context", "_cp", "cp_")),
    (DP, ("data", "_dp", "dp_", "fsdp", "shard", "replicate")),
)
"""What Megatron-Core, torchtitan and DeviceMesh call their groups; the first that is found counts.
Megatron-Core's EXPERT_DATA_PARALLEL_GROUP sums gradients of experts, EXPERT_MODEL_PARALLEL_GROUP sends
tokens to them (megatron/core/parallel_state.py)."""


def stream_of(
    what: str,
    ranks: tuple[int, ...],
    description: str,
    plan: ParallelPlan | None,
    rank: int,
    kind: str,
    args: Mapping[str, Any],
) -> str:
    """The stream of a collective that a rank takes part in.

    `ranks` and `description` are the process group's, as far as the trace has them, `kind` what the rank
    computed when it asked for it. Without ranks the plan decides where only one of its dimensions can be
    meant, then the kind of collective: experts exchange all to all, tensor-parallel ranks add up.
    """
    if any(word in what.lower() for word in ("send", "recv")):
        return _transfer(what, plan, rank, kind, args)
    if plan is not None and len(ranks) > 1:
        for stream in (TP, CP, EP, DP):
            if set(ranks) == set(group_of(plan, stream, rank)):
                return stream
    words = description.lower()
    for stream, parts in _WORDS:
        if words and any(part in words for part in parts):
            return stream
    many = () if plan is None else [s for s in (TP, CP, EP, DP) if getattr(plan, s) > 1]
    if len(many) == 1:
        return many[0]
    if re.search("all_?to_?all", what.lower()):
        return EP
    if plan is not None and plan.tp > 1 and kind in ("forward", "backward"):
        return TP
    return DP


def _transfer(
    what: str, plan: ParallelPlan | None, rank: int, kind: str, args: Mapping[str, Any]
) -> str:
    """The stream of a pipeline transfer: towards the next stage or the one before.

    Where the peer is not known, the first and the last stage have one neighbour only; between them
    activations are taken to travel onward around a forward and gradients back around a backward.
    """
    sends = "send" in what.lower()
    word = "send" if sends else "recv"
    peer = args.get("Dst Rank" if sends else "Src Rank")
    onward = (kind == "forward") == sends
    if plan is not None:
        at = plan.coordinate(rank)
        if type(peer) is int and 0 <= peer < plan.gpus and peer != rank:
            onward = (plan.coordinate(peer).pp - at.pp) % plan.pp == 1
        elif plan.vpp == 1 and at.pp in (0, plan.pp - 1):
            onward = at.pp == 0
    return f"pp_{word}_{'next' if onward else 'prev'}"


def group_of(plan: ParallelPlan, stream: str, rank: int) -> Iterable[int]:
    """The ranks that a rank shares this stream's collectives with."""
    at = plan.coordinate(rank)
    if stream == EP:
        places = product((at.pp,), range(plan.dp), range(plan.cp), range(plan.tp))
        stage = sorted(plan.rank(Coordinate(*place)) for place in places)
        first = stage.index(rank) // plan.expert_ranks * plan.expert_ranks
        return stage[first : first + plan.expert_ranks]
    dimensions = {TP: ("tp",), CP: ("cp",), DP: ("dp", "cp")}[stream]
    sizes = ({at[i]} if name not in dimensions else range(getattr(plan, name))
             for i, name in enumerate(Coordinate._fields))  # fmt: skip
    return [plan.rank(Coordinate(*place)) for place in product(*sizes)]
