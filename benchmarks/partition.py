"""How near chosen stages come to the best: python benchmarks/partition.py (some minutes).

Small pipelines beside the estimate of every split, which is the replay's step; then whole models.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import combinations, pairwise
from statistics import fmean

from parsim.config import load_cluster, load_model, load_stack
from parsim.cost.stage import CostModel
from parsim.model import ModelSpec
from parsim.plan import Job, ParallelPlan, parse_plan, stage_layers
from parsim.schedule.program import step_time_s
from parsim.search.partition.chosen import partitioned
from parsim.search.partition.plan import Partitioner
from parsim.simulate.prediction import program_of

SMALL = (
    ("llama-3.1-8b", "h100-sxm-80gb", 9, "tp=4,pp=4"),
    ("llama-3.1-8b", "h100-sxm-80gb", 12, "tp=4,pp=4"),
    ("llama-3.1-8b", "h100-sxm-80gb", 14, "tp=4,pp=4"),
    ("llama-3.1-70b", "h100-sxm-80gb", 12, "dp=8,tp=8,pp=6,zero=1"),
    ("gpt3-175b", "a100-sxm-80gb", 13, "dp=8,tp=8,pp=4,zero=1"),
    ("mixtral-8x7b", "h100-sxm-80gb", 10, "dp=8,tp=1,ep=8,pp=5,zero=1"),
    ("deepseek-v3", "h100-sxm-80gb", 10, "dp=8,tp=1,ep=8,pp=4,zero=1"),
)
WHOLE = (
    ("llama-3.1-70b", "h100-sxm-80gb", 256, "dp=8,tp=8,pp=4,zero=1"),
    ("llama-3.1-70b", "h100-sxm-80gb", 256, "dp=8,tp=8,pp=8,zero=1"),
    ("gpt3-175b", "a100-sxm-80gb", 256, "dp=8,tp=8,pp=16,zero=1"),
    ("llama-3.1-405b", "h100-sxm-80gb", 2048, "dp=128,tp=8,pp=16,zero=1,recompute=full"),
    ("deepseek-v3", "h100-sxm-80gb", 8192, "dp=128,tp=1,ep=64,pp=16,zero=1,recompute=full"),
)


def main() -> None:
    """Both tables."""
    for schedule in ("gpipe", "1f1b", "zb-h1", "zb-h2"):
        regret = defaultdict(list)
        for name, hardware, layers, text in SMALL:
            for m in (4, 6, 8, 16, 32):
                for key, value in regrets(
                    name, hardware, layers, f"{text},schedule={schedule}", m
                ).items():
                    regret[key].append(value)
        for key, values in regret.items():
            best = sum(value < 1e-4 for value in values) / len(values)
            print(
                f"{schedule:6} {key:8} {len(values)} cases: mean {fmean(values):.2%}, "
                f"worst {max(values):.2%}, best {best:.0%}"
            )
    for name, hardware, global_batch, text in WHOLE:
        whole(name, hardware, global_batch, text)


def regrets(name: str, hardware: str, layers: int, text: str, m: int) -> dict[str, float]:
    """How much longer the steps of three splits are than that of the best."""
    plan = parse_plan(text)
    model, costs = costs_of(name, hardware, layers)
    job, ranks = Job(model=model, seq_len=4096, global_batch=m * plan.dp), [costs] * plan.pp
    options = {
        "usual": plan,
        "formula": Partitioner(job).partition(plan, ranks, split=True, counts=False),
        "chosen": partitioned(job, plan, ranks, split=True, counts=False).plan,
    }
    best_s = min(
        step_s(job, replace(plan, stage_split=split), costs)
        for split in splits(layers, plan.pp)
        if max(split) <= 1.6 * layers / plan.pp + 1
    )
    return {key: step_s(job, option, costs) / best_s - 1 for key, option in options.items()}


def whole(name: str, hardware: str, global_batch: int, text: str) -> None:
    """One model before and after."""
    plan = parse_plan(text)
    model, costs = costs_of(name, hardware)
    job = Job(model=model, seq_len=model.max_seq_len, global_batch=global_batch)
    counts = plan.recompute != "none"
    print(f"{name} {text}: {step_s(job, plan, costs):.3f} s")
    for split in (False, True):
        chosen = partitioned(job, plan, [costs] * plan.pp, split=split, counts=counts).plan
        layers = "-".join(map(str, stage_layers(model, chosen)))
        again = "-".join(map(str, chosen.recompute_layers)) or chosen.recompute
        print(f"  {step_s(job, chosen, costs):.3f} s  {layers}, recomputed {again}")


def costs_of(name: str, hardware: str, layers: int | None = None) -> tuple[ModelSpec, CostModel]:
    """A model, of so many layers where that is given, and what it costs."""
    model, cluster = load_model(name), load_cluster(hardware)
    model = replace(model, layers=layers or model.layers)
    return model, CostModel(model, cluster, load_stack(cluster.default_stack))


def step_s(job: Job, plan: ParallelPlan, costs: CostModel) -> float:
    """The step of a plan."""
    return step_time_s(program_of(job, plan, costs)[0])


def splits(layers: int, stages: int) -> list[tuple[int, ...]]:
    """Every split with a layer or more on each stage."""
    ends = [(0, *cuts, layers) for cuts in combinations(range(1, layers), stages - 1)]
    return [tuple(b - a for a, b in pairwise(end)) for end in ends]


if __name__ == "__main__":
    main()
