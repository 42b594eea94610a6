"""Job and ParallelPlan: what is trained, and how it is split over the devices.

Standard library only: the executor's workers import it where nothing but torch is installed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

from parsim.errors import ParsimError, did_you_mean
from parsim.model import MAX_SIZE, ModelSpec
from parsim.settings_text import MOST_NUMBERS, numbers_text, parse_numbers
from parsim.units import require_range

Recompute = Literal["none", "selective", "full"]
MAX_GPUS = 1_000_000
"""More than any cluster has: what lies beyond is a slip of the pen, and loops over it would hang."""
MAX_STAGES = 2 * MAX_GPUS
"""Of a pipeline. Far more than a model has layers: searches look at every pp, if only to refuse it."""

RECOMPUTE_MODES: tuple[Recompute, ...] = ("none", "selective", "full")

USUAL_PLACEMENT = "tp-cp-dp-pp"
"""Mesh dimensions from the fastest to the slowest, as frameworks lay out their ranks."""

V_SHAPED_SCHEDULES = ("zbv", "dualpipe", "dualpipev")
"""Schedules whose second chunk runs back up the pipeline; they always have two chunks a rank."""
TWO_CHAIN_SCHEDULES = ("dualpipe",)
"""Of these, schedules whose second chunk is a second copy of the model, run from the other end."""
ASYNCHRONOUS_SCHEDULES = ("pipedream", "pipedream-2bw")
"""Schedules without a flush: gradients are computed with weights of the past."""


STAGE_LISTS = ("stage_split", "recompute_layers")
"""Fields of a plan with a number for each stage of the model."""

Aggregation = Literal["bucket", "layer", "tensor"]
AGGREGATIONS: tuple[Aggregation, ...] = ("bucket", "layer", "tensor")
COMPRESSIONS = "none, fp16, bf16, int8, topk-<percent>, powersgd-<rank>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one optimizer step does."""

    model: ModelSpec
    seq_len: int
    """Tokens in a sequence."""
    global_batch: int
    """Sequences in a step, over all ranks."""
    precision: str = "bf16"
    """dtype of the GEMMs: bf16, fp16, fp8, mxfp8, nvfp4, fp32, fp64."""
    optimizer: Literal["adamw", "sgd"] = "adamw"

    def __post_init__(self) -> None:
        require_range(self, 1, MAX_SIZE, "seq_len", "global_batch")

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.seq_len * self.global_batch


