"""What the executor refuses, each with its reason, and how a job is shrunken."""

from __future__ import annotations

import dataclasses
import json

import pytest

from parsim.config import load_cluster, load_model, load_stack
from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.execute.launch.cases import run_cases, verification_case
from parsim.execute.request import Case, decode_case, encode_case
from parsim.execute.shrink import fewer_replicas, shrunken
from parsim.execute.support import check_executable
from parsim.model import MlaSpec, ModelSpec, MoeSpec, num_parameters
from parsim.plan import Job, ParallelPlan, parse_plan, stage_layers
from parsim.schedule import make_schedule
from parsim.schedule.action import Action, Schedule, parse_action
from parsim.search.examine import Examiner
from parsim.search.space import Constraints, families

MODEL = ModelSpec(
    name="small", layers=8, hidden=64, heads=8, kv_heads=4, ffn_hidden=96, gated_mlp=True, vocab=128,
    max_seq_len=32,
)  # fmt: skip
MOE = MoeSpec(experts=8, top_k=2, ffn_hidden=32)
JOB = Job(model=MODEL, seq_len=32, global_batch=16)


def check(plan: str | ParallelPlan, *, dtype: str = "fp32", **model: object) -> None:
    job = dataclasses.replace(JOB, model=dataclasses.replace(MODEL, **model))  # type: ignore[arg-type]
    parsed = parse_plan(plan) if isinstance(plan, str) else plan
    check_executable(job, parsed, make_schedule(parsed, parsed.num_micro_batches(job)), dtype)


@pytest.mark.parametrize(
    ("name", "tied"), [("tiny-llama-8l", False), ("tiny-gpt-8l", True), ("mini-mixtral-8l", False)]
)
def test_the_executor_runs_every_plan_that_the_search_offers_for_it(name: str, tied: bool) -> None:
    model = dataclasses.replace(load_model(name), tied_embeddings=tied)
    job = Job(model=model, seq_len=128, global_batch=8, precision="fp32")
    costs = CostModel(model, load_cluster("local-cpu"), load_stack("parsim-executor"))
    examiner, constraints = Examiner(job, costs), Constraints(max_sizes={"cp": 2})
    offered, rejected = 0, dict[str, int]()
    for family in families(job, 4, constraints, cluster=costs.cluster):
        reasons, legal = examiner.legality(family)
        rejected |= reasons
        for plan, is_legal in zip(family.plans(), legal.ravel(), strict=True):
            if is_legal:
                offered += 1
                schedule = make_schedule(plan, plan.num_micro_batches(job))
                check_executable(job, plan, schedule, "fp32")
    assert offered > 100
    assert rejected["parsim-executor does not run dualpipe"] > 0


@pytest.mark.parametrize(
    ("plan", "model"),
    [
        ("dp=2", {}),
        ("dp=16,zero=3", {}),
        ("tp=4,pp=2", {}),
        ("dp=2,tp=2,pp=4,vpp=2,schedule=interleaved", {}),
        ("tp=2", {"tied_embeddings": True}),
        ("dp=2,cp=4,zero=3", {}),
        ("dp=2,tp=2,ep=4", {"moe": MOE}),
        ("dp=2,compression=bf16", {"moe": MOE}),
        ("pp=2", {"position": "learned", "norm": "layernorm", "linear_bias": True}),
        ("pp=8,recompute=selective", {"qk_norm": True, "qkv_bias": True}),
    ],
)
def test_what_runs_is_let_through(plan: str, model: dict[str, object]) -> None:
    check(plan, **model)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"moe": dataclasses.replace(MOE, router_bias=True)}, "routing biases"),
        (
            {
                "mla": MlaSpec(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
                "head_dim": 12,
                "kv_heads": 8,
            },
            "latent attention",
        ),
        ({"window": 8}, "sliding-window"),
        ({"attention_sinks": True}, "sinks"),
        ({"mtp_layers": 1}, "multi-token"),
        ({"position": "alibi"}, "ALiBi"),
        ({"norms_per_layer": 4}, "two norms"),
        ({"head_dim": 5}, "odd width"),
    ],
)
def test_parts_that_torch_has_no_code_for_here_are_refused(model: dict[str, object], said: str) -> None:
    with pytest.raises(ParsimError, match="the executor does not run") as caught:
        check("dp=2", **model)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("cp=3", "2·cp chunks"),
        ("cp=2,schedule=pipedream,pp=2", "cp in a pipeline without a flush"),
        ("ep=2,dp=2", "without experts"),
        ("tp=2,tp_overlap=yes", "overlapped"),
        ("dp=2,tp=2,placement=dp-tp-cp-pp", "another placement"),
        ("dp=4,zero=1,zero_group=2", "groups smaller than dp·cp"),
        ("dp=2,cp=2,zero=3,zero_group=2", "groups smaller than dp·cp"),
        ("tp=8", "tp must divide kv_heads"),
        ("dp=3", "must divide the global batch"),
        ("dp=2,micro_batch=16", "must divide the global batch"),
        ("pp=2,stage_split=4-3", "hold every layer once"),
        ("pp=2,stage_split=4-4,recompute=full,recompute_layers=4-5", "more layers than it has"),
    ],
)
def test_plans_that_cannot_run_are_refused(plan: str, said: str) -> None:
    with pytest.raises(ParsimError, match=said):
        check(plan)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("tp=2,sequence_parallel=no", "all have the same tokens"),
        ("tp=2,ep=2,expert_tp=2", "cut over tensor-parallel ranks"),
        ("dp=3,ep=3", "ep must divide experts"),
        ("dp=2,ep=8", "ep must divide dp·cp·tp"),
        ("dp=2,ep=2,compression=bf16", "other ranks hold"),
        ("dp=2,pp=2,ep=2,schedule=pipedream", "ep in a pipeline without a flush"),
    ],
)
def test_experts_are_refused_where_ranks_would_not_share_them_evenly(plan: str, said: str) -> None:
    with pytest.raises(ParsimError, match=said):
        check(plan, moe=MOE)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("pp=2,schedule=dualpipe", "hold each stage on two ranks"),
        ("pp=2,schedule=pipedream,compression=bf16", "without a flush"),
        ("dp=2,pp=2,zero=3,schedule=dualpipev", "leaves gradients out"),
        ("dp=2,pp=2,zero=3,schedule=zbv", "leaves gradients out"),
    ],
)
def test_schedules_that_torch_has_not_or_runs_wrong(plan: str, said: str) -> None:
    with pytest.raises(ParsimError, match=said):
        check(plan)


