"""Plans and predictions from Python: `import parsim; parsim.plan(...)`, with the command line's nouns.

Names and paths are those of the command line's flags; everything else is a noun or a number. Errors are
ParsimError, with the same texts.
"""

from __future__ import annotations

from typing import Any

from parsim.config import dump_json, load_cluster, load_model
from parsim.export.timeline_json import timeline_to_data
from parsim.hardware import Cluster
from parsim.model import ModelSpec
from parsim.plan import ParallelPlan
from parsim.search.search import SearchResult, search
from parsim.search.space import Constraints
from parsim.setup import Flags, load_plan, load_setup, rank_costs
from parsim.simulate.prediction import Prediction, predict
from parsim.timeline import Timeline

__all__ = ["load_cluster", "load_model", "plan", "simulate", "to_data", "to_json"]


def plan(
    *,
    model: str | ModelSpec,
    hardware: str | Cluster,
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
        model=model, hardware=hardware, global_batch=global_batch, seq_len=seq_len, stack=stack,
        precision=precision,
    )  # fmt: skip
    setup = load_setup(flags)
    return search(
        setup.job, gpus, setup.costs(), constraints=constraints, top=top, budget_s=budget_s,
        processes=processes,
    )  # fmt: skip


def simulate(
    plan: str | ParallelPlan,
    *,
    model: str | ModelSpec | None = None,
    hardware: str | Cluster | None = None,
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
        model=model, hardware=hardware, global_batch=global_batch, seq_len=seq_len, stack=stack,
        precision=precision,
    )  # fmt: skip
    setup, noun = load_plan(plan, flags)
    by_rank = rank_costs(setup.rank_hardware, setup, flags, noun)
    return predict(setup.job, noun, setup.costs(), costs_by_rank=by_rank)


def to_data(noun: SearchResult | Prediction | Timeline) -> dict[str, Any]:
    """A noun as plain data: of a prediction a plan file's ITEM, of a search its `space` and `plans`."""
    if isinstance(noun, Prediction):
        return noun.to_item()
    if isinstance(noun, Timeline):
        return timeline_to_data(noun)
    from dataclasses import asdict

    return {
        "space": asdict(noun.space),
        "optimal": noun.optimal,
        "search_s": noun.search_s,
        "plans": [each.to_item() for each in noun.plans],
    }


def to_json(noun: SearchResult | Prediction | Timeline) -> str:
    """The JSON text of `to_data`."""
    return dump_json(to_data(noun))
