"""Random worlds: any model, cluster, software, job, plan and network that the files could describe.

tests/strategies.py draws legal plans of small models on one cluster of round numbers; here everything
varies at once, on shipped profiles too, and about two plans in five are not legal.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st

from parsim.config import load_cluster, load_stack
from parsim.cost.host import stack_on
from parsim.cost.stage import CostModel
from parsim.hardware import Cluster, Device, Link
from parsim.model import MlaSpec, ModelSpec, MoeSpec
from parsim.plan import (
    AGGREGATIONS,
    ASYNCHRONOUS_SCHEDULES,
    USUAL_PLACEMENT,
    Job,
    ParallelPlan,
)
from parsim.schedule import ONE_CHUNK_SCHEDULES, OVERLAPPED_SCHEDULES
from parsim.shipped import shipped
from parsim.simulate.uneven import Unevenness
from parsim.stack import Stack
from tests.strategies import COMPRESSED, recomputed, schedules, stacks, stage_splits, stragglers

EXAMPLES = int(os.environ.get("PARSIM_RANDOM_EXAMPLES", "300"))
SEED = os.environ.get("PARSIM_RANDOM_SEED")
SOURCE = {"source": "drawn at random", "date": "2026-01"}


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """All that a simulated step depends on."""

    job: Job
    plan: ParallelPlan
    cluster: Cluster
    stack: Stack
    fabric: str | None
    """As `--fabric` reads it."""
    uneven: Unevenness

    def costs(self) -> CostModel:
        """A fresh cost model: nothing is priced yet."""
        return CostModel(self.job.model, self.cluster, self.stack)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For hypothesis: the cluster by its name, of the other nouns what differs from the usual."""
        machine = f"{self.cluster.name} ({self.cluster.gpus_per_node}/{self.cluster.scale_up_domain})"
        nouns = (
            f"{unusual(self.job.model)}, {unusual(self.job)}, on {machine} under {unusual(self.stack)}"
        )
        printer.text(f"World({self.plan.short()}; {nouns}; {self.fabric}, {self.uneven})")


def unusual(noun: Any) -> str:
    """A dataclass by the fields that do not have their usual values."""
    different = {
        field.name: getattr(noun, field.name)
        for field in fields(noun)
        if field.name not in ("model", "source", "description")
        and getattr(noun, field.name) != field.default
    }
    return f"{type(noun).__name__}({', '.join(f'{k}={v!r}' for k, v in different.items())})"


@cache
def shipped_cluster(name: str) -> Cluster:
    """A shipped profile, read once."""
    return load_cluster(name)


@cache
def shipped_stack(name: str) -> Stack:
    """A shipped stack, read once."""
    return load_stack(name)


@st.composite
def random_models(draw: st.DrawFn) -> ModelSpec:
    """Dense or with experts; MHA, GQA, MQA or MLA; windows; tied or not; one or many layers."""
    heads = draw(st.sampled_from([1, 2, 4, 6, 8, 16]))
    kv_heads = draw(st.sampled_from([k for k in (1, 2, 4, 8, 16) if heads % k == 0] + [heads]))
    head_dim = draw(st.sampled_from([16, 64, 80, 128]))
    layers = draw(st.integers(1, 18))
    moe, mla = draw(st.none() | moe_parts(layers)), None
    if draw(st.integers(0, 3)) == 0:
        mla = MlaSpec(
            kv_lora_rank=draw(st.sampled_from([16, 512])),
            q_lora_rank=draw(st.sampled_from([0, 96])),
            qk_nope_head_dim=head_dim,
            qk_rope_head_dim=draw(st.sampled_from([0, 32])),
            v_head_dim=draw(st.sampled_from([16, 128])),
        )
        kv_heads, head_dim = heads, 0
    plain = mla is None
    return ModelSpec(
        name="drawn",
        layers=layers,
        hidden=draw(st.sampled_from([64, 100, 1024])) * heads,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_hidden=draw(st.sampled_from([96, 2048, 11008])),
        gated_mlp=draw(st.booleans()),
        vocab=draw(st.sampled_from([2, 997, 32000])),
        max_seq_len=draw(st.sampled_from([64, 4096])),
        tied_embeddings=draw(st.booleans()),
        norm=draw(st.sampled_from(["rmsnorm", "layernorm"])),
        position=draw(st.sampled_from(["rope", "learned", "alibi", "none"])),
        linear_bias=plain and draw(st.booleans()),
        qk_norm=plain and draw(st.booleans()),
        attention_sinks=plain and draw(st.booleans()),
        norms_per_layer=draw(st.integers(0, 4)),
        embedding_norm=draw(st.booleans()),
        window=draw(st.sampled_from([0, 0, 1, 100])),
        window_every=draw(st.sampled_from([1, 2, 5])),
        moe=moe,
        mla=mla,
        mtp_layers=draw(st.sampled_from([0, 0, 1])),
    )


