"""`parsim run` started by torchrun or srun, once for every rank: all take part, one speaks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from parsim.cli.output import say
from parsim.errors import ParsimError

if TYPE_CHECKING:
    from pathlib import Path

    from parsim.execute.launch.joined import Joined
    from parsim.plan import ParallelPlan


def joined_here(nnodes: int, excluded: dict[str, bool]) -> Joined | None:
    """The rank that this process is for torchrun or srun; None where it is to start ranks itself.

    Raises ParsimError for flags of the command that only whoever starts ranks can follow.
    """
    from parsim.execute.launch.joined import joined_rank

    if nnodes > 1:
        return None  # the script of `parsim export --to slurm` starts one process a machine
    joined = joined_rank(os.environ)
    given = [flag for flag, is_given in excluded.items() if is_given]
    if joined is not None and given:
        raise ParsimError(
            f"{given[0]} is for a command that starts its ranks itself",
            where=given[0],
            got=f"rank {joined.rank} of {joined.world_size}, started by torchrun or srun",
            hint="torchrun has a --max-restarts of its own" if given[0] == "--max-restarts" else None,
        )
    return joined


def require_ranks(joined: Joined | None, plan: ParallelPlan) -> None:
    """Raise ParsimError where another number of ranks was started than the plan has."""
    if joined is None or joined.world_size == plan.gpus:
        return
    raise ParsimError(
        "the plan has another number of ranks than were started",
        where="WORLD_SIZE",
        got=f"{joined.world_size} ranks, {plan.gpus} in the plan",
        hint=f"torchrun --nproc-per-node {plan.gpus} on one machine, or parsim run by itself",
    )


def goes_on(joined: Joined | None, checkpoint: Path | None) -> bool:
    """Whether torchrun has lost a rank and started all again, with something to go on from."""
    from parsim.execute.launch.checkpoint_folder import newest

    if joined is None or not joined.restarts or checkpoint is None or not checkpoint.is_dir():
        return False
    return newest(checkpoint) is not None


@contextlib.contextmanager
def one_voice(joined: Joined | None) -> Iterator[None]:
    """Only the first rank says what all would say; others say nothing but why they failed."""
    from parsim.execute.launch.watch import RankLost

    if joined is None:
        yield
    elif joined.rank == 0:
        say(f"{joined.world_size} ranks, started by torchrun or srun; this is the first")
        yield
    else:
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            try:
                yield
            except RankLost:
                raise  # told outside of this
            except ParsimError as error:
                raise typer.Exit(error.exit_code) from None  # the first one has the same
