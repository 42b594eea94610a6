"""One row of a table of measured runs as nouns: job, plan, cluster, stack and what was measured.

What a row leaves out is taken by default and said in `Run.assumed`; a row that contradicts itself or
asks for what parsim does not model is an error that says why.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from parsim.compare.csv_table import Row
from parsim.compare.library import Library
from parsim.compare.row_cells import Cells, precision_of
from parsim.compare.row_stack import GPT2_VOCAB, NO_OVERLAP, VTRAIN_HARNESS, stack_of
from parsim.compare.run_models import Shape, model_of
from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.hardware import Cluster
from parsim.model import ModelSpec
from parsim.plan import ASYNCHRONOUS_SCHEDULES, Job, ParallelPlan
from parsim.schedule.check import check_plan
from parsim.search.fullest import fullest_rank
from parsim.stack import Stack

OMNI_PATH_SHARE = 0.27
"""Of the nominal 4 x 100 Gb/s a node, under all-reduces of BLOOM's trials (fitted to their dependence on
the number of data-parallel ranks). GPUs cannot reach that network directly; the authors' own all_reduce
over four nodes saw 5 of 50 GB/s (bigscience, experiments/bandwidth/all_reduce_bench-a100-n4.txt)."""

OMNI_PATH_BEFORE_FIX_SHARE = 0.18
"""The same where the notes say "before the 02-25 PCIe/NUMA fix": processes then sat on sockets away from
their GPU and its network interface (fitted to what these trials lost; their authors say 1 to 5%)."""
NUMA_FIX = "before the 02-25 pcie/numa fix"

MEMORY_FORCES = 1.5
"""A run whose source does not state recomputation had it where its device's memory would have to be this
many times larger without: more than predictions of memory are off for models without experts."""

MAX_ACTIONS = 2_000_000
"""Forwards of all stages in a step; more is a slip of the pen, and would run for hours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A measured run."""

    job: Job
    plan: ParallelPlan
    cluster: Cluster
    cluster_key: tuple[str, int, float]
    """Name and overrides of the cluster: the same key, the same cluster."""
    stack: Stack
    assumed: tuple[str, ...]
    """Settings that the row does not state, with the value they were given."""


def run_of(row: Row, library: Library) -> Run:
    """The nouns of a row.

    Raises ParsimError, naming the column, where a cell cannot be read, the row contradicts itself, or
    parsim does not model what it asks for.
    """
    if "" in row:
        raise ParsimError("this row has more cells than the header has columns")
    cells = Cells(row)
    stack = stack_of(cells, library)
    key, cluster = _cluster(cells, library)
    plan = _plan(cells, cluster, stack)
    model = _model(cells, library.models)
    if stack.name == VTRAIN_HARNESS:
        model = replace(model, vocab=GPT2_VOCAB // plan.tp * plan.tp, tied_embeddings=False)
        cells.assumed.append(f"vocab {model.vocab}, untied, as in the harness that timed the parts")
    job = _job(cells, model, plan)
    if plan.schedule in ASYNCHRONOUS_SCHEDULES:
        raise ParsimError(
            "steps of a pipeline without a flush are not told apart in measurements",
            where="schedule",
            got=plan.schedule,
        )
    check_plan(job, plan, cluster)
    plan = _recomputed(cells, job, plan, CostModel(model, cluster, stack))
    actions = plan.num_stages * plan.num_micro_batches(job)
    if actions > MAX_ACTIONS:
        raise ParsimError("this step is too long to simulate", got=f"{actions} forwards of stages")
    return Run(
        job=job,
        plan=plan,
        cluster=cluster,
        cluster_key=key,
        stack=stack,
        assumed=tuple(cells.assumed),
    )


def _cluster(cells: Cells, library: Library) -> tuple[tuple[str, int, float], Cluster]:
    gbit_per_s = cells.number("inter_node_gbit_per_gpu")
    node = 0 if cells.number("gpus_per_node") is None else cells.whole("gpus_per_node")
    if gbit_per_s is not None and not gbit_per_s > 0:
        raise ParsimError(
            "a bandwidth is greater than zero", where="inter_node_gbit_per_gpu", got=gbit_per_s
        )
    key = (cells.text("hardware"), node, _reached(cells, gbit_per_s or 0.0) * 1e9 / 8)
    cluster = library.cluster(key)
    if gbit_per_s is None and cells.whole("gpus") > cluster.scale_up_domain:
        gbit = cluster.inter_node.bandwidth_bytes_per_s * 8 / 1e9
        cells.assumed.append(f"inter_node_gbit_per_gpu not stated: {gbit:g}, as in {cluster.name}")
    return key, cluster


def _reached(cells: Cells, gbit_per_s: float) -> float:
    """What a network gives of its nominal rate, where that is known to be far less."""
    if gbit_per_s and "omni-path" in cells.text("interconnect").lower():
        before_fix = NUMA_FIX in cells.text("notes").lower()
        share = OMNI_PATH_BEFORE_FIX_SHARE if before_fix else OMNI_PATH_SHARE
        cells.assumed.append(f"Omni-Path gives {share:.0%} of its rate between GPUs")
        return share * gbit_per_s
    return gbit_per_s


def _plan(cells: Cells, cluster: Cluster, stack: Stack) -> ParallelPlan:
    gpus, tp, pp, cp = cells.whole("gpus"), cells.whole("tp"), cells.whole("pp"), cells.whole("cp", 1)
    dp = cells.whole("dp", max(1, gpus // (tp * pp * cp)))
    if dp * tp * pp * cp != gpus:
        raise ParsimError(
            "this row contradicts itself: gpus is not dp·tp·pp·cp",
            where="gpus",
            got=f"{gpus} GPUs, dp {dp}, tp {tp}, pp {pp}, cp {cp}",
        )
    zero, zero_group = _zero(cells, stack, dp=dp, cp=cp, node_ranks=max(1, cluster.gpus_per_node // tp))
    schedule, vpp = _schedule(cells, pp)
    ep = cells.whole("ep", 1)
    recompute = cells.text("recompute")
    if stack.name == VTRAIN_HARNESS:
        recompute = "none"
        cells.assumed.append("recompute: none in the harness that timed the parts")
    if not recompute:
        recompute = stack.default_recompute
        cells.assumed.append(f"recompute not stated: {stack.name} default {recompute}")
    return ParallelPlan(
        dp=dp,
        tp=tp,
        pp=pp,
        cp=cp,
        ep=ep,
        expert_tp=_expert_tp(cells, stack, ranks=dp * cp * tp, ep=ep, tp=tp),
        vpp=vpp,
        micro_batch=cells.whole("micro_batch"),
        schedule=schedule,
        zero=zero,
        zero_group=zero_group,
        sequence_parallel=_sequence_parallel(cells, tp),
        recompute=recompute,  # type: ignore[arg-type]  # ParallelPlan refuses other words
        tp_overlap=_tp_overlap(cells, stack, tp),
    )


def _expert_tp(cells: Cells, stack: Stack, *, ranks: int, ep: int, tp: int) -> int:
    """Ranks that share an expert: as the notes say (ETP=4), or the stack's default where it fits."""
    stated = re.search(r"\bETP=(\d+)", cells.text("notes"))
    if stated is not None:
        return int(stated[1])
    if cells.whole("experts", 0) == 0 or tp == 1:
        return 1
    expert_tp = tp if stack.default_expert_tp and ranks % (ep * tp) == 0 else 1
    cells.assumed.append(f"tensor parallelism of experts not stated: {expert_tp}")
    return expert_tp


