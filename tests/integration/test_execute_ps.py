"""Parameter servers on real ranks: the weights are those of one process that does the same in order."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from parsim.cli.main import run_command
from parsim.errors import ParsimError
from parsim.execute.launch.attempts import Launch
from parsim.execute.launch.cases import run_cases, verification_case
from parsim.execute.measurement import Measurement, Verification
from parsim.execute.request import Case, Checkpoints, ParameterServers
from parsim.model import ModelSpec
from parsim.plan import Job, parse_plan
from parsim.schedule import make_schedule
from parsim.timeline import COMPUTE, DP

pytest.importorskip("torch")

MODEL = ModelSpec(
    name="llama", layers=2, hidden=32, heads=4, kv_heads=2, ffn_hidden=48, gated_mlp=True, vocab=64,
    max_seq_len=16,
)  # fmt: skip
BOUNDS = (0.0, 1.0, math.inf)
WORKERS, STEPS = 3, 12
RUN = "run micro_batch=2 --model tiny-llama-8l --seq-len 16"


def case(bound: float, *, verify: bool, plan: str = f"dp={WORKERS},recompute=full") -> Case:
    """Three workers, and two servers of which the first has two thirds of the model."""
    parsed = parse_plan(plan)
    job = Job(model=MODEL, seq_len=16, global_batch=2 * parsed.dp, precision="fp32", optimizer="sgd")
    schedule = make_schedule(parsed, parsed.num_micro_batches(job))
    made = Case(job=job, plan=parsed, schedule=schedule, steps=STEPS - 2, warmup=2)
    if verify:
        made = verification_case(job, parsed, schedule, steps=5)
    return dataclasses.replace(made, servers=ParameterServers(shares=(2.0, 1.0), bound=bound))


Found = dict[float, tuple[Verification, Measurement]]


@pytest.fixture(scope="module")
def served() -> Found:
    results = run_cases(
        [case(bound, verify=verify) for bound in BOUNDS for verify in (True, False)],
        Launch(timeout_s=120),
    )
    found: Found = {}
    for i, bound in enumerate(BOUNDS):
        verified, timed = results[2 * i : 2 * i + 2]
        assert isinstance(verified, Verification)
        assert isinstance(timed, Measurement)
        found[bound] = verified, timed
    return found


@pytest.mark.slow
@pytest.mark.parametrize("bound", BOUNDS)
def test_weights_and_losses_are_those_of_one_process(served: Found, bound: float) -> None:
    verified, _ = served[bound]
    assert verified.max_gradient_error <= 1e-10
    assert verified.max_loss_error <= 1e-10
    order = "single-process training" if bound == 0 else "recorded order"
    assert order in verified.against


@pytest.mark.slow
@pytest.mark.parametrize("bound", BOUNDS)
def test_staleness_and_lead_are_within_what_the_bound_allows(served: Found, bound: float) -> None:
    """Ho et al. 2013; and every gradient is counted at each of the two servers."""
    _, timed = served[bound]
    assert timed.served is not None
    assert timed.served.max_lead <= bound + 1
    assert len(timed.staleness) == WORKERS
    for ages in timed.staleness:
        assert sum(ages.values()) == 2 * STEPS
        assert max(ages) <= ((WORKERS - 1) * (2 * bound + 1) if bound else 0)
    if bound == math.inf:
        # All updates of the others fall into some step, but for those after a worker's own last one.
        assert sum(sum(age * n for age, n in ages.items()) for ages in timed.staleness) > 0


@pytest.mark.slow
def test_what_is_measured(served: Found) -> None:
    for _, timed in served.values():
        assert timed.world_size == WORKERS + 2
        assert len(timed.steps_s) == len(timed.loss) == STEPS - 2
        assert timed.served is not None
        assert sum(timed.served.worker_time.values()) == pytest.approx(1)
        assert all(0 <= share <= 1 for share in timed.served.worker_time.values())
        assert timed.served.worker_steps_per_s * timed.step_time_s == pytest.approx(WORKERS, rel=0.9)
        own = [s for s in timed.timeline.spans if s.rank == 0]
        assert [s.name for s in own if s.stream == DP] == ["wait", "pull", "push"]
        assert [s.name for s in own if s.stream == COMPUTE] == ["0F0", "0B0", "0F1", "0B1"]
        assert any(s.kind == "optimizer" and s.rank >= WORKERS for s in timed.timeline.spans)


@pytest.mark.slow
def test_the_command_says_measured_beside_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, chart = tmp_path / "measured.json", tmp_path / "chart.svg"
    command = f"{RUN} --ps workers=2,servers=1,mode=ssp,bound=2 --steps 3 --warmup 1"
    assert run_command([*command.split(), "-o", str(file), "--chart", str(chart)]) == 0
    assert "stale synchronous, bound 2" in capsys.readouterr().out
    found = json.loads(file.read_text())
    item = found["parameter_server"]
    assert (item["mode"], item["bound"], item["workers"], item["servers"]) == ("ssp", 2, 2, 1)
    assert found["world_size"] == 3
    assert found["predicted_s"] == item["predicted"]["step_time_s"]
    assert sum(item["staleness"]["histogram"].values()) == 2 * 4
    assert chart.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--ps workers=2,jitter=0.1", "a run finds out"),
        ("--ps workers=2,mode=ssp", "a bound goes with"),
        ("--ps servers=1", "several workers"),
        ("--ps workers=2 --checkpoint nowhere", "clocks of parameter servers"),
        ("--ps workers=2 --one-rank 0", "runs one rank alone"),
        ("--ps workers=2 --device cuda --hardware h100-sxm-80gb", "CPU ranks only"),
    ],
)
def test_what_goes_with_no_servers_is_refused(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command([*RUN.split(), *arguments.split()]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("plan", ["dp=2,zero=1", "dp=2,tp=2", "dp=2,compression=fp16"])
def test_plans_whose_replicas_are_no_single_rank_are_refused(plan: str) -> None:
    with pytest.raises(ParsimError, match="one rank that holds the model once"):
        run_cases([case(0.0, verify=False, plan=plan)])


def test_a_dry_run_shows_the_servers(capsys: pytest.CaptureFixture[str]) -> None:
    command = f"{RUN} --ps workers=2,servers=2 --dry-run"
    assert run_command(command.split()) == 0
    out = capsys.readouterr().out
    assert "4 ranks" in out
    assert out.count("parameter server") == 2


def test_checkpoints_are_refused_in_python_too() -> None:
    policy = Checkpoints(folder="/nonexistent", every=1)
    with pytest.raises(ParsimError, match="clocks of parameter servers"):
        run_cases([dataclasses.replace(case(0.0, verify=False), checkpoint=policy)])
