"""Runs on real ranks: what a measurement holds, and what happens when a rank fails."""

from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from parsim.compare.causes import causes_of
from parsim.config import load_cluster, load_stack
from parsim.cost.stage import CostModel
from parsim.errors import ParsimError
from parsim.execute.launch.attempts import Launch, Progress
from parsim.execute.launch.cases import execute, run_cases
from parsim.execute.launch.checkpoint_folder import newest
from parsim.execute.launch.watch import Ranks
from parsim.execute.measurement import Measurement
from parsim.execute.request import Case, Checkpoints
from parsim.model import ModelSpec, MoeSpec
from parsim.plan import Job, parse_plan
from parsim.schedule import make_schedule
from parsim.schedule.action import Schedule
from parsim.schedule.program import step_time_s
from parsim.simulate.prediction import program_of
from parsim.timeline import COMPUTE, DP, STREAMS, TP, Span, transfers

pytest.importorskip("torch")

MODEL = ModelSpec(
    name="small", layers=4, hidden=64, heads=4, kv_heads=2, ffn_hidden=96, gated_mlp=True, vocab=128,
    max_seq_len=32,
)  # fmt: skip
JOB = Job(model=MODEL, seq_len=32, global_batch=8, precision="fp32")
STEPS = 4


def schedule_of(text: str) -> Schedule:
    plan = parse_plan(text)
    return make_schedule(plan, plan.num_micro_batches(JOB))


def timed(text: str) -> Case:
    return Case(
        job=JOB, plan=parse_plan(text), schedule=schedule_of(text), steps=STEPS, warmup=1, seed=5
    )


PLANS = (
    "dp=2",
    "dp=2,zero=3,micro_batch=2",
    "tp=2,micro_batch=4",
    "pp=2,micro_batch=2",
    "pp=2,schedule=gpipe",
)


@pytest.fixture(scope="module")
def measured() -> dict[str, Measurement]:
    results = run_cases([timed(text) for text in PLANS], Launch(timeout_s=120))
    return {t: r for t, r in zip(PLANS, results, strict=True) if isinstance(r, Measurement)}


def spans(measurement: Measurement, rank: int, stream: str) -> list[Span]:
    return [s for s in measurement.timeline.spans if (s.rank, s.stream) == (rank, stream)]


def in_order(found: list[Span]) -> list[str]:
    """Names of spans by their first start; an action that is cut into parts is named once."""
    return list(dict.fromkeys(s.name for s in sorted(found, key=lambda s: s.start_s)))


