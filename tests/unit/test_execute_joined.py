"""Which rank torchrun's or srun's environment makes of a process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from parsim.cli.output import say
from parsim.cli.run_joined import joined_here, one_voice, require_ranks
from parsim.cli.run_verify import only_verified
from parsim.errors import ParsimError
from parsim.execute.launch.attempts import Launch
from parsim.execute.launch.cases import resumed
from parsim.execute.launch.joined import Joined, first_line, joined_rank
from parsim.plan import parse_plan
from tests.unit.test_execute_checkpoint_folder import case, write

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0", "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "2",
}  # fmt: skip
SRUN = {
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
MEETING = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_torchrun_says_everything() -> None:
    assert joined_rank(TORCHRUN) == Joined(
        rank=5, world_size=8, local_rank=1, local_world_size=4, restarts=2
    )


@pytest.mark.parametrize("ranks", [{}, {"RANK": "5", "WORLD_SIZE": "8"}])
def test_a_task_of_srun_is_a_rank(ranks: dict[str, str]) -> None:
    """Slurm's manual, srun, output environment variables; some scripts set torch's names besides."""
    joined = joined_rank(SRUN | MEETING | ranks)
    assert joined == Joined(rank=5, world_size=8, local_rank=1, local_world_size=4)
    assert joined.variables()["LOCAL_WORLD_SIZE"] == "4"
    assert "GLOO_SOCKET_IFNAME" not in joined.variables()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0"},  # left over from something else
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"},  # the script of an sbatch job itself
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_a_process_on_its_own_starts_its_ranks(environment: dict[str, str]) -> None:
    assert joined_rank(environment) is None


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (SRUN, "do not know where to meet"),
        (TORCHRUN | {"RANK": "first"}, "whole number"),
        ({k: v for k, v in TORCHRUN.items() if k != "LOCAL_RANK"}, "its place on its machine"),
        (SRUN | MEETING | {"SLURM_STEP_TASKS_PER_NODE": "4,2"}, "same number of ranks"),
    ],
)
def test_half_an_environment_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ParsimError, match=said):
        joined_rank(environment)


def test_a_rank_starts_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in TORCHRUN.items():
        monkeypatch.setenv(key, value)
    assert joined_here(1, {"--max-restarts": False}) is not None
    assert joined_here(2, {}) is None  # one process a machine, as the exported script starts them
    with pytest.raises(ParsimError, match="--max-restarts is for a command that starts"):
        joined_here(1, {"--ps": False, "--max-restarts": True})


def test_the_plan_has_the_ranks_that_were_started() -> None:
    joined = joined_rank(TORCHRUN)
    require_ranks(joined, parse_plan("dp=2,tp=2,pp=2"))
    require_ranks(None, parse_plan("dp=3"))
    with pytest.raises(ParsimError, match="another number of ranks"):
        require_ranks(joined, parse_plan("dp=4"))


def of_torchrun(logs: str, *, attempt: int = 0, run_id: str = "none", rank: int = 0) -> Joined:
    """A rank as torchrun starts it, with its logs in a folder of a random name."""
    found = joined_rank(
        TORCHRUN
        | {
            "RANK": str(rank), "TORCHELASTIC_RUN_ID": run_id, "TORCHELASTIC_RESTART_COUNT": str(attempt),
            "TORCHELASTIC_ERROR_FILE": f"torchelastic_x/{logs}/attempt_{attempt}/{rank}/error.json",
        }
    )  # fmt: skip
    assert found is not None
    return found


def test_a_launch_has_a_name_that_outlives_restarts_and_is_no_others() -> None:
    first = of_torchrun("none_a1b2").launch
    assert first
    assert of_torchrun("none_a1b2", attempt=3).launch == first
    assert of_torchrun("none_c3d4").launch != first  # the id is "none" where nobody gives one
    assert of_torchrun("none_a1b2", run_id="night").launch != first
    srun = joined_rank(SRUN | MEETING)
    assert srun is not None
    assert srun.launch == ""


def begins_at(folder: Path, joined: Joined, *, resume: bool = False, steps: int = 40) -> int:
    """After how many steps `parsim run --checkpoint FOLDER` begins on a rank."""
    done = resumed(case(folder, steps=steps), Launch(joined=joined), resume=resume)
    assert done.checkpoint is not None
    return done.checkpoint.start


def test_a_restart_goes_on_only_from_what_its_own_launch_wrote(tmp_path: Path) -> None:
    earlier, later = of_torchrun("none_earlier"), of_torchrun("none_later")
    assert begins_at(tmp_path, earlier) == 0
    assert begins_at(tmp_path, of_torchrun("none_earlier", attempt=1)) == 0  # lost before it wrote any
    write(tmp_path, 5)
    assert begins_at(tmp_path, of_torchrun("none_earlier", attempt=2)) == 5
    for attempt in range(3):  # torchrun starts what refused again and again
        with pytest.raises(ParsimError, match="checkpoints of an earlier run"):
            begins_at(tmp_path, of_torchrun("none_later", attempt=attempt))
    assert begins_at(tmp_path, later, resume=True) == 5
    write(tmp_path, 10)
    assert begins_at(tmp_path, of_torchrun("none_later", attempt=1)) == 10
    with pytest.raises(ParsimError, match="checkpoints of an earlier run"):
        begins_at(tmp_path, of_torchrun("none_earlier", attempt=3))


def test_a_run_that_parsim_started_leaves_nothing_for_torchrun_to_go_on_from(tmp_path: Path) -> None:
    begins_at(tmp_path, of_torchrun("none_a"))
    write(tmp_path, 5)
    resumed(case(tmp_path), Launch(), resume=True)
    with pytest.raises(ParsimError, match="checkpoints of an earlier run"):
        begins_at(tmp_path, of_torchrun("none_a", attempt=1))


def test_what_failed_behind_the_last_step_runs_that_step_again(tmp_path: Path) -> None:
    """As a plan that --verify finds different: its answer must come again, not "already at the end"."""
    begins_at(tmp_path, of_torchrun("none_a"), steps=8)
    write(tmp_path, 5)
    write(tmp_path, 10)  # 8 steps and 2 of warm-up: the end
    assert begins_at(tmp_path, of_torchrun("none_a", attempt=1), steps=8) == 5


def test_the_first_rank_decides_for_all_of_torchruns(tmp_path: Path) -> None:
    write(tmp_path, 5)
    assert begins_at(tmp_path, of_torchrun("none_a", rank=5)) == 0  # it will follow rank 0, or be ended


def fail_aloud() -> None:
    say("what all say")
    raise ParsimError("no such file", where="--tokens")


def test_a_rank_that_fails_alone_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    for rank in (4, 5):  # the first and the second of their machine
        joined = Joined(rank=rank, world_size=8, local_rank=rank % 4, local_world_size=4)
        with pytest.raises(typer.Exit) as end, one_voice(joined):
            fail_aloud()
        assert end.value.exit_code == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err == f"rank {rank}: error: no such file\n  where:    --tokens\n"
    assert 0 < waited[0] < waited[1]  # one speaks for its machine, and torchrun ends the others


def test_an_exception_without_a_message_is_named() -> None:
    assert first_line(RuntimeError()) == "RuntimeError"
    assert first_line(RuntimeError("one\ntwo")) == "RuntimeError: one"


@pytest.mark.parametrize(("rank", "left_out"), [(0, True), (1, False)])
def test_the_first_rank_decides_whether_there_is_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: int, left_out: bool
) -> None:
    monkeypatch.setattr("parsim.execute.devices.available_memory_bytes", lambda: 1.0)
    how = Launch(joined=Joined(rank=rank, world_size=2, local_rank=rank, local_world_size=2))
    prediction = SimpleNamespace(memory=SimpleNamespace(peak=2.0))
    asked: Any = {"draws": False, "verify": True}
    assert only_verified(case(tmp_path), how, prediction, **asked) == left_out  # type: ignore[arg-type]
    with pytest.raises(ParsimError, match="do not fit"):
        only_verified(case(tmp_path), how, prediction, draws=False, verify=False)  # type: ignore[arg-type]
