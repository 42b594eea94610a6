"""Settings that all tests share, alone or spread over processes by pytest-xdist."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

MOST_PROCESSES = 8
"""More of them would spend longer on collecting the tests than on running them."""
REAL_RANKS = "integration/test_execute_", "integration/test_calibrate"
"""Files whose tests start real ranks: one for each core, and fixtures of many seconds."""

# Examples are drawn the same way on every run, and a busy machine is no failure.
settings.register_profile(
    "parsim", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("parsim")

if "PYTEST_XDIST_WORKER" in os.environ:
    # A process for each core: more threads would only take turns. Read when numpy and torch load.
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Processes of `pytest -n auto`: one for each core that this process may use."""
    usable = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if usable else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests that start real ranks run in turn in one process, all others wherever there is room."""
    from xdist.scheduler import LoadScopeScheduling

    class RanksInTurn(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "ranks" if any(start in path for start in REAL_RANKS) else nodeid

    return RanksInTurn(config, log)