def _tp_overlap(cells: Cells, stack: Stack, tp: int) -> bool:
    stated, notes = cells.flag("tp_overlap"), cells.text("notes").lower()
    if tp == 1 or NO_OVERLAP in notes or "tp-comm-overlap off" in notes:
        return False
    if stated is None and cells.text("precision").lower().startswith("nvfp4"):
        cells.assumed.append("tp_overlap not stated: off, as Megatron-Bridge's nvfp4 recipes set")
        return False
    if stated is None:
        stated = stack.default_tp_overlap
        cells.assumed.append(f"tp_overlap not stated: {stack.name} default {'on' if stated else 'off'}")
    return stated


def _zero(cells: Cells, stack: Stack, *, dp: int, cp: int, node_ranks: int) -> tuple[int, int]:
    """ZeRO stage and the ranks that share the shards (0: all), from texts such as "zero1 within 8"."""
    text = cells.text("zero_or_fsdp").lower()
    stated = re.search(r"zero-?([0-3])", text)
    hybrid = "hybrid" in text or "hsdp" in text
    if stated is not None:
        zero = int(stated[1])
    elif hybrid or "fsdp" in text:
        zero = 3
    elif text in ("none", "ddp", "no", "0"):
        zero = 0
    elif text:
        raise ParsimError("cannot tell the ZeRO stage", where="zero_or_fsdp", got=text)
    else:
        zero = stack.default_zero
        if dp * cp > 1:
            cells.assumed.append(f"zero_or_fsdp not stated: {stack.name} default zero {zero}")
    if zero == 0:
        return 0, 0
    within = re.search(r"(?:within|group)\s+(\d+)", text)
    group = int(within[1]) if within else (node_ranks if hybrid else 0)
    return zero, 0 if group >= dp * cp else group


