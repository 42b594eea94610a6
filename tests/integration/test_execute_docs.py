"""Commands of README and docs/ that take long or start real ranks, as a reader types them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.doc_examples import ROOT, Example, examples, run_script, write_inputs

SLOW = [example for example in examples() if example.is_run and example.is_slow]


@pytest.mark.slow
@pytest.mark.parametrize("example", SLOW, ids=lambda example: example.name)
def test_slow_commands_run(example: Example, tmp_path: Path) -> None:
    write_inputs(tmp_path / "inputs")
    for path in (tmp_path / "inputs").glob("*.*"):
        if path.is_file():
            path.rename(tmp_path / path.name)
    done = run_script(example.script, tmp_path)
    assert done.returncode == 0, f"{example.script}{done.stdout[-500:]}{done.stderr[-1500:]}"


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_the_example_that_runs_on_two_ranks(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "run_two_ranks.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    measured, predicted, loss = done.stdout.splitlines()
    assert measured.endswith("on 2 ranks")
    assert 0 < float(predicted.split()[1]) < 10
    assert float(loss.split()[3]) < float(loss.split()[1]), "training lowers the loss"
