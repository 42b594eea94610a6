"""Predicted against measured steps on this machine: python benchmarks/local_steps.py FOLDER --hardware F

Small models of several shapes train under every plan that is legal and that the executor runs, on two
and on four CPU ranks; each plan's step is predicted from a profile that `parsim calibrate` wrote. Runs
are kept in FOLDER and not repeated, so measuring can be interrupted, and any profile compared with the
same runs:

    parsim calibrate -o here.toml                                                 # a quiet machine
    python benchmarks/local_steps.py runs --hardware here.toml --measure-s 300     # again until all ran
    python benchmarks/local_steps.py runs --hardware here.toml --write reports/local.md

The plan that parsim picks is the fastest predicted of those that ran; its regret is its measured time
over the least measured, less 1.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from parsim.cli.run_launch import timed_case
from parsim.compare.steps import StepComparison, compare_steps
from parsim.config import load_cluster, load_model, load_stack, write_file
from parsim.cost.host import stack_on
from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.execute.launch.attempts import Launch
from parsim.execute.launch.cases import run_cases
from parsim.execute.measurement import Measurement
from parsim.execute.support import check_executable
from parsim.hardware import Cluster
from parsim.model import ModelSpec, MoeSpec
from parsim.plan import Job, ParallelPlan
from parsim.schedule import running_schedule
from parsim.schedule.check import check_plan
from parsim.search.space import Constraints, families
from parsim.setup import Setup
from parsim.simulate.prediction import Prediction, estimate, predict
from parsim.stack import Stack
from parsim.timeline import breakdown_s

GLOBAL_BATCH = 8
STEPS, WARMUP = 6, 2
AT_ONCE = 12
"""Plans that one launch of the ranks runs."""
SHORTLIST = 30
"""Plans that are looked at as they run, with ranks that share cores."""
GOALS = {2: 0.10, 4: 0.15}
"""What the error of every plan's step time should be within, by ranks."""
HEADING = """# Steps on one machine: predicted from its calibration, and run

{device}, {cores} cores, one thread a rank; written by `benchmarks/local_steps.py`. Nothing is fitted to
steps. Times in ms. *spread*: (slowest − fastest) / median of the steps counted; an asterisk: some steps
were left out because other processes used the cores. *regret*: measured time of the plan predicted to be
fastest over the least measured, less 1. Models with 8 sequences a step; plans are drawn, the same number
from each split of the ranks, from all that are legal and that the executor runs."""
MODELS_HEAD = """| model | plans run | within {goal} | median error | worst | median spread | regret |
|---|---|---|---|---|---|---|"""
PLANS_HEAD = """| plan | predicted | measured | error | spread | most of it: predicted / measured |
|---|---|---|---|---|---|"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One plan, predicted and measured."""

    plan: ParallelPlan
    spread: float
    """(slowest − fastest) / median of the steps that nothing disturbed."""
    disturbed: int
    """Steps left out because other processes used the cores."""
    compared: StepComparison


def jobs() -> dict[str, Job]:
    """Models of some million parameters that spend their time on different things."""

    def llama(name: str, seq_len: int, **sizes: Any) -> ModelSpec:
        return ModelSpec(name=name, gated_mlp=True, max_seq_len=seq_len, **sizes)

    models = (
        load_model("tiny-llama-8l"),
        llama("deep-narrow", 128, layers=24, hidden=128, heads=4, ffn_hidden=352, vocab=512),
        llama("short-wide", 64, layers=4, hidden=512, heads=8, ffn_hidden=1408, vocab=1024),
        llama("big-vocabulary", 64, layers=4, hidden=256, heads=4, ffn_hidden=704, vocab=16384),
        llama(
            "experts",
            64,
            layers=4,
            hidden=256,
            heads=4,
            ffn_hidden=704,
            vocab=1024,
            moe=MoeSpec(experts=8, top_k=2, ffn_hidden=352),
        ),
        replace(load_model("tiny-gpt-8l"), max_seq_len=64),
    )
    return {
        model.name: Job(
            model=model, seq_len=model.max_seq_len, global_batch=GLOBAL_BATCH, precision="fp32"
        )
        for model in models
    }


def legal_plans(job: Job, ranks: int, cluster: Cluster) -> Iterator[ParallelPlan]:
    """Every plan of the search's space that is legal and that the executor accepts."""
    every = Constraints(recompute=("none", "selective", "full"), stage_split=("even",))
    for family in families(job, ranks, every, cluster=cluster):
        for plan in family.plans():
            try:
                check_plan(job, plan, cluster)
                schedule = running_schedule(plan, plan.num_micro_batches(job), STEPS + WARMUP)
                check_executable(job, plan, schedule, job.precision)
            except ParsimError:
                continue
            yield plan


def chosen(plans: Sequence[ParallelPlan], most: int) -> list[ParallelPlan]:
    """At most so many of them, the same ones each time, from each split of the ranks alike."""
    by_split: dict[tuple[int, int, int], list[ParallelPlan]] = defaultdict(list)
    for plan in plans:
        by_split[plan.dp, plan.tp, plan.pp].append(plan)
    shuffled = random.Random(0)
    for group in by_split.values():
        shuffled.shuffle(group)
    found: list[ParallelPlan] = []
    while len(found) < most and any(by_split.values()):
        found += [group.pop() for group in by_split.values() if group]
    return found[:most]


def picked(plans: Sequence[ParallelPlan], job: Job, costs: CostModel) -> ParallelPlan:
    """The plan that is predicted to be fastest, of those that are with a core for each rank."""
    first = sorted(plans, key=lambda plan: estimate(job, plan, costs).step_time_s)[:SHORTLIST]
    return min(first, key=lambda plan: _predicted(job, plan, costs).step_time_s)


