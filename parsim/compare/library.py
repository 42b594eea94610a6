"""What tables of runs are read with: shipped models, clusters and stacks."""

from __future__ import annotations

from dataclasses import dataclass, field

from parsim.config import load_cluster, load_stack
from parsim.hardware import Cluster, with_overrides
from parsim.model import ModelSpec
from parsim.stack import Stack


@dataclass(slots=True)
class Library:
    """Shipped models, clusters and stacks, each read once."""

    models: tuple[ModelSpec, ...]
    stacks: dict[str, Stack] = field(default_factory=dict)
    """By framework name; what is put here before the first row replaces the shipped file."""
    clusters: dict[tuple[str, int, float], Cluster] = field(default_factory=dict)

    def stack(self, framework: str) -> Stack:
        if framework not in self.stacks:
            self.stacks[framework] = load_stack(framework)
        return self.stacks[framework]

    def cluster(self, key: tuple[str, int, float]) -> Cluster:
        """The cluster of a hardware name, GPUs a node and bytes/s between nodes (0: the profile's)."""
        if key not in self.clusters:
            name, gpus_per_node, inter_node_bytes_per_s = key
            self.clusters[key] = with_overrides(
                load_cluster(name),
                gpus_per_node=gpus_per_node or None,
                inter_node=inter_node_bytes_per_s or None,
            )
        return self.clusters[key]
