"""Device memory of one pipeline rank, itemised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from parsim.cost.cell import Cell, cell_of
from parsim.cost.compression import keeps_residual
from parsim.cost.stage import StageCost
from parsim.hardware import DTYPE_BYTES
from parsim.model import ModelSpec
from parsim.plan import Job, ParallelPlan, parse_compression
from parsim.stack import Stack

ENOUGH_HEADROOM = 0.05
"""Share of device memory that a plan should leave free: about twice as much as the furthest that a
predicted peak was below a measured one (reports/accuracy.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes on one device at its fullest moment; the allocator's peak is their sum."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept from forwards for backwards, over all micro-batches in flight."""
    working: float
    """Recomputed layer, gradients of activations, and the tensors of the kernels that run."""
    buffers: float
    """Pipeline receive buffers and gathered FSDP parameters."""
    residuals: float = 0.0
    """What compressed gradients left out, kept for the next step (error feedback)."""
    slack: float = 0.0
    """What the caching allocator holds beyond all these."""

    @property
    def peak(self) -> float:
        """The allocator's peak."""
        return self.static + self.activations + self.working + self.buffers + self.slack

    @property
    def static(self) -> float:
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer + self.residuals

    def to_data(self, context_bytes: float) -> dict[str, float]:
        """The `memory_bytes` table of the JSON contract; context lies outside the allocator."""
        return {"peak": self.peak} | asdict(self) | {"context": context_bytes}


def weight_bytes(precision: str) -> float:
    """Bytes of a parameter as the forward reads it: 16 bits unless the job is in fp32 or fp64.

    >>> weight_bytes("fp8"), weight_bytes("fp32")
    (2, 4)
    """
    return max(2, DTYPE_BYTES[precision])


def gathered_bytes(precision: str, stack: Stack) -> float:
    """Bytes of a parameter as ZeRO gathers it: that of the GEMMs where the stack keeps them so."""
    if stack.fp8_gather and precision in ("fp8", "mxfp8"):
        return DTYPE_BYTES[precision]
    return weight_bytes(precision)


def stored_weight_bytes(job: Job, plan: ParallelPlan, stack: Stack) -> float:
    """Bytes of a parameter as it is kept: FSDP without a copy for the optimizer keeps fp32 shards, and
    gathers them in 16 bits (torchtitan's mixed precision policy).
    """
    weights = weight_bytes(job.precision)
    return weights if plan.zero < 3 or stack.master_weights else max(4, weights)


def gradient_bytes(precision: str, stack: Stack) -> float:
    """Bytes of a gradient as it is accumulated and reduced."""
    kind = stack.gradient_dtype
    if kind == "fp32_for_bf16":
        kind = "fp32" if precision == "bf16" else "same"
    if kind == "same":
        return weight_bytes(precision)
    return max(DTYPE_BYTES[kind], weight_bytes(precision))


def optimizer_bytes(job: Job, stack: Stack) -> float:
    """Bytes of optimizer state a parameter: AdamW's two moments, and fp32 weights beside 16-bit ones.

    Source: Rajbhandari et al. 2020 (ZeRO), arXiv 1910.02054, section 3.1: K = 12.
    """
    width = max(4, weight_bytes(job.precision))
    master = 4 if stack.master_weights and weight_bytes(job.precision) < 4 else 0
    return master + (2 * width if job.optimizer == "adamw" else 0)


def shard_counts(plan: ParallelPlan) -> tuple[int, int]:
    """Ranks that share the optimizer states of dense and of expert parameters."""
    if plan.zero == 0:
        return 1, 1
    experts = max(1, plan.dp * plan.cp * plan.tp // plan.expert_ranks)
    return plan.shard_group, min(experts, plan.shard_group) if plan.zero_group else experts


def sharded(stage: StageCost, plan: ParallelPlan) -> float:
    """Parameters of a stage that one rank's optimizer updates."""
    dense_ranks, expert_ranks = shard_counts(plan)
    return stage.dense_parameters / dense_ranks + stage.expert_parameters / expert_ranks


def accumulates(plan: ParallelPlan, stack: Stack) -> bool:
    """Whether ZeRO-2 and 3 sum gradients over micro-batches before they reduce them."""
    return plan.zero >= 2 and plan.pp > 1 and stack.sums_in_pipeline


def model_states(
    stages: Sequence[StageCost],
    job: Job,
    plan: ParallelPlan,
    stack: Stack,
    *,
    weight_versions: int = 1,
) -> MemoryUse:
    """What a rank that holds `stages` keeps whatever its micro-batches are, without slack.

    Of several versions of the weights the older ones are kept as they are computed with.
    """
    whole = sum(stage.parameters for stage in stages)
    shards = sum(sharded(stage, plan) for stage in stages)
    working = buffers = 0.0
    if stack.empty_gradients:
        working += max(stage.distinct_parameters for stage in stages) * weight_bytes(job.precision)
    if plan.zero == 3:
        # The part that runs and those gathered ahead; without any, the buffer that it is gathered into.
        largest = max(stage.largest_part_parameters for stage in stages)
        gathered = (1 + max(1, stack.fsdp_prefetch)) * largest
        buffers += (whole if accumulates(plan, stack) else gathered) * weight_bytes(job.precision)
    kept = shards if plan.zero >= 2 and not accumulates(plan, stack) else whole
    gradients = kept * gradient_bytes(job.precision, stack)
    older = (weight_versions - 1) * whole * weight_bytes(job.precision)
    return MemoryUse(
        weights=(shards if plan.zero == 3 else whole) * stored_weight_bytes(job, plan, stack) + older,
        gradients=gradients,
        residuals=gradients if keeps_residual(parse_compression(plan.compression)) else 0.0,
        optimizer=shards * optimizer_bytes(job, stack),
        activations=0.0,
        working=working,
        buffers=buffers,
    )


def rank_memory(
    stages: Sequence[StageCost],
    in_flight: Sequence[float],
    job: Job,
    plan: ParallelPlan,
    stack: Stack,
    *,
    weight_versions: int = 1,
) -> MemoryUse:
    """Memory of a rank that holds `stages`, with `in_flight` micro-batches kept for each of them."""
    cell = cell_of(job, plan)
    states = model_states(stages, job, plan, stack, weight_versions=weight_versions)
    recomputed = max(stage.recomputed_bytes for stage in stages)
    use = replace(
        states,
        activations=sum(
            stage.saved_bytes * count for stage, count in zip(stages, in_flight, strict=True)
        ),
        working=states.working + working_bytes(job.model, cell) + recomputed,
        buffers=states.buffers + receive_buffers(plan) * boundary_bytes(job.model, cell),
    )
    return replace(use, slack=stack.allocator_slack * use.peak)


def receive_buffers(plan: ParallelPlan) -> int:
    """Micro-batches that a pipeline rank has room to receive: two for each chunk."""
    return 2 * plan.vpp if plan.pp > 1 else 0


def boundary_bytes(model: ModelSpec, cell: Cell) -> float:
    """A micro-batch's activations between two stages."""
    return cell.local_tokens * model.hidden * cell.activation_bytes


def working_bytes(model: ModelSpec, cell: Cell) -> float:
    """Gradients of a layer's input and output, those on both sides of the activation, a gathered
    sequence.
    """
    e = cell.activation_bytes
    widest = cell.tokens * (3 if model.gated_mlp else 2) * _widest_feed_forward(model) / cell.tp * e
    gathered = cell.tokens * model.hidden * e if cell.sequence_parallel else 0
    return 2 * boundary_bytes(model, cell) + widest + gathered


def _widest_feed_forward(model: ModelSpec) -> int:
    """The most inner values that a token has in any layer: with experts, in all those that it visits."""
    moe = model.moe
    if moe is None:
        return model.ffn_hidden
    has_dense = moe.dense_layers > 0 or moe.every > 1
    return max(model.ffn_hidden * has_dense, moe.top_k * moe.ffn_hidden, moe.shared_ffn_hidden)
