"""Training that is cut off and goes on ends with the losses of training that was left alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from parsim.errors import ParsimError
from parsim.execute.launch.attempts import Launch, Progress
from parsim.execute.launch.cases import run_cases
from parsim.execute.launch.checkpoint_folder import newest
from parsim.execute.launch.torchrun import Nodes
from parsim.execute.launch.watch import RankLost
from parsim.execute.measurement import Measurement, Verification
from parsim.execute.request import Case, Checkpoints
from parsim.model import ModelSpec, MoeSpec
from parsim.plan import Job, parse_plan
from parsim.schedule import make_schedule

torch = pytest.importorskip("torch")

from parsim.execute.training.checkpoint import IndexReader  # noqa: E402 - needs torch
from tests.integration.test_execute_run import leftovers, workers  # noqa: E402 - skips without torch

MODEL = ModelSpec(
    name="small", layers=4, hidden=32, heads=4, kv_heads=2, ffn_hidden=48, gated_mlp=True, vocab=64,
    max_seq_len=16,
)  # fmt: skip
TIED = dataclasses.replace(MODEL, name="tied", tied_embeddings=True, qk_norm=True, linear_bias=True)
EXPERTS = dataclasses.replace(
    MODEL, name="experts", moe=MoeSpec(experts=4, top_k=2, ffn_hidden=24, dense_layers=1)
)
STEPS, HALF = 4, 2


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, empty and our own."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def case(
    text: str, folder: Path | None, *, model: ModelSpec = MODEL, dtype: str = "fp64", every: int = HALF
) -> Case:
    plan = parse_plan(text)
    job = Job(model=model, seq_len=16, global_batch=8, precision=dtype)
    return Case(
        job=job, plan=plan, schedule=make_schedule(plan, plan.num_micro_batches(job)), steps=STEPS,
        seed=3, dtype=dtype, checkpoint=folder and Checkpoints(folder=str(folder), every=every),
    )  # fmt: skip


def from_half(written: Case, text: str, folder: Path) -> Case:
    """A case that begins at the checkpoint that `written` left after half of its steps."""
    start = Checkpoints(folder=str(folder), every=10 * STEPS, start=HALF)
    return dataclasses.replace(case(text, None, model=written.job.model, dtype=written.dtype),
                               checkpoint=start)  # fmt: skip


Chain = tuple[ModelSpec, tuple[str, ...]]
"""Plans for one model, each of which also goes on from the checkpoint of the one before it."""

TWO_RANKS: tuple[Chain, ...] = (
    (TIED, ("dp=2", "dp=2,zero=1", "tp=2,micro_batch=8", "dp=2,zero=2,micro_batch=2",
            "tp=2,micro_batch=8,sequence_parallel=no", "dp=2,zero=3,micro_batch=4")),
    (MODEL, ("pp=2,recompute=full", "pp=2,vpp=2,schedule=interleaved", "dp=2,zero=3,micro_batch=4",
             "pp=2,schedule=zbv,micro_batch=2")),
    (TIED, ("pp=2,micro_batch=2", "dp=2,zero=1,micro_batch=4")),
    (EXPERTS, ("dp=2,ep=2,zero=1,micro_batch=4", "dp=2,zero=3,micro_batch=4", "cp=2,micro_batch=8",
               "tp=2,ep=2,micro_batch=8")),
)  # fmt: skip
FOUR_RANKS: tuple[Chain, ...] = (
    (MODEL, ("dp=2,tp=2,zero=3,micro_batch=4", "tp=2,pp=2,micro_batch=8,stage_split=1-3",
             "dp=2,tp=2,zero=1,micro_batch=4")),
)  # fmt: skip


def names(chains: tuple[Chain, ...]) -> list[str]:
    return [f"{model.name} {plan}" for model, plans in chains for plan in plans]


def launched(chains: tuple[Chain, ...], folder: Path) -> dict[str, tuple[Measurement, ...]]:
    """Every plan run whole, going on by itself, and carried on by the next plan, in one launch."""
    cases: list[Case] = []
    for model, plans in chains:
        for plan, following in zip(plans, plans[1:] + plans[:1], strict=True):
            place = folder / str(len(cases))
            place.mkdir()
            written = case(plan, place, model=model)
            cases += [written, from_half(written, plan, place), from_half(written, following, place)]
    results = [r for r in run_cases(cases, Launch(timeout_s=120)) if isinstance(r, Measurement)]
    return dict(zip(names(chains), batched(results, 3), strict=True))


def batched(results: list[Measurement], size: int) -> list[tuple[Measurement, ...]]:
    return [tuple(results[i : i + size]) for i in range(0, len(results), size)]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Measurement, ...]]:
    return launched(TWO_RANKS, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def on_four_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Measurement, ...]]:
    return launched(FOUR_RANKS, tmp_path_factory.mktemp("four"))


def check(whole: Measurement, again: Measurement, other: Measurement) -> None:
    """The same plan goes on bit by bit; another one within rounding, on the same tensors cut anew."""
    assert again.resumed_at == HALF
    assert len(again.loss) == STEPS
    assert again.loss == whole.loss
    assert again.steps_s[:HALF] == whole.steps_s[:HALF]
    assert other.loss == pytest.approx(whole.loss, rel=1e-12)
    # Not because nothing changes from step to step:
    assert abs(whole.loss[HALF - 1] / whole.loss[-1] - 1) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", names(TWO_RANKS))
def test_two_ranks_go_on_as_if_nothing_had_happened(
    on_two_ranks: dict[str, tuple[Measurement, ...]], name: str
) -> None:
    check(*on_two_ranks[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", names(FOUR_RANKS))
def test_four_ranks_go_on_as_if_nothing_had_happened(
    on_four_ranks: dict[str, tuple[Measurement, ...]], name: str
) -> None:
    check(*on_four_ranks[name])


LONG = "dp=2,zero=1,micro_batch=4"
LONG_STEPS = 30


def long_case(folder: Path | None) -> Case:
    return dataclasses.replace(case(LONG, folder, every=3), steps=LONG_STEPS)


@pytest.fixture(scope="module")
def undisturbed() -> Measurement:
    (found,) = run_cases([long_case(None)], Launch(timeout_s=120))
    assert isinstance(found, Measurement)
    return found


@pytest.mark.slow
def test_a_run_that_loses_a_rank_at_any_moment_ends_as_if_it_had_not(
    undisturbed: Measurement, temporary: Path, tmp_path: Path
) -> None:
    rank, moment_s = random.choice((0, 1)), random.random() * sum(undisturbed.steps_s) / 3
    notes: list[str] = []

    def on_step(progress: Progress) -> None:
        if progress.step == 3 and not notes:
            time.sleep(moment_s)
            os.kill(workers(temporary)[rank], signal.SIGKILL)

    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    how = Launch(timeout_s=120, max_restarts=1, on_step=on_step, on_note=notes.append)
    (found,) = run_cases([long_case(checkpoints)], how)
    assert isinstance(found, Measurement)
    assert found.loss == undisturbed.loss
    assert found.failures == (f"rank {rank} died without a word",)
    assert re.search(r"from the checkpoint after \d+ steps", notes[0])
    assert leftovers(temporary) == []
    saved = newest(checkpoints)
    assert saved is not None
    assert saved.step == LONG_STEPS


def free_endpoint() -> str:
    """A place on this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.slow
