"""Plans: short form, ranks, stage splits, legality, files."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parsim.config import load_model
from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.plan import Job, ParallelPlan, parse_plan, recompute_text, stage_layers
from parsim.plan_file import read_plan
from parsim.schedule.check import plan_problems
from parsim.simulate.prediction import predict
from tests.builders import plain_stack, round_cluster, small_model

sizes = st.integers(1, 9)


@given(dp=sizes, tp=sizes, pp=sizes, cp=sizes, data=st.data())
def test_rank_and_coordinate_are_inverse(
    dp: int, tp: int, pp: int, cp: int, data: st.DataObject
) -> None:
    plan = ParallelPlan(dp=dp, tp=tp, pp=pp, cp=cp)
    rank = data.draw(st.integers(0, plan.gpus - 1))
    assert plan.rank(plan.coordinate(rank)) == rank


@given(
    st.builds(
        ParallelPlan,
        dp=sizes, tp=sizes, pp=sizes, ep=sizes, micro_batch=sizes, zero=st.integers(0, 3),
        sequence_parallel=st.booleans(), tp_overlap=st.booleans(),
        recompute=st.sampled_from(["none", "selective", "full"]),
    )
)  # fmt: skip
def test_short_form_round_trip(plan: ParallelPlan) -> None:
    assert parse_plan(plan.short()) == plan


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(1, 20)), min_size=1, max_size=8))
def test_long_runs_of_stages_are_counted_and_read_back(runs: list[tuple[int, int]]) -> None:
    split = tuple(number for number, count in runs for _ in range(count))
    plan = ParallelPlan(pp=len(split), stage_split=split)
    assert parse_plan(plan.short()) == plan
    assert parse_plan(f"pp={len(split)},stage_split={'-'.join(map(str, split))}") == plan
    written = plan.short().rpartition("=")[2].split("-")
    assert not any(written[i : i + 5] == [written[i]] * 5 for i in range(len(written)))


def test_defaults_of_the_short_form() -> None:
    assert parse_plan("") == ParallelPlan()
    assert parse_plan("tp=2").sequence_parallel
    assert not parse_plan("tp=2,sequence_parallel=false").sequence_parallel
    assert parse_plan("pp=4,schedule=zbv").vpp == 2
    assert parse_plan("pp=2,stage_split=5-3").stage_split == (5, 3)
    counted = parse_plan("pp=2,recompute=full,recompute_layers=3-0")
    assert counted.recompute_layers == (3, 0)
    assert parse_plan(counted.short()) == counted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ddp=2", "did you mean 'dp'"),
        ("dp=two", "whole number"),
        ("dp", "key=value"),
        ("dp=2,dp=4", "twice"),
        ("dp=0", "out of range"),
        ("zero=4", "0 to 3"),
        ("recompute=some", "none, selective, full"),
        ("sequence_parallel=perhaps", "yes or no"),
        ("pp=4,stage_split=4-4", "4 numbers"),
        ("pp=4,stage_split=4-four", "numbers with dashes"),
        ("pp=4,recompute=full,recompute_layers=4-4", "4 numbers"),
        ("pp=2,recompute=full,recompute_layers=4--4", "numbers with dashes"),
        ("pp=2,stage_split=4-4x0", "numbers with dashes"),
        ("pp=2,stage_split=4x", "numbers with dashes"),
        ("pp=2,stage_split=4x999999999999", "numbers with dashes"),
        ("pp=2,recompute_layers=1-1", "selective or full beside it"),
    ],
)
def test_bad_short_forms(text: str, message: str) -> None:
    with pytest.raises(ParsimError) as caught:
        parse_plan(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("short", "text"),
    [
        ("pp=2", "none"),
        ("pp=2,recompute=selective", "selective"),
        ("pp=2,recompute=full,recompute_layers=4-4", "full"),
        ("pp=2,recompute=full,recompute_layers=3-0", "full 3/8"),
        ("pp=2,recompute=full,recompute_layers=0-0", "none"),
    ],
)
def test_tables_say_how_many_layers_are_recomputed(short: str, text: str) -> None:
    assert recompute_text(small_model(), parse_plan(short)) == text


@given(layers=st.integers(1, 200), stages=st.integers(1, 64))
def test_stages_hold_all_layers_evenly(layers: int, stages: int) -> None:
    model = small_model(layers=layers)
    split = stage_layers(model, ParallelPlan(pp=stages))
    assert sum(split) == layers
    assert max(split) - min(split) <= 1 or layers < stages


def test_llama_405b_counts_embedding_and_head_as_layers() -> None:
    # arXiv 2407.21783, section 3.3.2: one layer fewer on the first and on the last stage
    split = stage_layers(load_model("llama-3.1-405b"), ParallelPlan(pp=16))
    assert split == (7, *[8] * 14, 7)


@pytest.mark.parametrize(
    ("short", "reason"),
    [
        ("tp=3", "tp does not divide the query heads"),
        ("tp=8", "tp does not divide the KV heads"),
        ("dp=3", "does not divide the global batch"),
        ("micro_batch=64", "does not divide the global batch"),
        ("pp=16", "more stages than layers"),
        ("pp=2,stage_split=5-5", "does not add up"),
        ("pp=2,recompute=full,recompute_layers=5-0", "more layers than it has"),
        ("pp=2,stage_split=7-1,recompute=selective,recompute_layers=7-2", "at most 7-1"),
        ("pp=2,vpp=2", "one chunk a rank"),
        ("pp=2,schedule=interleaved", "more than one chunk"),
        ("vpp=2,schedule=interleaved", "chunks need a pipeline"),
        ("pp=2,schedule=gpip", "unknown schedule 'gpip'"),
        ("sequence_parallel=true", "sequence parallelism shares"),
        ("cp=3", "2·cp chunks"),
        ("ep=2", "no experts"),
        ("dp=4,zero_group=2", "zero_group"),
    ],
)
def test_illegal_plans_say_why(short: str, reason: str) -> None:
    job = Job(model=small_model(), seq_len=256, global_batch=32)
    problems = [str(p) for p in plan_problems(job, parse_plan(short), round_cluster())]
    assert any(reason in problem for problem in problems), problems


def test_a_precision_that_the_device_lacks() -> None:
    job = Job(model=small_model(), seq_len=256, global_batch=32, precision="fp8")
    with pytest.raises(ParsimError, match="fp8"):
        list(plan_problems(job, ParallelPlan(), round_cluster()))


def item(tmp_path: Path) -> tuple[Path, dict]:  # type: ignore[type-arg]
    model = small_model()
    costs = CostModel(model, round_cluster(), plain_stack())
    job = Job(model=model, seq_len=256, global_batch=32)
    plan = parse_plan("dp=2,tp=2,pp=2,micro_batch=2,zero=1")
    data = predict(job, plan, costs)[0].to_item()
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    return path, data


def test_an_item_can_be_read_back(tmp_path: Path) -> None:
    path, _ = item(tmp_path)
    found = read_plan(str(path))
    assert found.job == Job(model=small_model(), seq_len=256, global_batch=32)
    assert found.plan.short().startswith("dp=2,tp=2,pp=2,micro_batch=2")
    assert (found.plan.zero, found.plan.stage_split) == (1, ())
    assert (found.hardware, found.stack) == ("round", "plain")


def test_a_whole_plan_document_means_its_best_plan(tmp_path: Path) -> None:
    path, data = item(tmp_path)
    single = read_plan(str(path))
    path.write_text(json.dumps({"plans": [data, {}]}))
    assert read_plan(str(path)) == single


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": {"dp": 2, "tpp": 2}}, "did you mean 'tp'"),
        ({"plan": {"dp": "2"}}, "plan"),
        ({"plan": None}, "no plan file"),
        ({"job": {"seq_len": 256}}, "global_batch"),
        ({"hardware": 5}, "name or a path"),
        ({"model": {"name": "x"}}, "layers"),
    ],
)
def test_bad_plan_files(tmp_path: Path, change: dict, message: str) -> None:  # type: ignore[type-arg]
    path, data = item(tmp_path)
    path.write_text(json.dumps(data | change))
    with pytest.raises(ParsimError) as caught:
        read_plan(str(path))
    assert message in str(caught.value)


def test_a_plan_file_counts_recomputed_layers(tmp_path: Path) -> None:
    path, data = item(tmp_path)
    counts = {"recompute": "full", "recompute_layers": [3, 1]}
    path.write_text(json.dumps(data | {"plan": data["plan"] | counts}))
    assert read_plan(str(path)).plan.recompute_layers == (3, 1)
    counts = {"recompute": "full", "recompute_layers": [-1, 1]}
    path.write_text(json.dumps(data | {"plan": data["plan"] | counts}))
    with pytest.raises(ParsimError, match="no layer or some"):
        read_plan(str(path))


def test_a_truncated_plan_file(tmp_path: Path) -> None:
    path, data = item(tmp_path)
    path.write_text(json.dumps(data)[:200])
    with pytest.raises(ParsimError, match="complete"):
        read_plan(str(path))


@pytest.mark.parametrize("pp", [16_384, 1_000_000])
def test_a_search_may_look_at_one_long_pipeline(pp: int) -> None:
    assert ParallelPlan(pp=pp, vpp=2, schedule="zbv").num_stages == 2 * pp
