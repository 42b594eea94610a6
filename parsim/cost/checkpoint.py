"""Checkpoints and failures of a long run in closed form: the expected goodput, and the best interval.

Failures come as a Poisson process; one during a checkpoint or a restart counts like any other. Sources:
J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974; J. T.
Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation
Computer Systems 22(3), 2006.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from parsim.cost.memory import optimizer_bytes, stored_weight_bytes
from parsim.errors import ParsimError
from parsim.model import num_parameters
from parsim.plan import Job, ParallelPlan
from parsim.stack import Stack


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointing:
    """When checkpoints are taken, and what they cost.

    Training stops for `blocking_s`; for `background_s` after that it goes on while the checkpoint is
    still being written, and a failure then falls back on the checkpoint before.
    """

    interval_s: float
    """Training between two checkpoints; never less than the background part of the one before."""
    blocking_s: float
    background_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.interval_s < math.inf:
            raise ParsimError("an interval takes some time", where="interval_s", got=self.interval_s)
        for key in ("blocking_s", "background_s"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ParsimError("a time cannot be negative", where=key, got=getattr(self, key))

    @property
    def between_s(self) -> float:
        """Training between two checkpoints, the wait for the one before included."""
        return max(self.interval_s, self.background_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """How often a job fails, and what it takes to train again."""

    mtbf_s: float
    """Mean time between failures of the whole job while its nodes work; infinite where none fail."""
    restart_s: float
    """Detection, start of the processes, and load of the last checkpoint."""
    spares: int | None = None
    """Nodes that stand by; None where there always is another."""
    repair_s: float = 0.0
    """Until a failed node stands by again; without a spare the job waits for one."""

    def __post_init__(self) -> None:
        if not self.mtbf_s > 0:
            raise ParsimError("a time between failures is positive", where="mtbf", got=self.mtbf_s)
        for key in ("restart_s", "repair_s"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ParsimError("a time cannot be negative", where=key, got=getattr(self, key))
        if self.spares is not None and self.spares < 0:
            raise ParsimError("spares are a number of nodes", where="spares", got=self.spares)


def checkpoint_bytes(job: Job, plan: ParallelPlan, stack: Stack) -> float:
    """Bytes of a checkpoint of the whole model: its weights and optimizer states, each once."""
    kept = stored_weight_bytes(job, plan, stack) + optimizer_bytes(job, stack)
    return num_parameters(job.model) * kept


def young_interval_s(write_s: float, mtbf_s: float) -> float:
    """√(2·δ·M): Young 1974, for checkpoints much shorter than the time between failures.

    >>> young_interval_s(300.0, 6 * 3600.0)
    3600.0
    """
    return math.sqrt(2 * write_s * mtbf_s)


def daly_interval_s(write_s: float, mtbf_s: float) -> float:
    """√(2δM)·[1 + ⅓·√(δ/2M) + ⅑·δ/2M] − δ where δ < 2M, else M: Daly 2006.

    >>> [round(daly_interval_s(5.0, mtbf), 1) for mtbf in (24 * 60.0, 6 * 60.0, 15.0)]
    [116.7, 56.7, 9.1]
    """
    if write_s >= 2 * mtbf_s:
        return mtbf_s
    share = write_s / (2 * mtbf_s)
    return young_interval_s(write_s, mtbf_s) * (1 + math.sqrt(share) / 3 + share / 9) - write_s


def best_interval_s(blocking_s: float, mtbf_s: float) -> float:
    """The training time between checkpoints that makes `expected_goodput` greatest.

    Its derivative vanishes at τ = M·(1 + W₀(−e^(−1 − δ/M))), W₀ being Lambert's function; Daly 2006
    expands this in √(δ/2M). Neither restarts, nor waiting, nor a background write moves it. 0 where
    checkpoints stop nothing, infinite where nothing fails.
    """
    from scipy.special import lambertw

    if math.isinf(mtbf_s):
        return math.inf if blocking_s else 0.0
    share = blocking_s / mtbf_s
    if share < 1e-4:  # next to its branch point -1/e the function loses digits that the series has
        return daly_interval_s(blocking_s, mtbf_s)
    return float(mtbf_s * (1 + lambertw(-math.exp(-1 - share)).real))


def expected_goodput(checkpointing: Checkpointing, failures: Failures) -> float:
    """Share of a long run's wall time that trains the model and is not lost again.

    Daly's complete cost function, (τ/M) / (e^((R+g)/M)·(e^((τ+δ)/M) − 1)), where δ is the part of a
    checkpoint that stops training. Its background part g enters like a longer restart: from one
    durable checkpoint to the next there are τ + δ, but after a failure R + τ + δ + g. What waiting for
    nodes leaves of the time is 1 − `waiting_share`.
    """
    train_s = checkpointing.between_s
    cycle_s = train_s + checkpointing.blocking_s
    mtbf_s = failures.mtbf_s
    if math.isinf(mtbf_s):
        return train_s / cycle_s
    again_s = failures.restart_s + checkpointing.background_s + cycle_s
    goodput = train_s / mtbf_s * math.exp(-again_s / mtbf_s) / -math.expm1(-cycle_s / mtbf_s)
    return goodput * (1 - waiting_share(failures))


def waiting_share(failures: Failures) -> float:
    """Share of the wall time in which the job waits for a node to be repaired.

    The nodes under repair are the customers of a queue without room to wait: failures come at rate
    1/M while no more than `spares` are away, and one more stops the job. So it is Erlang's loss
    formula B(spares + 1, repair/M), which holds for repairs of any distribution (Sevastyanov 1957).
    """
    if failures.spares is None or failures.repair_s == 0:
        return 0.0
    load = failures.repair_s / failures.mtbf_s
    blocked = 1.0
    for servers in range(1, failures.spares + 2):
        blocked = load * blocked / (servers + load * blocked)
        if blocked == 0.0:  # too small for a float, and smaller still with more spares
            break
    return blocked
