"""A large step over fabrics, and flows beside SimGrid: what is shared, how slow, how exact.

    python benchmarks/network.py [--write]

--write puts the figures into reports/network.md. SimGrid is left out where python3-simgrid is missing.
"""

from __future__ import annotations

import argparse
import platform
import resource
import sys
import time
from pathlib import Path

import pytest
import simpy

from parsim.config import load_cluster, load_model, load_stack, write_file
from parsim.cost.stage import CostModel
from parsim.plan import Job, ParallelPlan
from parsim.schedule.program import timeline_of
from parsim.simulate.contention import replay_over
from parsim.simulate.fabric import fabric_of
from parsim.simulate.network_load import network_load_of
from parsim.simulate.prediction import program_of
from parsim.timeline import breakdown_s

REPORTS = Path(__file__).parent.parent / "reports"
PLAN = ParallelPlan(dp=128, tp=8, pp=16, sequence_parallel=True, tp_overlap=True)
FABRICS = (
    "rail",
    "fat-tree",
    "fat-tree,leaf=3072,oversubscription=7",
    "fat-tree,routing=hash",
    "fat-tree,oversubscription=4",
    "rail,oversubscription=8",
    "fat-tree,oversubscription=8",
    "fat-tree,oversubscription=8,algorithm=in-switch",
    "torus",
)
SEEDS = 200


def main() -> None:
    """Print both tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite reports/network.md")
    lines = [
        "# The network",
        "",
        f"`python benchmarks/network.py --write`; Python {platform.python_version()}, SimPy "
        f"{simpy.__version__}, {platform.machine()}.",
        "",
        *large_step(),
        *beside_simgrid(),
    ]
    if parser.parse_args().write:
        write_file(REPORTS / "network.md", "\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


def large_step() -> list[str]:
    """Llama 3.1 405B on 16,384 H100s, 128 micro-batches in 16 stages."""
    model, cluster = load_model("llama-3.1-405b"), load_cluster("h100-sxm-80gb")
    costs = CostModel(model, cluster, load_stack(cluster.default_stack))
    job = Job(model=model, seq_len=model.max_seq_len, global_batch=16384)
    program, _ = program_of(job, PLAN, costs)
    lines = [
        f"Llama 3.1 405B on {PLAN.gpus:,} H100s ({PLAN.short()}, 128 micro-batches of "
        f"{job.seq_len:,} tokens): {len(program.tasks):,} tasks.",
        "",
        "| fabric | step | pp waits | dp waits | pp exposed | dp exposed | kinds of links | run in s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for text in FABRICS:
        started = time.process_time()
        fabric = fabric_of(text, cluster, PLAN.gpus)
        load = network_load_of(program, job, PLAN, costs, fabric)
        found = replay_over(load, fabric)
        taken_s = time.process_time() - started
        waits, parts = found.contended_s, breakdown_s(timeline_of(load.program, found.times))
        lines.append(
            f"| `{text}` | {found.step_s:.2f} s ({found.step_s / found.alone_s - 1:+.1%}) | "
            f"{waits['pp']:.3f} s | {waits['dp']:.3f} s | {parts['pp_exposed']:.2f} s | "
            f"{parts['dp_exposed']:.2f} s | {len(load.links)} | {taken_s:.1f} |"
        )
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [*lines, "", f"All in one process of {most:.0f} MiB at most.", ""]


def beside_simgrid() -> list[str]:
    """Staggered random flows over trees and shared links, as in tests/unit/test_flows.py."""
    sys.path.insert(0, str(REPORTS.parent))
    from tests.simgrid import simgrid_ends
    from tests.unit.test_flows import ends_s, shared_case, tree_case

    cases = [make(seed) for seed in range(SEEDS) for make in (tree_case, shared_case)]
    try:
        expected = simgrid_ends(cases)
    except pytest.skip.Exception as missing:
        return [str(missing)]
    started = time.process_time()
    found = [ends_s(case["capacities"], case["flows"]) for case in cases]
    taken_s = time.process_time() - started
    ends = [
        pair for one, other in zip(found, expected, strict=True) for pair in zip(one, other, strict=True)
    ]
    worst = max(abs(end - other) / other for end, other in ends)
    return [
        f"SimGrid: {len(ends):,} flows in {len(cases)} networks end within {worst:.0e} (relative) of "
        f"its ends; {taken_s:.1f} s here."
    ]


if __name__ == "__main__":
    main()
