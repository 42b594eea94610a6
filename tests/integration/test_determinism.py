"""The same inputs give the same bytes, whoever asks: every document, trace, schedule, picture and page.

The same commands run in processes that differ in hash seed, locale, encoding, time zone, number of
processors, width of the terminal and working folder; all they print and write is compared byte by byte.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders import write_csv

SMALL = "--model tiny-llama-8l --hardware h100-sxm-80gb --global-batch 16"
STEP = "dp=4,tp=2,pp=2,schedule=zbv"
COMMANDS = {
    "plan": f"plan {SMALL} --gpus 8 --top 20 --explain dp=8,micro_batch=1 --report plan --json",
    "simulate": f"simulate {SMALL} --plan {STEP} --straggler count=2,slow=1.3 --jitter 0.05 --seed 7 "
    "--fabric fat-tree,oversubscription=2,routing=hash,leaf=2 --fabric-chart links.svg --mtbf 50000h "
    "--goodput-chart goodput.svg --detail operations --detail-chart detail.svg --chart step.svg "
    "--memory-chart memory.pdf --waterfall waterfall.svg --roofline roofline.svg --trace step.json "
    "--schedule-csv step.csv --report step --json",
    "picture": f"simulate {SMALL} --plan {STEP} --chart step.png",
    "stages": f"simulate {SMALL} --plan dp=2,pp=3,stage_split=auto --json",
    "capacity": "capacity --model tiny-llama-8l --hardware h100-sxm-80gb --gpus 2,4 --tokens 1B "
    "--global-batch 8 --max-pp 2 --sensitivity --scaling --csv capacity.csv --chart capacity.svg "
    "--scaling-chart scaling.svg --tornado-chart tornado.svg --report capacity --json",
    "sweep": "sweep --model tiny-llama-8l --hardware h100-sxm-80gb,a100-sxm-80gb --gpus 2-8 "
    "--global-batch 16 -o rows.jsonl --csv sweep.csv --chart sweep.svg --json",
    "validate": "validate --runs runs.csv --report validate --json",
    "schedules": f"compare-schedules {SMALL} --plan dp=2,pp=2 --chart schedules.svg --json",
    "collective": "collective --hardware h100-sxm-80gb --kind all_reduce --bytes 64MB --ranks 16 --json",
    **{
        target: f"export dp=2,pp=2 {SMALL} --to {target}"
        for target in ("megatron", "torchtitan", "deepspeed", "slurm", "schedule-csv")
    },
    "models": "models --json",
    "hardware": "hardware --json",
    "reading": f"simulate {SMALL} --plan {STEP}",
}
CLOCK = re.compile(rb'"search_s": [0-9.e-]+')
"""What the clock says stands in documents under this key, and nowhere else."""
RUNS = """
import contextlib, json, os, sys
from parsim.cli.main import main
cpus, commands = json.loads(sys.argv[1])
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])
stdout = os.dup(1)
for name, command in commands.items():
    with open(f"{name}.stdout", "wb") as file:
        os.dup2(file.fileno(), 1)
    sys.stdout = open(1, "w", closefd=False)
    sys.argv = ["parsim", *command.split()]
    try:
        main()
    except SystemExit as status:
        print(f"{name} {status.code}", file=sys.stderr)
    sys.stdout.close()
os.dup2(stdout, 1)
"""
ENVIRONMENTS = {
    "one": {"PYTHONHASHSEED": "1", "LC_ALL": "C.UTF-8", "TZ": "UTC", "COLUMNS": "200"},
    "other": {
        "PYTHONHASHSEED": "4242",
        "LC_ALL": "C",
        "LANG": "de_DE.ISO-8859-1",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "TZ": "Asia/Kathmandu",
        "COLUMNS": "40",
        "LINES": "5",
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "svg",
    },
}
FOLDERS = {"one": "here", "other": "some where/élse"}
CPUS = {"one": 2, "other": 1}
"""Two where the machine has them; processes of sweeps and searches follow from it."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The working folders after all commands, one for each environment."""
    root = tmp_path_factory.mktemp("determinism")
    with Path("published_runs/runs.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["pp"] == "1"]
    processes, found = [], {}
    for name, variables in ENVIRONMENTS.items():
        folder = found[name] = root / FOLDERS[name]
        folder.mkdir(parents=True)
        write_csv(folder / "runs.csv", rows[:4])
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTEST"))
        }
        process = subprocess.Popen(
            [sys.executable, "-c", RUNS, json.dumps([CPUS[name], COMMANDS])],
            cwd=folder,
            env=environment | variables | {"PYTHONPATH": os.getcwd()},
            stderr=subprocess.PIPE,
        )
        processes.append(process)
    for process in processes:
        _, errors = process.communicate(timeout=300)
        statuses = dict(line.rsplit(" ", 1) for line in errors.decode().splitlines() if line[:1] != " ")
        assert {name: statuses.get(name) for name in COMMANDS} == dict.fromkeys(COMMANDS, "0"), errors
    return found


@pytest.mark.slow
def test_every_file_has_the_same_bytes(folders: dict[str, Path]) -> None:
    files = {
        name: {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        for name, folder in folders.items()
    }
    one, other = files.values()
    assert one.keys() == other.keys()
    kinds = {path.suffix for path in one.values()}
    assert kinds >= {".stdout", ".svg", ".png", ".pdf", ".html", ".csv", ".json"}
    different = [
        name
        for name, path in one.items()
        if name != "rows.jsonl"  # in the order in which scenarios were done
        and CLOCK.sub(b"", path.read_bytes()) != CLOCK.sub(b"", other[name].read_bytes())
    ]
    assert not different
