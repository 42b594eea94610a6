"""Plans and predictions from Python: `import parsim; parsim.plan(...)`, with the command line's nouns.

Names and paths are those of the command line's flags; everything else is a noun or a number. Errors are
ParsimError, with the same texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike, fspath
from typing import Any, TypeVar

from parsim.capacity_cases import GPU_MTBF, check_numbers, check_prices, read_cases, read_long_runs
from parsim.config import dump_json, load_cluster, load_model
from parsim.export.timeline_json import timeline_to_data
from parsim.hardware import Cluster
from parsim.model import ModelSpec
from parsim.plan import ParallelPlan
from parsim.search.capacities import Capacity, Wanted, find_capacity
from parsim.search.capacity import Limits
from parsim.search.capacity_data import capacity_data
from parsim.search.search import SearchResult, search
from parsim.search.space import Constraints
from parsim.setup import Flags, load_plan, load_setup, rank_costs
from parsim.simulate.prediction import Prediction, predict
from parsim.timeline import Timeline

Noun = TypeVar("Noun")
__all__ = ["capacity", "load_cluster", "load_model", "plan", "simulate", "to_data", "to_json"]


def plan(
    *,
    model: str | PathLike[str] | ModelSpec,
    hardware: str | PathLike[str] | Cluster,
    gpus: int,
    global_batch: int,
    seq_len: int | None = None,
    stack: str | None = None,
    precision: str | None = None,
    constraints: Constraints | None = None,
    top: int = 10,
    budget_s: float = 60.0,
    processes: int | None = 1,
) -> SearchResult:
    """The `top` fastest plans that fit, fastest first, as `parsim plan` finds them.

    `global_batch` is in sequences of `seq_len` tokens (default: the model's own), `budget_s` the seconds
    after which nothing more is proven; `processes` None takes one a core, in a script that is guarded by
    `if __name__ == "__main__"`.

    Raises ParsimError for bad input, and its subclass NothingFits where no plan fits.
    """
    flags = Flags(
        model=_named(model), hardware=_named(hardware), global_batch=global_batch, seq_len=seq_len,
        stack=stack, precision=precision,
    )  # fmt: skip
    setup = load_setup(flags)
    return search(
        setup.job, gpus, setup.costs(), constraints=constraints, top=top, budget_s=budget_s,
        processes=processes,
    )  # fmt: skip


def simulate(
    plan: str | PathLike[str] | ParallelPlan,
    *,
    model: str | PathLike[str] | ModelSpec | None = None,
    hardware: str | PathLike[str] | Cluster | None = None,
    global_batch: int | None = None,
    seq_len: int | None = None,
    stack: str | None = None,
    precision: str | None = None,
) -> tuple[Prediction, Timeline]:
    """One step of a plan, as `parsim simulate` replays it.

    `plan` is a noun, the short form "dp=8,tp=4", or the path of a plan file, whose model, hardware and
    job hold where nothing else is given. `global_batch` is in sequences; without one each pipeline runs
    2·pp micro-batches. A short form that does not name tp_overlap has the stack's usual one.

    Raises ParsimError for bad input and for a plan that is not legal; one that does not fit in memory is
    simulated all the same (`Prediction.fits`).
    """
    flags = Flags(
        model=_named(model), hardware=_named(hardware), global_batch=global_batch, seq_len=seq_len,
        stack=stack, precision=precision,
    )  # fmt: skip
    setup, noun = load_plan(_named(plan), flags)
    by_rank = rank_costs(setup.rank_hardware, setup, flags, noun)
    return predict(setup.job, noun, setup.costs(), costs_by_rank=by_rank)


def capacity(
    *,
    model: str | PathLike[str] | ModelSpec | Sequence[str | PathLike[str] | ModelSpec],
    hardware: str | PathLike[str] | Cluster | Sequence[str | PathLike[str] | Cluster],
    gpus: int | Sequence[int],
    tokens: int | str,
    deadline_s: float | None = None,
    budget_usd: float | None = None,
    global_batch: int | None = None,
    seq_len: int | None = None,
    stack: str | None = None,
    precision: str | None = None,
    usd_per_gpu_hour: float | None = None,
    mtbf: str = GPU_MTBF,
    pue: float | None = None,
    constraints: Constraints | None = None,
    top: int = 1,
    budget_s: float = 60.0,
    scaling: bool = False,
    sensitivity: bool = False,
) -> Capacity:
    """Days, dollars and energy of a training on each cluster, as `parsim capacity` finds them.

    `tokens` is a number, or a text such as "15T" or "20x" (a parameter); `mtbf` is the flag's text.
    `Capacity.answers` holds, by model, the options to take within `deadline_s` and `budget_usd`, the
    recommended one first.

    Raises ParsimError for bad input; clusters that no plan fits on are in `Capacity.refused`.
    """
    flags = Flags(global_batch=global_batch, seq_len=seq_len, stack=stack, precision=precision)
    limits = Limits(deadline_s=deadline_s, budget_usd=budget_usd)
    check_numbers(pue, usd_per_gpu_hour)
    several_models = [model] if isinstance(model, str | PathLike | ModelSpec) else model
    several_machines = [hardware] if isinstance(hardware, str | PathLike | Cluster) else hardware
    models = [_named(each) for each in several_models]
    machines = [_named(each) for each in several_machines]
    counts = list(gpus) if isinstance(gpus, Iterable) else [gpus]
    cases = list(read_cases(models, machines, flags, counts, tokens, usd_per_gpu_hour, {}))
    check_prices(limits, cases)
    long_run, assumed = read_long_runs(mtbf)
    wanted = Wanted(
        limits=limits, constraints=constraints or Constraints(), long_run=long_run, assumed=assumed,
        top=top, budget_s=budget_s, scaling=scaling, sensitivity=sensitivity, pue=pue,
    )  # fmt: skip
    return find_capacity(cases, wanted)


def _named(given: Noun | str | PathLike[str]) -> Noun | str:
    """A path as the text that names it; names and nouns as they are."""
    return fspath(given) if isinstance(given, PathLike) else given


def to_data(noun: SearchResult | Prediction | Timeline | Capacity) -> dict[str, Any]:
    """A noun as plain data: of a prediction a plan file's ITEM, of a search its `space` and `plans`."""
    if isinstance(noun, Prediction):
        return noun.to_item()
    if isinstance(noun, Timeline):
        return timeline_to_data(noun)
    if isinstance(noun, Capacity):
        return capacity_data(noun)
    from dataclasses import asdict

    return {
        "space": asdict(noun.space),
        "optimal": noun.optimal,
        "search_s": noun.search_s,
        "plans": [each.to_item() for each in noun.plans],
    }


def to_json(noun: SearchResult | Prediction | Timeline | Capacity) -> str:
    """The JSON text of `to_data`."""
    return dump_json(to_data(noun))