@pytest.mark.slow
@pytest.mark.parametrize("text", PLANS)
class TestMeasurement:
    def test_the_prediction_has_the_same_tasks(
        self, measured: dict[str, Measurement], text: str
    ) -> None:
        """What was computed and sent bears the names of the Program's tasks, so that its measured
        durations can replace theirs one by one; and every transfer has both its ends.
        """
        found, plan = measured[text], parse_plan(text)
        costs = CostModel(MODEL, load_cluster("local-cpu"), load_stack("parsim-executor"))
        program, _ = program_of(JOB, plan, costs, schedule_of(text))
        for kind in ("forward", "backward", "pp", "optimizer"):
            tasks = {(task.rank, task.name) for task in program.tasks if task.kind == kind}
            sends = [s for s in found.timeline.spans if not s.stream.startswith("pp_recv")]
            assert {(plan.coordinate(s.rank).pp, s.name) for s in sends if s.kind == kind} == tasks
        sent = [task for task in program.tasks if task.kind == "pp"]
        assert len(transfers(found.timeline.spans)) == len(sent)
        causes = causes_of(program, plan, found.timeline, found.step_time_s)
        error_s = step_time_s(program) - found.step_time_s
        assert sum(cause.difference_s for cause in causes) == pytest.approx(error_s)

    def test_every_counted_step_has_a_time_and_a_loss(
        self, measured: dict[str, Measurement], text: str
    ) -> None:
        found = measured[text]
        assert len(found.steps_s) == len(found.loss) == len(found.disturbed) == STEPS
        assert min(found.steps_s) <= found.step_time_s <= max(found.steps_s)
        assert found.world_size == 2
        assert found.warmup == 1

    def test_all_plans_train_the_same_model_on_the_same_tokens(
        self, measured: dict[str, Measurement], text: str
    ) -> None:
        assert measured[text].loss == pytest.approx(measured["dp=2"].loss, rel=1e-4)

    def test_the_timeline_is_one_step_of_all_ranks(
        self, measured: dict[str, Measurement], text: str
    ) -> None:
        found = measured[text]
        assert found.timeline.source == "measured"
        assert found.timeline.ranks == (0, 1)
        assert all(0 <= s.start_s <= s.end_s and s.stream in STREAMS for s in found.timeline.spans)
        assert any(found.timeline.end_s <= step_s for step_s in found.steps_s)

    def test_every_rank_runs_the_actions_of_its_schedule_in_order_and_then_the_optimizer(
        self, measured: dict[str, Measurement], text: str
    ) -> None:
        plan, schedule = parse_plan(text), schedule_of(text)
        for rank in (0, 1):
            actions = [str(action) for action in schedule.ranks[plan.coordinate(rank).pp]]
            assert in_order(spans(measured[text], rank, COMPUTE)) == [*actions, "optimizer"]

    def test_a_core_computes_one_thing_at_a_time(
        self, measured: dict[str, Measurement], text: str
    ) -> None:
        for rank in (0, 1):
            own = [s for s in measured[text].timeline.spans if s.rank == rank]
            own = sorted((s for s in own if not s.stream.startswith("pp_send")), key=lambda s: s.start_s)
            for before, after in pairwise(own):
                assert before.end_s <= after.start_s + 1e-9


@pytest.mark.slow
def test_replicas_sum_gradients_once_after_the_last_backward(measured: dict[str, Measurement]) -> None:
    (reduced,) = spans(measured["dp=2"], 0, DP)
    assert reduced.name == "gradients 0"
    backwards = [s for s in spans(measured["dp=2"], 0, COMPUTE) if s.kind == "backward"]
    assert reduced.start_s >= max(s.end_s for s in backwards)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["tp=2,micro_batch=4", "dp=4,ep=2,zero=1", "dp=4,ep=2,zero=2"])
def test_sums_of_experts_are_named_apart_from_those_of_all_replicas(text: str) -> None:
    """Two ranks hold the same experts in each of these; all others are those of every replica."""
    moe = dataclasses.replace(MODEL, moe=MoeSpec(experts=4, top_k=2, ffn_hidden=24))
    case = dataclasses.replace(timed(text), job=dataclasses.replace(JOB, model=moe), steps=1)
    (found,) = run_cases([case], Launch(timeout_s=120))
    assert isinstance(found, Measurement)
    replicas = {"gradients 0"} | ({"parameters 0"} if case.plan.zero else set())
    named = {f"expert {name}" for name in replicas} | (replicas if case.plan.dp > 1 else set())
    assert set(in_order(spans(found, 0, DP))) == named


@pytest.mark.slow
def test_fsdp_gathers_each_layer_twice_a_micro_batch_and_reduces_it_once(
    measured: dict[str, Measurement],
) -> None:
    """ZeRO-3: 4 layers and one unit of embedding and head, two micro-batches."""
    found = spans(measured["dp=2,zero=3,micro_batch=2"], 0, DP)
    units, micro_batches = MODEL.layers + 1, 2
    gathers = [s for s in found if s.name == "parameters 0"]
    assert len([s for s in found if s.name == "gradients 0"]) == units * micro_batches
    # The last unit of a forward may stay whole until its backward.
    assert (2 * units - 1) * micro_batches <= len(gathers) <= 2 * units * micro_batches


