"""The search's work on several cores: families examined, schedules walked, plans replayed.

Every piece of work depends on nothing but the job, its costs and itself, so that the answer is the same
to the last byte on any number of processes.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from parsim.cost.stage import CostModel
from parsim.plan import Job
from parsim.search.examine import Examiner

MOST_PROCESSES = 8
"""Each takes up to 200 MB, and what a search leaves to do after its largest pieces is short."""

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Work = Callable[[Examiner, Item], Answer]
"""A function of a module, so that another process finds it by its name."""


@dataclass(slots=True, kw_only=True)
class Workers:
    """This process, or several that joblib starts and keeps; each remembers what it has priced."""

    job: Job
    costs: CostModel
    processes: int = 1
    _own: Examiner = field(init=False)

    def __post_init__(self) -> None:
        self._own = Examiner(self.job, self.costs)

    def answers(self, work: Work[Item, Answer], items: Sequence[Item]) -> Iterator[Answer]:
        """What the work makes of every item, in their order. Whoever stops asking stops the work."""
        if self.processes == 1 or len(items) < 2:
            return (work(self._own, item) for item in items)
        return self._spread(work, items)

    def _spread(self, work: Work[Item, Answer], items: Sequence[Item]) -> Iterator[Answer]:
        from joblib import Parallel, delayed, parallel_config

        # Bytes, so that a process knows by comparing them that it has seen this job before.
        costs = CostModel(self.costs.model, self.costs.cluster, self.costs.stack)  # nothing priced yet
        setup = pickle.dumps((self.job, costs))
        # A process that has grown ends, and another takes its place: that is no matter of the user's.
        warnings.filterwarnings("ignore", "A worker stopped", UserWarning)
        with parallel_config(backend="loky", n_jobs=self.processes, initializer=begin_process):
            parallel = Parallel(return_as="generator", batch_size=1, max_nbytes=None)
        with interrupts_held_back():
            answers = parallel(delayed(_answer)(setup, work, item) for item in items)
        try:
            for answer in answers:  # noqa: UP028 - closing it is up to what follows
                yield answer
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # it warns of work that nobody waited for
                answers.close()


def cores(most: int = MOST_PROCESSES) -> int:
    """Cores that this process may use, and one search makes use of."""
    from joblib import cpu_count

    return max(1, min(most, int(cpu_count())))


def _answer(setup: bytes, work: Work[Any, Any], item: Any) -> Any:
    return work(_examiner(setup), item)


@lru_cache(maxsize=1)
def _examiner(setup: bytes) -> Examiner:
    """This process's examiner of a job, which keeps what it has priced for the next piece of work."""
    job, costs = pickle.loads(setup)  # noqa: S301 - written above, by the process that asks
    return Examiner(job, costs)


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits until this is over, and processes that are started meanwhile never see it.

    It reaches all processes of a terminal at once: the one that the user sees stops the others, which
    may still be importing and would say so in a traceback each.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_process() -> None:
    """What a process that joblib starts does first: it watches the one that started it.

    When that has ended, however it did, it ends soon after; joblib's would wait for work for five
    minutes. (The kernel's own way, PR_SET_PDEATHSIG, goes by the thread that started it, which may well
    end before.)
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
