"""The sbatch script: bash reads it, and starts what it says, whatever the names in it are."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from parsim.errors import ParsimError
from parsim.export.slurm import sbatch_script
from parsim.plan import parse_plan

NASTY = 'it\'s; touch $(echo harm) `id` "$HOME" \\ & | > #\n#SBATCH --wrap=evil *'


def bash(script: str, folder: Path, *arguments: str) -> list[list[str]]:
    """What `parsim` is called with on each node: srun, scontrol and parsim are stand-ins."""
    tools = folder / "bin"
    tools.mkdir()
    stand_ins = {
        # Runs the task once a node, as srun with one task a node does.
        "srun": 'while [[ $1 == --* ]]; do [[ $1 == --nodes=* ]] && n=${1#--nodes=}; shift; done\n'
        'for ((i = 0; i < n; i++)); do SLURM_NODEID=$i "$@"; done',
        "scontrol": "printf 'node-a\\nnode-b\\n'",
        "parsim": 'python3 -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@"',
    }  # fmt: skip
    for name, text in stand_ins.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(stat.S_IRWXU)
    (folder / "job.sbatch").write_text(script)
    subprocess.run(["bash", "-n", str(folder / "job.sbatch")], check=True, timeout=20)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_ID": "1234567",
    }
    done = subprocess.run(
        ["bash", str(folder / "job.sbatch"), *arguments],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_node_starts_its_ranks_of_the_plan(tmp_path: Path) -> None:
    arguments = ["dp=2,tp=8", "--model", "m"]
    script = sbatch_script(
        parse_plan("dp=2,tp=8"), 8, on_gpus=True, name="llama 8b", arguments=arguments
    )
    assert "#SBATCH --nodes=2\n" in script
    assert "#SBATCH --gpus-per-node=8\n" in script
    assert "#SBATCH --job-name=llama-8b\n" in script
    assert bash(script, tmp_path, "--steps", "7 8") == [
        ["run", *arguments, "--nnodes", "2", "--rdzv-endpoint", f"node-a:{20000 + 1234567 % 20000}",
         "--steps", "7 8", "--node-rank", str(node)]
        for node in (0, 1)
    ]  # fmt: skip


def test_names_stay_words_of_one_argument(tmp_path: Path) -> None:
    script = sbatch_script(parse_plan("dp=2"), 8, on_gpus=True, name=NASTY, arguments=[NASTY, NASTY])
    (called,) = bash(script, tmp_path, NASTY)
    assert called[:3] == ["run", NASTY, NASTY]
    assert called[-3:] == [NASTY, "--node-rank", "0"]
    directives = [line for line in script.split("\n\n")[0].splitlines() if line.startswith("#SBATCH")]
    assert len(directives) == 6
    assert not any("evil" in line and "wrap" in line and "job-name" not in line for line in directives)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin", "job.sbatch"]


def test_a_plan_smaller_than_a_node_takes_what_it_needs_and_cpus_take_no_gpus() -> None:
    plan = parse_plan("dp=2")
    assert "--gpus-per-node=2\n" in sbatch_script(plan, 8, on_gpus=True, name="m", arguments=[])
    assert "gpus" not in sbatch_script(plan, 8, on_gpus=False, name="m", arguments=[])


def test_ranks_that_do_not_fill_whole_nodes_are_refused() -> None:
    with pytest.raises(ParsimError, match="same number of ranks"):
        sbatch_script(parse_plan("dp=12"), 8, on_gpus=True, name="m", arguments=[])
