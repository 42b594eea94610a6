"""Has parsim become slower or fatter? Counted work and ratios beside those of the committed baseline.

    python benchmarks/regression.py [--update] [--quick]

Counts (plans examined, walked and replayed by searches, events of replays, modules loaded, bytes of
answers) are the same on every machine; peaks of memory and ratios of times within one run nearly so, and
each has a tolerance. Exit status 1 where any figure is worse than the baseline by more than that, or is
another where it should be the same. --update writes the figures found as the new baseline,
benchmarks/regression.json. --quick leaves out what is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import platform
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import simpy

from parsim.cli.main import run_command
from parsim.config import dump_json, load_cluster, load_model, load_stack, read_json, write_file
from parsim.cost.stage import CostModel
from parsim.plan import Job, parse_plan
from parsim.schedule.program import Program
from parsim.search import candidates
from parsim.search.examine import Examiner
from parsim.search.search import search
from parsim.search.space import Constraints, families
from parsim.simulate.prediction import program_of
from parsim.simulate.replay import dependencies, replay, replayed_times, run_events

BASELINE = Path(__file__).with_suffix(".json")
ROUNDS = 5
"""Of each timed work, in turn; the best counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Something counted or measured."""

    name: str
    value: float
    worse: Literal["more", "less", "other"]
    """Which way from the baseline is worse; other: it should be the same."""
    tolerance: float = 0.0
    """Relative distance from the baseline that is none."""

    def verdict(self, before: float | None) -> str:
        """What to say of it beside the baseline: new, same, better, WORSE or CHANGED."""
        if before is None:
            return "new"
        if abs(self.value - before) <= self.tolerance * abs(before):
            return "same"
        if self.worse == "other":
            return "CHANGED"
        return "WORSE" if (self.value > before) == (self.worse == "more") else "better"


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """A search."""

    model: str
    hardware: str
    gpus: int
    global_batch: int
    constraints: Constraints = field(default_factory=Constraints)


SPACES = (
    Space(model="llama-3.1-8b", hardware="h100-sxm-80gb", gpus=64, global_batch=512),
    Space(model="llama-3.1-70b", hardware="a100-sxm-80gb", gpus=512, global_batch=1024),
    Space(
        model="mixtral-8x7b",
        hardware="gb200-nvl72",
        gpus=72,
        global_batch=576,
        constraints=Constraints(zero=(1,), max_sizes={"vpp": 2}),
    ),
)
STEP = "dp=8,tp=8,pp=16"
"""Of Llama 3 405B, replayed with 64 micro-batches."""


def main() -> int:
    """Print every figure beside the baseline's; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the figures as the new baseline")
    parser.add_argument("--quick", action="store_true", help="only what is counted")
    arguments = parser.parse_args()
    baseline: dict[str, Any] = read_json(BASELINE)["figures"] if BASELINE.exists() else {}
    found, failed = {}, 0
    for figure in figures(timed=not arguments.quick):
        before = baseline.get(figure.name)
        verdict = figure.verdict(before)
        failed += verdict.isupper()
        found[figure.name] = figure.value
        was = "" if before is None else f"{before:,.4g}"
        print(f"{figure.name:<52}{figure.value:>16,.10g}{was:>14}  {verdict}", flush=True)
    gone = [] if arguments.quick else sorted(baseline.keys() - found.keys())
    for name in gone:
        print(f"{name:<52}{'':>30}  GONE")
    if arguments.update:
        where = {"python": platform.python_version(), "simpy": simpy.__version__}
        write_file(
            BASELINE,
            dump_json(
                {"made_with": where, "figures": found if not arguments.quick else baseline | found}
            ),
        )
        print(f"wrote {BASELINE.name}")
        return 0
    return 1 if failed or gone else 0


def figures(*, timed: bool = True) -> Iterator[Figure]:
    """All figures, as they are found."""
    for space in SPACES:
        yield from searched(space)
    program = step_program()
    yield from replayed(program)
    yield from answers()
    yield from loaded()
    if timed:
        yield from ratios(program)


def searched(space: Space) -> Iterator[Figure]:
    """What a search for the ten best plans looks at."""
    job, costs = setup(space.model, space.hardware, space.global_batch)
    walked = 0

    def counting(examiner: Examiner, chosen: candidates.Chosen) -> object:
        nonlocal walked
        walked += sum(len(index) for _, index in chosen)
        return walk(examiner, chosen)

    walk = candidates.walk
    with patch.object(candidates, "walk", counting):
        result = search(job, space.gpus, costs, constraints=space.constraints, budget_s=600)
    name = f"search {space.model} {space.gpus}"
    yield Figure(name=f"{name}: plans", value=result.space.enumerated, worse="other")
    yield Figure(name=f"{name}: plans that fit", value=result.space.fits, worse="other")
    yield Figure(name=f"{name}: walked", value=walked, worse="more")
    yield Figure(name=f"{name}: replayed", value=result.replayed, worse="more")
    yield Figure(name=f"{name}: proven", value=float(result.optimal), worse="less")


def setup(model: str, hardware: str, global_batch: int) -> tuple[Job, CostModel]:
    """A job with fresh costs: nothing is priced yet."""
    spec, cluster = load_model(model), load_cluster(hardware)
    job = Job(model=spec, seq_len=spec.max_seq_len, global_batch=global_batch)
    return job, CostModel(spec, cluster, load_stack(cluster.default_stack))


