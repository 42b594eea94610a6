"""One rank of a big plan alone: what it counts is what the cost model says, to the last byte."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from parsim.cli.main import run_command
from parsim.config import load_cluster, load_stack
from parsim.cost.stage import CostModel
from parsim.execute.launch.attempts import Launch
from parsim.execute.one_rank.one_rank import CountRow, OneRank, count_rows, measure_one_rank
from parsim.execute.request import Case
from parsim.model import ModelSpec
from parsim.plan import Job, parse_plan
from parsim.schedule import make_schedule
from parsim.simulate.prediction import program_of

pytest.importorskip("torch")

GQA = ModelSpec(
    name="gqa", layers=4, hidden=128, heads=16, kv_heads=8, ffn_hidden=192, gated_mlp=True, vocab=256,
    max_seq_len=32,
)  # fmt: skip
TIED = replace(GQA, name="tied", tied_embeddings=True)
BIASED = replace(
    GQA, name="biased", kv_heads=16, gated_mlp=False, norm="layernorm", norm_bias=True,
    linear_bias=True, embedding_norm=True,
)  # fmt: skip
NORMED_HEADS = replace(GQA, name="normed-heads", qk_norm=True)


# Rows of every matrix divide by tp·dp = 128: FSDP pads others.
DEEP = replace(GQA, name="deep", layers=8, hidden=256, head_dim=16, ffn_hidden=256)


def case(text: str, model: ModelSpec = GQA) -> Case:
    """Three micro-batches of a plan; interleaved pipelines take a multiple of pp."""
    plan = parse_plan(text)
    job = Job(
        model=model,
        seq_len=32,
        global_batch=(4 if plan.vpp > 1 else 3) * plan.dp * plan.micro_batch,
        precision="fp32",
    )
    schedule = make_schedule(plan, plan.num_micro_batches(job))
    return Case(job=job, plan=plan, schedule=schedule, steps=1)


def differences(found: OneRank) -> list[CountRow]:
    """What was counted otherwise than the model says."""
    case = found.case
    costs = CostModel(case.job.model, load_cluster("local-cpu"), load_stack("parsim-executor"))
    program, _ = program_of(case.job, case.plan, costs, case.schedule)
    rows = count_rows(found, program, costs)
    assert rows[0].counted > 0
    return [row for row in rows if not row.equal]


EIGHT_RANKS = (
    case("tp=8"),
    case("tp=8,sequence_parallel=false"),
    case("tp=8,sequence_parallel=false", NORMED_HEADS),
    case("tp=8,recompute=full"),
    case("tp=8,recompute=selective", TIED),
    case("dp=4,tp=2,zero=1,micro_batch=2", BIASED),
    case("dp=4,tp=2,zero=2"),
    case("dp=4,tp=2,zero=3,recompute=full"),
    case("dp=8,zero=3", TIED),
    case("dp=2,tp=2,pp=2"),
    case("dp=2,tp=2,pp=2,zero=2"),
    case("dp=2,tp=2,pp=2,zero=3", BIASED),
    case("dp=4,pp=2,zero=3,schedule=interleaved,vpp=2"),
    case("dp=2,tp=2,pp=2,zero=1,schedule=zbv,vpp=2", NORMED_HEADS),
    case("tp=4,pp=2,recompute=full,recompute_layers=2-1"),
    case("cp=8,zero=3,recompute=full"),
    case("dp=2,cp=2,tp=2,zero=1", BIASED),
    case("cp=2,tp=2,pp=2,recompute=selective"),
    case("dp=2,tp=2,pp=2,zero=1", TIED),
    case("dp=2,tp=2,pp=2", TIED),
    case("dp=4,pp=2,zero=2", TIED),
)


@pytest.fixture(scope="module")
def counted() -> list[OneRank]:
    return measure_one_rank(EIGHT_RANKS, 1, Launch(timeout_s=240))


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(EIGHT_RANKS)), ids=lambda i: EIGHT_RANKS[i].plan.short())
def test_a_rank_computes_and_sends_what_the_cost_model_says(counted: list[OneRank], index: int) -> None:
    assert differences(counted[index]) == []


@pytest.fixture(scope="module")
def of_thousands() -> list[OneRank]:
    """A rank in the middle of dp16 · tp8 · pp8."""
    texts = ("dp=16,tp=8,pp=8", "dp=16,tp=8,pp=8,zero=3,micro_batch=2")
    return measure_one_rank([case(text, DEEP) for text in texts], 600, Launch(timeout_s=240))


@pytest.mark.slow
class TestOneOfAThousand:
    def test_it_computes_and_sends_what_the_cost_model_says(self, of_thousands: list[OneRank]) -> None:
        assert [differences(found) for found in of_thousands] == [[], []]

    def test_it_runs_the_actions_of_its_stage_and_no_others(self, of_thousands: list[OneRank]) -> None:
        for found in of_thousands:
            assert [(a.stage, a.kind, a.number) for a in found.actions] == [(4, "B", 3), (4, "F", 3)]

    def test_its_step_is_its_work_and_what_the_host_adds(self, of_thousands: list[OneRank]) -> None:
        """But for the fake collectives, whose time is left out."""
        for found in of_thousands:
            known_s = sum(a.seconds * a.number for a in found.actions) + found.optimizer_s
            known_s += found.step_host_s + found.action_host_s * sum(a.number for a in found.actions)
            assert 0.2 * found.steps_s[0] < known_s <= 1.5 * found.steps_s[0]

    def test_it_holds_its_model_states_and_more(self, of_thousands: list[OneRank]) -> None:
        """AdamW in fp32: weights, gradients and two moments, 16 bytes a parameter."""
        found = of_thousands[0]
        h, f, kv_width = DEEP.hidden, DEEP.ffn_hidden, DEEP.kv_heads * DEEP.head_dim
        layer = (2 * h * h + 2 * h * kv_width + 3 * h * f) // 8 + 2 * h
        assert found.peak_bytes > 16 * layer


def test_the_command_replays_the_step_with_what_it_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = "run dp=1,pp=4 --model tiny-llama-8l --seq-len 32 --one-rank 2 --steps 2 --json"
    assert run_command(command.split()) == 0
    answer = json.loads(capsys.readouterr().out)
    alone = answer["one_rank"]
    assert (alone["rank"], alone["pp"], alone["world_size"]) == (2, 2, 4)
    assert [(a["stage"], a["kind"]) for a in alone["actions"]] == [(2, "B"), (2, "F")]
    assert all(row["equal"] for row in alone["counts"])
    # 1F1B: no stage is faster than this one, so a step takes at least m + p − 1 times both passes.
    passes_s = sum(a["measured_s"] for a in alone["actions"])
    assert answer["step_time_s"] >= (answer["num_micro_batches"] + 3) * passes_s * 0.99
    assert sum(answer["breakdown_s"].values()) == pytest.approx(answer["step_time_s"])
    assert answer["predicted_s"] > 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--one-rank 2", "no such rank"),
        ("--one-rank 1 --verify", "--verify"),
        ("--one-rank 1 --hardware h100-sxm-80gb --device cpu", "of the same hardware"),
    ],
)
def test_what_one_rank_cannot_do_is_said(
    capsys: pytest.CaptureFixture[str], flags: str, said: str
) -> None:
    assert run_command(f"run dp=2 --model tiny-llama-8l {flags}".split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