@pytest.mark.slow
def test_sequence_parallel_layers_communicate_as_megatron_does(
    measured: dict[str, Measurement],
) -> None:
    """Korthikanti et al. 2022, figure 5: per layer 2 all-gathers and 2 reduce-scatters each way."""
    found = spans(measured["tp=2,micro_batch=4"], 0, TP)
    backward = [s for s in found if s.name == "0B0"]
    ends = 2  # the gathered embedding gradient, and the head's input gradient
    assert len(backward) == 4 * MODEL.layers + ends


OVERFLOWING = 2.0**28
"""A loss scale under which fp16 gradients of the model above are infinite at first."""


@pytest.fixture(scope="module")
def in_fp16(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measurement]:
    """Fourteen steps of fp32 and of fp16, some also from a checkpoint behind the twelfth."""

    def case(text: str, *, scale: float = OVERFLOWING, dtype: str = "fp16") -> Case:
        return dataclasses.replace(timed(text), warmup=0, steps=14, dtype=dtype, loss_scale=scale)

    cases = {
        "exact": case("dp=2,micro_batch=4", dtype="fp32"),
        "scaled": case("dp=2,micro_batch=4", scale=65536.0),
        "frozen": case("dp=2,micro_batch=4", scale=2.0**60),  # fourteen halvings are not enough
        "replicas": case("dp=2,micro_batch=4"),
        "fsdp": case("dp=2,zero=3,micro_batch=4"),
        "tp": case("tp=2,micro_batch=8"),
        "pipeline": case("pp=2"),
    }
    again: dict[str, Case] = {}
    for name in ("frozen", "fsdp", "pipeline"):
        policy = Checkpoints(folder=str(tmp_path_factory.mktemp(name)), every=12)
        cases[name] = dataclasses.replace(cases[name], checkpoint=policy)
        begun = dataclasses.replace(policy, start=12)
        again[f"{name} again"] = dataclasses.replace(cases[name], checkpoint=begun)
    cases |= again  # run in this order
    found = run_cases(list(cases.values()), Launch(timeout_s=120))
    return {n: f for n, f in zip(cases, found, strict=True) if isinstance(f, Measurement)}


@pytest.mark.slow
def test_fp16_trains_as_fp32_does(in_fp16: dict[str, Measurement]) -> None:
    scaled = in_fp16["scaled"]
    assert scaled.loss == pytest.approx(in_fp16["exact"].loss, rel=2e-3)
    assert scaled.loss_scale == {"skipped_steps": 0, "final": 65536.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["replicas", "fsdp", "tp", "pipeline"])
def test_fp16_leaves_steps_out_until_gradients_are_finite(
    in_fp16: dict[str, Measurement], name: str
) -> None:
    found = in_fp16[name]
    skipped = int(found.loss_scale["skipped_steps"])
    assert 0 < skipped < 12
    assert found.loss_scale["final"] == OVERFLOWING / 2**skipped
    # Until then the weights are those of the beginning.
    frozen = in_fp16["frozen"].loss[: skipped + 1]
    assert found.loss[: skipped + 1] == pytest.approx(frozen, rel=2e-4)
    assert abs(found.loss[-1] / in_fp16["frozen"].loss[-1] - 1) > 1e-3


@pytest.mark.slow
def test_fp16_goes_on_with_the_scale_of_its_checkpoint(in_fp16: dict[str, Measurement]) -> None:
    for name in ("frozen", "fsdp", "pipeline"):
        written, resumed = in_fp16[name], in_fp16[f"{name} again"]
        assert resumed.resumed_at == 12
        assert resumed.loss == written.loss
        assert resumed.loss_scale["final"] == written.loss_scale["final"]


@pytest.mark.slow
def test_the_second_stage_waits_for_the_first(measured: dict[str, Measurement]) -> None:
    found = measured["pp=2,micro_batch=2"]
    received = spans(found, 1, "pp_recv_prev")
    assert in_order(received) == ["0F0", "0F1", "0F2", "0F3"]
    first = next(s for s in spans(found, 0, COMPUTE) if s.name == "0F0")
    assert next(s for s in spans(found, 1, COMPUTE) if s.name == "1F0").start_s >= first.end_s


