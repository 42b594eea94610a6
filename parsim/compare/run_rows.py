"""One row of a table of measured runs as nouns: job, plan, cluster, stack and what was measured.

What a row leaves out is taken by default and said in `Run.assumed`; a row that contradicts itself or
asks for what parsim does not model is an error that says why.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from parsim.compare.csv_table import Row
from parsim.compare.run_models import Shape, model_of
from parsim.config import load_cluster, load_stack, shipped
from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.hardware import Cluster, with_overrides
from parsim.model import ModelSpec
from parsim.plan import Job, ParallelPlan
from parsim.schedule.check import check_plan
from parsim.search.search import fullest_rank
from parsim.stack import Stack

REQUIRED_COLUMNS = (
    *("id", "framework", "hardware", "gpus", "layers", "hidden", "heads", "ffn_hidden", "gated_mlp"),
    *("vocab", "seq_len", "global_batch", "micro_batch", "tp", "pp", "precision", "recompute"),
    "iter_time_s",
)
OPTIONAL_COLUMNS = (
    *("source", "gpus_per_node", "inter_node_gbit_per_gpu", "model_name", "kv_heads", "experts"),
    *("top_k", "vpp", "cp", "ep", "dp", "zero_or_fsdp", "sequence_parallel", "schedule", "compile"),
    *("tp_overlap", "peak_memory_gib", "strict", "notes", "year", "interconnect", "params_b"),
    *("tflops_per_gpu", "mfu", "tokens_per_s_per_gpu"),
)

NEAREST_STACK = {
    "megatron-bridge": "megatron-core-2025",
    "megatron-lm": "megatron-core-2025",
    "gcp-recipes": "nemo",  # the recipes of AI-Hypercomputer/gpu-recipes run NeMo
    "deepspeed": "megatron-deepspeed",
    "fms-fsdp": "fsdp1",
    "fsdp2": "torchtitan",
    "mosaic": "llm-foundry",
}
"""Stands in for frameworks that have no Stack of their own."""

OMNI_PATH_SHARE = 0.27
"""Of the nominal 4 x 100 Gb/s a node, under all-reduces of BLOOM's trials (fitted to their dependence on
the number of data-parallel ranks). GPUs cannot reach that network directly; the authors' own all_reduce
over four nodes saw 5 of 50 GB/s (bigscience, experiments/bandwidth/all_reduce_bench-a100-n4.txt)."""

OMNI_PATH_BEFORE_FIX_SHARE = 0.18
"""The same where the notes say "before the 02-25 PCIe/NUMA fix": processes then sat on sockets away from
their GPU and its network interface (fitted to what these trials lost; their authors say 1 to 5 %)."""
NUMA_FIX = "before the 02-25 pcie/numa fix"

NO_OVERLAP = "all comm overlap disabled"
"""What the notes of a row say where no communication runs beside compute."""

VTRAIN_HARNESS = "vtrain-harness"
COMPOSED_BY = "ground_truth_single"
"""In the source of vTrain's single-node rows, which are exactly affine in layers and micro-batches. Its
code (VIA-Research/vTrain, src/trainer.py and src/model) times embedding, layer, head and update alone
on one GPU, whatever the plan, with GPT-2's vocabulary cut by tp as it is and never recomputing; steps
are put together from these times."""
GPT2_VOCAB = 50257

FUSED_EXPERTS_SINCE = "26.06"
"""Container of NeMo from which Megatron-Bridge's recipes fuse an expert's kernels where scales are of
blocks: cutedsl_fused_grouped_mlp, full_iteration graphs and moe_a2a_overlap in its workload configs."""

ROW_SETTINGS = (
    *("fused_elementwise", "fp8_scaling", "dp_overlap", "pp_overlap", "tp_async_backward"),
    *("fsdp_prefetch", "gradient_dtype", "fused_experts"),
)
"""Settings of a Stack that a row may state for itself."""

REDUCED_IN_BF16 = "scripts/performance recipe"
"""What the notes of a row say where it ran with Megatron-Bridge's performance recipes, which set
grad_reduce_in_fp32 = False."""

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


@dataclass(slots=True)
class Library:
    """Shipped models, clusters and stacks, each read once."""

    models: tuple[ModelSpec, ...]
    stacks: dict[str, Stack] = field(default_factory=dict)
    """By framework name; what is put here before the first row replaces the shipped file."""
    clusters: dict[tuple[str, int, float], Cluster] = field(default_factory=dict)

    def stack(self, framework: str) -> Stack:
        if framework not in self.stacks:
            self.stacks[framework] = load_stack(framework)
        return self.stacks[framework]

    def cluster(self, key: tuple[str, int, float]) -> Cluster:
        """The cluster of a hardware name, GPUs a node and bytes/s between nodes (0: the profile's)."""
        if key not in self.clusters:
            name, gpus_per_node, inter_node_bytes_per_s = key
            self.clusters[key] = with_overrides(
                load_cluster(name),
                gpus_per_node=gpus_per_node or None,
                inter_node=inter_node_bytes_per_s or None,
            )
        return self.clusters[key]


@dataclass(slots=True)
class _Cells:
    """The cells of a row, read by type; every error names its column."""

    row: Row
    assumed: list[str] = field(default_factory=list)

    def text(self, key: str) -> str:
        return self.row.get(key, "").strip()

    def number(self, key: str) -> float | None:
        text = self.text(key)
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ParsimError("this cell is no number", where=key, got=text)
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number from 1, such as 48 or 48.0; an empty cell is the default or an error."""
        value = self.number(key)
        if value is None:
            if default is None:
                raise ParsimError("this cell is empty", where=key, expected="a whole number")
            return default
        if value != int(value) or not 1 <= value < 2**31:
            raise ParsimError("this cell is no whole number from 1", where=key, got=self.text(key))
        return int(value)

    def flag(self, key: str) -> bool | None:
        value = self.number(key)
        if value not in (None, 0, 1):
            raise ParsimError("this cell is yes (1) or no (0)", where=key, got=self.text(key))
        return None if value is None else bool(value)


def measured_s(row: Row) -> float:
    """Measured seconds of a step."""
    seconds = _Cells(row).number("iter_time_s")
    if seconds is None or not seconds > 0:
        raise ParsimError(
            "a measured time is greater than zero", where="iter_time_s", got=row.get("iter_time_s", "")
        )
    return seconds


def peak_memory_bytes(row: Row) -> float | None:
    """Measured peak of a device's memory, or None where it is not stated."""
    gib = _Cells(row).number("peak_memory_gib")
    return None if gib is None or not gib > 0 else gib * 2**30


def run_of(row: Row, library: Library) -> Run:
    """The nouns of a row.

    Raises ParsimError, naming the column, where a cell cannot be read, the row contradicts itself, or
    parsim does not model what it asks for.
    """
    if "" in row:
        raise ParsimError("this row has more cells than the header has columns")
    cells = _Cells(row)
    stack = _stack(cells, library)
    key, cluster = _cluster(cells, library)
    plan = _plan(cells, cluster, stack)
    model = _model(cells, library.models)
    if stack.name == VTRAIN_HARNESS:
        model = replace(model, vocab=GPT2_VOCAB // plan.tp * plan.tp, tied_embeddings=False)
        cells.assumed.append(f"vocab {model.vocab}, untied, as in the harness that timed the parts")
    job = _job(cells, model, plan)
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


def stack_named(framework: str, year: str, known: Collection[str]) -> str | None:
    """The stack that stands for a framework: of that year, of its name, or the nearest one; None for
    a framework that nothing is known of.
    """
    for name in (_of_year(framework, year), framework):
        if name in known:
            return name
    return NEAREST_STACK.get(framework)


def _of_year(framework: str, year: str) -> str:
    return f"{framework}-{year.strip().removesuffix('.0')}"


def _stack(cells: _Cells, library: Library) -> Stack:
    framework = cells.text("framework")
    known = {*shipped("hardware_profiles/stacks"), *library.stacks}
    name = stack_named(framework, cells.text("year"), known) or "megatron-core-2025"
    if name not in (framework, _of_year(framework, cells.text("year"))):
        cells.assumed.append(f"stack {framework or 'not stated'}: nearest is {name}")
    if name != VTRAIN_HARNESS and COMPOSED_BY in cells.text("source"):
        name = VTRAIN_HARNESS
        cells.assumed.append(f"stack {name}: the row is composed of parts that were timed there")
    stack = library.stack(name)
    compiled = cells.flag("compile")
    if compiled is not None and compiled != stack.fused_elementwise:
        stack = replace(stack, fused_elementwise=compiled)
    if _fuses_experts(cells):
        cells.assumed.append(f"experts fused, as in recipes since container {FUSED_EXPERTS_SINCE}")
        stack = replace(stack, fused_experts=True)
    scaling = re.match(r"fp8-(tensor|row)wise", cells.text("precision").lower())
    if scaling is not None:
        stack = replace(stack, fp8_scaling=scaling[1])  # type: ignore[arg-type]  # one of the two
    if NO_OVERLAP in cells.text("notes").lower():
        cells.assumed.append("no overlap of communication, by the row's notes")
        stack = replace(
            stack, dp_overlap=False, pp_overlap=False, tp_async_backward=False, fsdp_prefetch=False
        )
    if REDUCED_IN_BF16 in cells.text("notes"):
        cells.assumed.append("gradients reduced in bf16, as the performance recipes set")
        stack = replace(stack, gradient_dtype="bf16")
    return stack


def _fuses_experts(cells: _Cells) -> bool:
    container = re.search(r"\bcontainer (\d\d\.\d\d)", cells.text("source"))
    narrow = _precision(cells) in ("mxfp8", "nvfp4") and cells.whole("experts", 0) > 0
    return narrow and container is not None and container[1] >= FUSED_EXPERTS_SINCE


def _cluster(cells: _Cells, library: Library) -> tuple[tuple[str, int, float], Cluster]:
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


def _reached(cells: _Cells, gbit_per_s: float) -> float:
    """What a network gives of its nominal rate, where that is known to be far less."""
    if gbit_per_s and "omni-path" in cells.text("interconnect").lower():
        before_fix = NUMA_FIX in cells.text("notes").lower()
        share = OMNI_PATH_BEFORE_FIX_SHARE if before_fix else OMNI_PATH_SHARE
        cells.assumed.append(f"Omni-Path gives {share:.0%} of its rate between GPUs")
        return share * gbit_per_s
    return gbit_per_s


def _plan(cells: _Cells, cluster: Cluster, stack: Stack) -> ParallelPlan:
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


def _expert_tp(cells: _Cells, stack: Stack, *, ranks: int, ep: int, tp: int) -> int:
    """Ranks that share an expert: as the notes say (ETP=4), or the stack's default where it fits."""
    stated = re.search(r"\bETP=(\d+)", cells.text("notes"))
    if stated is not None:
        return int(stated[1])
    if cells.whole("experts", 0) == 0 or tp == 1:
        return 1
    expert_tp = tp if stack.default_expert_tp and ranks % (ep * tp) == 0 else 1
    cells.assumed.append(f"tensor parallelism of experts not stated: {expert_tp}")
    return expert_tp


def _tp_overlap(cells: _Cells, stack: Stack, tp: int) -> bool:
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


def _zero(cells: _Cells, stack: Stack, *, dp: int, cp: int, node_ranks: int) -> tuple[int, int]:
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


def _schedule(cells: _Cells, pp: int) -> tuple[str, int]:
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


def _sequence_parallel(cells: _Cells, tp: int) -> bool:
    stated = cells.flag("sequence_parallel")
    if tp == 1:
        return False
    if stated is None:
        cells.assumed.append("sequence_parallel not stated: on, as tp > 1")
        return True
    return stated


def _model(cells: _Cells, models: Sequence[ModelSpec]) -> ModelSpec:
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


def _job(cells: _Cells, model: ModelSpec, plan: ParallelPlan) -> Job:
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
        precision=_precision(cells),
    )


def _recomputed(cells: _Cells, job: Job, plan: ParallelPlan, costs: CostModel) -> ParallelPlan:
    """The plan with full recomputation where its row does not state any and memory leaves no choice."""
    if cells.text("recompute") or plan.recompute == "full" or job.model.moe is not None:
        return plan
    needed = fullest_rank(job, plan, costs).peak / costs.cluster.device.memory_bytes
    if needed <= MEMORY_FORCES:
        return plan
    cells.assumed.append(f"recompute not stated: full, as {needed:.1f} of the memory is needed without")
    return replace(plan, recompute="full")


def _precision(cells: _Cells) -> str:
    """The GEMMs' dtype by its prefix; what follows names a scaling recipe."""
    text = cells.text("precision").lower()
    if not text:
        cells.assumed.append("precision not stated: bf16")
        return "bf16"
    for prefix, precision in (
        ("fp8-mx", "mxfp8"),
        ("mxfp8", "mxfp8"),
        ("nvfp4", "nvfp4"),
        ("fp8", "fp8"),
        ("bf16", "bf16"),
        ("fp16", "fp16"),
        ("fp32", "fp32"),
        ("fp64", "fp64"),
    ):
        if text.startswith(prefix):
            return precision
    raise ParsimError("unknown precision", where="precision", got=text, expected="bf16, fp16, fp8 …")