@pytest.mark.parametrize("schedule", ["zb-h1", "zb-h2", "zbv", "dualpipev", "looped-bfs"])
def test_other_schedules_are_let_through(schedule: str) -> None:
    check(f"dp=2,pp=2,zero=2,schedule={schedule}")


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("pp=2,schedule=zbv", "one rank has the first and the last stage"),
        ("pp=2,schedule=pipedream", "without a flush"),
        ("dp=2,pp=2,compression=int8", "compressed gradients of tied embeddings"),
    ],
)
def test_tied_embeddings_are_refused_where_their_copies_would_differ(plan: str, said: str) -> None:
    with pytest.raises(ParsimError, match=said):
        check(plan, tied_embeddings=True)
    check("dp=2,pp=2", tied_embeddings=True)


def test_unknown_dtypes_are_refused() -> None:
    with pytest.raises(ParsimError, match="dtype"):
        check("dp=2", dtype="fp8")


def rows(*texts: str) -> Schedule:
    return Schedule(name="written", ranks=tuple(tuple(map(parse_action, t.split())) for t in texts))


def test_zero_3_with_split_backwards_would_lose_gradients() -> None:
    schedule = rows("0F0 0I0 0W0", "1F0 1I0 1W0")
    job = dataclasses.replace(JOB, global_batch=2)
    with pytest.raises(ParsimError, match="leaves gradients out") as caught:
        check_executable(job, parse_plan("dp=2,pp=2,zero=3"), schedule, "fp32")
    assert "zero=2" in str(caught.value)
    check_executable(job, parse_plan("dp=2,pp=2,zero=2"), schedule, "fp32")


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (rows("0F0 0B0", "1F0"), "forward and backward exactly once"),
        (rows("0F0 0I0", "1F0 1B0"), "forward and backward exactly once"),
        (rows("0F0 0B0 0B0", "1F0 1B0"), "stands twice"),
        (rows("0F0 0B0", "1B0 1F0"), "deadlocks"),
        (rows("0F0 0B0 0F1 0B1", "1F0 1B0 1F1 1B1"), "another number of micro-batches"),
        (rows("0F0 0B0"), "another number of pipeline ranks"),
        (rows("0F0 0B0 2F0 2B0", "1F0 1B0"), "another number of stages"),
        (rows("0F0 1B0", "1F0 0B0"), "has actions on two ranks"),
    ],
)
def test_schedules_that_do_not_fit_the_plan_are_refused(schedule: Schedule, said: str) -> None:
    job = dataclasses.replace(JOB, global_batch=1)
    with pytest.raises(ParsimError, match=said):
        check_executable(job, parse_plan("pp=2"), schedule, "fp32")


def test_plans_launched_together_have_equal_numbers_of_ranks() -> None:
    cases = []
    for text in ("dp=2", "dp=4"):
        plan = parse_plan(text)
        cases.append(verification_case(JOB, plan, make_schedule(plan, plan.num_micro_batches(JOB))))
    with pytest.raises(ParsimError, match="equal numbers of ranks"):
        run_cases(cases)


