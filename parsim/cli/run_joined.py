"""`parsim run` started by torchrun or srun, once for every rank: all take part, one speaks."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from parsim.cli.output import say
from parsim.errors import ParsimError

if TYPE_CHECKING:
    from parsim.execute.launch.joined import Joined
    from parsim.plan import ParallelPlan

ALONE_AFTER_S = 3.0
"""How long the first rank has to end for the same reason; the first of each machine for its others, too.

torchrun looks for ranks that have ended ten times a second."""


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
    if joined is not None:
        # Whoever started the ranks ends them so: a rank that waits for a lost one must not wait on.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
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


@contextlib.contextmanager
def one_voice(joined: Joined | None) -> Iterator[None]:
    """Only the first rank says what all would say; others say nothing but why they failed.

    What stops them all alike stops the first one too, which says it and whose end makes torchrun end the
    others. One that is still there after a while has failed alone: it says so before it ends.
    """
    from parsim.execute.launch.watch import RankLost

    if joined is None:
        yield
    elif joined.rank == 0:
        say(f"{joined.world_size} ranks, started by torchrun or srun; this is the first")
        yield
    else:
        try:
            with (
                open(os.devnull, "w", encoding="utf-8") as nowhere,
                contextlib.redirect_stdout(nowhere),
                contextlib.redirect_stderr(nowhere),
            ):
                yield
        except RankLost:
            raise  # says which rank
        except ParsimError as error:
            time.sleep(ALONE_AFTER_S * (1 if joined.local_rank == 0 else 2))
            say(f"rank {joined.rank}: error: {error}")
            raise typer.Exit(error.exit_code) from None