@st.composite
def moe_parts(draw: st.DrawFn, layers: int) -> MoeSpec:
    """Experts in all layers, in some, or in none that the model has."""
    experts = draw(st.sampled_from([1, 4, 6, 64]))
    return MoeSpec(
        experts=experts,
        top_k=draw(st.integers(1, min(experts, 8))),
        ffn_hidden=draw(st.sampled_from([48, 768])),
        shared_ffn_hidden=draw(st.sampled_from([0, 512])),
        dense_layers=draw(st.integers(0, layers + 1)),
        every=draw(st.sampled_from([1, 2])),
        expert_bias=draw(st.booleans()),
        shared_gate=draw(st.booleans()),
    )


@st.composite
def random_clusters(draw: st.DrawFn) -> Cluster:
    """A shipped profile, or devices and links with figures over many orders of magnitude."""
    name = draw(st.sampled_from([None, *shipped("hardware_profiles")]))
    if name is not None:
        return shipped_cluster(name)
    device = Device(
        name="drawn",
        peak_flops_per_s={"bf16": draw(st.sampled_from([1e11, 3e14])), "fp32": 1e11, "fp8": 6e14},
        memory_bytes=draw(st.sampled_from([1e9, 80e9])),
        memory_bandwidth_bytes_per_s=draw(st.sampled_from([1e10, 3e12])),
        num_sms=draw(st.sampled_from([1, 132])),
        l2_bytes=draw(st.sampled_from([1e5, 5e7])),
        power_w=500.0,
        is_host=draw(st.booleans()),
        host_slowdown=draw(st.sampled_from([1.0, 1.5])),
        clock_spread=draw(st.sampled_from([0.0, 0.02])),
        **SOURCE,
    )
    node = draw(st.sampled_from([1, 2, 4, 8]))
    return Cluster(
        name="drawn",
        device=device,
        gpus_per_node=node,
        scale_up_domain=node * draw(st.sampled_from([1, 1, 2, 9])),
        intra_node=draw(links()),
        inter_node=draw(links()),
        source="drawn at random",
        date="2026-01",
    )


@st.composite
def links(draw: st.DrawFn) -> Link:
    """From a modem to a backplane."""
    return Link(
        latency_s=draw(st.sampled_from([0.0, 2e-6, 1e-3])),
        bandwidth_bytes_per_s=draw(st.sampled_from([1e6, 5e10, 9e11])),
        **SOURCE,
    )


@st.composite
def random_stacks(draw: st.DrawFn, cluster: Cluster) -> Stack:
    """A shipped one, or everything switched on or off."""
    name = draw(st.sampled_from([None, *shipped("hardware_profiles/stacks")]))
    return stack_on(draw(stacks()) if name is None else shipped_stack(name), cluster)


@st.composite
def random_plans(draw: st.DrawFn, model: ModelSpec) -> ParallelPlan:
    """Any split, schedule, sharding and placement; most are legal."""
    dp, cp = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 1, 1, 2]))
    tp = draw(st.sampled_from([t for t in (1, 2, 4) if model.kv_heads % t == 0] or [1]))
    tp = draw(st.sampled_from([tp, tp, tp, tp, tp, tp, tp, 3]))
    pp = draw(st.sampled_from([p for p in (1, 2, 3, 4, 6) if p <= model.layers + 2]))
    schedule, vpp = draw(random_schedules(pp))
    stages = pp if schedule == "dualpipe" else pp * vpp
    zero = draw(st.integers(0, 3))
    groups = [g for g in range(1, dp * cp + 1) if dp * cp % g == 0]
    experts = model.moe.experts if model.moe else 1
    expert_tp = tp if model.moe and draw(st.integers(0, 3)) == 0 else 1
    eps = [e for e in (1, 2, 3, 4, 8) if experts % e == 0 and dp * cp * tp % (e * expert_tp) == 0]
    split = draw(stage_splits(model.layers, stages)) if draw(st.integers(0, 3)) == 0 else ()
    recompute, counts = draw(recomputed(model, stages, split))
    plain = dp * cp > 1 and not zero
    return ParallelPlan(
        dp=dp,
        tp=tp,
        pp=pp,
        cp=cp,
        ep=draw(st.sampled_from(eps or [1])),
        expert_tp=expert_tp,
        vpp=vpp,
        micro_batch=draw(st.sampled_from([1, 1, 2, 5])),
        schedule=schedule,
        zero=zero,
        zero_group=draw(st.sampled_from([0, *groups])) if zero else 0,
        sequence_parallel=tp > 1 and (model.moe is not None or draw(st.booleans())),
        recompute=recompute,
        recompute_layers=counts,
        aggregation=draw(st.sampled_from(AGGREGATIONS)) if plain else "bucket",
        weighted=dp * cp > 1 and draw(st.booleans()),
        compression=draw(st.sampled_from(COMPRESSED)) if plain else "none",
        tp_overlap=tp > 1 and draw(st.booleans()),
        placement=draw(placements()),
        stage_split=split,
    )