def test_two_machines_that_lose_a_rank_go_on_together(
    undisturbed: Measurement, temporary: Path, tmp_path: Path
) -> None:
    """Two launches with a torchrun of their own, over loopback; the rank is on machine 1."""
    endpoint = free_endpoint()
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    killed: list[int] = []

    def on_step(progress: Progress) -> None:
        if progress.step == 4 and not killed:
            killed.append(workers(temporary)[1])
            os.kill(killed[0], signal.SIGKILL)

    def machine(index: int) -> list[Measurement | Verification]:
        nodes = Nodes(count=2, index=index, endpoint=endpoint)
        how = Launch(nodes=nodes, timeout_s=120, max_restarts=2, on_step=on_step)
        return run_cases([long_case(checkpoints)], how)

    with ThreadPoolExecutor(2) as pool:
        (found,), nothing = pool.map(machine, (0, 1))
    assert nothing == []
    assert isinstance(found, Measurement)
    assert found.loss == undisturbed.loss
    assert found.world_size == 2
    assert found.timeline.ranks == (0, 1)
    assert len(found.failures) >= 1
    # Both ranks of a data-parallel step begin at one barrier, on one clock.
    first = [min(s.start_s for s in found.timeline.spans if s.rank == rank) for rank in (0, 1)]
    assert max(first) < found.step_time_s
    assert leftovers(temporary) == []


