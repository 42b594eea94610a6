"""Host times of parsim's executor: what its passes and steps take where kernels take next to nothing.

A model too small for its kernels to matter trains as one rank of two under torch's fake process group,
by the same code as every run, with few and with more layers: a layer is the difference, the rest is what
does not grow. So DTensor's dispatch, FSDP's hooks, checkpoints and torch's pipeline runtime are timed
where they arise, without anything to wait for.
"""

from __future__ import annotations

from dataclasses import replace

from parsim.cost.collective import Group, collective_s
from parsim.execute.launch.attempts import Launch
from parsim.execute.launch.cases import run_cases
from parsim.execute.measurement import Measurement
from parsim.execute.one_rank.one_rank import OneRank, measure_one_rank
from parsim.execute.request import Case
from parsim.hardware import Cluster
from parsim.kernels import HOST_MODES, HostExperts, HostMode, MeasuredHost
from parsim.model import ModelSpec, MoeSpec
from parsim.plan import Job, ParallelPlan, parse_plan
from parsim.schedule import running_schedule

PLANS = dict(
    zip(
        HOST_MODES,
        (
            *("dp=2", "dp=2,recompute=selective", "dp=2,recompute=full"),
            *("tp=2,sequence_parallel=false", "tp=2", "dp=2,zero=2", "dp=2,zero=3"),
        ),
        strict=True,
    )
)
"""A plan of two ranks for each mode."""
WHOLE, SPLIT = "pp=2", "pp=2,schedule=zb-h1"
FEW, MORE = 2, 6
"""Layers of a rank."""
RANK = 1
"""The last of a pipeline: it hands gradients back."""
MICRO_BATCHES, STEPS, WARMUP = 4, 12, 3
COLLECTIVES = 4
"""All-reduces of a layer under tensor parallelism, both passes together (Shoeybi et al. 2019)."""
EXPERTS = "dp=2"
"""The plan of layers with FEW and with MORE experts."""
TYPICAL_S = 45.0


def measure_host(op_s: float, source: str, date: str, *, cluster: Cluster | None = None) -> MeasuredHost:
    """The host times of this machine; takes about TYPICAL_S seconds of one core.

    `op_s`: of one operation without autograd. `cluster` has the machine's collectives; with two devices
    or more, what one takes among layers beyond its time there is found too.
    Raises ParsimError where a rank is lost.
    """
    texts = [*PLANS.values(), WHOLE, SPLIT]
    cases = [_case(parse_plan(text), layers) for text in texts for layers in (FEW, MORE)]
    cases += [
        _case(parse_plan(EXPERTS), layers, experts) for experts in (FEW, MORE) for layers in (FEW, MORE)
    ]
    # The first one once more, for nothing: a process that has just begun is slow.
    _, *found = measure_one_rank([cases[0], *cases], RANK, Launch(device="cpu"))
    *each, few, more = zip(found[::2], found[1::2], strict=True)
    pairs = dict(zip(texts, each, strict=True))
    modes = tuple(host_mode(mode, *pairs[text]) for mode, text in PLANS.items())
    split_s, split_walk_s = split_host(pairs[WHOLE], pairs[SPLIT])
    wait_s = 0.0
    if cluster is not None and cluster.gpus_per_node >= 2:
        alone = modes[HOST_MODES.index("tensor parallel")]
        wait_s = _wait_s(alone.layer_forward_s + alone.layer_backward_s, cluster)
    return MeasuredHost(
        op_s=op_s,
        layer_forward_s=modes[0].layer_forward_s,
        layer_backward_s=modes[0].layer_backward_s,
        modes=modes,
        action_s=_rounded(pairs[WHOLE][1].action_host_s),
        wait_s=wait_s,
        split_s=split_s,
        split_walk_s=split_walk_s,
        experts=host_experts(few, more),
        source=f"{source}, {STEPS} steps of {MICRO_BATCHES} micro-batches each",
        date=date,
    )


def _wait_s(alone_s: float, cluster: Cluster) -> float:
    """What one collective of a layer takes on two real ranks beyond its host's part and its own time.

    `alone_s`: both passes of a layer on the host of a rank that nobody answers.
    """
    plan = parse_plan(PLANS["tensor parallel"])
    cases = [_case(plan, layers) for layers in (FEW, MORE)]
    few, more = run_cases(cases, Launch(device="cpu"))
    assert isinstance(few, Measurement)
    assert isinstance(more, Measurement)
    layer_s = (more.step_time_s - few.step_time_s) / (MORE - FEW) / MICRO_BATCHES
    job = cases[0].job
    num_bytes = 4.0 * job.seq_len * job.model.hidden
    own_s = collective_s(cluster, "all_reduce", num_bytes, Group(size=2, local=2))
    return _rounded(max(0.0, (layer_s - alone_s) / COLLECTIVES - own_s))


