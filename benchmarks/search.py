"""How fast the search is: plans examined by arrays and one by one, and two large clusters in full.

    python benchmarks/search.py [--write]

--write puts the figures into reports/search.md.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path

import numpy as np
from joblib.externals.loky import get_reusable_executor

from parsim.config import load_cluster, load_model, load_stack, write_file
from parsim.cost.stage import CostModel
from parsim.cost.step import step_cost
from parsim.plan import Job
from parsim.schedule.check import plan_problems
from parsim.search.bound import lower_bound_s
from parsim.search.examine import Examiner
from parsim.search.fullest import fullest_rank
from parsim.search.search import search
from parsim.search.space import Constraints, Family, families

REPORT = Path(__file__).parent.parent / "reports" / "search.md"
SCALAR_PLANS = 20_000
"""Plans that the scalar functions are timed on: every so many-th family of the space."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A job on a cluster."""

    model: str
    hardware: str
    gpus: int
    global_batch: int


CASES = (
    Case(model="llama-3.1-405b", hardware="h100-sxm-80gb", gpus=16384, global_batch=2048),
    Case(model="gpt3-175b", hardware="a100-sxm-80gb", gpus=4096, global_batch=4096),
)
SPACES = {
    "default": Constraints(),
    "every cp, tp_overlap": Constraints(max_sizes={"cp": 10**6}, tp_overlap=(False, True)),
}
PROCESSES = (1, 2)
"""A search is timed on one core and on two."""


def main() -> None:
    """Time everything, print it, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite reports/search.md")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--space", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(searched(CASES[arguments.case], arguments.space, arguments.processes))
        return
    lines = [
        "# The search's speed",
        "",
        f"`python benchmarks/search.py --write`; Python {platform.python_version()}, NumPy "
        f"{np.__version__}. A plan is examined when its legality, its memory and a lower bound of its "
        "step time are known. Processor seconds, pricing of all cells included. Illegal plans count as "
        "examined, by arrays and one by one alike.",
        "",
        *examined(),
        "",
        "## Proven best ten",
        "",
        "Each in a process of its own, from the start of Python to the answer, with so many processes "
        "at work. Processor seconds of all of them; of memory the most that they can have had together.",
        "",
        "| case | space | plans | fit | replayed | proven | processes | seconds | processor seconds "
        "| plans a processor second | memory |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|---:|---:|",
        *(
            in_own_process(number, space, processes)
            for space in SPACES
            for number in range(len(CASES))
            for processes in PROCESSES
        ),
    ]
    print("\n".join(lines))
    if arguments.write:
        write_file(REPORT, "\n".join(lines) + "\n")


def setup(case: Case) -> tuple[Job, CostModel]:
    """The job with fresh costs: nothing is priced yet."""
    model, cluster = load_model(case.model), load_cluster(case.hardware)
    job = Job(model=model, seq_len=model.max_seq_len, global_batch=case.global_batch)
    return job, CostModel(model, cluster, load_stack(cluster.default_stack))


def examined() -> list[str]:
    """Plans a processor second, by arrays and one by one."""
    lines = [
        "| case | space | plans | legal | by arrays, plans/s | one by one, plans/s | ratio |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for case in CASES:
        for name, constraints in SPACES.items():
            job, costs = setup(case)
            start = time.process_time()
            examiner, plans, legal = Examiner(job, costs), 0, 0
            for family in families(job, case.gpus, constraints):
                plans += prod(family.shape)
                legal += examiner.examine(family).legal
            rate = plans / (time.process_time() - start)
            slow = scalar_rate(case, constraints, plans)
            lines.append(
                f"| {case.model} on {case.gpus:,} | {name} | {plans:,} | {legal:,} | {rate:,.0f} | "
                f"{slow:,.0f} | {rate / slow:.0f} |"
            )
    return lines


def scalar_rate(case: Case, constraints: Constraints, plans: int) -> float:
    """Plans a processor second of the functions that look at one plan, over a sample of the space."""
    job, costs = setup(case)
    every = max(1, plans // SCALAR_PLANS)
    start, count = time.process_time(), 0
    for family in islice(families(job, case.gpus, constraints), 0, None, every):
        count += _one_by_one(job, family, costs)
    return count / (time.process_time() - start)


def _one_by_one(job: Job, family: Family, costs: CostModel) -> int:
    limit = costs.cluster.device.memory_bytes - costs.stack.context_bytes
    count = 0
    for plan in family.plans():
        count += 1
        if next(plan_problems(job, plan, costs.cluster), None) is not None:
            continue
        if fullest_rank(job, plan, costs).peak <= limit:
            lower_bound_s(step_cost(job, plan, costs), job, plan, costs.stack)
    return count


def in_own_process(number: int, space: str, processes: int) -> str:
    """The row of one search."""
    command = [sys.executable, __file__, "--case", str(number), "--space", space]
    start = time.monotonic()
    row = subprocess.run(
        [*command, "--processes", str(processes)], check=True, capture_output=True, text=True
    ).stdout.strip()
    return row.replace("SECONDS", f"{time.monotonic() - start:.1f}")


def searched(case: Case, space: str, processes: int) -> str:
    """The row of one search, run here."""
    job, costs = setup(case)
    result = search(job, case.gpus, costs, constraints=SPACES[space], processes=processes, budget_s=600)
    get_reusable_executor().shutdown(wait=True)  # only what has ended is counted
    own, others = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu_s = own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime
    memory_bytes = 1024 * (own.ru_maxrss + (processes if processes > 1 else 0) * others.ru_maxrss)
    return (
        f"| {case.model} on {case.gpus:,} | {space} | {result.space.enumerated:,} | "
        f"{result.space.fits:,} | {result.replayed} | {'yes' if result.optimal else 'no'} | "
        f"{processes} | SECONDS | {cpu_s:.1f} | {result.space.enumerated / cpu_s:,.0f} | "
        f"{memory_bytes / 1e6:.0f} MB |"
    )


if __name__ == "__main__":
    main()