def _schedule(cells: Cells, pp: int) -> tuple[str, int]:
    """Schedule and model chunks a rank; a pipeline of one has neither."""
    text = re.sub(r"\(.*\)", "", cells.text("schedule")).strip().lower()
    vpp = cells.whole("vpp", 1)
    other = re.search(r"lists (\d+) for the same model\) - vpp uncertain", cells.text("notes"))
    if other is not None:
        vpp = int(other[1])
        cells.assumed.append(f"vpp uncertain: {vpp}, as another release of the source lists")
    if pp == 1:
        if vpp > 1:
            cells.assumed.append(f"vpp {vpp} without a pipeline: 1")
        return "1f1b", 1
    name = {"interleaved-1f1b": "interleaved", "none": "", "1f1b": "", "interleaved": ""}.get(text, text)
    if name in ("", "interleaved"):
        name = "interleaved" if vpp > 1 else "1f1b"
        if text in ("", "none"):
            cells.assumed.append(f"schedule not stated: {name}")
    return name, vpp


def _sequence_parallel(cells: Cells, tp: int) -> bool:
    stated = cells.flag("sequence_parallel")
    if tp == 1:
        return False
    if stated is None:
        cells.assumed.append("sequence_parallel not stated: on, as tp > 1")
        return True
    return stated


def _model(cells: Cells, models: Sequence[ModelSpec]) -> ModelSpec:
    experts = cells.whole("experts", 0)
    shape = Shape(
        name=cells.text("model_name") or "the model",
        layers=cells.whole("layers"),
        hidden=cells.whole("hidden"),
        heads=cells.whole("heads"),
        kv_heads=cells.whole("kv_heads", 0),
        ffn_hidden=cells.whole("ffn_hidden"),
        gated_mlp=bool(cells.flag("gated_mlp")),
        vocab=cells.whole("vocab"),
        experts=experts,
        top_k=cells.whole("top_k") if experts else 0,
    )
    if not cells.text("gated_mlp"):
        cells.assumed.append("gated_mlp not stated: no")
    model, assumed = model_of(shape, cells.whole("seq_len"), models)
    cells.assumed.extend(assumed)
    return model


def _job(cells: Cells, model: ModelSpec, plan: ParallelPlan) -> Job:
    stated = cells.whole("global_batch")
    pass_size = plan.dp * plan.micro_batch
    global_batch = stated // pass_size * pass_size
    if global_batch == 0:
        raise ParsimError(
            "this row contradicts itself: the global batch is smaller than dp·micro_batch",
            where="global_batch",
            got=f"{stated}, dp {plan.dp}, micro_batch {plan.micro_batch}",
        )
    if global_batch != stated:
        cells.assumed.append(
            f"global_batch {stated} is no multiple of dp·micro_batch {pass_size}: {global_batch}"
        )
    return Job(
        model=model,
        seq_len=cells.whole("seq_len"),
        global_batch=global_batch,
        precision=precision_of(cells),
    )


def _recomputed(cells: Cells, job: Job, plan: ParallelPlan, costs: CostModel) -> ParallelPlan:
    """The plan with full recomputation where its row does not state any and memory leaves no choice."""
    if cells.text("recompute") or plan.recompute == "full" or job.model.moe is not None:
        return plan
    needed = fullest_rank(job, plan, costs).peak / costs.cluster.device.memory_bytes
    if needed <= MEMORY_FORCES:
        return plan
    cells.assumed.append(f"recompute not stated: full, as {needed:.1f} of the memory is needed without")
    return replace(plan, recompute="full")
