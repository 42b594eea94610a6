"""Training frameworks as oracles, each in a virtual environment of its own.

`tests/oracles/install.sh` makes them in .oracles, or in the folder that PARSIM_ORACLES names.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(__file__).parent / "oracles"


def environments() -> Path:
    """The folder that holds them."""
    return Path(os.environ.get("PARSIM_ORACLES", ROOT / ".oracles")).absolute()


def ask(framework: str, question: object) -> list[dict[str, Any]]:
    """What a framework's own parser and classes answer; skips the test where it is not installed."""
    python = environments() / framework / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{framework} is not installed (tests/oracles/install.sh {framework})")
    done = subprocess.run(
        [python, SCRIPTS / f"{framework}_config.py"],
        input=json.dumps(question), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers
