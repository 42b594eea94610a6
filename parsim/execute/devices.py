"""What this machine offers to run ranks on."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess

from parsim.errors import ParsimError


def require_torch() -> None:
    """Raises ParsimError, which says how to install it, where there is no torch; imports nothing."""
    if importlib.util.find_spec("torch") is None:
        raise ParsimError(
            "running on real ranks needs PyTorch",
            hint="pip install 'parsim[torch]'; plan, simulate and all charts work without it",
        )


def available_gpus() -> int:
    """NVIDIA GPUs that torch could use here, counted without importing it; 0 without a driver.

    CUDA_VISIBLE_DEVICES counts as it does for torch.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command
            [tool, "--list-gpus"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = (
        sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if not done.returncode else 0
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    return min(found, len([each for each in visible.split(",") if each.strip() not in ("", "-1")]))


def usable_cores() -> list[int]:
    """Cores that this process may run on, by the system's number."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def available_memory_bytes() -> float:
    """Host memory that new processes can have, by /proc/meminfo; infinite where it cannot be read."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024.0
    except (OSError, ValueError, IndexError):
        pass
    return float("inf")