def _case(plan: ParallelPlan, layers: int, experts: int = 0) -> Case:
    """So many layers on each pipeline rank, of the smallest sizes that two tp ranks can share."""
    spec = ModelSpec(
        name="host", layers=layers * plan.pp, hidden=16, heads=2, ffn_hidden=16, gated_mlp=True,
        vocab=16, max_seq_len=4,
    )  # fmt: skip
    if experts:
        spec = replace(spec, moe=MoeSpec(experts=experts, top_k=1, ffn_hidden=16))
    job = Job(model=spec, seq_len=4, global_batch=MICRO_BATCHES * plan.dp, precision="fp32")
    schedule = running_schedule(plan, MICRO_BATCHES, STEPS + WARMUP)
    return Case(job=job, plan=plan, schedule=schedule, steps=STEPS, warmup=WARMUP, seed=0, dtype="fp32")


def host_experts(few: tuple[OneRank, OneRank], more: tuple[OneRank, OneRank]) -> HostExperts:
    """A layer without its experts, and each expert, from layers with FEW and with MORE of them."""
    layers = [host_mode("plain", *pair) for pair in (few, more)]
    forward_s, rest_forward_s = _line(*(layer.layer_forward_s for layer in layers))
    backward_s, rest_backward_s = _line(*(layer.layer_backward_s for layer in layers))
    return HostExperts(
        layer_forward_s=rest_forward_s,
        layer_backward_s=rest_backward_s,
        expert_forward_s=forward_s,
        expert_backward_s=backward_s,
    )


def host_mode(mode: str, few: OneRank, more: OneRank) -> HostMode:
    """A layer and the rest, from what a rank with few and with more layers took."""
    forward_s, ends_forward_s = _line(*(_pass_s(rank, "F") for rank in (few, more)))
    backward_s, ends_backward_s = _line(*(_pass_s(rank, "B") for rank in (few, more)))
    few_s, more_s = _outside_s(few), _outside_s(more)
    layer_step_s, step_s = _line(few_s, more_s) if more_s > few_s else (0.0, _rounded(more_s))
    return HostMode(
        mode=mode,
        layer_forward_s=forward_s,
        layer_backward_s=backward_s,
        ends_forward_s=ends_forward_s,
        ends_backward_s=ends_backward_s,
        layer_step_s=layer_step_s,
        step_s=step_s,
    )


def split_host(whole: tuple[OneRank, OneRank], split: tuple[OneRank, OneRank]) -> tuple[float, float]:
    """What the two halves of a backward take more than a whole one: a s + b s² for s layers of a stage.

    Each of a layer's walks for the gradients of its weights goes on to the stage's first layer.
    """
    more_s = [
        max(0.0, _pass_s(apart, "I") + _pass_s(apart, "W") - _pass_s(one, "B"))
        for one, apart in zip(whole, split, strict=True)
    ]
    each = [seconds / layers for seconds, layers in zip(more_s, (FEW, MORE), strict=True)]
    walk_s = max(0.0, (each[1] - each[0]) / (MORE - FEW))
    return _rounded(max(0.0, each[0] - walk_s * FEW)), _rounded(walk_s)


def _pass_s(rank: OneRank, kind: str) -> float:
    return sum(action.whole_s for action in rank.actions if action.kind == kind)


def _outside_s(rank: OneRank) -> float:
    """A step's host time outside its actions, with an update whose kernels take nothing."""
    return rank.step_host_s + rank.optimizer_s


def _line(few_s: float, more_s: float) -> tuple[float, float]:
    """(seconds a layer, the rest); neither is negative.

    Where other work made fewer layers the slower ones, the difference says nothing: then all of what
    more layers took is theirs, the most that it can be.
    """
    layer_s = (more_s - few_s) / (MORE - FEW) if more_s > few_s else more_s / MORE
    return _rounded(layer_s), _rounded(max(0.0, few_s - FEW * layer_s) if more_s > few_s else 0.0)


def _rounded(seconds: float) -> float:
    """Three digits are more than repeats agree on."""
    return float(f"{seconds:.3g}")