@pytest.mark.slow
def test_machines_share_one_budget_of_restarts(temporary: Path, tmp_path: Path) -> None:
    """A rank of machine 1 is killed in every attempt: both machines start again once and give up."""
    endpoint, killed = free_endpoint(), set[int]()
    notes: dict[int, list[str]] = {0: [], 1: []}
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()

    def on_step(progress: Progress) -> None:
        rank = workers(temporary).get(1)
        if progress.step >= 3 and rank is not None and rank not in killed:
            killed.add(rank)
            os.kill(rank, signal.SIGKILL)

    def machine(index: int) -> str:
        nodes = Nodes(count=2, index=index, endpoint=endpoint)
        how = Launch(nodes=nodes, timeout_s=60, max_restarts=1, on_step=on_step,
                     on_note=notes[index].append)  # fmt: skip
        with pytest.raises(RankLost) as caught:
            run_cases([long_case(checkpoints)], how)
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(machine, (0, 1)))
    assert len(killed) == 2
    assert [len(each) for each in notes.values()] == [1, 1]
    assert all("restart 1 of 1" in each for (each,) in notes.values())
    assert "rank 1 died" in ends[1]
    assert leftovers(temporary) == []


class HeardError(Exception):
    """What the test waited for has been said."""


@pytest.mark.slow
def test_a_slow_rank_is_said_and_not_killed(temporary: Path) -> None:
    """Rank 1 is stopped and continued so that it runs for a tenth of the time."""
    over = threading.Event()

    def throttle() -> None:
        while not over.is_set():
            with contextlib.suppress(KeyError, ProcessLookupError):
                process = workers(temporary)[1]
                for _ in range(20):
                    os.kill(process, signal.SIGSTOP)
                    over.wait(0.18)
                    os.kill(process, signal.SIGCONT)
                    over.wait(0.02)

    def on_step(progress: Progress) -> None:
        if progress.step == 2:
            threading.Thread(target=throttle, daemon=True).start()

    def on_note(text: str) -> None:
        assert "rank 1 is slow" in text
        raise HeardError

    long = dataclasses.replace(long_case(None), steps=100_000)
    try:
        with pytest.raises(HeardError):
            run_cases([long], Launch(timeout_s=120, on_step=on_step, on_note=on_note))
    finally:
        over.set()
    assert leftovers(temporary) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Detected an existing")
def test_a_loss_that_is_not_finite_stops_the_run_where_it_came_up(
    temporary: Path, tmp_path: Path
) -> None:
    """A weight of layer 2, on the second of two machines, overflows: no restart helps."""
    text, checkpoints = "pp=2,micro_batch=4", tmp_path / "checkpoints"
    checkpoints.mkdir()
    written = case(text, checkpoints)
    run_cases([written], Launch(timeout_s=120))
    spoil(checkpoints / f"step-{HALF:08}", "model.layers.2.feed_forward.up.weight")
    endpoint, notes = free_endpoint(), list[str]()

    def machine(index: int) -> str:
        nodes = Nodes(count=2, index=index, endpoint=endpoint)
        how = Launch(nodes=nodes, timeout_s=120, max_restarts=3, on_note=notes.append)
        with pytest.raises(ParsimError, match="no longer finite") as caught:
            run_cases([from_half(written, text, checkpoints)], how)
        return str(caught.value.where)

    with ThreadPoolExecutor(2) as pool:
        places = list(pool.map(machine, (0, 1)))
    assert places == ["step 2, rank 1, stage 1, layer 2"] * 2  # both machines say the same, at once
    assert notes == []


def spoil(checkpoint: Path, name: str) -> None:
    """Make one value of a tensor infinite, with torch's own reader and writer."""
    dcp = torch.distributed.checkpoint
    index = IndexReader(checkpoint).read_metadata().state_dict_metadata
    states = {k: torch.zeros(m.size, dtype=m.properties.dtype) for k, m in index.items()}
    dcp.load(states, storage_reader=IndexReader(checkpoint), no_dist=True)
    states[name].view(-1)[5] = torch.inf
    for path in checkpoint.glob("*.distcp"):
        path.unlink()
    dcp.save(states, storage_writer=dcp.FileSystemWriter(checkpoint), no_dist=True)
    manifest = json.loads((checkpoint / "parsim.json").read_text())
    manifest["files"] = {}
    (checkpoint / "parsim.json").write_text(json.dumps(manifest))
