"""Commands that README and docs/ show, taken out of their pages so that tests can run them.

A block of ```bash is one script, run by bash in a folder of its own that holds the small files it reads.
Comments before a block change that: `not run: WHY`; `slow`: only with the slow tests; `goes on`: one
script with the block before it.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"((?:[ \t]*<!-- [^\n]* -->\n)*)[ \t]*```bash\n(.*?)```", re.S)
_MODEL = "--model llama-3.1-8b --hardware h100-sxm-80gb"


class Example(NamedTuple):
    """One script of a page."""

    name: str
    script: str
    comments: str

    @property
    def is_run(self) -> bool:
        return "not run: " not in self.comments

    @property
    def is_slow(self) -> bool:
        return "<!-- slow -->" in self.comments

    @property
    def commands(self) -> list[list[str]]:
        """The arguments of its `parsim` commands."""
        words = shlex.shlex(
            re.sub(r"\\\n|#.*", " ", self.script), posix=True, punctuation_chars=";&|>()\n"
        )
        words.whitespace, words.whitespace_split, words.commenters = " \t", True, ""
        commands: list[list[str]] = [[]]
        for word in words:
            if set(word) <= set(";&|>()\n"):
                commands.append([])
            else:
                commands[-1].append(word)
        return [command[1:] for command in commands if command[:1] == ["parsim"]]


def examples() -> list[Example]:
    """All scripts of README and docs/, in order."""
    found: list[Example] = []
    for page in PAGES:
        for number, (comments, script) in enumerate(_BLOCK.findall(page.read_text("utf-8")), 1):
            if "<!-- goes on -->" in comments:
                last = found.pop()
                found.append(
                    last._replace(script=last.script + script, comments=last.comments + comments)
                )
            else:
                found.append(Example(f"{page.stem}-{number}", script, comments))
    return found


def run_script(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script as a reader would, with this tree's parsim, and stop at its first failure."""
    command = folder / ".bin" / "parsim"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m parsim "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join([str(command.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def write_inputs(folder: Path) -> None:
    """The files that pages take for given: a plan, and runs of the reader's own."""
    folder.mkdir(exist_ok=True)
    with (ROOT / "published_runs/runs.csv").open(newline="") as source:
        rows = list(csv.reader(source))
    framework, year = rows[0].index("framework"), rows[0].index("year")
    # Without a year the stack is the current one.
    own = [row for row in rows[1:] if row[framework] == "torchtitan" and not row[year]][:8]
    with (folder / "my_runs.csv").open("w", newline="") as target:
        csv.writer(target).writerows([rows[0], *own])
    made = run_script(
        f"parsim simulate {_MODEL} --plan dp=8,zero=3 --stack torchtitan --json > plan.json", folder
    )
    assert made.returncode == 0, made.stderr
    for name in ("best.json", "plans.json"):
        (folder / name).write_bytes((folder / "plan.json").read_bytes())
