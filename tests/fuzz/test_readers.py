"""Every reader of files from outside, against files that are wrong.

The short form runs with the other tests. The long one, a million mutations, takes about an hour:

    PARSIM_FUZZ=1000000 pytest tests/fuzz -m slow

Commands take files that their reader accepts: PARSIM_FUZZ_COMMANDS=500 tries so many of each kind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.commands import COMMANDS
from tests.fuzz.kinds import KINDS

ROOT = Path(__file__).parents[2]
NEEDS_TORCH = ("index",)
SHORT = 60
"""Mutants of each kind."""
LONG = int(os.environ.get("PARSIM_FUZZ", "0"))
COMMANDS_EACH = int(os.environ.get("PARSIM_FUZZ_COMMANDS", "10"))
MOST_BYTES = 2**30


def read_mutants(
    kinds: Sequence[str], count: int, folder: Path, *, by: str = "readers"
) -> list[dict[str, Any]]:
    """What came of `count` mutants of each kind, read in a process of its own."""
    command = [sys.executable, "-m", "tests.fuzz.worker", by]
    ran = subprocess.run(
        [*command, ",".join(kinds), str(count), "1", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


def check(found: Sequence[dict[str, Any]], kinds: Sequence[str], count: int) -> None:
    assert [one["kind"] for one in found] == list(kinds)
    for one in found:
        assert one["failures"] == []
        assert one["answered"] + one["refused"] == one["mutations"] == count
        assert one["peak_bytes"] < MOST_BYTES
        # Mutants are neither all valid nor all broken: a reader that takes anything has no test here.
        if one["kind"] != "checkpoint":  # a wrong one does not count, and is said when none is left
            assert one["refused"] > 0, one


def test_wrong_files_are_answered_or_refused(tmp_path: Path) -> None:
    kinds = [name for name in KINDS if name not in NEEDS_TORCH]
    check(read_mutants(kinds, SHORT, tmp_path), kinds, SHORT)


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="PARSIM_FUZZ says how many mutations: 1000000 takes an hour")
@pytest.mark.parametrize("kind", KINDS)
def test_a_million_wrong_files_are_answered_or_refused(kind: str, tmp_path: Path) -> None:
    count = -(-LONG // len(KINDS))
    check(read_mutants([kind], count, tmp_path), [kind], count)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMMANDS)
def test_commands_answer_or_refuse_what_their_readers_let_through(kind: str, tmp_path: Path) -> None:
    (found,) = read_mutants([kind], COMMANDS_EACH, tmp_path, by="commands")
    assert found["failures"] == []
    assert found["answered"] + found["refused"] == COMMANDS_EACH
    assert found["peak_bytes"] < MOST_BYTES
    assert found["answered"] > 0, found
