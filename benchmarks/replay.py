"""How fast the replay is: ratios to bare SimPy within this run, a large uneven step, and growth.

    python benchmarks/replay.py [--write]

--write puts the figures into reports/replay.md and the growth into reports/replay-growth.png.
"""

from __future__ import annotations

import argparse
import gc
import platform
import random
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import simpy

from parsim.charts.replay_cost import draw_replay_cost
from parsim.config import load_cluster, load_model, load_stack, write_file
from parsim.cost.stage import CostModel
from parsim.plan import Job, ParallelPlan
from parsim.schedule.program import Program, timeline_of
from parsim.simulate.prediction import program_of
from parsim.simulate.replay import dependencies, replay, replayed_times, run_events
from parsim.simulate.uneven import Straggler, Unevenness, replicas_of, unfolded_program

REPORTS = Path(__file__).parent.parent / "reports"
PLAN = ParallelPlan(dp=128, tp=8, pp=16, sequence_parallel=True)
REPEATS = 9
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Micro-batches of the growth curve, on 16 stages."""


def main() -> None:
    """Time everything, print it, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite reports/replay*")
    write = parser.parse_args().write
    lines = [
        "# The replay's speed",
        "",
        f"`python benchmarks/replay.py --write`; Python {platform.python_version()}, SimPy "
        f"{simpy.__version__}; processor time, the best of {REPEATS} interleaved rounds.",
        "",
        *against_simpy(),
        *uneven(),
        *growth(write),
    ]
    print("\n".join(lines))
    if write:
        write_file(REPORTS / "replay.md", "\n".join(lines) + "\n")


def program_405b(costs: CostModel, num_micro_batches: int) -> Program:
    """Llama 3 405B on 16,384 GPUs: 16 stages, 1F1B with its sends."""
    job = Job(model=costs.model, seq_len=8192, global_batch=PLAN.dp * num_micro_batches)
    return program_of(job, PLAN, costs)[0]


def costs_405b() -> CostModel:
    """Llama 3 405B on H100s."""
    model, cluster = load_model("llama-3.1-405b"), load_cluster("h100-sxm-80gb")
    return CostModel(model, cluster, load_stack(cluster.default_stack))


