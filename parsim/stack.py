"""Stack: the training software on top of the hardware.

Which kernels are fused, what overlaps with what, what a launch costs: the same plan on the same GPUs
runs at different speeds under Megatron-LM of 2021 and Megatron-Core of 2025. A Stack holds at most about
ten fitted constants, each with a physical meaning; a constant says where it comes from in `source`.
Standard library only: the executor's workers import it where nothing but torch is installed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from parsim.errors import ParsimError

AttentionKernel = Literal["flash", "fused_softmax", "unfused"]
SelectiveRecompute = Literal["attention_core", "every_other_gemm"]
Fp8Scaling = Literal["delayed", "tensor", "row"]
MAX_RELATIVE_ERROR = 2.0
"""Of a log: an interval from a seventh of the prediction to seven times it says nothing any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A training framework of some year, as far as step time and memory depend on it."""

    name: str
    description: str
    source: str

    # Which kernels there are
    attention: AttentionKernel = "flash"
    """flash: scores stay on chip; fused_softmax: written once a pass; unfused: by each kernel."""
    fused_elementwise: bool = True
    """Bias, activation, dropout and residual run as one kernel each way."""
    merged_products: bool = True
    """q, k and v are one product, and the two that enter a gated feed-forward are; else each is one of
    its own, and the gradients of their input are added up."""
    complex_rotary: bool = False
    """Rotary positions are products of complex fp32 numbers, which no compiler fuses (torchtitan)."""
    fused_cross_entropy: bool = True
    """The loss reads the logits once and keeps them in the GEMMs' dtype."""
    gemm_stream_k: bool = True
    """The matrix library fills the last wave of tiles by sharing their k among SMs (cuBLAS 12); else
    it is as long as a full wave."""
    fp8_scaling: Fp8Scaling = "delayed"
    """Where the scales of a fp8 tensor come from. delayed: one from earlier passes, whose extremes all
    ranks of a stage share after each pass of a chunk (Transformer Engine's first recipe); tensor: one
    from this pass's own values, which are read once more for it; row: so for each row."""
    fp8_keeps_wide: bool = False
    """What a fp8 product reads is kept in 16 bits and cast again in the backward (torchao)."""
    dropout: bool = False
    """Models are trained with dropout on attention and residuals, as in the GPT-3 years."""

    # How fast they are in training, against the same kernel alone on a hot device
    gemm_slowdown: float = 1.0
    """Time of a GEMM in training over the bare kernel's."""
    routed_slowdown: float = 1.0
    """Time of the kernels on routed tokens over memory-bound ones of as many bytes: rows gathered by
    index, padding, a launch for each expert."""
    fp8_row_slowdown: float = 1.0
    """Time of a fp8 product with a scale a row over the same with a scale a tensor."""
    attention_slowdown: float = 1.0
    attention_max_flops_per_s: float = 0.0
    """The most its fused attention reaches on any device: a kernel written for one generation does not
    use the matrix instructions of the next (FlashAttention-2 on H100). 0: written for the device. Alone,
    that is: in training the clock yields to the power limit as it does for products."""
    memory_bound_slowdown: float = 1.0

    # Host
    layer_host_s: float = 0.0
    """Host time to launch one layer's forward; its backward takes as much. See cost.price.part_time."""
    moe_host_s: float = 0.0
    """The same of a layer with experts, on top: router, permutations, launches for each expert, and the
    counts of tokens that the host waits for."""
    graphs_for_slow_hosts: bool = False
    """Beside a host that is slow to launch (Device.host_slowdown above 1: Grace) its recipes launch all
    but the experts' products by graphs."""
    narrow_host_s: float = 0.0
    """What a layer's pass takes longer on the host where its GEMMs are narrower than 16 bits: casts,
    scales, and modules that keep track of both."""
    ring_host_s: float = 0.0
    """The same for each step of a ring beyond the first (context parallelism): its slices, kernels,
    transfers and sums are launched one by one."""
    layer_lead_s: float = 0.0
    """What a layer's forward, and its backward, waits for its first kernels where layers are timed one
    by one: each then begins with a device that has nothing to do."""
    action_host_s: float = 0.0
    """Host time of every pipeline action beyond its kernels: the schedule's loop, posting transfers."""
    step_overhead_s: float = 0.0
    """Host time once a step: data, logging, gradient norm, zeroing."""

    # Recomputation
    selective_recompute: SelectiveRecompute = "attention_core"
    """What recompute = selective runs again: attention_core, softmax(QKᵀ)V (Megatron-LM); or
    every_other_gemm, all but each second matrix product and the attention (torchtitan)."""

    recompute_stops_early: bool = False
    """Full recomputation ends with the last tensor that the backward needs: a layer's last product does
    not run again (PyTorch from 2.1, torch.utils.checkpoint without re-entry)."""

    recomputes_for_each_weight: bool = False
    """Where a backward runs as two passes, the second runs a recomputed layer again for each of its
    tensors of weights: torch's stage_backward_weight calls autograd once for each, and a checkpoint
    keeps what it recomputes for one call."""
    gradients_arise_anew: bool = False
    """Every backward leaves new tensors of gradients, and the second and later ones add them to those
    before (eager autograd); replicas copy them into a flat buffer once a step. Else products add to a
    buffer as they write."""

    # Communication
    sequence_copies: bool = False
    """Under sequence parallelism what is gathered or scattered is copied once more: collectives work on
    a tensor's first dimension, and the sequence is its second (DTensor)."""
    collective_overhead_s: float = 0.0
    """What a collective among layers costs beyond itself, for each doubling of its ranks: its launch,
    and waiting for the rank that comes last."""
    tp_async_backward: bool = False
    """A column-parallel product's backward reduces its input's gradient beside the weight gradient and,
    with sequence parallelism, gathers the input again beside the input gradient (Megatron-LM from
    2021-10, Korthikanti et al. 2022, section 4.2.2)."""
    context_exchange: Literal["ring", "all_gather"] = "ring"
    """How context-parallel ranks come by the keys and values of others. ring: part by part, beside the
    attention to the part before; all_gather: all before the attention, kept for its backward, whose
    gradients a reduce-scatter brings home (Llama Team 2024, arXiv 2407.21783, section 3.3.2)."""
    overlap_cost: float = 0.2
    """Share of tensor-parallel communication beside a GEMM that costs time all the same: it takes SMs
    and memory bandwidth from the GEMM."""
    dp_overlap: bool = True
    """Gradients are reduced bucket by bucket behind the last backward (and ZeRO-1's parameters
    gathered before the first forward); else after it."""
    dp_overlap_cost: float = 0.0
    """Share of data-parallel communication beside compute that costs time all the same: it takes SMs
    and memory bandwidth, and the host holds gathers back for want of memory. 1: nothing is hidden."""
    dp_slowdown: float = 1.0
    """Time of data-parallel collectives, and of those inside layers that leave the scale-up domain, but
    for exchanges of tokens, in training over the same alone: copies into and out of flat buckets, a
    network that others use too. Between stages a pipeline's transfers take their bare time."""
    dp_bucket_parameters: float = 40e6
    """Parameters in a bucket."""
    sums_in_pipeline: bool = False
    """ZeRO-2 and 3 sum gradients over micro-batches on each rank of a pipeline and reduce them once,
    behind a stage's last backward; parameters gathered for a backward stay until a forward has used them
    (torch's pipeline runtime). Else every backward's gradients are reduced."""
    sums_norm_gradients: bool = False
    """Under sequence parallelism a tp rank has its part of the gradients of norms; their sum is counted:
    one all-reduce a step, or with ZeRO-2 and 3 one for each tensor and reduction (DTensor)."""
    sums_tied_shards: bool = False
    """Under ZeRO the two stages with a copy of a tied embedding sum the shards of its gradients that
    each rank keeps; else whole gradients (Megatron-Core's finalize_model_grads)."""
    zero_broadcast_s: float = 0.0
    """ZeRO's parameters come back after the update by one broadcast from each rank of the shard group,
    each of this time beyond its transfer (InternEvo); 0: by one all-gather."""
    fp8_gather: bool = False
    """ZeRO gathers parameters as fp8 products read them (Megatron-Core's fp8-param-gather)."""
    fsdp_copies: bool = False
    """Each parameter is a shard of its own: a layer's are copied out of the buffer that they are
    gathered into, and its gradients into the one that is reduced (PyTorch's FSDP2)."""
    fsdp_prefetch: int = 1
    """Layers whose parameters FSDP gathers ahead of the one that runs (FSDP1's limit_all_gathers: 2);
    0: each in the way of its own compute."""
    zero_prefetch: int | None = None
    """The same of ZeRO-1 and 2, in buckets of the first forward; left out: all of them are gathered from
    the start of the step, for their parameters have a place in any case."""
    moe_dispatch: Literal["all_to_all", "deduplicated"] = "all_to_all"
    """How tokens reach their experts. all_to_all: a copy for each of top_k experts; deduplicated: one
    copy a node that holds any of them, handed on over the scale-up links (DeepEP, HybridEP)."""
    ep_overlap: Literal["never", "network"] = "never"
    """Which exchanges of tokens run beside the compute of another micro-batch: those that leave the
    scale-up domain, or none."""
    ep_slowdown: float = 1.0
    """Time of these exchanges in training over the same alone: ranks that come late, and tokens that
    are not spread evenly over the receivers."""
    fused_experts: bool = False
    """Casts, biases and the activation run inside the experts' grouped products, graphs launch the whole
    layer, and every exchange has another micro-batch's compute beside it."""
    pair_overlap: bool = True
    """The passes of an overlapped pair (DualPipe) hide each other's exchanges; else they run one after
    the other, as torch's pipeline runtime runs them by itself."""
    lacks_schedules: tuple[str, ...] = ()
    """Schedules that this software does not run."""
    zero3_splits_backward: bool = True
    """Schedules with backwards split into I and W run under ZeRO 3."""
    ties_on_one_rank: bool = True
    """Tied embeddings may be on two stages of one rank, as V-shaped schedules have them."""
    pp_overlap: bool = True
    """Pipeline sends run beside compute; else both ends wait for them."""
    pp_over_network: bool = False
    """Pipeline sends leave the node even between devices of one."""
    pp_scatter_gather: bool = False
    """Pipeline sends carry 1/tp of the tensor even without sequence parallelism."""

    # Numbers kept per parameter
    gradient_dtype: Literal["fp32", "bf16", "fp16", "same", "fp32_for_bf16"] = "fp32"
    """dtype gradients are accumulated and reduced in; same: that of the parameters; fp32_for_bf16: fp32
    where they are bf16, else the same (DeepSpeed)."""
    master_weights: bool = True
    """The optimizer keeps fp32 weights beside 16-bit ones."""

    empty_gradients: bool = False
    """Products that add a weight's gradient to its buffer still hand autograd an empty tensor of its
    shape; Transformer Engine keeps one of each (get_dummy_wgrad)."""

    # What a run does where its source does not say
    default_recompute: Literal["none", "selective", "full"] = "none"
    default_tp_overlap: bool = False
    default_zero: int = 0
    default_expert_tp: bool = False
    """Experts are cut over tp as the dense layers are (Megatron-Core's own default)."""

    # Memory beyond the model's tensors
    loss_peak_bytes: float = 0.0
    """Bytes a logit at the fullest moment of a loss that keeps more than its backward needs: 12 where
    PyTorch's cross entropy in fp32 holds log-probabilities and two gradients (eager); 0: it does not."""
    allocator_slack: float = 0.0
    """What the caching allocator holds beyond the tensors, as a share of them: blocks of the wrong
    size, kept for a moment of the step that is not the fullest."""
    context_bytes: float = 1.2e9
    """CUDA context, NCCL buffers and allocator slack on each device."""

    relative_error: float = 0.15
    """Half width of the 90% interval of log(measured / predicted), from models left out of the fit:
    dense ones, in 16 bits, on devices whose kernels were measured. cost.interval says what widens it."""
    fitted_parameters: float = 0.0
    """Parameters of the largest model among the runs that constants were fitted to; 0: none were."""

    def __post_init__(self) -> None:
        for key in (f.name for f in fields(self) if f.name.endswith("_slowdown")):
            if not 0.5 <= getattr(self, key) <= 5:
                raise ParsimError("a slowdown is a factor near 1", where=key, got=getattr(self, key))
        for key, value in ((f.name, getattr(self, f.name)) for f in fields(self)):
            if isinstance(value, int | float) and value < 0:
                what = "a prefetch depth is 0 or more" if "prefetch" in key else "this is 0 or more"
                raise ParsimError(what, where=key, got=value)
        ranges = {
            "dp_bucket_parameters": (1000.0, math.inf, "1000 or more"),
            "relative_error": (0.0, MAX_RELATIVE_ERROR, f"at most {MAX_RELATIVE_ERROR:g}"),
            "default_zero": (0, 3, "0 to 3"),
        }
        for key, (low, high, expected) in ranges.items():
            if not low <= (got := getattr(self, key)) <= high:
                what = "this constant is out of range"
                raise ParsimError(what, where=key, got=got, expected=expected)
        for key in ("overlap_cost", "dp_overlap_cost", "allocator_slack"):
            if not 0 <= getattr(self, key) <= 1:
                raise ParsimError("a share lies between 0 and 1", where=key, got=getattr(self, key))
