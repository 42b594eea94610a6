"""SimGrid as an oracle: Debian's python3-simgrid, run by the system's Python."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

SYSTEM_PYTHON = Path("/usr/bin/python3")
SCRIPT = Path(__file__).parent / "oracles" / "simgrid_flows.py"


def simgrid_ends(cases: list[dict[str, Any]]) -> list[list[float]]:
    """When each flow of each case ends; skips the test where python3-simgrid is not installed."""
    found = subprocess.run(
        [SYSTEM_PYTHON, "-c", "import sys; sys.path.insert(0, '/usr/lib/python3/dist-packages'); "
         "import simgrid"], capture_output=True, check=False,
    ) if SYSTEM_PYTHON.exists() else None  # fmt: skip
    if found is None or found.returncode:
        pytest.skip("python3-simgrid is not installed (apt-get install python3-simgrid)")
    done = subprocess.run(
        [SYSTEM_PYTHON, SCRIPT], input=json.dumps(cases), capture_output=True, text=True, check=True
    )
    answer: list[list[float]] = json.loads(done.stdout)
    return answer
