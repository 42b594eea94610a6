"""Compressed gradients on real ranks: hooks compute what the papers say and send what is predicted."""

from __future__ import annotations

import dataclasses

import pytest

from parsim.config import load_cluster, load_stack
from parsim.cost.compression import INT8_BLOCK
from parsim.cost.stage import CostModel
from parsim.cost.step import step_cost
from parsim.errors import ParsimError
from parsim.execute.launch.attempts import Launch
from parsim.execute.launch.cases import run_cases, verification_case
from parsim.execute.measurement import Measurement, Verification
from parsim.execute.request import Case, Checkpoints
from parsim.model import ModelSpec, num_parameters
from parsim.plan import Job, parse_plan
from parsim.schedule import make_schedule

torch = pytest.importorskip("torch")

MODEL = ModelSpec(
    name="small", layers=2, hidden=32, heads=4, kv_heads=2, ffn_hidden=64, gated_mlp=True, vocab=64,
    max_seq_len=16,
)  # fmt: skip
KINDS = ("fp16", "bf16", "int8", "topk-5", "powersgd-2")
TWO_RANKS = tuple(f"dp=2,compression={kind}" for kind in KINDS)
FOUR_RANKS = (
    "dp=4,compression=bf16",
    "dp=4,compression=int8",
    "dp=4,compression=powersgd-1",
    "dp=2,tp=2,compression=powersgd-2",
    "dp=2,pp=2,compression=topk-2",
    "dp=2,pp=2,vpp=2,schedule=interleaved,compression=fp16",
)
FEW_TOKENS = "dp=2,compression=powersgd-8"


def cases(text: str) -> list[Case]:
    """A plan verified, and timed for two steps."""
    plan = parse_plan(text)
    model = dataclasses.replace(MODEL, layers=plan.num_stages * 2)
    job = Job(model=model, seq_len=16, global_batch=2 * plan.dp, precision="fp32")
    schedule = make_schedule(plan, plan.num_micro_batches(job))
    return [
        verification_case(job, plan, schedule),
        Case(job=job, plan=plan, schedule=schedule, steps=2),
    ]


Found = dict[str, tuple[Verification, Measurement]]


def launched(texts: tuple[str, ...], *more: Case) -> tuple[Found, list[Measurement | Verification]]:
    results = run_cases(
        [case for text in texts for case in cases(text)] + [*more], Launch(timeout_s=120)
    )
    found: Found = {}
    for i, text in enumerate(texts):
        verified, timed = results[2 * i : 2 * i + 2]
        assert isinstance(verified, Verification)
        assert isinstance(timed, Measurement)
        found[text] = verified, timed
    return found, results[2 * len(texts) :]


def few_tokens(compression: str) -> Case:
    """Eight tokens a step in float64, so a gradient is a sum of eight outer products."""
    plan = parse_plan(f"dp=2,compression={compression}")
    job = Job(model=MODEL, seq_len=4, global_batch=2, optimizer="sgd")
    schedule = make_schedule(plan, 1)
    return Case(job=job, plan=plan, schedule=schedule, steps=4, dtype="fp64")


@pytest.fixture(scope="module")
def on_two_ranks() -> tuple[Found, list[Measurement | Verification]]:
    return launched(TWO_RANKS, *map(few_tokens, ("none", "powersgd-8", "powersgd-2")))


@pytest.fixture(scope="module")
def on_four_ranks() -> Found:
    return launched(FOUR_RANKS)[0]


def predicted_bytes(measurement: Measurement) -> list[float]:
    """What each rank sends by the cost model."""
    costs = CostModel(measurement.job.model, load_cluster("local-cpu"), load_stack("parsim-executor"))
    plan, found = measurement.plan, [0.0] * measurement.plan.pp
    for stage, sync in enumerate(step_cost(measurement.job, plan, costs).syncs):
        found[plan.stage_rank(stage)] += sync.reduce_bytes
    return [found[plan.coordinate(rank).pp] for rank in range(plan.gpus)]


def check(text: str, verified: Verification, timed: Measurement) -> None:
    assert verified.equal, (verified.parameter, verified.max_gradient_error)
    assert "by hand" in verified.against
    sent, predicted = timed.gradient_sent_bytes, predicted_bytes(timed)
    if "int8" in text or "topk" in text:
        # Whole blocks for every rank, and whole numbers of values, of each bucket.
        rounding = timed.plan.dp * timed.plan.vpp * (INT8_BLOCK + 4 if "int8" in text else 8) * 2
        for mine, expected in zip(sent, predicted, strict=True):
            assert expected <= mine <= expected + rounding
    else:
        assert sent == pytest.approx(predicted, rel=1e-12)
    whole_bytes = 8 * (timed.plan.dp - 1) / timed.plan.dp * num_parameters(timed.job.model)
    assert sum(sent) < 0.7 * whole_bytes * timed.plan.dp


@pytest.mark.slow
@pytest.mark.parametrize("text", TWO_RANKS)
def test_two_replicas(on_two_ranks: tuple[Found, list[Measurement | Verification]], text: str) -> None:
    check(text, *on_two_ranks[0][text])


@pytest.mark.slow
@pytest.mark.parametrize("text", FOUR_RANKS)
def test_four_ranks(on_four_ranks: Found, text: str) -> None:
    check(text, *on_four_ranks[text])


@pytest.mark.slow
def test_powersgd_of_the_gradients_own_rank_loses_nothing(
    on_two_ranks: tuple[Found, list[Measurement | Verification]],
) -> None:
    """A mean gradient of rank 8 is its own best approximation of rank 8, which M·Q spans."""
    exact, full, low = on_two_ranks[1]
    assert isinstance(exact, Measurement)
    assert isinstance(full, Measurement)
    assert isinstance(low, Measurement)
    assert full.loss == pytest.approx(exact.loss, rel=1e-12)
    assert low.loss[-1] != pytest.approx(exact.loss[-1], rel=1e-12)
    assert full.gradient_sent_bytes[0] < 8 * num_parameters(MODEL)


@pytest.mark.parametrize("kind", ["topk-1", "powersgd-2"])
def test_what_still_has_to_be_sent_is_in_no_checkpoint(kind: str) -> None:
    case = cases(f"dp=2,compression={kind}")[1]
    policy = Checkpoints(folder="/nonexistent", every=1)
    with pytest.raises(ParsimError, match="still has to send"):
        run_cases([dataclasses.replace(case, checkpoint=policy)])
