"""Any command on any files is refused in words, or its document holds together.

In one process, by the function that `parsim` runs: what the shell adds is tested elsewhere.
PARSIM_RANDOM_EXAMPLES and PARSIM_RANDOM_SEED as in test_random_plans.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import event

from parsim.cli.main import run_command
from parsim.config import to_data, to_toml
from parsim.plan import ParallelPlan
from parsim.simulate.prediction import predict
from tests.invariants import check_figures, check_item
from tests.worlds import World, drawn

TARGETS = ("torchtitan", "megatron", "deepspeed", "slurm", "schedule-csv")


class Answer(NamedTuple):
    """What a command said."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document, without numbers that JSON does not have."""

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} in JSON")

        found: dict[str, Any] = json.loads(self.out, parse_constant=refuse)
        return found


def run(*words: str) -> Answer:
    """One command in this process; whatever happens, no traceback and no half an answer."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run_command(["--no-config", *words])
    answer = Answer(status, out.getvalue(), err.getvalue())
    assert status in (0, 1, 2), answer
    assert "Traceback" not in answer.err
    assert "defect" not in answer.err, answer.err
    if status == 2:
        assert answer.err.startswith("error: "), answer
        assert not answer.out, answer
    return answer


@contextlib.contextmanager
def files_of(world: World) -> Iterator[list[str]]:
    """The flags that describe a world, with files where it is not of shipped parts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, machine, stack = (folder / f"{part}.toml" for part in ("model", "machine", "stack"))
        model.write_text(to_toml(to_data(world.job.model)))
        machine.write_text(to_toml(asdict(world.cluster)))
        stack.write_text(to_toml(asdict(world.stack)))
        yield [
            *("--model", str(model)),
            *("--hardware", world.cluster.name if world.cluster.name != "drawn" else str(machine)),
            *("--stack", world.stack.name if world.stack.name != "plain" else str(stack)),
            *("--global-batch", str(world.job.global_batch)),
            *("--seq-len", str(world.job.seq_len)),
            *("--precision", world.job.precision),
        ]


def plan_flags(plan: ParallelPlan) -> list[str]:
    """A plan in its short form, with the one field that stacks decide where it is left out."""
    return ["--plan", f"{plan.short()}" + (",tp_overlap=false" if not plan.tp_overlap else "")]


@drawn(0.06, shrink=False)
def test_simulate_says_what_python_says(world: World) -> None:
    with files_of(world) as flags:
        answer = run("simulate", *flags, *plan_flags(world.plan), "--json")
    event(f"status {answer.status}")
    if answer.status == 2:
        return
    item = answer.document
    check_item(item)
    assert item["fits"] == (answer.status == 0)
    if world.job.optimizer == "adamw":  # the command line has no other
        prediction, _ = predict(world.job, world.plan, world.costs())
        expected = json.loads(json.dumps(prediction.to_item()))
        for key in ("plan", "step_time_s", "breakdown_s", "memory_bytes", "interval_s", "mfu"):
            assert item[key] == expected[key], key


@drawn(0.02, shrink=False)
def test_simulate_with_everything(world: World) -> None:
    more = ["--fabric", world.fabric] if world.fabric else []
    for straggler in world.uneven.stragglers:
        more += ["--straggler", f"rank={straggler.rank},slow={straggler.slow},link={straggler.link}"]
    more += ["--jitter", str(world.uneven.jitter), "--mtbf", "50000 h", "--detail", "operations"]
    with files_of(world) as flags, tempfile.TemporaryDirectory() as name:
        trace, csv, page = (Path(name) / part for part in ("trace.json", "schedule.csv", "page"))
        paths = ["--trace", str(trace), "--schedule-csv", str(csv), "--report", str(page)]
        answer = run("simulate", *flags, *plan_flags(world.plan), *more, *paths, "--json")
        event(f"status {answer.status}")
        if answer.status == 2:
            assert not trace.exists()
            assert not page.exists()
            return
        check_item(answer.document)
        assert json.loads(trace.read_text())["traceEvents"]
        assert (page / "simulate.html").stat().st_size > 10_000
        again = run("simulate", *flags, *plan_flags(world.plan), *more, *paths[2:4], "--json")
    assert again.document["step_time_s"] == answer.document["step_time_s"]


@drawn(0.02, shrink=False)
def test_every_export_and_schedule_of_a_random_plan(world: World) -> None:
    with files_of(world) as flags:
        for target in TARGETS:
            answer = run("export", plan_flags(world.plan)[1], *flags[:-2], "--to", target)
            event(f"{target}: status {answer.status}")
            assert answer.out or answer.status == 2
        answer = run("compare-schedules", *flags, *plan_flags(world.plan), "--json")
        event(f"compare-schedules: status {answer.status}")
        if answer.status != 2:
            check_figures(answer.document)


@drawn(0.01, shrink=False)
def test_a_search_on_a_random_machine(world: World) -> None:
    gpus = min(world.plan.gpus, 4)
    with files_of(world) as flags:
        answer = run(
            "plan", *flags, "--gpus", str(gpus), "--budget-s", "1", "--processes", "1", "--json"
        )
        event(f"plan: status {answer.status}")
        if answer.status == 2:
            return
        found = answer.document
        check_figures(found)
        space = found["space"]
        assert space["enumerated"] == space["fits"] + sum(space["rejected"].values())
        for item in found["plans"]:
            check_item(item)
            assert item["gpus"] == gpus
            assert item["fits"]
        if found["plans"]:
            path = Path(flags[1]).parent / "best.json"
            path.write_text(answer.out)
            again = run("simulate", "--plan", str(path), "--json")
            assert again.status == 0
            assert again.document["step_time_s"] == found["plans"][0]["step_time_s"]
