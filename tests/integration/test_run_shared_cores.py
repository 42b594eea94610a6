"""`parsim run` with more ranks than cores: what it says of its own prediction, on given measurements."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from parsim.cli.main import run_command
from parsim.cli.run_compare import compared
from parsim.cli.run_launch import timed_case
from parsim.execute.measurement import Measurement
from parsim.execute.request import Case
from parsim.plan import parse_plan
from parsim.setup import Flags, load_plan
from parsim.simulate.fold import unfolded
from parsim.simulate.prediction import predict
from parsim.timeline import Timeline

FLAGS = {"model": "tiny-llama-8l", "hardware": "local-cpu", "seq_len": 128}
CORES = 2


def measured(case: Case, timeline: Timeline, step_time_s: float) -> Measurement:
    """One undisturbed step of that timeline, which took so long."""
    empty: dict[str, Any] = dict.fromkeys(
        ("gradient_sent_bytes", "weight_versions", "staleness", "peak_memory_bytes", "failures"), ()
    )
    return Measurement(
        job=case.job,
        plan=case.plan,
        step_time_s=step_time_s,
        steps_s=(step_time_s,),
        loss=(1.0,),
        disturbed=(False,),
        foreign_cpu_s=(0.0,),
        spread=0.0,
        timeline=dataclasses.replace(timeline, source="measured"),
        loss_scale={},
        world_size=case.world_size,
        warmup=0,
        seed=0,
        dtype="fp32",
        device="cpu",
        machine="a test's",
        torch_version="none",
        resumed_at=0,
        **empty,
    )


@pytest.mark.parametrize("plan", ["dp=4", "dp=2,pp=2,micro_batch=1,schedule=1f1b"])
@pytest.mark.parametrize("longer", [1.0, 1.5])
def test_causes_add_up_to_the_error_where_ranks_share_cores(plan: str, longer: float) -> None:
    setup, parsed = load_plan(plan, Flags(**FLAGS))  # type: ignore[arg-type]
    case = timed_case(setup, parsed, steps=1, warmup=0, seed=0)
    prediction, folded = predict(setup.job, parsed, setup.costs(), cores=CORES)
    timeline = unfolded(folded, parsed)
    step = measured(case, timeline, longer * prediction.step_time_s)
    found = compared(setup, case, timeline, step, CORES)
    assert found is not None
    error_s = found.whole.predicted_s - found.whole.measured_s
    assert error_s == pytest.approx((1 - longer) * prediction.step_time_s)
    assert sum(cause.difference_s for cause in found.causes) == pytest.approx(error_s, abs=1e-9)
    # Everything took so many times as long, so every part is to blame, and none hides another.
    assert all(cause.difference_s <= 1e-9 for cause in found.causes)


def test_run_says_why_and_its_document_names_the_cores(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def half_as_long_again(cases: list[Case], _: object) -> list[Measurement]:
        (case,) = cases
        setup, plan = load_plan("dp=4", Flags(**FLAGS))  # type: ignore[arg-type]
        assert case.plan == parse_plan("dp=4") == plan
        prediction, timeline = predict(setup.job, plan, setup.costs(), cores=CORES)
        return [measured(case, unfolded(timeline, plan), 1.5 * prediction.step_time_s)]

    monkeypatch.setattr("parsim.execute.launch.attempts.usable_cores", lambda: list(range(CORES)))
    monkeypatch.setattr("parsim.cli.run.run_all", half_as_long_again)
    path = tmp_path / "measurement.json"
    words = "run dp=4 --model tiny-llama-8l --hardware local-cpu --seq-len 128 --device cpu --steps 1"
    assert run_command([*words.split(), "-o", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["cores"] == CORES
    assert written["error"] == pytest.approx(1 / 1.5 - 1)
    assert "compute" in written["because"]
    assert "1.50 times what was predicted" in written["because"]
    page = tmp_path / "page"
    assert run_command(["report", str(path), "-o", str(page)]) == 0
    for cores in (0, -1, 1.5, "two"):
        path.write_text(json.dumps(written | {"cores": cores}))
        capsys.readouterr()
        assert run_command(["report", str(path), "-o", str(tmp_path / "none")]) == 2
        assert "cores" in capsys.readouterr().err
        assert not (tmp_path / "none").exists()
