"""Many independent calls on the cores of this machine, or on a cluster of machines.

joblib hands them out to processes of its own (loky) or to a Dask cluster, Ray to its own. What one
search does on several cores is in `workers`, whose processes keep what they have priced.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import parent_process
from typing import Literal, TypeVar

from parsim.errors import ParsimError
from parsim.search.workers import begin_process, interrupts_held_back

Backend = Literal["processes", "dask", "ray"]
BACKENDS: tuple[Backend, ...] = ("processes", "dask", "ray")

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Who does the work."""

    backend: Backend = "processes"
    jobs: int = 1
    """Processes of this machine; a cluster with an address has its own number of workers."""
    address: str | None = None
    """Of a Dask scheduler or a Ray cluster that runs; None starts one on this machine."""

    def __post_init__(self) -> None:
        """Refuses what cannot be started, before anything is."""
        if self.jobs < 1:
            raise ParsimError(
                "somebody has to work", where="--jobs", got=self.jobs, expected="1 or more"
            )
        if self.backend == "processes":
            if self.address is not None:
                raise ParsimError(
                    "an address is that of a cluster",
                    where="--address",
                    got=self.address,
                    expected="with it, --backend dask or --backend ray",
                )
        elif find_spec({"dask": "distributed", "ray": "ray"}[self.backend]) is None:
            raise ParsimError(
                f"{self.backend} is not installed",
                where="--backend",
                got=self.backend,
                hint=f"pip install 'parsim[{self.backend}]'",
            )


def as_done(call: Callable[[T], R], tasks: Iterable[T], pool: Pool) -> Generator[R, None, None]:
    """`call(task)` of every task, as they are done, in no order.

    Tasks are taken as there is room for them, and no result is kept: memory does not grow with their
    number. One job works in this process. Closing the iterator ends the processes that it started.

    Raises ParsimError where a worker was killed, or a cluster does not answer.
    """
    with _cluster(pool):
        yield from _on_ray(call, tasks) if pool.backend == "ray" else _by_joblib(call, tasks, pool)


def _by_joblib(call: Callable[[T], R], tasks: Iterable[T], pool: Pool) -> Generator[R, None, None]:
    from joblib import Parallel, delayed, parallel_config
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    with parallel_config(**_backend(pool)):
        with interrupts_held_back():
            done = Parallel(return_as="generator_unordered")(
                delayed(_apart)(call, task) for task in tasks
            )
        try:
            yield from done
        except TerminatedWorkerError as error:
            raise ParsimError(
                "a worker was killed, perhaps because memory ran out",
                got=str(error).splitlines()[0],
                hint="fewer --jobs",
            ) from None
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # it warns of work that nobody waited for
                done.close()


def _on_ray(call: Callable[[T], R], tasks: Iterable[T]) -> Generator[R, None, None]:
    """The same on Ray, whose backend for joblib returns results all at once (ray 2.60)."""
    import ray

    remote = ray.remote(_apart)
    room = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    pending: list[object] = []
    for task in tasks:
        pending.append(remote.remote(call, task))
        if len(pending) == room:
            (done,), pending = ray.wait(pending)
            yield ray.get(done)
    while pending:
        (done,), pending = ray.wait(pending)
        yield ray.get(done)


def _apart(call: Callable[[T], R], task: T) -> R:
    """The call; in a process of Dask's or Ray's, too, Ctrl-C is left to the one that started it."""
    if parent_process() is not None:
        with suppress(ValueError):  # a thread of a Dask worker, which no signal reaches
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    return call(task)


def _backend(pool: Pool) -> dict[str, object]:
    """The settings of joblib's own."""
    if pool.backend == "processes":
        if pool.jobs == 1:
            return {"backend": "sequential"}
        # One thread of numpy's a process: a search has one core.
        return {
            "backend": "loky",
            "n_jobs": pool.jobs,
            "inner_max_num_threads": 1,
            "initializer": begin_process,
        }
    return {"backend": "dask", "n_jobs": -1}


@contextmanager
def _cluster(pool: Pool) -> Iterator[None]:
    """The Dask or Ray cluster, ours to end where there was none."""
    if pool.backend == "dask":
        with _dask(pool):
            yield
    elif pool.backend == "ray":
        with _ray(pool):
            yield
    else:
        yield


@contextmanager
def _dask(pool: Pool) -> Iterator[None]:
    from distributed import Client, LocalCluster

    if pool.address is not None:
        try:
            client = Client(pool.address, timeout="20s")
        except (OSError, ValueError) as error:
            raise _no_answer(pool, error) from None
        with client:
            yield
        return
    with (
        LocalCluster(n_workers=pool.jobs, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        yield


@contextmanager
def _ray(pool: Pool) -> Iterator[None]:
    import ray

    try:
        if pool.address is None:
            ray.init(num_cpus=pool.jobs, include_dashboard=False, log_to_driver=False)
        else:
            ray.init(address=pool.address, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:  # ConnectionError is an OSError
        raise _no_answer(pool, error) from None
    try:
        yield
    finally:
        ray.shutdown()


def _no_answer(pool: Pool, error: Exception) -> ParsimError:
    return ParsimError(
        f"no {pool.backend} cluster answers",
        where="--address" if pool.address else "--backend",
        got=pool.address or str(error),
        expected="tcp://HOST:8786 of a Dask scheduler"
        if pool.backend == "dask"
        else "auto, HOST:6379 or ray://HOST:10001 of a Ray cluster",
    )