def _predicted(job: Job, plan: ParallelPlan, costs: CostModel) -> Prediction:
    """On this machine alone: ranks may exceed its cores."""
    return predict(job, plan, costs, cores=costs.cluster.gpus_per_node)[0]


def measure(
    folder: Path, job: Job, plans: Sequence[ParallelPlan], setup: Setup, deadline: float
) -> None:
    """Run what has not been run yet, some plans a launch, until the deadline."""
    path = folder / f"{job.model.name}-{plans[0].gpus}.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    missing = [plan for plan in plans if plan.short() not in rows]
    for at in range(0, len(missing), AT_ONCE):
        if time.monotonic() > deadline:
            return
        some = missing[at : at + AT_ONCE]
        cases = [timed_case(setup, plan, steps=STEPS, warmup=WARMUP, seed=0) for plan in some]
        for plan, found in zip(some, run_cases(cases, Launch(device="cpu")), strict=True):
            assert isinstance(found, Measurement)
            rows[plan.short()] = {
                "plan": asdict(plan),
                "step_time_s": found.step_time_s,
                "spread": found.spread,
                "disturbed": sum(found.disturbed),
                "steps": len(found.steps_s),
                "breakdown_s": breakdown_s(found.timeline),
            }
        write_file(path, json.dumps(rows, indent=1))
        print(f"{job.model.name}: {len(rows)} of {len(plans)}", file=sys.stderr)


def compared(folder: Path, job: Job, ranks: int, costs: CostModel) -> list[Row]:
    """Every run of a model beside its prediction, the fastest run first."""
    path = folder / f"{job.model.name}-{ranks}.json"
    rows = []
    for kept in json.loads(path.read_text()).values() if path.exists() else ():
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in kept["plan"].items()}
        plan = ParallelPlan(**fields)
        prediction = _predicted(job, plan, costs)
        found = compare_steps(
            prediction.step_time_s, prediction.breakdown_s, kept["step_time_s"], kept["breakdown_s"]
        )
        rows.append(Row(plan=plan, spread=kept["spread"], disturbed=kept["disturbed"], compared=found))
    return sorted(rows, key=lambda row: row.compared.measured_s)


def regret(rows: Sequence[Row]) -> float:
    """Measured time of the plan that is predicted to be fastest over the least measured, less 1."""
    picked = min(rows, key=lambda row: row.compared.predicted_s)
    return picked.compared.measured_s / min(row.compared.measured_s for row in rows) - 1


def summary(name: str, plans: int, rows: Sequence[Row], goal: float) -> str:
    """A line of the table of models."""
    errors = [abs(row.compared.error) for row in rows]
    worst = max(rows, key=lambda row: abs(row.compared.error))
    return (
        f"| {name} | {len(rows)} of {plans} | {sum(e <= goal for e in errors)} | "
        f"{statistics.median(errors):.1%} | {worst.compared.error:+.1%} `{worst.plan.short()}` | "
        f"{statistics.median(row.spread for row in rows):.0%} | {regret(rows):.1%} |"
    )


def line(row: Row) -> str:
    """A line of the table of plans, with the two parts of the step that are most off."""
    found = row.compared
    parts = ", ".join(
        f"{part.what} {1e3 * part.predicted_s:.0f} / {1e3 * part.measured_s:.0f}"
        for part in found.parts[:2]
    )
    return (
        f"| `{row.plan.short()}` | {1e3 * found.predicted_s:.0f} | {1e3 * found.measured_s:.0f} | "
        f"{found.error:+.1%} | {row.spread:.0%}{'*' * (row.disturbed > 0)} | {parts} |"
    )


def report(folder: Path, cluster: Cluster, stack: Stack) -> str:
    """All runs in the folder, as Markdown."""
    parts = [HEADING.format(device=cluster.device.name, cores=cluster.gpus_per_node)]
    for ranks, goal in GOALS.items():
        head, tables = [], []
        for name, job in jobs().items():
            rows = compared(folder, job, ranks, CostModel(job.model, cluster, stack))
            if not rows:
                continue
            plans = sum(1 for _ in legal_plans(job, ranks, cluster))
            head.append(summary(name, plans, rows, goal))
            tables += [f"\n### {name} on {ranks} ranks\n", PLANS_HEAD, *map(line, rows)]
        if head:
            title = f"\n## {ranks} ranks: goal {goal:.0%}\n"
            parts += [title, MODELS_HEAD.format(goal=f"{goal:.0%}"), *head, *tables]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path, help="where runs are kept")
    parser.add_argument("--hardware", required=True, help="a profile of this machine")
    parser.add_argument("--measure-s", type=float, default=0.0, help="how long to run plans now")
    parser.add_argument("--ranks", type=int, default=2, help="of the plans to run")
    parser.add_argument("--most", type=int, default=20, help="plans of each model to run")
    parser.add_argument("--write", type=Path, help="the report's file [default: print it]")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    cluster = load_cluster(given.hardware)
    stack = stack_on(load_stack("parsim-executor"), cluster)
    deadline = time.monotonic() + given.measure_s
    for job in jobs().values() if given.measure_s else ():
        setup = Setup(job=job, cluster=cluster, stack=stack, origin={})
        legal = list(legal_plans(job, given.ranks, cluster))
        plans = list(dict.fromkeys((picked(legal, job, setup.costs()), *chosen(legal, given.most))))
        measure(given.folder, job, plans, setup, deadline)
    text = report(given.folder, cluster, stack)
    if given.write:
        write_file(given.write, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
