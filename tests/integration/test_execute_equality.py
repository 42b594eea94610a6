"""A plan on real ranks trains exactly as one process does: float64, three AdamW steps, all gradients."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from parsim.execute.launch.attempts import Launch
from parsim.execute.launch.cases import run_cases, verification_case
from parsim.execute.measurement import Verification
from parsim.execute.request import Case
from parsim.model import ModelSpec, MoeSpec
from parsim.plan import Job, parse_plan
from parsim.schedule import make_schedule
from parsim.schedule.action import Schedule, parse_action

pytest.importorskip("torch")

LLAMA = ModelSpec(
    name="llama", layers=4, hidden=32, heads=4, kv_heads=2, ffn_hidden=48, gated_mlp=True, vocab=64,
    max_seq_len=16,
)  # fmt: skip
GPT = dataclasses.replace(
    LLAMA,
    name="gpt",
    kv_heads=4,
    gated_mlp=False,
    norm="layernorm",
    position="learned",
    linear_bias=True,
)
QWEN = dataclasses.replace(LLAMA, name="qwen", head_dim=6, qkv_bias=True, qk_norm=True)
TIED = dataclasses.replace(LLAMA, name="tied", tied_embeddings=True)
MIXTRAL = dataclasses.replace(LLAMA, name="mixtral", moe=MoeSpec(experts=4, top_k=2, ffn_hidden=24))
# A dense layer first, an expert that every token visits, biases.
DEEPSEEK = dataclasses.replace(
    LLAMA,
    name="deepseek",
    moe=MoeSpec(
        experts=4, top_k=2, ffn_hidden=24, shared_ffn_hidden=32, dense_layers=1, expert_bias=True,
        shared_gate=True,
    ),
)  # fmt: skip
MODELS = {model.name: model for model in (LLAMA, GPT, QWEN, TIED, MIXTRAL, DEEPSEEK)}


def listed(name: str, *rows: str) -> Schedule:
    """A schedule written out."""
    return Schedule(name=name, ranks=tuple(tuple(map(parse_action, row.split())) for row in rows))


WRITTEN = {
    # Backwards split into input and weight gradients, as in ZB-H1.
    "split": listed("split", "0F0 0F1 0I0 0W0 0I1 0W1", "1F0 1I0 1F1 1I1 1W0 1W1"),
    # The second chunk runs back up the pipeline: stages 1 and 2 are neighbours on one rank.
    "v": listed("v", "0F0 0F1 3F0 3B0 3F1 3B1 0B0 0B1", "1F0 2F0 1F1 2F1 2B0 1B0 2B1 1B1"),
    "v split": listed(
        "v split", "0F0 0F1 3F0 3I0 3F1 3I1 3W0 3W1 0I0 0I1 0W0 0W1",
        "1F0 2F0 1F1 2F1 2I0 1I0 2I1 1I1 2W0 1W0 1W1 2W1",
    ),
    # torch's own runtime looks losses up by order of computation and would take the wrong ones here.
    "backwards first": listed("backwards first", "0F1 0F0 0B0 0B1", "1F1 1F0 1B0 1B1"),
}  # fmt: skip


def case(text: str) -> Case:
    """A case from "model plan", "model plan global_batch" or "model plan | schedule written out"."""
    head, _, written = text.partition(" | ")
    name, short, *batch = head.split()
    plan = parse_plan(short)
    schedule = WRITTEN.get(written)
    sequences = 2 * plan.dp if schedule else int(batch[0]) if batch else 4 * plan.dp * plan.micro_batch
    job = Job(model=MODELS[name], seq_len=16, global_batch=sequences)
    return verification_case(job, plan, schedule or make_schedule(plan, plan.num_micro_batches(job)))


TWO_RANKS = (
    "llama dp=2",
    "llama dp=2,zero=1,micro_batch=2",
    "llama dp=2,zero=2",
    "llama dp=2,zero=3",
    "llama dp=2,zero=3,recompute=full",
    "llama tp=2",
    "llama tp=2,sequence_parallel=no",
    "llama tp=2,recompute=selective",
    "llama pp=2,schedule=gpipe",
    "llama pp=2",
    "llama pp=2,micro_batch=3 3",
    "llama pp=2,vpp=2,schedule=interleaved",
    "llama pp=2,recompute=full,stage_split=1-3,recompute_layers=0-2",
    "llama pp=2 | split",
    "llama pp=2 | backwards first",
    "llama pp=2,vpp=2,schedule=zbv | v",
    "llama pp=2,vpp=2,schedule=zbv | v split",
    "llama pp=2,vpp=2,schedule=looped-bfs,recompute=selective,recompute_layers=1-0-1-0",
    "llama pp=2,schedule=zb-h1",
    "llama pp=2,schedule=zb-h2",
    "llama pp=2,schedule=zb-h2 1",
    "llama pp=2,vpp=2,schedule=interleaved-zb",
    "llama pp=2,schedule=zbv",
    "llama pp=2,schedule=zbv 2",
    "llama pp=2,schedule=dualpipev",
    "gpt pp=2,schedule=dualpipev,recompute=full 7",
    "gpt tp=2",
    "gpt tp=2,sequence_parallel=no",
    "gpt pp=2,recompute=full | split",
    "qwen tp=2",
    "qwen dp=2,zero=3,recompute=selective",
    "llama cp=2",
    "llama cp=2,zero=3",
    "gpt cp=2,zero=1,recompute=full",
    "qwen cp=2,recompute=selective",
    "mixtral dp=2,ep=2",
    "mixtral dp=2,zero=3,recompute=full",
    "mixtral pp=2,schedule=zb-h1",
    "deepseek dp=2,ep=2,zero=1",
    "deepseek dp=2,ep=2,zero=3,recompute=full",
    "deepseek tp=2",
    "deepseek cp=2,ep=2,zero=2",
    "tied pp=2",
    "tied pp=2,schedule=zb-h1,recompute=full",
    "tied tp=2",
    "tied dp=2,zero=3",
)
FOUR_RANKS = (
    "llama dp=2,tp=2",
    "llama dp=2,tp=2,zero=1",
    "gpt dp=2,tp=2,zero=3,sequence_parallel=no",
    "qwen dp=2,tp=2,zero=2,recompute=full,recompute_layers=3",
    "llama tp=2,pp=2",
    "qwen tp=2,pp=2,vpp=2,schedule=zbv | v split",
    "llama pp=4 2",
    "llama dp=2,pp=2,zero=3",
    "llama dp=2,pp=2,zero=2 | split",
    "llama dp=2,pp=2,zero=2,schedule=zbv",
    "llama dp=2,pp=2,zero=1,schedule=dualpipev",
    "llama dp=2,pp=2,vpp=2,zero=3,schedule=looped-bfs",
    "qwen tp=2,pp=2,schedule=dualpipev",
    "llama pp=4,schedule=zb-h2 2",
    "llama dp=2,cp=2,zero=3",
    "gpt tp=2,cp=2,zero=3",
    "qwen cp=2,pp=2,schedule=zb-h1",
    "llama cp=2,pp=2,zero=2,schedule=dualpipev",
    "deepseek dp=2,tp=2,ep=2,zero=3",
    "deepseek dp=2,tp=2,ep=4,zero=3",
    "deepseek dp=2,tp=2,zero=1",
    "deepseek dp=2,pp=2,ep=2,zero=2,schedule=zbv",
    "mixtral dp=2,pp=2,ep=2,zero=3",
    "tied dp=2,pp=2,zero=1",
    "tied dp=2,pp=2,zero=3",
    "tied tp=2,pp=2,vpp=2,schedule=interleaved",
    "tied tp=2,pp=2,sequence_parallel=no",
    "tied pp=4 2",
)
EIGHT_RANKS = (
    "llama dp=2,tp=2,pp=2",
    "gpt dp=2,tp=2,pp=2,zero=3",
    "deepseek dp=2,tp=2,cp=2,ep=4,zero=2",
    "mixtral tp=2,cp=2,pp=2,ep=2,zero=3,recompute=full",
)


def launched(texts: tuple[str, ...]) -> dict[str, Verification]:
    """All cases of equal world size, verified in one launch: ranks take seconds to import torch."""
    results = run_cases([case(text) for text in texts], Launch(timeout_s=120))
    return {t: r for t, r in zip(texts, results, strict=True) if isinstance(r, Verification)}


@pytest.fixture(scope="module")
def on_two_ranks() -> dict[str, Verification]:
    return launched(TWO_RANKS)


@pytest.fixture(scope="module")
def on_four_ranks() -> dict[str, Verification]:
    return launched(FOUR_RANKS)


@pytest.fixture(scope="module")
def on_eight_ranks() -> dict[str, Verification]:
    return launched(EIGHT_RANKS)


def check(found: Verification) -> None:
    assert found.steps == 3
    assert found.max_gradient_error <= 1e-10, found.parameter
    assert found.max_loss_error <= 1e-10
    assert found.equal


@pytest.mark.slow
@pytest.mark.parametrize("text", TWO_RANKS)
def test_two_ranks_equal_one_process(on_two_ranks: dict[str, Verification], text: str) -> None:
    check(on_two_ranks[text])


@pytest.mark.slow
@pytest.mark.parametrize("text", FOUR_RANKS)
def test_four_ranks_equal_one_process(on_four_ranks: dict[str, Verification], text: str) -> None:
    check(on_four_ranks[text])


@pytest.mark.slow
@pytest.mark.parametrize("text", EIGHT_RANKS)
def test_eight_ranks_equal_one_process(on_eight_ranks: dict[str, Verification], text: str) -> None:
    check(on_eight_ranks[text])


def test_the_documents_count_the_combinations() -> None:
    page = Path(__file__).parents[2] / "docs" / "executor.md"
    count = len(TWO_RANKS) + len(FOUR_RANKS) + len(EIGHT_RANKS)
    assert f"with the {count} combinations of" in page.read_text()
