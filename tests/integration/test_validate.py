"""`parsim validate PREDICTION MEASUREMENT`: a step's error itemised, drawn and traced."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from parsim.cli.main import run_command
from parsim.cli.validate_step import slowest_replicas
from parsim.export.timeline_json import timeline_to_data
from parsim.plan import ParallelPlan
from parsim.schedule.program import task_times, timeline_of
from parsim.setup import Flags, load_plan
from parsim.simulate.fold import unfolded
from parsim.simulate.prediction import predict, program_of
from parsim.timeline import Span, Timeline, breakdown_s


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run_command([*arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_validate_itemises_a_step_with_its_spans(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A step of which all compute took a quarter longer: validate replays the prediction and says so."""
    plan = "dp=2,tp=2,pp=2,micro_batch=1,schedule=1f1b"
    flags = ["--model", "tiny-llama-8l", "--hardware", "local-cpu", "--seq-len", "128"]
    prediction = answer(capsys, "simulate", *flags, "--plan", plan)
    (tmp_path / "prediction.json").write_text(json.dumps(prediction))
    setup, parsed = load_plan(str(tmp_path / "prediction.json"), Flags())
    program, _ = program_of(setup.job, parsed, setup.costs())
    slower = tuple(
        t._replace(duration_s=1.25 * t.duration_s) if t.stream == "compute" else t for t in program.tasks
    )
    program = dataclasses.replace(program, tasks=slower)
    timeline = unfolded(timeline_of(program, task_times(program)), parsed)
    timeline = dataclasses.replace(timeline, source="measured")
    measurement = {
        "step_time_s": timeline.end_s,
        "plan": prediction["plan"],
        "breakdown_s": breakdown_s(timeline),
        "timeline": timeline_to_data(timeline),
    }
    (tmp_path / "measurement.json").write_text(json.dumps(measurement))
    paths = [str(tmp_path / name) for name in ("prediction.json", "measurement.json")]
    pictures = {flag: tmp_path / f"{flag[2:]}.svg" for flag in ("--chart", "--waterfall")}
    trace = tmp_path / "both.json"
    extra = [str(word) for pair in pictures.items() for word in pair]
    found = answer(capsys, "validate", *paths, *extra, "--trace", str(trace))
    causes = {cause["what"]: cause["difference_s"] for cause in found["causes"]}
    error_s = found["predicted_s"] - found["measured_s"]
    assert sum(causes.values()) == pytest.approx(error_s, rel=1e-9)
    assert causes["compute"] + causes["optimizer"] == pytest.approx(error_s, rel=1e-6)
    assert "because of compute" in found["finding"]
    assert [row["rank"] for row in found["ranks"]] == list(range(8))
    assert all("because of compute" in path.read_text() for path in pictures.values())
    processes = {
        event["args"]["name"]
        for event in json.loads(trace.read_text())["traceEvents"]
        if event["name"] == "process_name"
    }
    assert processes == {f"{source} rank {i}" for source in ("simulated", "measured") for i in range(8)}


@pytest.mark.parametrize("plan", ["dp=4", "dp=2,pp=2,micro_batch=1,schedule=1f1b"])
def test_ranks_on_shared_cores_are_compared_with_what_is_predicted_for_these(
    plan: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Four ranks ran on two cores exactly as predicted for two: no error, and nothing that explains one.
    Of a step half as long again all causes together explain what is missing.
    """
    flags = ["--model", "tiny-llama-8l", "--hardware", "local-cpu", "--seq-len", "128"]
    prediction = answer(capsys, "simulate", *flags, "--plan", plan)
    paths = tmp_path / "prediction.json", tmp_path / "measurement.json"
    paths[0].write_text(json.dumps(prediction))
    setup, parsed = load_plan(str(paths[0]), Flags())
    shared, folded = predict(setup.job, parsed, setup.costs(), cores=2)
    assert shared.step_time_s > 1.3 * prediction["step_time_s"]
    timeline = dataclasses.replace(unfolded(folded, parsed), source="measured")
    measurement = {
        "step_time_s": shared.step_time_s,
        "plan": prediction["plan"],
        "breakdown_s": shared.breakdown_s,
        "timeline": timeline_to_data(timeline),
        "cores": 2,
    }
    for longer, error in ((1.0, 0.0), (1.5, 1 / 1.5 - 1)):
        measurement["step_time_s"] = longer * shared.step_time_s
        paths[1].write_text(json.dumps(measurement))
        found = answer(capsys, "validate", *map(str, paths))
        assert found["error"] == pytest.approx(error, abs=1e-9)
        assert found["predicted_s"] == pytest.approx(shared.step_time_s)
        error_s = found["predicted_s"] - found["measured_s"]
        causes = [cause["difference_s"] for cause in found["causes"]]
        assert sum(causes) == pytest.approx(error_s, abs=1e-9)
        assert sum(map(abs, causes)) == pytest.approx(abs(error_s), abs=1e-6)
    measurement["cores"] = 0
    paths[1].write_text(json.dumps(measurement))
    assert run_command(["validate", *map(str, paths)]) == 2
    assert "measurement.json: cores" in capsys.readouterr().err


def test_of_many_replicas_the_slowest_is_drawn() -> None:
    plan = ParallelPlan(dp=16, pp=2)
    longer = {5: 1.5, 20: 1.2}
    spans = tuple(
        Span(rank, "compute", "0F0", 0.0, longer.get(rank, 1.0), "forward") for rank in range(32)
    )
    assert slowest_replicas(Timeline(spans=spans), plan) == (5, 20)
    few = Timeline(spans=spans[:16])
    assert slowest_replicas(few, plan) == few.ranks