class Coordinate(NamedTuple):
    """Where a rank stands on the device mesh."""

    pp: int
    dp: int
    cp: int
    tp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """How a job is split. gpus = dp·tp·pp·cp; ep regroups the dp·cp·tp ranks of one stage."""

    dp: int = 1
    """Data-parallel replicas."""
    tp: int = 1
    """Tensor-parallel ranks that share every layer."""
    pp: int = 1
    """Pipeline ranks."""
    cp: int = 1
    """Context-parallel ranks that share every sequence."""
    ep: int = 1
    """Expert-parallel ranks that share the experts of an MoE layer."""
    expert_tp: int = 1
    """Tensor-parallel ranks that share each expert: 1, or tp as the dense layers have."""
    vpp: int = 1
    """Model chunks on each pipeline rank."""
    micro_batch: int = 1
    """Sequences in one forward of one dp rank."""
    schedule: str = "1f1b"
    zero: int = 0
    """0 replicates; 1 shards optimizer states, 2 also gradients, 3 also parameters (FSDP)."""
    zero_group: int = 0
    """Ranks that share the shards; 0 means all dp·cp of them."""
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    aggregation: Aggregation = "bucket"
    """Gradients that are reduced at once: a bucket of layers, a layer, or a single tensor."""
    weighted: bool = False
    """Each replica's gradients are scaled by its share of the samples before they are summed."""
    compression: str = "none"
    """How gradients are made smaller for their reduction: one of COMPRESSIONS."""
    tp_overlap: bool = False
    """Tensor-parallel communication is cut up and hidden behind the GEMMs (async tp)."""
    placement: str = USUAL_PLACEMENT
    """Mesh dimensions from the fastest to the slowest: ranks next to each other differ in the first."""
    stage_split: tuple[int, ...] = ()
    """Layers of every stage in order; empty: as even as can be, embedding and head counted."""
    recompute_layers: tuple[int, ...] = ()
    """How many layers of every stage, its first ones, are recomputed in the way that `recompute` says;
    empty: all of them. A multi-token prediction module counts as the last layer of its stage."""

    def __post_init__(self) -> None:
        require_range(self, 1, MAX_GPUS, "dp", "tp", "cp", "ep", "expert_tp")
        require_range(self, 1, MAX_SIZE, "micro_batch")
        require_range(self, 1, MAX_GPUS, "pp")
        require_range(self, 1, MOST_NUMBERS, "vpp")
        require_range(self, 0, MAX_GPUS, "zero_group")
        if self.gpus > MAX_GPUS or self.num_stages > MAX_STAGES:
            raise ParsimError(
                "no cluster has so many devices, or no model so many stages",
                where="dp·tp·pp·cp",
                got=f"{self.gpus} devices, {self.num_stages} stages",
                expected=f"at most {MAX_GPUS} and {MAX_STAGES}",
            )
        if not 0 <= self.zero <= 3:
            raise ParsimError("unknown ZeRO stage", where="zero", got=self.zero, expected="0 to 3")
        if self.recompute not in RECOMPUTE_MODES:
            raise ParsimError(
                "unknown recompute mode",
                where="recompute",
                got=self.recompute,
                expected=", ".join(RECOMPUTE_MODES),
                hint="as few layers as memory asks for: recompute=full,recompute_layers=auto",
            )
        if self.placement != USUAL_PLACEMENT and (
            sorted(self.placement.split("-")) != sorted(USUAL_PLACEMENT.split("-"))
        ):
            raise ParsimError(
                "a placement names every mesh dimension once",
                where="placement",
                got=self.placement,
                expected=f"an order of {USUAL_PLACEMENT}",
            )
        if self.aggregation not in AGGREGATIONS:
            raise ParsimError(
                "unknown aggregation of gradients",
                where="aggregation",
                got=self.aggregation,
                expected=", ".join(AGGREGATIONS),
            )
        if self.compression != "none":
            parse_compression(self.compression)
        for key in STAGE_LISTS:
            numbers = getattr(self, key)
            if numbers and len(numbers) != self.model_stages:
                raise ParsimError(
                    f"{key} needs one number a stage",
                    where=key,
                    got=len(numbers),
                    expected=f"{self.model_stages} numbers, one for each stage of the model",
                )
        if self.recompute_layers:
            self._check_recompute_layers()

    def _check_recompute_layers(self) -> None:
        if self.recompute == "none":
            raise ParsimError(
                "recompute_layers counts what recompute=none leaves out",
                where="recompute_layers",
                got=f"recompute={self.recompute}",
                expected="recompute of selective or full beside it",
                hint="leave recompute_layers out where nothing is recomputed",
            )
        if min(self.recompute_layers) < 0:
            raise ParsimError(
                "a stage recomputes no layer or some",
                where="recompute_layers",
                got=min(self.recompute_layers),
            )

    @property
    def gpus(self) -> int:
        return self.dp * self.tp * self.pp * self.cp

    @property
    def expert_ranks(self) -> int:
        """Ranks of a stage that together hold its experts once."""
        return self.ep * self.expert_tp

    @property
    def num_stages(self) -> int:
        """Stages on all pipeline ranks: of all chains together."""
        return self.pp * self.vpp

    @property
    def chains(self) -> int:
        """How often a pipeline holds the whole model: twice in DualPipe, whose micro-batches enter at
        both ends.
        """
        return 2 if self.schedule in TWO_CHAIN_SCHEDULES else 1

    @property
    def model_stages(self) -> int:
        """Stages that the model is cut into."""
        return self.num_stages // self.chains

    @property
    def shard_group(self) -> int:
        """Ranks that share optimizer shards (1 without ZeRO)."""
        if self.zero == 0:
            return 1
        return self.zero_group or self.dp * self.cp

    def num_micro_batches(self, job: Job) -> int:
        """Micro-batches that each pipeline runs in a step."""
        return job.global_batch // (self.dp * self.micro_batch)

    @property
    def strides(self) -> Coordinate:
        """How many global ranks neighbours along each mesh dimension lie apart.

        >>> ParallelPlan(dp=2, tp=4, pp=2, placement="tp-pp-cp-dp").strides
        Coordinate(pp=4, dp=8, cp=8, tp=1)
        """
        stride, strides = 1, {}
        for dimension in self.placement.split("-"):
            strides[dimension] = stride
            stride *= getattr(self, dimension)
        return Coordinate(**strides)

    def coordinate(self, rank: int) -> Coordinate:
        """Mesh coordinate of a global rank; as usually placed ((pp_i·DP + dp_i)·CP + cp_i)·TP + tp_i.

        >>> ParallelPlan(dp=2, tp=4, pp=2).coordinate(13)
        Coordinate(pp=1, dp=1, cp=0, tp=1)
        """
        sizes = (self.pp, self.dp, self.cp, self.tp)
        return Coordinate(
            *(rank // stride % size for stride, size in zip(self.strides, sizes, strict=True))
        )

    def rank(self, at: Coordinate) -> int:
        """The global rank at a mesh coordinate."""
        return sum(place * stride for place, stride in zip(at, self.strides, strict=True))

    def stage_rank(self, stage: int) -> int:
        """The pipeline rank that holds a stage.

        Chunks go round the ranks (stage s on s mod pp) except in V-shaped schedules, where the
        second chunk runs back.
        """
        chunk, place = divmod(stage, self.pp)
        if self.schedule in V_SHAPED_SCHEDULES and chunk % 2:
            return self.pp - 1 - place
        return place

    def rank_stages(self) -> list[list[int]]:
        """The stages of every pipeline rank, in order.

        >>> ParallelPlan(pp=2, vpp=2, schedule="zbv").rank_stages()
        [[0, 3], [1, 2]]
        """
        own: list[list[int]] = [[] for _ in range(self.pp)]
        for stage in range(self.num_stages):
            own[self.stage_rank(stage)].append(stage)
        return own

    def short(self) -> str:
        """The short form that `--plan` reads, without fields that have their usual value.

        >>> ParallelPlan(dp=2, pp=4, schedule="gpipe").short()
        'dp=2,tp=1,pp=4,micro_batch=1,schedule=gpipe'
        """
        always = ("dp", "tp", "pp", "micro_batch", "schedule")
        default = _short_defaults(self.tp, self.schedule)
        parts = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in always or value != default.get(f.name, f.default):
                text = numbers_text(value) if f.name in STAGE_LISTS else str(value).lower()
                parts.append(f"{f.name}={text}")
        return ",".join(parts)


class Compression(NamedTuple):
    """How gradients are compressed."""

    kind: str
    """none, fp16, bf16, int8, topk or powersgd."""
    amount: float = 0.0
    """Percent of the values that are sent (topk), or the rank (powersgd)."""


def parse_compression(text: str) -> Compression:
    """A compression from its text. Raises ParsimError for an unknown one, or one without its number.

    >>> parse_compression("topk-0.1"), parse_compression("none")
    (Compression(kind='topk', amount=0.1), Compression(kind='none', amount=0.0))
    """
    kind, dash, number = text.partition("-")
    if kind in ("none", "fp16", "bf16", "int8") and not dash:
        return Compression(kind)
    try:
        amount = float(number) if kind in ("topk", "powersgd") else 0.0
    except ValueError:
        amount = 0.0
    if 0 < amount <= 100 and (kind == "topk" or amount.is_integer()):
        return Compression(kind, amount)
    raise ParsimError(
        "unknown compression of gradients",
        where="compression",
        got=text,
        expected=COMPRESSIONS,
        hint="such as topk-1 (a percent up to 100) or powersgd-4 (a whole rank up to 100)",
    )


def _short_defaults(tp: int, schedule: str) -> dict[str, object]:
    """Defaults of the short form that depend on other fields."""
    return {"sequence_parallel": tp > 1, "vpp": 2 if schedule in V_SHAPED_SCHEDULES else 1}


def parse_plan(text: str) -> ParallelPlan:
    """A plan from its short form, e.g. "dp=8,tp=8,pp=8,micro_batch=1,schedule=1f1b".

    Fields left out: every size 1, schedule 1f1b, vpp 1 (2 for V-shaped schedules), zero 0, recompute
    none, sequence_parallel where tp > 1. Lists of numbers by stage have dashes, and x for a number that
    repeats: stage_split=8-9x14-6.

    Raises ParsimError for an unknown field, a field given twice, or a value of the wrong type.
    """
    known = {f.name: f for f in dataclasses.fields(ParallelPlan)}
    given: dict[str, object] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ParsimError(
                "a plan is written as key=value pairs",
                where=part,
                hint="such as dp=2,tp=4,pp=2,micro_batch=1",
            )
        if key not in known:
            raise ParsimError(
                f"unknown field {key!r} in the plan",
                where=part,
                expected=", ".join(known),
                hint=did_you_mean(key, known),
            )
        if key in given:
            raise ParsimError(f"field {key!r} is given twice", where=text)
        given[key] = _parse_value(key, value)
    tp, schedule = given.get("tp", 1), given.get("schedule", "1f1b")
    assert isinstance(tp, int)
    assert isinstance(schedule, str)
    return ParallelPlan(**(_short_defaults(tp, schedule) | given))  # type: ignore[arg-type]


def _parse_value(key: str, value: str) -> object:
    if key in ("schedule", "recompute", "placement", "aggregation", "compression"):
        return value.lower()
    if key in ("sequence_parallel", "tp_overlap", "weighted"):
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if value.lower() not in words:
            raise ParsimError("this field is yes or no", where=key, got=value, expected="true, false")
        return words[value.lower()]
    try:
        if key in STAGE_LISTS:
            return parse_numbers(value)
        return int(value)
    except ValueError:
        what = (
            "has whole numbers with dashes between them, or 8x14 for 14 times 8"
            if key in STAGE_LISTS
            else "is a whole number"
        )
        raise ParsimError(f"this field {what}", where=key, got=value) from None


def recomputed_layers(model: ModelSpec, plan: ParallelPlan) -> tuple[int, ...]:
    """How many layers of every stage of the model, its first ones, are recomputed in any way.

    >>> from parsim.model import ModelSpec
    >>> spec = ModelSpec(name="x", layers=8, hidden=8, heads=1, ffn_hidden=8, gated_mlp=True, vocab=8,
    ...                  max_seq_len=8)
    >>> recomputed_layers(spec, ParallelPlan(pp=2)), recomputed_layers(
    ...     spec, ParallelPlan(pp=2, recompute="full"))
    ((0, 0), (4, 4))
    """
    split = stage_layers(model, plan)
    if plan.recompute == "none":
        return (0,) * len(split)
    *others, last = split
    return plan.recompute_layers or (*others, last + model.mtp_layers)


def recompute_text(model: ModelSpec, plan: ParallelPlan) -> str:
    """How a plan recomputes, for reading: none, selective or full, and how many layers if not all.

    >>> from parsim.model import ModelSpec
    >>> spec = ModelSpec(name="x", layers=8, hidden=8, heads=1, ffn_hidden=8, gated_mlp=True, vocab=8,
    ...                  max_seq_len=8)
    >>> recompute_text(spec, ParallelPlan(pp=2, recompute="full", recompute_layers=(3, 0)))
    'full 3/8'
    """
    again, layers = sum(recomputed_layers(model, plan)), model.layers + model.mtp_layers
    if again == 0:
        return "none"
    return plan.recompute if again == layers else f"{plan.recompute} {again}/{layers}"


def stage_layers(model: ModelSpec, plan: ParallelPlan) -> tuple[int, ...]:
    """Layers of every stage of the model, in order of stage.

    Even where their number divides the layers. Else embedding and head count as one layer each where
    that makes it even (as Llama 3 405B: 126 + 2 on 16 stages, arXiv 2407.21783 section 3.3.2); else the
    remainder goes to the stages in the middle, away from embedding and head. A multi-token prediction
    module and the head count as three layers where that makes it even (layouts of Megatron-Bridge for
    DeepSeek-V3: 61 + 3 on 16 stages), or as two and the embedding as one in small stages.

    >>> from parsim.model import ModelSpec
    >>> spec = ModelSpec(name="x", layers=14, hidden=8, heads=1, ffn_hidden=8, gated_mlp=True, vocab=8,
    ...                  max_seq_len=8)
    >>> stage_layers(spec, ParallelPlan(pp=4))
    (3, 4, 4, 3)
    """
    if plan.stage_split:
        return plan.stage_split
    n = plan.model_stages
    each, rest = divmod(model.layers, n)
    if rest == 0:
        return (each,) * n
    if n > 1 and model.mtp_layers and (model.layers + 3) % n == 0:
        each = (model.layers + 3) // n
        first = each if each >= 3 else each - 1
        return (first, *(each for _ in range(n - 2)), model.layers - first - each * (n - 2))
    if n > 1 and (model.layers + 2) % n == 0:
        each = (model.layers + 2) // n
        return (each - 1, *(each for _ in range(n - 2)), each - 1)
    first = (n - rest + 1) // 2
    return tuple(each + (1 if first <= s < first + rest else 0) for s in range(n))
