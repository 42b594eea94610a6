"""PipeDream and PipeDream-2BW on real ranks: the weights are those that the papers' formulas give."""

from __future__ import annotations

import dataclasses

import pytest

from parsim.errors import ParsimError
from parsim.execute.launch.attempts import Launch
from parsim.execute.launch.cases import run_cases, verification_case
from parsim.execute.measurement import Measurement, Verification
from parsim.execute.request import Case, Checkpoints
from parsim.model import ModelSpec
from parsim.plan import Job, ParallelPlan, parse_plan
from parsim.schedule import running_schedule
from parsim.schedule.pipedream import staleness, weight_versions
from parsim.timeline import COMPUTE

pytest.importorskip("torch")

MODEL = ModelSpec(
    name="llama", layers=4, hidden=32, heads=4, kv_heads=2, ffn_hidden=48, gated_mlp=True, vocab=64,
    max_seq_len=16,
)  # fmt: skip
TWO_RANKS = (
    "pp=2,schedule=pipedream",
    "pp=2,schedule=pipedream-2bw",
    "pp=2,schedule=pipedream,micro_batch=2,recompute=full",
    "pp=2,schedule=pipedream-2bw,stage_split=1-3",
)
FOUR_RANKS = (
    "pp=4,schedule=pipedream",
    "dp=2,pp=2,schedule=pipedream",
    "tp=2,pp=2,schedule=pipedream-2bw",
    "pp=4,schedule=pipedream-2bw",
)
STEPS = 3


def case(text: str, *, verify: bool) -> Case:
    """By plain SGD: AdamW would forgive gradients of a wrong scale."""
    plan = parse_plan(text)
    batch = 4 * plan.dp * plan.micro_batch
    job = Job(model=MODEL, seq_len=16, global_batch=batch, precision="fp32", optimizer="sgd")
    schedule = running_schedule(plan, 4, STEPS)
    if verify:
        return verification_case(job, plan, schedule, steps=STEPS)
    return Case(job=job, plan=plan, schedule=schedule, steps=STEPS - 1, warmup=1)


Found = dict[str, tuple[Verification, Measurement]]


def launched(texts: tuple[str, ...]) -> Found:
    results = run_cases(
        [case(text, verify=verify) for text in texts for verify in (True, False)], Launch(timeout_s=120)
    )
    found: Found = {}
    for i, text in enumerate(texts):
        verified, timed = results[2 * i : 2 * i + 2]
        assert isinstance(verified, Verification)
        assert isinstance(timed, Measurement)
        found[text] = verified, timed
    return found


@pytest.fixture(scope="module")
def on_two_ranks() -> Found:
    return launched(TWO_RANKS)


@pytest.fixture(scope="module")
def on_four_ranks() -> Found:
    return launched(FOUR_RANKS)


def check(verified: Verification, timed: Measurement) -> None:
    assert verified.max_gradient_error <= 1e-10, verified.parameter
    assert verified.max_loss_error <= 1e-10
    assert verified.against == "one process with the same versions of the weights"
    plan = timed.plan
    stages = [plan.coordinate(rank).pp for rank in range(plan.gpus)]
    # Narayanan et al. 2019, section 3.3: n − s versions on stage s of n; 2021, section 3.1: two.
    assert timed.weight_versions == tuple(weight_versions(plan, stage) for stage in stages)
    for stage, ages in zip(stages, timed.staleness, strict=True):
        assert max(ages) == staleness(plan, stage)
        assert ages[max(ages)] > sum(ages.values()) / 2
        updates = timed.plan.num_micro_batches(timed.job)
        assert sum(ages.values()) == updates * (STEPS + -(-plan.pp // updates))


@pytest.mark.slow
@pytest.mark.parametrize("text", TWO_RANKS)
def test_two_stages(on_two_ranks: Found, text: str) -> None:
    check(*on_two_ranks[text])


@pytest.mark.slow
@pytest.mark.parametrize("text", FOUR_RANKS)
def test_four_ranks(on_four_ranks: Found, text: str) -> None:
    check(*on_four_ranks[text])


@pytest.mark.slow
def test_a_measured_step_is_the_endless_pipeline_s(on_four_ranks: Found) -> None:
    """Each rank does a step's forwards and backwards in the time of one, with nothing left out."""
    _, timed = on_four_ranks["pp=4,schedule=pipedream"]
    assert timed.timeline.source == "measured"
    assert len(timed.steps_s) == len(timed.loss) == STEPS - 1
    for rank in range(4):
        own = [s for s in timed.timeline.spans if s.rank == rank and s.stream == COMPUTE]
        kinds = [s.kind for s in own if s.kind != "optimizer"]
        assert 3 <= kinds.count("backward") <= 5
        assert max(s.end_s for s in own) <= timed.timeline.end_s


def test_what_cannot_run_without_a_flush_is_refused() -> None:
    fine = case("pp=2,schedule=pipedream", verify=False)
    compressed = dataclasses.replace(fine, plan=dataclasses.replace(fine.plan, compression="fp16"))
    with pytest.raises(ParsimError, match="compressed gradients in a pipeline without a flush"):
        run_cases([compressed])
    policy = Checkpoints(folder="/nonexistent", every=1)
    with pytest.raises(ParsimError, match="micro-batches under way"):
        run_cases([dataclasses.replace(fine, checkpoint=policy)])
    with pytest.raises(ParsimError, match="CPU ranks only"):
        run_cases([fine], Launch(device="cuda"))
    with pytest.raises(ParsimError, match="needs a pipeline"):
        running_schedule(ParallelPlan(schedule="pipedream"), 4, 1)
