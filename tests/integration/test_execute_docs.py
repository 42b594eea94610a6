"""Commands of README and docs/ that take long or start real ranks, as a reader types them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.doc_examples import Example, examples, run_script, write_inputs

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
