"""Which rank torchrun's or srun's environment makes of a process."""

from __future__ import annotations

import pytest

from parsim.cli.run_joined import goes_on, joined_here, require_ranks
from parsim.errors import ParsimError
from parsim.execute.launch.joined import Joined, joined_rank
from parsim.plan import parse_plan

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


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tmp_path: object) -> None:
    from pathlib import Path

    assert not goes_on(joined_rank(TORCHRUN), None)
    assert not goes_on(joined_rank(TORCHRUN), Path(str(tmp_path)) / "none yet")
