"""Small nouns for tests, with round numbers."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from parsim.cost.price import PartTime, PassTime
from parsim.cost.stage import StageCost
from parsim.cost.step import StepCost
from parsim.cost.sync import StageSync
from parsim.hardware import Cluster, Device, Link
from parsim.model import ModelSpec
from parsim.stack import Stack


def round_cluster(**changes: object) -> Cluster:
    """8 GPUs a node, 100 TFLOP/s, 1 TB/s, 100 GB/s inside and 10 GB/s between nodes, no latency."""
    source = {"source": "round numbers", "date": "2026-01"}
    device = Device(
        name="round", peak_flops_per_s={"bf16": 1e14, "fp32": 5e13}, memory_bytes=80e9,
        memory_bandwidth_bytes_per_s=1e12, num_sms=100, l2_bytes=4e7, power_w=500.0, **source,
    )  # fmt: skip
    fields: dict[str, object] = {
        "name": "round",
        "device": device,
        "gpus_per_node": 8,
        "scale_up_domain": 8,
        "intra_node": Link(latency_s=0.0, bandwidth_bytes_per_s=1e11, **source),
        "inter_node": Link(latency_s=0.0, bandwidth_bytes_per_s=1e10, **source),
    }
    return Cluster(**(fields | changes))  # type: ignore[arg-type]


def plain_stack(**changes: object) -> Stack:
    """A stack without overheads, overlap or context."""
    fields: dict[str, object] = {
        "name": "plain", "description": "", "source": "", "dp_overlap": False, "context_bytes": 0.0,
    }  # fmt: skip
    return Stack(**(fields | changes))  # type: ignore[arg-type]


def small_model(**changes: object) -> ModelSpec:
    """A dense model of 8 layers."""
    fields: dict[str, object] = {
        "name": "small", "layers": 8, "hidden": 512, "heads": 8, "kv_heads": 4, "ffn_hidden": 1024,
        "gated_mlp": True, "vocab": 4096, "max_seq_len": 256,
    }  # fmt: skip
    return ModelSpec(**(fields | changes))  # type: ignore[arg-type]


def flat_cost(
    num_stages: int,
    *,
    forward_s: float = 1.0,
    backward_s: float = 2.0,
    recompute_s: float = 0.0,
    send_s: float = 0.0,
    reduce_s: float = 0.0,
    gather_s: float = 0.0,
    optimizer_s: float = 0.0,
    tied_reduce_s: float = 0.0,
    saved_bytes: float = 1.0,
    buckets: int = 1,
) -> StepCost:
    """Equal stages that only compute: half of the backward for each gradient, recomputation on top."""
    gradient = PassTime(backward_s / 2)
    time = PartTime(PassTime(forward_s), gradient, gradient, PassTime(recompute_s))
    stage = StageCost(
        time=time, num_layers=1, saved_bytes=saved_bytes, recomputed_bytes=0.0,
        dense_parameters=1, expert_parameters=0, largest_part_parameters=1,
        distinct_parameters=1,
    )  # fmt: skip
    sync = StageSync(reduce_s=reduce_s, gather_s=gather_s, buckets=buckets, optimizer_s=optimizer_s)
    return StepCost(
        stages=(stage,) * num_stages,
        syncs=(sync,) * num_stages,
        send_s=(send_s,) * (num_stages - 1),
        send_bytes=(0.0,) * (num_stages - 1),
        tied_reduce_s=tied_reduce_s,
    )


def write_csv(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    """Rows of the same columns as a table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
