"""Ranks run where nothing but torch is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

ABSENT = {"pydantic", "pydantic_core", "numpy", "scipy", "simpy", "matplotlib", "typer", "rich"}


def run(statements: str, blocked: set[str]) -> subprocess.CompletedProcess[str]:
    """Statements in a fresh interpreter in which some packages cannot be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(blocked)})); {statements}"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_blocker_blocks() -> None:
    done = run("import pydantic", ABSENT)
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_a_rank_needs_torch_and_the_standard_library_alone() -> None:
    done = run("import parsim.execute.launch.worker, parsim.execute.launch.rank", ABSENT)
    assert done.returncode == 0, done.stderr


def test_the_parent_needs_no_torch_until_it_runs_a_plan() -> None:
    done = run("import parsim.execute.launch.cases", ABSENT | {"torch"})
    assert done.returncode == 0, done.stderr
