"""The speed-up of a pruned model, predicted and run: python benchmarks/pruning.py

Steps of tiny-llama-8l and of what --prune leaves of it, on one core, in CPU seconds, which other
processes on the machine hardly change; the prediction is of one rank on the shipped local-cpu.
"""

from __future__ import annotations

import statistics
import time

import torch

from parsim.config import load_cluster, load_model, load_stack
from parsim.cost.flops import model_flops
from parsim.cost.stage import CostModel
from parsim.execute.training.parallelize import token_loss
from parsim.execute.training.trainer import make_optimizer
from parsim.execute.training.transformer import build, synthetic_tokens, whole
from parsim.model import ModelSpec
from parsim.plan import Job, ParallelPlan
from parsim.pruning import Keep, pruned
from parsim.simulate.prediction import predict

SEQ_LEN, BATCH, MICRO_BATCH, STEPS, WARMUP = 256, 4, 2, 10, 2


def predicted_s(model: ModelSpec) -> float:
    """Seconds of a step by the simulator."""
    costs = CostModel(model, load_cluster("local-cpu"), load_stack("parsim-executor"))
    return predict(job_of(model), ParallelPlan(micro_batch=MICRO_BATCH), costs)[0].step_time_s


def job_of(model: ModelSpec) -> Job:
    return Job(model=model, seq_len=SEQ_LEN, global_batch=BATCH, precision="fp32")


def measured_s(model: ModelSpec) -> float:
    """Median CPU seconds of a step of the executor's model."""
    module = build(
        model, whole(model), seq_len=SEQ_LEN, recompute="none", dtype=torch.float32,
        device=torch.device("cpu"), seed=0,
    )  # fmt: skip
    optimizer = make_optimizer("adamw", list(module.parameters()))
    taken_s = []
    for step in range(STEPS):
        batch = synthetic_tokens(model.vocab, SEQ_LEN, BATCH, seed=0, step=step)
        begin_s = time.process_time()
        for tokens, targets in zip(*(part.split(MICRO_BATCH) for part in batch), strict=True):
            (token_loss(module(tokens), targets, None) * MICRO_BATCH / BATCH).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        taken_s.append(time.process_time() - begin_s)
    return statistics.median(taken_s[WARMUP:])


def main() -> None:
    torch.set_num_threads(1)
    full = load_model("tiny-llama-8l")
    print(f"{'kept':<32}{'FLOPs':>8}{'predicted':>11}{'measured':>10}{'error':>8}")
    for keep in (Keep(layers=0.5), Keep(ffn=0.5), Keep(layers=0.5, heads=0.5, ffn=0.5)):
        small = pruned(full, keep)
        foreseen = predicted_s(full) / predicted_s(small)
        found = measured_s(full) / measured_s(small)
        flops = model_flops(job_of(full)) / model_flops(job_of(small))
        name = small.name.removeprefix(full.name + "-")
        print(f"{name:<32}{flops:>7.2f}x{foreseen:>10.2f}x{found:>9.2f}x{foreseen / found - 1:>+8.1%}")


if __name__ == "__main__":
    main()