def workers(temporary: Path) -> dict[int, int]:
    """Process ids by rank of the ranks that run now on behalf of this test."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            if b"parsim.execute.launch.worker" in command and os.fsencode(temporary) in command:
                environment = (process / "environ").read_bytes().split(b"\0")
                rank = next((e[5:] for e in environment if e.startswith(b"RANK=")), None)
                if rank is not None:
                    found[int(rank)] = int(process.name)
        except OSError:
            continue
    return found


def leftovers(temporary: Path) -> list[str]:
    """Processes and files of a run that are still there."""
    deadline = time.monotonic() + 10
    while workers(temporary) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [*map(str, workers(temporary)), *(p.name for p in temporary.iterdir())]


def run_until(after: int, act: Callable[[], None], timeout_s: float = 120.0) -> None:
    """Start a long run and do something when step `after` has ended."""

    def on_step(progress: Progress) -> None:
        if progress.step == after:
            act()

    execute(
        JOB, parse_plan("pp=2"), schedule_of("pp=2"), steps=100_000, warmup=0,
        how=Launch(timeout_s=timeout_s, on_step=on_step),
    )  # fmt: skip


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, empty and our own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_with_what_it_did(temporary: Path, rank: int) -> None:
    with pytest.raises(ParsimError, match=f"rank {rank} died without a word") as caught:
        run_until(3, lambda: os.kill(workers(temporary)[rank], signal.SIGKILL))
    assert "step" in (caught.value.where or "")
    assert leftovers(temporary) == []


def test_a_killed_rank_is_named_even_where_its_victim_ends_before_anyone_looks(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Ranks._wait_a_moment

    def look_late(ranks: Ranks) -> None:
        time.sleep(1.5)
        look(ranks)

    monkeypatch.setattr(Ranks, "_wait_a_moment", look_late)
    with pytest.raises(ParsimError, match="rank 1 died without a word"):
        run_until(3, lambda: os.kill(workers(temporary)[1], signal.SIGKILL))


def test_a_stopped_rank_is_named_and_not_those_that_wait_for_it(temporary: Path) -> None:
    with pytest.raises(ParsimError, match="rank 1 hangs") as caught:
        run_until(3, lambda: os.kill(workers(temporary)[1], signal.SIGSTOP), timeout_s=3.0)
    assert "(stopped)" in (caught.value.where or "")
    assert "rank 0: step" in (caught.value.where or "")
    assert leftovers(temporary) == []


def test_an_interrupted_run_leaves_its_checkpoint_and_nothing_else(
    temporary: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, notes = tmp_path_factory.mktemp("checkpoints"), list[str]()

    def on_step(progress: Progress) -> None:
        if progress.step == 2:
            signal.raise_signal(signal.SIGINT)

    policy = Checkpoints(folder=str(folder), every=1)
    with pytest.raises(KeyboardInterrupt):
        run_cases(
            [dataclasses.replace(timed("pp=2"), steps=100_000, checkpoint=policy)],
            Launch(timeout_s=120, on_step=on_step, on_note=notes.append),
        )
    assert leftovers(temporary) == []
    saved = newest(folder)
    assert saved is not None
    assert notes == [f"stopped; --resume goes on from the checkpoint after {saved.step} steps"]


def test_an_error_in_a_rank_is_told_in_one_line_with_the_traceback_as_a_note(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gloo refuses an interface that does not exist."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    with pytest.raises(ParsimError, match=r"rank [01] failed") as caught:
        execute(JOB, parse_plan("dp=2"), schedule_of("dp=2"), steps=1)
    assert "Traceback" not in str(caught.value)
    assert any("Traceback" in note for note in caught.value.__notes__)
    assert leftovers(temporary) == []
