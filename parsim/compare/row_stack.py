"""Which Stack a measured run ran on, and what its row or source says of the stack's settings."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from parsim.compare.library import Library
from parsim.compare.row_cells import Cells, precision_of
from parsim.shipped import shipped
from parsim.stack import Stack

NEAREST = "nearest is"
"""In `assumed` of a row whose framework has no Stack of its own."""

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
    *(
        "fused_elementwise",
        "fp8_scaling",
        "dp_overlap",
        "pp_overlap",
        "pair_overlap",
        "tp_async_backward",
    ),
    *("fsdp_prefetch", "gradient_dtype", "fused_experts"),
)
"""Settings of a Stack that a row may state for itself."""

REDUCED_IN_BF16 = "scripts/performance recipe"
"""What the notes of a row say where it ran with Megatron-Bridge's performance recipes, which set
grad_reduce_in_fp32 = False."""


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


def stack_of(cells: Cells, library: Library) -> Stack:
    """The stack of the row's framework and year, with what the row says of it otherwise."""
    framework = cells.text("framework")
    known = {*shipped("hardware_profiles/stacks"), *library.stacks}
    name = stack_named(framework, cells.text("year"), known) or "megatron-core-2025"
    if name not in (framework, _of_year(framework, cells.text("year"))):
        cells.assumed.append(f"stack {framework or 'not stated'}: {NEAREST} {name}")
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
            stack,
            dp_overlap=False,
            pp_overlap=False,
            pair_overlap=False,
            tp_async_backward=False,
            fsdp_prefetch=0,
        )
    if REDUCED_IN_BF16 in cells.text("notes"):
        cells.assumed.append("gradients reduced in bf16, as the performance recipes set")
        stack = replace(stack, gradient_dtype="bf16")
    return stack


def _fuses_experts(cells: Cells) -> bool:
    container = re.search(r"\bcontainer (\d\d\.\d\d)", cells.text("source"))
    narrow = precision_of(cells) in ("mxfp8", "nvfp4") and cells.whole("experts", 0) > 0
    return narrow and container is not None and container[1] >= FUSED_EXPERTS_SINCE