def step_program() -> Program:
    """16 stages and 64 micro-batches."""
    plan = parse_plan(STEP)
    job, costs = setup("llama-3.1-405b", "h100-sxm-80gb", 64 * plan.dp)
    return program_of(job, plan, costs)[0]


class CountingEnvironment(simpy.Environment):
    """SimPy's, with a count of its events."""

    events = 0

    def schedule(self, *arguments: Any, **more: Any) -> None:
        self.events += 1
        super().schedule(*arguments, **more)


def replayed(program: Program) -> Iterator[Figure]:
    """Events of a replay, and the memory that lowering and replay take at their peak."""
    environment = CountingEnvironment()
    replayed_times(program, env=environment)
    yield Figure(name="replay: tasks", value=len(program.tasks), worse="more")
    yield Figure(name="replay: SimPy events", value=environment.events, worse="more")
    spans = len(replay(program).spans)
    yield Figure(name="replay: spans", value=spans, worse="other")
    for name, work in {"lowering": step_program, "replay": lambda: replay(program)}.items():
        work()  # what is loaded and remembered once is not counted
        peak, blocks = allocated(work)
        yield Figure(name=f"{name}: peak bytes a span", value=peak / spans, worse="more", tolerance=0.1)
        yield Figure(name=f"{name}: blocks a span", value=blocks / spans, worse="more", tolerance=0.1)


def allocated(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes at the peak of a call, and blocks that its result keeps."""
    tracemalloc.start()
    try:
        kept = work()
        peak = tracemalloc.get_traced_memory()[1]
        blocks = sum(trace.count for trace in tracemalloc.take_snapshot().statistics("filename"))
        del kept
    finally:
        tracemalloc.stop()
    return peak, blocks


def answers() -> Iterator[Figure]:
    """Bytes of the report, the trace and the document of a 64-rank plan."""
    step = "--model llama-3.1-70b --hardware h100-sxm-80gb --plan dp=4,tp=4,pp=4 --global-batch 128"
    words = f"--no-config simulate {step} --report report --trace trace.json --json".split()
    out = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            status = run_command(words)
        assert status in (0, 1), status
        sizes = {
            "report": Path("report/simulate.html").stat().st_size,
            "trace": Path("trace.json").stat().st_size,
            "document": len(out.getvalue().encode()),
        }
    for what, size in sizes.items():
        yield Figure(name=f"simulate: bytes of the {what}", value=size, worse="more", tolerance=0.1)


def loaded() -> Iterator[Figure]:
    """Modules that commands load which calculate nothing."""
    for command in ("--help", "models --json"):
        code = (
            "import sys; from parsim.cli.main import run_command; before = len(sys.modules); "
            f"run_command({command.split()!r}); "
            "own = sum(name.startswith('parsim') for name in sys.modules); "
            "print(own, len(sys.modules), file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        own, every = map(int, done.stderr.split())
        name = f"parsim {command}: modules"
        yield Figure(name=f"{name} of parsim", value=own, worse="more", tolerance=0.05)
        # Those of others change with their releases.
        yield Figure(name=f"{name} in all", value=every, worse="more", tolerance=0.15)


def ratios(program: Program) -> Iterator[Figure]:
    """Times over those of other work in this run: the best of interleaved rounds each."""
    ranks, streams, _, _, durations_s, afters, *_ = zip(*program.tasks, strict=True)

    def events() -> None:
        missing, waiting = dependencies(zip(ranks, streams, strict=True), afters)
        run_events(durations_s, missing, waiting)

    job, costs = setup("llama-3.1-8b", "h100-sxm-80gb", 512)
    listed = list(families(job, 64, Constraints()))
    plans = sum(prod(family.shape) for family in listed)

    def examined() -> None:
        examiner = Examiner(job, CostModel(costs.model, costs.cluster, costs.stack))
        for family in listed:
            examiner.examine(family)

    num_tasks = len(program.tasks)
    work: dict[str, Callable[[], object]] = {
        "bare": lambda: bare_simpy(num_tasks),
        "events": events,
        "replay": lambda: replay(program),
        "lowering": step_program,
        "examined": examined,
    }
    best = dict.fromkeys(work, float("inf"))
    for _ in range(ROUNDS):
        for name, run in work.items():
            started = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - started)
    bare_s = best["bare"]
    yield Figure(
        name="events a second of the replay / of bare SimPy",
        value=round(bare_s / best["events"], 3), worse="less", tolerance=0.3,
    )  # fmt: skip
    for name, count in {"replay": num_tasks, "lowering": num_tasks, "examined": plans}.items():
        one = best[name] / count / (bare_s / num_tasks)
        unit = "plan" if name == "examined" else "task"
        yield Figure(
            name=f"{name}: time a {unit} / of a timeout of bare SimPy",
            value=round(one, 3), worse="more", tolerance=0.4,
        )  # fmt: skip


def bare_simpy(num_timeouts: int) -> None:
    """A process of timeouts, and nothing else."""
    env = simpy.Environment()

    def loop() -> simpy.events.ProcessGenerator:
        for _ in range(num_timeouts):
            yield env.timeout(1.0)

    env.process(loop())
    env.run()


if __name__ == "__main__":
    sys.exit(main())