@pytest.mark.parametrize("text", ["tp=8,pp=16", "dp=8,pp=15", "tp=4,pp=8,vpp=2,schedule=interleaved"])
def test_a_shrunken_job_keeps_what_the_plan_divides(text: str) -> None:
    model = ModelSpec(
        name="llama-405b-like", layers=126, hidden=16384, heads=128, kv_heads=8, ffn_hidden=53248,
        gated_mlp=True, vocab=128256, max_seq_len=8192,
    )  # fmt: skip
    plan = parse_plan(text)
    job = Job(model=model, seq_len=8192, global_batch=64 if plan.pp != 15 else 120)
    small = shrunken(job, plan)
    micro_batches = plan.num_micro_batches(small)
    check_executable(small, plan, make_schedule(plan, micro_batches), "fp64")
    assert micro_batches == plan.num_micro_batches(job)
    assert small.model.attention_kind == model.attention_kind
    assert small.model.hidden <= 512
    # The same stages hold a layer more than others, or a layer less.
    large = stage_layers(model, plan)
    assert [n - min(large) for n in large] == [
        n - min(stage_layers(small.model, plan)) for n in stage_layers(small.model, plan)
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama-3.1-405b", "tp=2,pp=2,vpp=2,schedule=interleaved"),
        ("mixtral-8x7b", "dp=4,tp=2,pp=4,ep=8,zero=1"),
        ("mixtral-8x7b", "dp=2,cp=2,ep=2,zero=3,recompute=full"),
        ("qwen3-235b-a22b", "dp=4,tp=4,pp=2,ep=16"),
        ("llama-3.2-1b", "dp=2,tp=8"),
        ("gpt3-175b", "tp=8,pp=4,vpp=3,schedule=interleaved"),
    ],
)
def test_shipped_models_shrink_to_ones_that_run_alike(name: str, text: str) -> None:
    model, plan = load_model(name), parse_plan(text)
    job = Job(model=model, seq_len=2048, global_batch=8 * plan.dp)
    small = shrunken(job, plan)
    assert num_parameters(small.model) < 3e6
    check_executable(small, plan, make_schedule(plan, plan.num_micro_batches(small)), "fp64")
    assert plan.num_micro_batches(small) == 8
    for key in ("tied_embeddings", "qk_norm", "gated_mlp", "norm", "position", "linear_bias"):
        assert getattr(small.model, key) == getattr(model, key)
    assert small.model.attention_kind == model.attention_kind
    kinds, small_kinds = (
        {m.is_moe_layer(layer) for layer in range(m.layers)} for m in (model, small.model)
    )
    assert small_kinds == kinds
    large, little = stage_layers(model, plan), stage_layers(small.model, plan)
    assert [n - min(large) for n in large] == [n - min(little) for n in little]


def test_a_model_with_dense_and_expert_layers_keeps_both() -> None:
    moe = MoeSpec(experts=64, top_k=6, ffn_hidden=1408, shared_ffn_hidden=2816, dense_layers=3, every=2)
    model = dataclasses.replace(MODEL, layers=32, moe=moe)
    small = shrunken(dataclasses.replace(JOB, model=model), parse_plan("dp=2,ep=2")).model
    assert {small.is_moe_layer(layer) for layer in range(small.layers)} == {False, True}
    assert small.moe is not None
    assert (small.moe.experts, small.moe.top_k) == (4, 2)
    assert small.layers == 3  # dense, dense, experts: the fewest with both


@pytest.mark.parametrize(
    ("text", "ranks", "dp", "ep_ranks"),
    [("dp=64,tp=2", 16, 2, 4), ("dp=64,ep=16", 32, 16, 16), ("dp=4,tp=2", 8, 4, 8), ("tp=16", 8, 1, 16)],
)
def test_replicas_beyond_two_are_left_out_where_ranks_are_too_many(
    text: str, ranks: int, dp: int, ep_ranks: int
) -> None:
    plan = parse_plan(text)
    job = dataclasses.replace(JOB, global_batch=3 * plan.dp)
    small_job, small = fewer_replicas(job, plan, ranks)
    assert (small.dp, small.gpus) == (dp, ep_ranks)
    assert small.num_micro_batches(small_job) == plan.num_micro_batches(job)


def test_a_request_survives_json() -> None:
    plan = parse_plan("pp=2,dp=2,zero=2,stage_split=3-5,recompute=full,recompute_layers=1-5")
    case = Case(
        job=dataclasses.replace(JOB, model=dataclasses.replace(MODEL, moe=MOE)), plan=plan,
        schedule=make_schedule(plan, plan.num_micro_batches(JOB)), steps=3, seed=7,
        dtype="fp64", verify=True,
    )  # fmt: skip
    assert decode_case(json.loads(json.dumps(encode_case(case)))) == case
    assert case.schedule.ranks[0][0] == Action(0, "F", 0)
