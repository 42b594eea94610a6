"""An sbatch script that starts `parsim run` on the nodes a plan needs.

The script is made for bash. What comes from files or from the user is quoted by shlex, and the job's
name keeps letters, digits and a few signs only: nothing that was read becomes a word or a directive.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from parsim.export.target import nodes_of
from parsim.plan import ParallelPlan

FIRST_PORT, PORTS = 20_000, 20_000
"""Each job takes a port by its number, so that two on one node hardly ever meet."""

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
{gpus}#SBATCH --exclusive
#SBATCH --output=%x-%j.out
# {ranks} ranks: {plan}
# Arguments are handed on to `parsim run`:
#   sbatch SCRIPT --steps 1000 --checkpoint /shared/checkpoints --max-restarts 3
set -euo pipefail

read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$(({first_port} + SLURM_JOB_ID % {ports}))

# One task a node, which starts that node's ranks; $SLURM_NODEID is known only there.
srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none \\
  bash -c 'exec "$@" --node-rank "$SLURM_NODEID"' node \\
  {command} \\
  --nnodes {nodes} --rdzv-endpoint "$first_node:$port" "$@"
"""


def sbatch_script(
    plan: ParallelPlan,
    devices_per_node: int,
    *,
    on_gpus: bool,
    name: str,
    arguments: Sequence[str],
) -> str:
    """The script; `arguments` are those of `parsim run`, the plan first.

    Raises ParsimError where the plan's ranks do not fill whole nodes.
    """
    nodes, per_node = nodes_of(plan, devices_per_node)
    return _SCRIPT.format(
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")[:64] or "parsim",
        nodes=nodes,
        ranks=plan.gpus,
        gpus=f"#SBATCH --gpus-per-node={per_node}\n" if on_gpus else "",
        plan=" ".join(plan.short().split()),
        first_port=FIRST_PORT,
        ports=PORTS,
        command=shlex.join(["parsim", "run", *arguments]),
    )