def bare_simpy_s(num_timeouts: int, num_processes: int) -> float:
    """A loop of timeouts in each of some processes, and nothing else."""
    env = simpy.Environment()

    def loop() -> simpy.events.ProcessGenerator:
        for _ in range(num_timeouts // num_processes):
            yield env.timeout(1.0)

    for _ in range(num_processes):
        env.process(loop())
    return seconds(env.run)


T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and its processor time."""
    found: list[T] = []
    taken_s = seconds(lambda: found.append(work()))
    return found[0], taken_s


def seconds(work: Callable[[], object]) -> float:
    """Processor time of a call, with the garbage collector off, as the replay has it."""
    gc.collect()
    gc.disable()
    try:
        started = time.process_time()
        work()
        return time.process_time() - started
    finally:
        gc.enable()


def event_loop_s(program: Program) -> float:
    """The replay's events alone, with what waits for what known."""
    ranks, streams, _, _, durations_s, afters, *_ = zip(*program.tasks, strict=True)
    missing, waiting = dependencies(zip(ranks, streams, strict=True), afters)
    return seconds(lambda: run_events(durations_s, missing, waiting))


def against_simpy() -> list[str]:
    """16 stages × 128 micro-batches, beside bare SimPy with as many timeouts."""
    program = program_405b(costs_405b(), 128)
    num_tasks, num_spans = len(program.tasks), len(replay(program).spans)
    times = replayed_times(program)
    work: dict[str, Callable[[], float]] = {
        "one": lambda: bare_simpy_s(num_tasks, 1),
        "sixteen": lambda: bare_simpy_s(num_tasks, 16),
        "spans": lambda: bare_simpy_s(num_spans, 1),
        "loop": lambda: event_loop_s(program),
        "events": lambda: seconds(lambda: replayed_times(program)),
        "timeline": lambda: seconds(lambda: timeline_of(program, times)),
        "replay": lambda: seconds(lambda: replay(program)),
    }
    best = dict.fromkeys(work, float("inf"))
    for _ in range(REPEATS):
        for name, run in work.items():
            best[name] = min(best[name], run())
    return [
        "## Beside bare SimPy",
        "",
        f"Llama 3 405B, 1F1B with 16 stages × 128 micro-batches: {num_tasks:,} tasks, each one event, "
        f"and {num_spans:,} spans.",
        "",
        "| | |",
        "|---|---|",
        f"| events a second, of bare SimPy with one process | {best['one'] / best['loop']:.0%} |",
        f"| the same, of bare SimPy with 16 processes | {best['sixteen'] / best['loop']:.0%} |",
        "| both with the time to find out which task waits for which | "
        f"{best['one'] / best['events']:.0%}, {best['sixteen'] / best['events']:.0%} |",
        "| the whole replay over bare SimPy with a timeout for each span | "
        f"{best['replay'] / best['spans']:.1f} × |",
        "| share of the replay that builds the Timeline | "
        f"{best['timeline'] / (best['timeline'] + best['events']):.0%} |",
        "",
    ]


def uneven() -> list[str]:
    """16,384 GPUs with 100 random stragglers, and with every pipeline different."""
    program, plan = program_405b(costs_405b(), 128), PLAN
    ranks = random.Random(0).sample(range(plan.gpus), 100)
    slow = random.Random(1)
    kinds = {
        "100 stragglers, 1.3 × each": Unevenness(stragglers=tuple(Straggler(r, 1.3) for r in ranks)),
        "100 stragglers, each another": Unevenness(
            stragglers=tuple(Straggler(r, 1 + slow.random()) for r in ranks)
        ),
    }
    lines = [
        "## 16,384 GPUs with stragglers (tp 8, pp 16, dp 128, 128 micro-batches)",
        "",
        "| | kinds of pipelines | tasks | unfold and replay | × the even step | memory so far |",
        "|---|---|---|---|---|---|",
    ]
    even_s = replay(program).end_s
    for name, uneven in kinds.items():
        started = time.process_time()
        replicas = replicas_of(plan, uneven)
        unfolded = unfolded_program(program, replicas)
        end_s = replay(unfolded).end_s
        taken_s = time.process_time() - started
        peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        lines.append(
            f"| {name} | {len(replicas)} | {len(unfolded.tasks):,} | {taken_s:.1f} s | "
            f"{end_s / even_s:.2f} | {peak_gb:.1f} GB |"
        )
    return [*lines, ""]


def growth(write: bool) -> list[str]:
    """Lowering and replay over the number of micro-batches."""
    lowering, replaying = [], []
    costs = costs_405b()
    program_405b(costs, SIZES[0])  # prices every layer once
    for num_micro_batches in SIZES:
        lower_s = replay_s = float("inf")
        for _ in range(3 if num_micro_batches < 1000 else 1):
            program, taken_s = timed(partial(program_405b, costs, num_micro_batches))
            lower_s = min(lower_s, taken_s)
            replay_s = min(replay_s, seconds(partial(replay, program)))
        actions = 2 * 16 * num_micro_batches
        lowering.append((actions, 1e6 * lower_s / actions))
        replaying.append((actions, 1e6 * replay_s / actions))
    level = [each_us for actions, each_us in replaying if actions >= 1000]
    if write:
        draw_replay_cost(
            {"schedule and lowering": lowering, "replay and Timeline": replaying},
            REPORTS / "replay-growth.png",
            finding="Cost grows linearly in the actions of a schedule",
            note="Llama 3 405B on H100, 1F1B, 16 stages; processor time of one core",
        )
    return [
        "## Growth",
        "",
        "![Time an action over the number of actions](replay-growth.png)",
        "",
        f"From {1000:,} to {2 * 16 * SIZES[-1]:,} actions the replay's time an action stays within "
        f"a factor of {max(level) / min(level):.2f}.",
    ]


if __name__ == "__main__":
    main()
