"""Plans that recompute some layers of each stage: Megatron-LM's `--recompute-method block`, by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from parsim.compare.steps import compare_documents
from parsim.cost.cell import cell_of
from parsim.cost.stage import HEAD, CostModel, kept
from parsim.errors import ParsimError
from parsim.model import MoeSpec
from parsim.plan import Job, ParallelPlan, parse_plan, stage_layers
from parsim.schedule import make_schedule, with_schedule
from parsim.schedule.check import plan_problems
from parsim.search.examine import Examiner
from parsim.search.fullest import fullest_rank
from parsim.search.space import Family
from parsim.simulate.detail import StepOperations
from parsim.simulate.prediction import Prediction, predict
from tests.builders import plain_stack, round_cluster, small_model

MODEL = small_model(
    moe=MoeSpec(experts=4, top_k=2, ffn_hidden=256, dense_layers=3, every=2), mtp_layers=1
)
JOB = Job(model=MODEL, seq_len=256, global_batch=16)
COSTS = CostModel(MODEL, round_cluster(), plain_stack(empty_gradients=True, recompute_stops_early=True))
SHAPES = ("pp=2", "pp=2,vpp=2,schedule=interleaved", "pp=4,schedule=dualpipe", "pp=2,schedule=zbv")


def predicted(plan: ParallelPlan) -> Prediction:
    assert not list(plan_problems(JOB, plan, COSTS.cluster))
    return predict(JOB, plan, COSTS)[0]


def counted(short: str, counts: Sequence[int]) -> ParallelPlan:
    return replace(parse_plan(short), recompute_layers=tuple(counts))


def whole(plan: ParallelPlan) -> tuple[int, ...]:
    """All that each stage can recompute: its layers, and after them the multi-token prediction."""
    *others, last = stage_layers(MODEL, plan)
    return *others, last + MODEL.mtp_layers


def figures(prediction: Prediction) -> tuple[object, ...]:
    return prediction.step_time_s, prediction.memory, prediction.breakdown_s


@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_layers_are_the_plan_without_counts_and_none_is_no_recomputation(
    shape: str, how: str
) -> None:
    short = f"{shape},dp=2,ep=2,tp=2,zero=1,recompute={how}"
    usual = parse_plan(short)
    everything, nothing = (counted(short, [k * n for n in whole(usual)]) for k in (1, 0))
    assert figures(predicted(everything)) == figures(predicted(usual))
    assert figures(predicted(nothing)) == figures(predicted(replace(usual, recompute="none")))
    assert fullest_rank(JOB, nothing, COSTS) == predicted(nothing).memory


def test_a_stage_is_the_sum_of_its_layers_each_as_it_is_treated() -> None:
    plan = parse_plan("pp=2,recompute=full,recompute_layers=1-5")
    cell = cell_of(JOB, plan)
    plain = cell._replace(recompute="none")
    (first, last), (alone, _) = (
        COSTS.stages(cell, (4, 4), counts) for counts in (plan.recompute_layers, ())
    )
    again, rest = COSTS.layer(cell, 0), [COSTS.layer(plain, i) for i in (1, 2, 3)]
    assert first.time.recompute == again.time.recompute
    assert first.saved_bytes == pytest.approx(
        COSTS.part(cell, "embedding").saved_bytes
        + again.saved_bytes
        + sum(layer.saved_bytes for layer in rest)
    )
    assert first.recomputed_bytes == again.recomputed_bytes
    assert first.parameters == alone.parameters
    assert first.distinct_parameters == alone.distinct_parameters
    # The multi-token prediction is the fifth layer of the last stage; the head is never recomputed.
    assert last == COSTS.stages(cell, (4, 4))[1]
    assert COSTS.part(cell, kept("dense layer")) == COSTS.part(plain, "dense layer")


def test_only_the_first_layers_of_each_stage_are_recomputed() -> None:
    plan = parse_plan("pp=2,vpp=2,schedule=interleaved,recompute=full,recompute_layers=1-2-0-3")
    schedule = make_schedule(plan, plan.num_micro_batches(JOB))
    operations = StepOperations(job=JOB, plan=plan, costs=COSTS, schedule=schedule)
    again = [
        {place.step.part for place in operations.shape(stage, "B") if place.step.kind == "recompute"}
        for stage in range(4)
    ]
    assert again == [
        {"layer 0"},
        {"layer 2", "layer 3"},
        set(),
        {"layer 6", "layer 7", "multi-token prediction"},
    ]


def test_fewer_recomputed_layers_cost_memory_and_save_time() -> None:
    """On the slowest stage of equal ones; the last ranks of 1F1B keep few micro-batches and can afford
    it, as AdaPipe (Sun et al., ASPLOS 2024) exploits.
    """
    model = small_model(vocab=64, layers=64)
    job = Job(model=model, seq_len=256, global_batch=32)
    costs = CostModel(model, round_cluster(), plain_stack())
    plans = [
        parse_plan(f"pp=4,recompute=full,recompute_layers={counts}")
        for counts in ("16-16-16-16", "16-16-16-13", "16-16-15-13", "15-15-15-15", "0-0-0-0")
    ]
    full, last, slope, one, nothing = (predict(job, plan, costs)[0] for plan in plans)
    assert full.step_time_s > last.step_time_s > slope.step_time_s
    assert slope.step_time_s > one.step_time_s > nothing.step_time_s
    assert full.memory.peak == last.memory.peak == slope.memory.peak < one.memory.peak
    assert one.memory.peak < nothing.memory.peak


def test_counts_follow_a_plan_to_schedules_with_the_same_stages() -> None:
    plan = parse_plan("pp=4,recompute=full,recompute_layers=2-2-1-0,stage_split=2-2-2-2")
    same = with_schedule(plan, "dualpipe")  # two copies of the same four stages
    assert (same.recompute_layers, same.stage_split) == ((2, 2, 1, 0), (2, 2, 2, 2))
    other = with_schedule(plan, "zbv")
    assert (other.recompute_layers, other.stage_split, other.recompute) == ((), (), "full")


def test_steps_of_other_counts_are_not_compared() -> None:
    where = "prediction", "measurement"
    some, usual = (
        predicted(parse_plan(f"pp=2,recompute=full{counts}")).to_item()
        for counts in (",recompute_layers=1-1", "")
    )
    with pytest.raises(ParsimError, match="two different plans"):
        compare_documents(some, usual, where=where)
    older = usual | {"plan": {k: v for k, v in usual["plan"].items() if k != "recompute_layers"}}
    assert compare_documents(usual, older, where=where).error == 0
    with pytest.raises(ParsimError, match="recompute_layers"):
        compare_documents(some, older, where=where)


def test_one_examiner_tells_counts_apart() -> None:
    plans = [
        parse_plan(f"pp=2,recompute=full,recompute_layers={counts}") for counts in ("4-5", "0-1", "5-0")
    ]
    examiner, found, bounds_s = Examiner(JOB, COSTS), [], []
    for plan in plans:
        family = Family(
            base=plan,
            zero=(0,),
            micro_batch=(1,),
            sequence_parallel=(False,),
            tp_overlap=(False,),
            recompute=("full",),
        )
        found.append(examiner.examine(family))
        bounds_s.append(examiner.bounded(family)[1].tolist())
    full, few, illegal = found
    assert full.least_bytes == pytest.approx(fullest_rank(JOB, plans[0], COSTS).peak)
    assert few.least_bytes == pytest.approx(fullest_rank(JOB, plans[1], COSTS).peak)
    (slow_s,), (fast_s,), none = bounds_s
    assert fast_s < slow_s
    assert few.floor_s < full.floor_s
    assert none == []
    assert list(illegal.rejected) == ["a stage recomputes more layers than it has"]


def test_the_head_keeps_its_activations() -> None:
    plan = parse_plan("pp=2,recompute=full,recompute_layers=0-0")
    kinds = list(COSTS.kinds((4, 4), plan.recompute_layers))
    assert kinds[0][0] == "embedding"
    assert kinds[1][-1] == HEAD