@st.composite
def placements(draw: st.DrawFn) -> str:
    """The usual order of dimensions, or any."""
    if draw(st.integers(0, 3)):
        return USUAL_PLACEMENT
    return "-".join(draw(st.permutations(USUAL_PLACEMENT.split("-"))))


@st.composite
def random_schedules(draw: st.DrawFn, pp: int) -> tuple[str, int]:
    """Any schedule, those without a flush too, with chunks that it takes."""
    if pp > 1 and draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from(ASYNCHRONOUS_SCHEDULES)), 1
    return draw(schedules(pp))


@st.composite
def fabrics(draw: st.DrawFn) -> str | None:
    """A network with settings, or none given."""
    kind = draw(st.sampled_from([None, None, "rail", "fat-tree", "torus", "switch"]))
    if kind is None:
        return None
    parts = [kind, draw(st.sampled_from(["", "algorithm=ring", "algorithm=tree"]))]
    if kind in ("rail", "fat-tree"):
        parts += draw(
            st.sampled_from(["", "leaf=1", "leaf=4,oversubscription=4", "routing=hash"])
        ).split(",")
    return ",".join(filter(None, parts))


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """A plan of a job on a cluster, under some software."""
    model = draw(random_models())
    cluster = draw(random_clusters())
    plan = draw(random_plans(model))
    # Interleaving takes rounds of pp or more; DualPipe(V) 2·pp or more, an even number of them.
    rounds, more = draw(st.integers(1, 2)), draw(st.integers(0, plan.pp - 1))
    micro_batches = rounds * (plan.pp + more)
    if plan.schedule in ONE_CHUNK_SCHEDULES and plan.schedule not in ASYNCHRONOUS_SCHEDULES:
        micro_batches = draw(st.integers(1, 2 * plan.pp + 3))
    if plan.schedule in OVERLAPPED_SCHEDULES:
        micro_batches *= 2
    spare = draw(st.sampled_from([0] * 11 + [1]))
    job = Job(
        model=model,
        seq_len=draw(st.sampled_from([8, 48, 1024, 4096] + [37] * (plan.cp * plan.tp == 1))),
        global_batch=micro_batches * plan.dp * plan.micro_batch + spare,
        precision=draw(st.sampled_from(sorted(cluster.device.peak_flops_per_s))),
        optimizer=draw(st.sampled_from(["adamw", "adamw", "sgd"])),
    )
    uneven = Unevenness()
    if draw(st.integers(0, 3)) == 0:
        uneven = Unevenness(
            stragglers=draw(stragglers(plan.gpus)), jitter=draw(st.sampled_from([0.0, 0.1]))
        )
    return World(
        job=job,
        plan=plan,
        cluster=cluster,
        stack=draw(random_stacks(cluster)),
        fabric=draw(fabrics()),
        uneven=uneven,
    )


def drawn(
    share: float = 1.0, *, shrink: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Random worlds for a test: as many as asked for, or a share of them.

    shrink: look for a small example where one fails; not worth the minutes where each takes a second.
    """
    phases = [phase for phase in Phase if phase is not Phase.shrink or shrink]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        examples = max(1, round(share * EXAMPLES))
        limits = settings(max_examples=examples, derandomize=SEED is None, phases=phases)
        decorated = limits(given(worlds())(test))
        return decorated if SEED is None else seed(int(SEED))(decorated)

    return decorate
