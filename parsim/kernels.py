"""Constants of the kernel models: what a device really reaches, beyond its data sheet."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Fitted or measured behaviour of one device's kernels and collectives."""
